"""What a rollout must compute and read, counted from its true lengths: the floor that every backend is held against."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
class DecoderShape:
    """The sizes of a dense decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    """Whether the head is the embedding."""
    mlp_matrices: int
    """3 with a gate, else 2."""
    layer_vectors: int
    """Numbers in the norms and biases of one layer."""
    other_vectors: int
    """Numbers in the final norm and in learned positions."""

    @classmethod
    def of(cls, config: Any) -> "DecoderShape":
        """The sizes in a Hugging Face config.

        Raises: ValueError, if the architecture is none of those below, or some layers see a part of the text only.
        """
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        qkv = (heads + 2 * kv_heads) * head_dim
        biased = 4 * hidden + qkv + hidden + intermediate + hidden
        positions = config.max_position_embeddings * hidden
        # Norms and biases of one layer, what is outside of the layers, matrices of the MLP.
        kinds = {
            "llama": (2 * hidden, hidden, 3),
            "mistral": (2 * hidden, hidden, 3),
            "qwen2": (2 * hidden + qkv, hidden, 3),
            "qwen3": (2 * hidden + 2 * head_dim, hidden, 3),
            "gpt2": (biased, 2 * hidden + positions, 2),
            "gpt_neox": (biased, 2 * hidden, 2),
        }
        if config.model_type not in kinds:
            raise ValueError(f"the costs of {config.model_type} are not known: choose one of {', '.join(kinds)}")
        if getattr(config, "sliding_window", None) is not None:
            raise ValueError("the costs of a sliding window are not known: choose a model with full attention")
        layer_vectors, other_vectors, mlp_matrices = kinds[config.model_type]
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=intermediate,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            mlp_matrices=mlp_matrices,
            layer_vectors=layer_vectors,
            other_vectors=other_vectors,
        )

    @property
    def body(self) -> int:
        """Numbers in the matrices of all layers."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + self.mlp_matrices * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Numbers in the matrix that makes logits."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All numbers of the model."""
        embeddings = self.head if self.tied else 2 * self.head
        return self.body + embeddings + self.layers * self.layer_vectors + self.other_vectors

    @property
    def cached(self) -> int:
        """Numbers that the key-value cache holds for one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def attention_flops(self) -> int:
        """Of one token that attends to one token: a product with its key and one with its value, in all layers."""
        return 4 * self.layers * self.heads * self.head_dim


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
    """

    def cost(body_tokens: int, head_tokens: int, attended: int, cached: int) -> Cost:
        matmul_flops = 2 * (shape.body * body_tokens + shape.head * head_tokens)
        weight_bytes = (shape.body + shape.head) * number_bytes
        attention_flops, cache_bytes = shape.attention_flops * attended, shape.cached * cached * number_bytes
        matmul_seconds = max(matmul_flops / flops_per_second, weight_bytes / bytes_per_second)
        attention_seconds = max(attention_flops / flops_per_second, cache_bytes / bytes_per_second)
        return Cost(
            matmul_flops + attention_flops, weight_bytes + cache_bytes, seconds=matmul_seconds + attention_seconds
        )

    lengths = [len(ids) for ids in {tuple(ids) for ids in prompt_ids}]
    tokens, attended = sum(lengths), sum(length * (length + 1) // 2 for length in lengths)
    steps = decode_steps([len(ids) for ids in prompt_ids], response_lengths, batch_size)
    return {
        "prefill": cost(tokens, len(lengths), attended, tokens),
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
