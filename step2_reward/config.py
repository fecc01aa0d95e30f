"""Options of step 2."""

from dataclasses import dataclass, field

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
    check_range,
    num_processes,
)
from training.formats import check_format


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Training of a pairwise reward model."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))

    epochs: float = 1.0
    """Passes over the preferences. More than one overfits (Ouyang et al. 2022, appendix C.2)."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, even if `epochs` are not over."""
    train_batch_size: int = 64
    """Preferences of one optimizer step, over all GPUs."""
    micro_batch_size: int = 8
    """Preferences of one forward on one GPU; each has 2 sequences, or k for a ranking. Memory grows with it."""
    micro_batch_tokens: int | None = None
    """Most tokens of one forward on one GPU, in place of `micro_batch_size`: preferences of like length are computed
    together, and every GPU gets about as many tokens. Results do not change."""
    centring: float = 0.0
    """Weight of (chosen + rejected score)^2, which keeps scores around 0 (Eisenstein et al. 2023); 0.01 is usual."""
    use_margins: bool = False
    """Ask chosen to beat rejected by the `margin` of the record (Touvron et al. 2023, eq. 2)."""
    normalize: bool = True
    """After training, scale the scores to mean 0 and deviation 1 over the held-out responses."""

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "max_steps")
        check_format(self.data.format, "preference")
        check_held_out(self.data)
        check_micro_batch_tokens(self.micro_batch_tokens, 2 * self.data.longest)
        self.check_ranks(num_processes())
        check_range(self, "centring", low=0)

    def check_ranks(self, world_size: int) -> None:
        """Refuse batch sizes that do not divide among `world_size` processes."""
        check_batch_sizes(self.train_batch_size, self.micro_batch_size, world_size, self.micro_batch_tokens)
