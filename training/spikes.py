"""Numbers of a run that jump: a person who looks the next morning should be told at which step."""

import math
import statistics
from collections import deque
from collections.abc import Mapping

WATCHED = (
    *("train/loss", "train/grad_norm", "ppo/value_loss", "ppo/actor_grad_norm", "ppo/critic_grad_norm"),
    *("rollout/kl", "rollout/score_std", "rollout/response_tokens"),
)
WINDOW = 128
"""How many lines of metrics.jsonl a number is compared with."""
FEWEST = 32
DEVIATIONS = 6.0
TIMES = 2.0


class Spikes:
    """The last values of each number that is watched.

    All of them are positive and vary by factors rather than by differences, so logarithms are compared: that of a spike
    lies `DEVIATIONS` standard deviations above their mean, and a spike is at least `TIMES` what that mean stands for.
    """

    def __init__(self) -> None:
        self._logs: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in WATCHED}

    def look(self, metrics: Mapping[str, float | None]) -> list[str]:
        """Take in a line of metrics. Returns: a sentence for each number that jumps."""
        found = []
        for name, logs in self._logs.items():
            value = metrics.get(name)
            if value is None or not 0 < value < math.inf:
                continue
            if len(logs) >= FEWEST:
                mean = statistics.fmean(logs)
                above = math.log(value) - mean
                # The deviation last: it takes 150 us, and a run that goes on reads all of its lines again.
                if above > math.log(TIMES) and above > DEVIATIONS * statistics.pstdev(logs):
                    found.append(
                        f"{name} jumps to {value:.4g}: its mean over {len(logs)} lines is {math.exp(mean):.4g}"
                    )
            logs.append(math.log(value))
        return found
