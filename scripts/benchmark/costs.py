"""The least time of a rollout and of a whole PPO iteration, from true lengths: the floor that a run is held against."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from training.costs import DecoderShape, attended

# What AdamW reads and writes for each number that learns: float32 weight and two moments both ways, 16-bit gradient
# twice, the norm's pass included, and the 16-bit weight.
OPTIMIZER_BYTES = 30
# Of SmolLM2-135M, Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B, in the names of a Llama config.
LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"vocab_size": 49152, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {**LLAMA_3, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {**LLAMA_3, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {**LLAMA_3, "tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Cost:
    """The useful work of one phase."""

    flops: float = 0
    bytes: float = 0
    seconds: float = 0
    """The least time: each part at the rate of whichever bounds it, arithmetic or memory."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds)


def rollout_costs(
    shape: DecoderShape,
    prompt_ids: Sequence[Sequence[int]],
    response_lengths: Sequence[int],
    *,
    batch_size: int,
    number_bytes: int,
    flops_per_second: float,
    bytes_per_second: float,
) -> dict[str, Cost]:
    """The costs of a rollout without padding or repeated work, by "prefill" and "decode", one after the other.

        prefill     max(2 (N T + H D) / F, (N + H) b / W) + attention
        a step      max(2 (N + H) n / F, (N + H) b / W) + attention
        attention   max(attention FLOPs of each token over what it sees / F, bytes of keys and values / W)

    with N numbers in the body and H in the head, T tokens in D distinct prompts, n rows that decode, b bytes a number,
    F FLOP/s and W bytes/s. (A roofline for each part: Williams et al. 2009.) Lookups, norms and sampling cost nothing.

    Args:
        prompt_ids: one list for each response; equal ones are computed once.
        response_lengths: tokens of each response. The first comes from the prefill, each other one from a step.
        batch_size: rows that decode together; the next prompt takes the place of a row that has ended.
        number_bytes: of a weight, key or value.
        flops_per_second, bytes_per_second: what the machine reaches at best.

    Raises: ValueError, if a layer's window is shorter than a row.
    """
    longest = max(len(ids) + length for ids, length in zip(prompt_ids, response_lengths, strict=True))
    if any(window is not None and window < longest for window in shape.windows):
        raise ValueError("the costs of a sliding window are not known: choose a model with full attention")

    def cost(body_tokens: int, head_tokens: int, pairs: int, cached: int) -> Cost:
        matmul_flops = 2 * (shape.body * body_tokens + shape.head * head_tokens)
        weight_bytes = (shape.body + shape.head) * number_bytes
        attention_flops = shape.pair_flops * len(shape.windows) * pairs
        cache_bytes = shape.cached * cached * number_bytes
        matmul_seconds = max(matmul_flops / flops_per_second, weight_bytes / bytes_per_second)
        attention_seconds = max(attention_flops / flops_per_second, cache_bytes / bytes_per_second)
        return Cost(
            matmul_flops + attention_flops, weight_bytes + cache_bytes, seconds=matmul_seconds + attention_seconds
        )

    lengths = [len(ids) for ids in {tuple(ids) for ids in prompt_ids}]
    tokens, pairs = sum(lengths), sum(attended(length) for length in lengths)
    steps = decode_steps([len(ids) for ids in prompt_ids], response_lengths, batch_size)
    return {
        "prefill": cost(tokens, len(lengths), pairs, tokens),
        "decode": sum((cost(rows, rows, seen, seen) for rows, seen in steps), Cost()),
    }


def decode_steps(
    prompt_lengths: Sequence[int], response_lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[int, int]]:
    """For each step of continuous batching: the rows that decode, and the tokens that they see together."""
    waiting = list(zip(prompt_lengths, response_lengths, strict=True))[::-1]
    running: list[tuple[int, int]] = []  # tokens seen in the next step, the new one included, and steps left
    while waiting or running:
        admitted = [waiting.pop() for _ in range(min(batch_size - len(running), len(waiting)))]
        if running:
            yield len(running), sum(seen for seen, _ in running)
        running = [(seen + 1, left - 1) for seen, left in running if left > 1]
        running += [(prompt + 1, response - 1) for prompt, response in admitted if response > 1]


def iteration_floor(
    trained: Sequence[DecoderShape],
    frozen: Sequence[DecoderShape],
    prompt_ids: Sequence[Sequence[int]],
    response_lengths: Sequence[int],
    *,
    batch_size: int,
    number_bytes: int,
    flops_per_second: float,
    bytes_per_second: float,
    epochs: int = 1,
    optimizer_steps: int = 1,
) -> dict[str, Cost]:
    """The costs of a PPO iteration on one device, by "prefill", "decode", "score", "train" and "optimizer".

    Scoring is one forward of each model but the actor, whose log-probabilities the sampler has; training is `epochs`
    forwards and backwards of actor and critic; both take their FLOPs at the best rate. The optimizer takes 30 bytes of
    memory traffic for each number that learns.

    Args:
        trained: the actor, and the critic if there is one.
        frozen: reference and reward model, as far as there are models.
        epochs: passes over the rollout.
        optimizer_steps: of each trained model.
        prompt_ids, response_lengths, batch_size, number_bytes, flops_per_second, bytes_per_second: as for
            `rollout_costs`.
    """
    rows = [len(ids) + length for ids, length in zip(prompt_ids, response_lengths, strict=True)]
    logits = sum(response_lengths)
    actor, *critics = trained
    scoring = sum(shape.forward_flops(rows, logits) for shape in [*frozen, *critics])
    training = epochs * sum(shape.training_flops(rows, logits) for shape in trained)
    traffic = optimizer_steps * OPTIMIZER_BYTES * sum(shape.trained_parameters for shape in trained)
    return rollout_costs(
        actor,
        prompt_ids,
        response_lengths,
        batch_size=batch_size,
        number_bytes=number_bytes,
        flops_per_second=flops_per_second,
        bytes_per_second=bytes_per_second,
    ) | {
        "score": Cost(flops=scoring, seconds=scoring / flops_per_second),
        "train": Cost(flops=training, seconds=training / flops_per_second),
        "optimizer": Cost(bytes=traffic, seconds=traffic / bytes_per_second),
    }
