"""What every rollout backend takes and returns: token ids in, token ids and their log-probabilities out."""

from dataclasses import dataclass
from typing import Protocol


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


@dataclass(frozen=True)
class Completion:
    """One sampled response."""

    response_ids: list[int]
    """Tokens of the response; the last one is EOS if `finished`."""
    logprobs: list[float]
    """Log-probability of each token under the distribution that it was drawn from."""
    finished: bool
    """Whether the model ended the response itself, rather than the limit."""


class Generator(Protocol):
    """A rollout backend."""

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingConfig, seeds: list[int]) -> list[Completion]:
        """One completion for each prompt, in order.

        Args:
            prompt_ids: unpadded token ids; a prompt that is to be sampled n times is given n times.
            sampling: how to draw.
            seeds: one for each prompt; what a row draws depends on its own seed and not on its neighbours.
        """
        ...
