"""Attention of one new token a row over paged keys and values, on a GPU: flash-decoding in Triton.

Dao et al. 2023, "Flash-Decoding for long-context inference": the tokens of a row are split over several programs, and a
second kernel combines what they found by their log-sum-exps. The query heads that share keys are one tile, so that each
key and value is read once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)

# Keys of one block: two blocks of keys and values leave room for three programs in a multiprocessor's shared memory.
BLOCK_BYTES = 16384
# A program alone does not keep its multiprocessor's share of the memory busy.
PROGRAMS_PER_MULTIPROCESSOR = 4
# With fewer tokens the partial results cost as much as what is split.
MIN_TOKENS_PER_SPLIT = 128
# The combining kernel holds all partial results of a head at once.
MAX_SPLITS = 64


@triton.jit
def attend_kernel(  # type: ignore[no-untyped-def]
    queries_at,
    keys_at,
    values_at,
    page_table_at,
    lengths_at,
    output_at,
    log_sums_at,
    scaling,
    query_row_stride,
    query_head_stride,
    query_dim_stride,
    page_stride,
    token_stride,
    kv_head_stride,
    table_stride,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    BOUND: tl.constexpr,
):
    """One split of one row, for the query heads of one key head; every exponential and logarithm is to base 2.

    A block lies within one page and holds at least one token that the row sees, so no other page number is read.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.arange(0, GROUP_TILE)
    dim = tl.arange(0, DIM_TILE)
    head = kv_head * GROUP + member
    inside = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    places = row * query_row_stride + head[:, None] * query_head_stride + dim[None, :] * query_dim_stride
    queries = tl.load(queries_at + places, mask=inside, other=0.0)

    length = tl.load(lengths_at + row)
    first = 0
    if SLIDING_WINDOW is not None:
        first = tl.maximum(length - SLIDING_WINDOW, 0)
    blocks = (length + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    first_block = first // BLOCK_TOKENS
    blocks_per_split = (blocks - first_block + SPLITS - 1) // SPLITS
    start = first_block + split * blocks_per_split
    end = tl.minimum(start + blocks_per_split, blocks)

    largest = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_TILE], tl.float32)
    attended = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)
    for block in range(start, end):
        token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        seen = (token >= first) & (token < length)
        # 64 bits: a pool may hold more than 2^31 numbers.
        page = tl.load(page_table_at + row * table_stride + block * BLOCK_TOKENS // PAGE_TOKENS).to(tl.int64)
        memory = page * page_stride + kv_head * kv_head_stride
        memory += (token % PAGE_TOKENS)[:, None] * token_stride + dim[None, :]
        # Memory that nothing was written to may hold nan, and 0 * nan is nan.
        readable = seen[:, None] & (dim < HEAD_DIM)[None, :]
        keys = tl.load(keys_at + memory, mask=readable, other=0.0)
        products = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling
        if BOUND is not None:
            products = BOUND * (1.0 - 2.0 / (tl.exp2(products) + 1.0))
        products = tl.where(seen[None, :], products, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(products, 1))
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(products - new_largest[:, None])
        values = tl.load(values_at + memory, mask=readable, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        attended = attended * shrink[:, None]
        attended = tl.dot(weights.to(values.dtype), values, attended, input_precision="ieee")
        largest = new_largest

    # Without tokens: zeros, whose log-sum-exp is minus infinity.
    divisor = tl.where(total > 0, total, 1.0)
    attended = attended / divisor[:, None]
    slot = (row * tl.num_programs(1) * GROUP + head) * SPLITS + split
    places = slot[:, None] * HEAD_DIM + dim[None, :]
    tl.store(output_at + places, attended.to(output_at.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        tl.store(log_sums_at + slot, largest + tl.log2(divisor), mask=member < GROUP)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    partial_at, log_sums_at, output_at, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, SPLITS: tl.constexpr
):
    """The mean of a head's splits, weighted by the exponentials of their log-sums."""
    head = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM_TILE)
    log_sums = tl.load(log_sums_at + head * SPLITS + split)
    largest = tl.max(log_sums, 0)
    weights = tl.exp2(log_sums - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    places = (head * SPLITS + split)[:, None] * HEAD_DIM + dim[None, :]
    partial = tl.load(partial_at + places, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    combined = tl.sum(partial * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(output_at + head * HEAD_DIM + dim, combined.to(output_at.dtype.element_ty), mask=dim < HEAD_DIM)


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    splits: int | None = None,
) -> Tensor:
    """Attend from each row's newest token to the tokens of its row.

    Nothing is read on the host, and what is launched depends on shapes alone: a CUDA graph may hold it, once it has run
    outside of one. A row's result depends on that row and on `splits`, to the bit.

    Args:
        query: [rows, heads, head_dim], of any strides; head_dim a multiple of 8, at most 256.
        key_pages, value_pages: [pages, page_tokens, kv_heads, head_dim] in query's dtype and of equal strides, the last
            one 1; page_tokens a power of 2, at least 16. What no row sees may hold anything.
        page_table: [rows, max_pages] int32, the pages of each row in order; what is behind a row's last page, or before
            the first one of its sliding window, is not read.
        lengths: [rows] int32, tokens that a row sees, the newest one included; 0 gives zeros.
        scaling: of the products of queries and keys; None for 1 / sqrt(head_dim).
        sliding_window: how many of the newest tokens are seen, the own one included; None for all.
        softcap: bound of the scaled products, softcap * tanh(product / softcap); None for none.
        splits: programs that share the tokens of one row and key head, a power of 2; None for `choose_splits`.

    Returns: [rows, heads, head_dim] in query's dtype; sums are float32.
    """
    rows, heads, head_dim = query.shape
    page_tokens, kv_heads = key_pages.shape[1:3]
    assert head_dim % 8 == 0 and head_dim <= 256
    assert page_tokens >= 16 and page_tokens & (page_tokens - 1) == 0
    assert key_pages.dtype == value_pages.dtype == query.dtype
    assert key_pages.shape == value_pages.shape and key_pages.shape[3] == head_dim
    assert key_pages.stride() == value_pages.stride() and key_pages.stride(3) == 1
    assert page_table.stride(1) == 1 and lengths.stride(0) == 1
    if splits is None:
        splits = choose_splits(rows, kv_heads, page_table.shape[1] * page_tokens, num_multiprocessors(query.device))
    if scaling is None:
        scaling = head_dim**-0.5
    output = query.new_empty(rows, heads, head_dim)
    partial, log_sums = output, output
    if splits > 1:
        partial = query.new_empty(rows, heads, splits, head_dim, dtype=torch.float32)
        log_sums = query.new_empty(rows, heads, splits, dtype=torch.float32)
    constants, options = attend_constants(heads // kv_heads, head_dim, page_tokens, query.element_size())
    attend_kernel[(rows, kv_heads, splits)](
        query,
        key_pages,
        value_pages,
        page_table,
        lengths,
        partial,
        log_sums,
        # exp(x) is exp2(x log2 e), and tanh(x) is 1 - 2 / (exp(2x) + 1).
        scaling * LOG2_E * (1.0 if softcap is None else 2.0 / softcap),
        *query.stride(),
        *key_pages.stride()[:3],
        page_table.stride(0),
        **constants,
        SPLITS=splits,
        SLIDING_WINDOW=sliding_window,
        BOUND=None if softcap is None else softcap * LOG2_E,
        **options,
    )
    if splits > 1:
        constants, options = combine_constants(head_dim, splits)
        combine_kernel[(rows * heads,)](partial, log_sums, output, **constants, **options)
    return output


def choose_splits(rows: int, kv_heads: int, max_tokens: int, multiprocessors: int) -> int:
    """The smallest power of 2 that gives every multiprocessor enough programs.

    No more than leaves each split enough of `max_tokens`, the most that a row can hold. A shorter row is divided into
    as many splits of fewer tokens.
    """
    wanted = math.ceil(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / (rows * kv_heads))
    most = max(1, min(MAX_SPLITS, max_tokens // MIN_TOKENS_PER_SPLIT))
    return min(next_power_of_2(wanted), next_power_of_2(most + 1) // 2)


def attend_constants(
    group: int, head_dim: int, page_tokens: int, number_bytes: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of tiles and launch options of `attend_kernel`, for `group` query heads to a key head."""
    dim_tile = max(16, next_power_of_2(head_dim))
    block_tokens = min(page_tokens, max(16, min(128, BLOCK_BYTES // (dim_tile * number_bytes))))
    constants = {
        "GROUP": group,
        "GROUP_TILE": max(16, next_power_of_2(group)),  # the smallest tile of a matrix product
        "HEAD_DIM": head_dim,
        "DIM_TILE": dim_tile,
        "PAGE_TOKENS": page_tokens,
        "BLOCK_TOKENS": block_tokens,
    }
    # Page numbers are read a step ahead of their keys: with 5 stages the pipeline holds two blocks, with 4 only one.
    # Exact float32 products take no tensor cores, and more registers than 4 warps have.
    return constants, {"num_warps": 8 if number_bytes == 4 else 4, "num_stages": 5}


def combine_constants(head_dim: int, splits: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of tiles and launch options of `combine_kernel`."""
    constants = {"HEAD_DIM": head_dim, "DIM_TILE": next_power_of_2(head_dim), "SPLITS": splits}
    return constants, {"num_warps": 4}


def num_multiprocessors(device: torch.device) -> int:
    """1 where Triton's interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
