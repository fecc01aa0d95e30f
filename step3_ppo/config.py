"""Options of step 3."""

from dataclasses import dataclass, field
from typing import Literal

from training.advantages import ADVANTAGE_ESTIMATORS, CRITIC_FREE
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
from training.generation.interface import SamplingConfig
from training.rewards import KL_ESTIMATORS


@dataclass(frozen=True, kw_only=True)
class CriticConfig(ModelConfig):
    """The critic: a scalar head on any causal language model with the actor's tokenizer."""

    path: str = ""
    """Hub name or folder; empty takes the reward model, or the actor with a head of zeros where a function scores."""

    def __post_init__(self) -> None:
        """An empty path has a meaning here."""


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(ModelConfig):
    """Where scores come from: a reward model, or a Python function."""

    path: str = ""
    """Folder of a reward model, as step 2 writes it. Empty if `function` gives the score."""
    function: str | None = None
    """`module:function` called as f(prompts, responses, records) -> list of scores: lists of texts, and the records
    that the prompts were read from. For tasks whose answers can be checked."""
    function_minutes: float = 10.0
    """How long one call of `function` may take before the run ends with an error."""
    function_early: bool = False
    """Call `function` with responses as they end, while others are still drawn. It must score each by itself, since it
    is called with a few at a time, and gains where it waits for something: a service, or programs that it starts."""
    retokenize: bool = False
    """Decode responses and tokenize them again for a reward model with another tokenizer."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.function):
            raise ValueError("give either path, the folder of a reward model, or function, which computes the score")
        if self.function is not None and self.function.count(":") != 1:
            raise ValueError(f"function is {self.function}: write module:function, as in scripts.my_task:score")
        check_positive(self, "function_minutes")
        if self.function_early and self.function is None:
            raise ValueError("function_early is True, but there is no function: give one, or leave function_early out")
        if self.lora.rank > 0:
            raise ValueError("lora.rank is not 0, but the reward model is not trained here: leave it out")


@dataclass(frozen=True, kw_only=True)
class KlConfig:
    """The penalty that keeps the actor near the reference."""

    coefficient: float = 0.05
    """Score given up per nat of KL. Small values let the actor drift into text that only the reward model likes."""
    estimator: str = "k1"
    """k1, k2 or k3 (Schulman 2020, "Approximating KL divergence")."""
    adaptive: bool = False
    """Move the coefficient so that the KL of a response stays near `target` (Ziegler et al. 2019, section 2.2)."""
    target: float = 6.0
    """Nats per response, for `adaptive`."""
    horizon: int = 10_000
    """Responses over which an adaptive coefficient changes noticeably."""
    loss_coefficient: float = 0.0
    """Weight of a KL term in the loss itself (k2, whose gradient is that of the KL), beside that in the reward."""

    def __post_init__(self) -> None:
        if self.estimator not in KL_ESTIMATORS:
            raise ValueError(f"estimator is {self.estimator}: choose one of {', '.join(KL_ESTIMATORS)}")
        check_range(self, "coefficient", "loss_coefficient", low=0)
        if self.adaptive and (self.coefficient <= 0 or self.target <= 0 or self.horizon <= 0):
            raise ValueError("adaptive is True, which needs coefficient, target and horizon above 0")


@dataclass(frozen=True, kw_only=True)
class PtxConfig:
    """Pretraining mix: the loss of step 1 beside that of PPO (Ouyang et al. 2022, eq. 2)."""

    coefficient: float = 0.0
    """Weight of the loss on demonstrations; 0 leaves it out."""
    paths: tuple[str, ...] = ()
    """Files of demonstrations, as in step 1."""
    format: str = "prompt_response"
    """How a record becomes a demonstration."""

    def __post_init__(self) -> None:
        check_range(self, "coefficient", low=0)
        if self.coefficient > 0 and not self.paths:
            raise ValueError("coefficient is above 0: give the demonstrations in paths")


@dataclass(frozen=True, kw_only=True)
class PpoRunConfig(RunConfig):
    """As in the other steps; a step of `log_every` and `eval_every` is an iteration."""

    log_every: int = 1
    """Iterations between two lines of metrics."""


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """Reinforcement learning from a score: PPO with a critic, or an estimator that needs none."""

    actor: ModelConfig
    data: DataConfig
    run: PpoRunConfig
    reward: RewardModelConfig
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference_path: str | None = None
    """Hub name or folder that the KL is measured from; None takes the actor as it starts."""
    share_base: bool = False
    """Keep one copy of the frozen weights for actor, critic and reward model, which then differ in adapters and heads
    alone: a third of the memory for weights. `actor.path` is a whole model, and the reward model what step 2 trained
    on that very model with lora.rank above 0. The critic goes on with the reward model's adapters, in place of new
    ones on top of them; scoring takes a little longer, as the reward model's adapters stay apart from its weights."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    actor_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6, schedule="linear", eps=1e-5))
    critic_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-6, schedule="linear", eps=1e-5))
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)

    iterations: int = 100
    """Rollouts, each with its updates."""
    rollout_batch_size: int = 64
    """Prompts of one iteration, over all GPUs."""
    samples_per_prompt: int = 1
    """Responses to each prompt; estimators without a critic compare them with each other and need at least 2."""
    generator: Literal["native", "hf"] = "native"
    """Rollout backend: native decodes on the training weights with its own cache and lets a waiting prompt take the
    place of a row that ends; hf uses the Hugging Face model's cache and serves what native cannot."""
    generation_batch_size: int = 64
    """Responses decoded together on one GPU. Memory for keys and values grows with it."""
    kv_cache_gib: float | None = None
    """Memory for keys and values on one GPU, for the native backend: responses that do not fit wait for others to
    end. None for as much as `generation_batch_size` needs."""
    keep_kv_cache: bool = True
    """Hold that memory between rollouts, for the native backend. Without it the updates have more memory, and each
    rollout takes it anew and captures its CUDA graphs anew."""
    ppo_epochs: int = 1
    """Passes over each rollout. More learn more from a sample and move further from where it was drawn."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """What ratios and KL compare with: the actor's forward over each rollout, or the sampler's own log-probabilities,
    which saves that forward and brings the sampler's rounding into both. With a single update for each rollout, the
    ratio's base is then the update's own forward."""
    train_batch_size: int = 64
    """Responses of one optimizer step, over all GPUs."""
    micro_batch_size: int = 8
    """Responses of one forward on one GPU. Memory for activations grows with it; results do not change."""
    micro_batch_tokens: int | None = None
    """Most tokens of one forward on one GPU, in place of `micro_batch_size`: responses of like length are computed
    together, and every GPU gets about as many tokens. Results do not change."""

    estimator: str = "gae"
    """How advantages are estimated: gae, monte_carlo or td with the critic; grpo, rloo or reinforce_pp without."""
    gamma: float = 1.0
    """Discount per token; 1 for whole responses."""
    lam: float = 0.95
    """GAE's lambda: 0 trusts the critic, 1 the rewards."""
    whiten_rewards: bool = False
    """Divide rewards by their deviation over all ranks; their mean stays."""
    whiten_advantages: bool = True
    """Give advantages mean 0 and deviation 1 over all ranks."""
    score_clip: float | None = None
    """Bound the score to +- this, in the reward model's units."""
    missing_eos_score: float | None = None
    """Score of a response that did not end within the limit; None leaves the reward model's."""
    clip_low: float = 0.2
    """The policy's ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The policy's ratio is clipped at 1 + clip_high; above clip_low leaves rare tokens room (Yu et al. 2025)."""
    dual_clip: float | None = None
    """Bound of the loss where the advantage is negative, usually 3 (Ye et al. 2020)."""
    max_importance_weight: float | None = None
    """Weigh each token's advantage by how much likelier the trainer finds it than the sampler did, up to this, usually
    2. Corrects for sampling in other arithmetic, see `rollout/logprob_gap`. None for no weights."""
    value_clip: float | None = 0.2
    """The critic may move this far from its old value, in units of the return; None for no bound."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus; above 0 the entropy over the vocabulary is computed and logged."""
    target_kl: float | None = None
    """Leave the rest of an iteration's updates when the KL to the sampling policy passes 1.5 x this (nats/token)."""
    critic_warmup_iterations: int = 0
    """First iterations in which only the critic learns."""
    ema_decay: float = 0.0
    """Keep a moving average of the actor and save that; 0 for none, 0.992 in InstructGPT. Held-out numbers stay those
    of the actor itself."""
    samples_shown: int = 64
    """Held-out responses written to samples.jsonl, before and after."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            "iterations",
            "rollout_batch_size",
            "samples_per_prompt",
            "generation_batch_size",
            "ppo_epochs",
            "score_clip",
            "value_clip",
            "target_kl",
            "kv_cache_gib",
        )
        check_range(self, "clip_low", "clip_high", "entropy_coefficient", "critic_warmup_iterations", low=0)
        check_range(self, "dual_clip", "max_importance_weight", low=1)
        if self.estimator not in ADVANTAGE_ESTIMATORS:
            raise ValueError(f"estimator is {self.estimator}: choose one of {', '.join(ADVANTAGE_ESTIMATORS)}")
        if self.estimator in ("grpo", "rloo") and self.samples_per_prompt < 2:
            raise ValueError(f"{self.estimator} compares responses to one prompt: set samples_per_prompt to 2 or more")
        check_range(self, "gamma", "lam", low=0, high=1)
        check_range(self, "ema_decay", low=0, high=0.999999)
        for name, model in (("actor", self.actor), ("critic", self.critic)):
            if model.lora.dropout > 0:
                raise ValueError(
                    f"{name}.lora.dropout is {model.lora.dropout}: PPO compares forwards of the same weights, which "
                    "dropout makes differ; set it to 0"
                )
        if self.generator == "hf" and self.kv_cache_gib is not None:
            raise ValueError("kv_cache_gib limits the native backend, but generator is hf: lower generation_batch_size")
        if self.generator == "hf" and not self.keep_kv_cache:
            raise ValueError("keep_kv_cache is False, but generator is hf, which keeps nothing: leave it out")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: greedy responses leave nothing to explore; 1 is usual")
        if self.old_logprobs == "rollout" and self.sampling.restricted:
            raise ValueError(
                "old_logprobs is rollout, but top_k, top_p or min_new_tokens makes the sampler draw from another "
                "distribution than the one that is trained: set it to recompute"
            )
        if self.old_logprobs == "rollout" and self.max_importance_weight is not None:
            raise ValueError(
                "max_importance_weight compares the sampler with the actor's own forward, which old_logprobs rollout "
                "saves: set that to recompute, or leave the weights out"
            )
        if self.responses % self.train_batch_size:
            raise ValueError(
                f"an iteration has rollout_batch_size x samples_per_prompt = {self.responses} responses, which "
                f"train_batch_size ({self.train_batch_size}) does not divide: choose one that does"
            )
        if not self.uses_critic and self.critic_warmup_iterations:
            raise ValueError(f"{self.estimator} has no critic: set critic_warmup_iterations to 0")
        if self.critic_warmup_iterations >= self.iterations:
            raise ValueError(
                f"critic_warmup_iterations is {self.critic_warmup_iterations} of {self.iterations} iterations, so the "
                "actor would never be trained: choose fewer"
            )
        if self.share_base:
            self._check_sharing()
        check_format(self.data.format, "prompt")
        check_held_out(self.data)
        check_micro_batch_tokens(self.micro_batch_tokens, self.data.max_prompt_tokens + self.sampling.max_new_tokens)
        self.check_ranks(num_processes())

    def _check_sharing(self) -> None:
        trained = [("actor", self.actor)] + ([("critic", self.critic)] if self.uses_critic else [])
        for name, model in trained:
            if model.lora.rank == 0:
                raise ValueError(
                    f"share_base is True, but {name}.lora.rank is 0, which trains the weights that were to be shared: "
                    f"set {name}.lora.rank, or leave share_base out"
                )
        if self.engine.zero_stage == 3:
            raise ValueError(
                "share_base is True, but engine.zero_stage is 3, which splits the weights of each model over the GPUs: "
                "set zero_stage to 2, or leave share_base out"
            )
        if not self.uses_critic and self.reward.function is not None:
            raise ValueError(
                f"share_base is True, but {self.estimator} has no critic and reward.function needs no model, so the "
                "actor has nobody to share with: leave share_base out"
            )

    @property
    def responses(self) -> int:
        """Responses of one iteration, over all GPUs."""
        return self.rollout_batch_size * self.samples_per_prompt

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps of one iteration, unless `target_kl` ends it early."""
        return self.ppo_epochs * (self.responses // self.train_batch_size)

    @property
    def uses_critic(self) -> bool:
        return self.estimator not in CRITIC_FREE

    def check_ranks(self, world_size: int) -> None:
        """Refuse batch sizes that do not divide among `world_size` processes."""
        check_batch_sizes(self.train_batch_size, self.micro_batch_size, world_size, self.micro_batch_tokens)
