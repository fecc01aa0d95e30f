"""Stages run in the process of the test, which may stop them after any step."""

import importlib
from typing import Any

from scripts.torture.runs import Run
from step1_sft.config import SftConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PpoConfig
from tests.tiny_runs import STAGES
from training import distributed
from training.config_files import load_config
from training.supervision import EXIT_STOPPED

CONFIGS = dict(zip(STAGES, (SftConfig, RewardConfig, PpoConfig), strict=True))


class Stopper:
    """A supervisor that is asked to stop after so many optimizer steps; None: never."""

    def __init__(self, after: int | None) -> None:
        self.left = after

    def progress(self, phase: str, step: int) -> None: ...

    def should_stop(self) -> bool:
        self.left = None if self.left is None else self.left - 1
        return self.left == 0


def start(run: Run, stop_after: int | None = None) -> bool:
    """Start a run in this process, or go on with it; returns whether it came to its end."""
    config: Any = load_config(CONFIGS[run.stage], ["--config", str(run.file)])
    distributed.seed_everything(config.run.seed, rank=0)
    try:
        importlib.import_module(f"{run.stage}.train").train(config, Stopper(stop_after))
    except SystemExit as end:
        assert end.code == EXIT_STOPPED
        return False
    return True
