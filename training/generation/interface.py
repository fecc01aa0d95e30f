"""What every rollout backend takes and returns: token ids in, token ids and their log-probabilities out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn."""

    max_new_tokens: int = 256
    """Longest response in tokens, EOS included. Time and memory of a rollout grow with it."""
    min_new_tokens: int = 0
    """EOS cannot be drawn before this many tokens."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in every log-probability of training. 0 takes the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 draws from all. Anything but 0 makes the sampled distribution differ
    from the one that PPO trains."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this probability; 1 draws from all. See `top_k`."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, as EOS does. Each is tokenized by itself and compared token by token."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: a response needs at least 1 token")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}: choose from 0 to max_new_tokens ({self.max_new_tokens})"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: choose 0 (greedy) or more, 1 for the model's own")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: choose 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: choose above 0, up to 1 (off)")

    @property
    def restricted(self) -> bool:
        """Whether some tokens that the model gives a probability can never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_new_tokens > 0


@dataclass(frozen=True)
class Completion:
    """One sampled response."""

    response_ids: list[int]
    """Tokens of the response; if `finished`, the last one is EOS or the end of a stop sequence."""
    logprobs: list[float]
    """Log-probability of each token under the distribution that it was drawn from."""
    finished: bool
    """Whether the model ended the response itself, rather than the limit."""


@dataclass(frozen=True)
class Endings:
    """What ends a response, beside its limit."""

    eos_ids: frozenset[int]
    stop_sequences: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, eos_ids: Sequence[int], stop_sequences: Sequence[Sequence[int]] = ()) -> "Endings":
        """Raises: ValueError, if a stop sequence is empty: it would end every response."""
        if any(len(sequence) == 0 for sequence in stop_sequences):
            raise ValueError("a stop sequence has no tokens: leave it out")
        return cls(frozenset(eos_ids), tuple(map(tuple, stop_sequences)))


OnFinish = Callable[[Sequence[int], Sequence[Completion]], None]


class Generator(Protocol):
    """A rollout backend."""

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        limits: Sequence[int] | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in order.

        Args:
            prompt_ids: unpadded token ids; a prompt that is to be sampled n times is given n times.
            sampling: how to draw.
            seeds: one for each prompt; what a row draws depends on its own seed and not on its neighbours.
            limits: longest response to each prompt, at most `sampling.max_new_tokens`, which is the limit if None.
            on_finish: called with the numbers of prompts whose responses have just ended, and with those.

        Raises:
            ValueError: a prompt is empty, or with its response exceeds the model's positions.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers about the last call, for the log."""
        ...

    def sleep(self) -> None:
        """Give back the memory that is kept between calls; the next call takes it again."""
        ...


def checked_limits(
    prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, limits: Sequence[int] | None, module: Any
) -> Sequence[int]:
    """The longest response to each prompt of `Generator.generate`, whose errors it raises."""
    room = max_positions(module)
    if limits is None:
        limits = [sampling.max_new_tokens] * len(prompt_ids)
    for number, (ids, limit) in enumerate(zip(prompt_ids, limits, strict=True)):
        if not 1 <= limit <= sampling.max_new_tokens:
            raise ValueError(f"the limit of prompt {number} is {limit}: choose 1 to {sampling.max_new_tokens}")
        if not ids:
            raise ValueError(f"prompt {number} has no tokens: a response needs at least one to follow")
        if room is not None and len(ids) + limit > room:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens and its response up to {limit}, but the model reads at most "
                f"{room}: lower data.max_prompt_tokens or sampling.max_new_tokens"
            )
    return limits


def max_positions(module: Any) -> int | None:
    """Tokens that a causal LM can read at once, where its configuration says so."""
    return getattr(getattr(module, "config", None), "max_position_embeddings", None)
