"""Where a run is, between any two optimizer steps, beside its engines."""

from dataclasses import asdict, dataclass, field
from typing import Any

from step3_ppo.config import PpoConfig
from step3_ppo.ema import MovingAverage
from step3_ppo.evaluate import Sample
from step3_ppo.ppo import Updates
from step3_ppo.rollout import Experience
from training.checkpoint import RunState
from training.data import Batch
from training.distributed import device
from training.rewards import AdaptiveKLController, FixedKLController

KLController = FixedKLController | AdaptiveKLController
AVERAGE = "average/"


@dataclass
class Progress:
    """What a run that goes on must know."""

    controller: KLController
    iteration: int = 0
    """Iterations that are over."""
    experience: Experience | None = None
    """What the iteration under way learns from; None before its rollout."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of that rollout."""
    updates: Updates = field(default_factory=Updates)
    """Those of this iteration so far."""
    actor_steps: int = 0
    """Optimizer steps of the actor in the iterations that are over."""
    before: list[Sample] = field(default_factory=list)
    """Held-out responses before the first update."""

    @classmethod
    def restored(cls, saved: RunState, config: PpoConfig, average: MovingAverage | None) -> "Progress":
        """The progress at a checkpoint, whose moving average is put back; that of a new run if nothing was saved."""
        result = cls(kl_controller(config))
        if not saved.values:
            return result
        values = dict(saved.values["progress"])
        result.controller.coefficient = values.pop("kl_coefficient")
        result.updates = Updates(**values.pop("updates"))
        result.before = [Sample(**sample) for sample in values.pop("before")]
        for name, value in values.items():
            setattr(result, name, value)
        rest: dict[str, Any] = {
            name: value.to(device()) for name, value in saved.tensors.items() if not name.startswith(AVERAGE)
        }
        if rest:
            parts = (rest.pop(name) for name in ("input_ids", "attention_mask", "response_mask"))
            result.experience = Experience(batch=Batch(*parts), **({"old_values": None} | rest))
        if average is not None:
            average.restore({name.removeprefix(AVERAGE): value for name, value in saved.tensors.items()})
        return result

    def state(self, average: MovingAverage | None, metric: float | None, **values: Any) -> RunState:
        """What `restored` reads, beside `values`. Every rank must call this."""
        progress = {
            "kl_coefficient": self.controller.coefficient,
            "updates": asdict(self.updates),
            "before": [asdict(sample) for sample in self.before],
            "iteration": self.iteration,
            "metrics": self.metrics,
            "actor_steps": self.actor_steps,
        }
        tensors = {} if self.experience is None else self.experience.tensors()
        if average is not None:
            tensors |= {AVERAGE + name: value for name, value in average.whole_weights().items()}
        return RunState(self.iteration, values | {"progress": progress}, tensors, metric)

    def end_iteration(self, responses: int) -> None:
        """Count an iteration, whose updates are over."""
        self.controller.update(self.metrics["rollout/kl"], responses)
        self.actor_steps += self.updates.actor_steps
        self.iteration += 1
        self.experience, self.metrics, self.updates = None, {}, Updates()


def kl_controller(config: PpoConfig) -> KLController:
    if config.kl.adaptive:
        return AdaptiveKLController(config.kl.coefficient, config.kl.target, config.kl.horizon)
    return FixedKLController(config.kl.coefficient)
