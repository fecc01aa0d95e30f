"""Options of step 1."""

from dataclasses import dataclass, field
from typing import Literal

from training.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    check_batch_sizes,
    check_held_out,
    check_micro_batch_tokens,
    check_positive,
    num_processes,
)
from training.formats import check_format


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning of a causal language model on demonstrations."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))

    loss_on: Literal["response", "all"] = "response"
    """Learn the response tokens only, or those of the prompt as well."""
    epochs: float = 1.0
    """Passes over the demonstrations. More than about 3 repeats them by heart."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, even if `epochs` are not over."""
    train_batch_size: int = 64
    """Sequences of one optimizer step, over all GPUs."""
    micro_batch_size: int = 8
    """Sequences of one forward on one GPU. Memory for activations grows with it; results do not change."""
    micro_batch_tokens: int | None = None
    """Most tokens of one forward on one GPU, in place of `micro_batch_size`: sequences of like length are computed
    together, and every GPU gets about as many tokens. Results do not change."""

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "max_steps")
        check_format(self.data.format, "demonstration")
        check_held_out(self.data)
        check_micro_batch_tokens(self.micro_batch_tokens, self.data.longest)
        self.check_ranks(num_processes())

    def check_ranks(self, world_size: int) -> None:
        """Refuse batch sizes that do not divide among `world_size` processes."""
        check_batch_sizes(self.train_batch_size, self.micro_batch_size, world_size, self.micro_batch_tokens)
