"""From logits to a token and its log-probability, on a GPU: the logits are read once, in Triton."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)

# Tokens that are summed up together; only the block that a draw falls into is looked at token by token.
BLOCK = 256
# Blocks of one program: 8 KB of bf16 logits.
BLOCKS_PER_PROGRAM = 16


@triton.jit
def summarize_kernel(  # type: ignore[no-untyped-def]
    logits_at,
    largest_at,
    sums_at,
    scale,
    row_stride,
    vocab,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
):
    """Each block's largest logit, and its sum of 2^((logit - largest) * scale)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS_PER_PROGRAM + tl.arange(0, BLOCKS_PER_PROGRAM)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logits = tl.load(logits_at + row * row_stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    largest = tl.max(logits, 1)
    # Where nothing can be drawn: -inf less itself would be nan.
    subtracted = tl.where(largest == float("-inf"), 0.0, largest)
    sums = tl.sum(tl.exp2((logits - subtracted[:, None]) * scale), 1)
    tl.store(largest_at + row * blocks + block, largest, mask=block < blocks)
    tl.store(sums_at + row * blocks + block, sums, mask=block < blocks)


@triton.jit
def draw_kernel(  # type: ignore[no-untyped-def]
    logits_at,
    largest_at,
    sums_at,
    uniforms_at,
    tokens_at,
    logprobs_at,
    scale,
    temperature,
    row_stride,
    vocab,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS_TILE: tl.constexpr,
):
    """One row: the block that the draw falls into, then the token within it."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS_TILE)
    block_largest = tl.load(largest_at + row * blocks + block, mask=block < blocks, other=float("-inf"))
    sums = tl.load(sums_at + row * blocks + block, mask=block < blocks, other=0.0)
    largest = tl.max(block_largest, 0)
    sums = (sums * tl.exp2((block_largest - largest) * scale)).to(tl.float64)
    total = tl.sum(sums, 0)
    threshold = tl.load(uniforms_at + row).to(tl.float64) * total
    # Where rounding keeps the running sum below the threshold: the last block with any weight.
    last = tl.max(tl.where(sums > 0, block, 0), 0)
    chosen = tl.minimum(tl.sum((tl.cumsum(sums, 0) <= threshold).to(tl.int32), 0), last)
    threshold = tl.maximum(threshold - tl.sum(tl.where(block < chosen, sums, 0.0), 0), 0.0)

    member = tl.arange(0, BLOCK)
    token = chosen * BLOCK + member
    logits = tl.load(logits_at + row * row_stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    weights = tl.exp2((logits - largest) * scale).to(tl.float64)
    last = tl.max(tl.where(weights > 0, member, 0), 0)
    place = tl.minimum(tl.sum((tl.cumsum(weights, 0) <= threshold).to(tl.int32), 0), last)
    logit = tl.sum(tl.where(member == place, logits, 0.0), 0)
    tl.store(tokens_at + row, (chosen * BLOCK + place).to(tl.int64))
    tl.store(logprobs_at + row, (logit - largest) / temperature - tl.log(total.to(tl.float32)))


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    The tokens are those of `sampler.sample_tokens` without top_k and top_p, unless a row's uniform lies within 1e-6 of
    where one token ends and the next begins: block sums are float32, in another order. The sums over blocks and within
    the chosen one are float64. A token of logit -inf is never drawn. Nothing is read on the host, so a CUDA graph may
    hold it, once it has run outside of one.

    Args:
        logits: [rows, vocab] bf16 or float32, each row contiguous; minus infinity where a token may not be drawn.
        uniforms: [rows] float32 in [0, 1), one random number per row; 1 draws the last token that may be drawn.
        temperature: above 0.

    Returns: tokens [rows] long and log-probabilities [rows] float32 under the distribution that was sampled.
    """
    assert logits.stride(1) == 1 and uniforms.stride(0) == 1
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, BLOCK)
    largest = logits.new_empty(rows, blocks, dtype=torch.float32)
    sums = torch.empty_like(largest)
    tokens = logits.new_empty(rows, dtype=torch.long)
    logprobs = logits.new_empty(rows, dtype=torch.float32)
    scale = LOG2_E / temperature
    constants, options = summarize_constants()
    summarize_kernel[(rows, triton.cdiv(blocks, BLOCKS_PER_PROGRAM))](
        logits, largest, sums, scale, logits.stride(0), vocab, blocks, **constants, **options
    )
    constants, options = draw_constants(vocab)
    draw_kernel[(rows,)](
        logits,
        largest,
        sums,
        uniforms,
        tokens,
        logprobs,
        scale,
        temperature,
        logits.stride(0),
        vocab,
        blocks,
        **constants,
        **options,
    )
    return tokens, logprobs


def summarize_constants() -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of tiles and launch options of `summarize_kernel`."""
    return {"BLOCK": BLOCK, "BLOCKS_PER_PROGRAM": BLOCKS_PER_PROGRAM}, {"num_warps": 4}


def draw_constants(vocab: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of tiles and launch options of `draw_kernel`."""
    return {"BLOCK": BLOCK, "BLOCKS_TILE": triton.next_power_of_2(triton.cdiv(vocab, BLOCK))}, {"num_warps": 4}
