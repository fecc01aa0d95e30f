"""A run that stops after every single optimizer step, and goes on each time, ends as one that never stopped."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from scripts.torture.runs import Run
from tests.in_process import start
from tests.tiny_models import save_tiny_model, write_tiny_data
from tests.tiny_runs import STAGES, tiny_configs, with_lora

pytestmark = pytest.mark.usefixtures("process_group")


def options_of(kind: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Options of the three steps, which log less often than they stop."""
    options = tiny_configs(folder, save_tiny_model(folder / "model"), write_tiny_data(folder))
    if kind == "one base":
        with_lora(options)
        options["step1_sft"]["model"]["lora"]["merge_on_save"] = True
        options["step3_ppo"]["share_base"] = True
    else:
        demonstrations = {name: options["step1_sft"]["data"][name] for name in ("paths", "format")}
        options["step3_ppo"] |= {"ema_decay": 0.5, "kl": {"adaptive": True, "target": 1.0}}
        options["step3_ppo"]["ptx"] = {"coefficient": 0.5, **demonstrations}
        for stage, model in zip(STAGES, ("model", "model", "actor"), strict=True):
            options[stage][model]["packing"] = False  # so that there is padding to count
            options[stage]["run"]["eval_every"] = 2 if stage == "step3_ppo" else 5
    for stage in STAGES[:2]:
        options[stage]["max_steps"] = 5
        options[stage]["run"]["log_every"] = 3
    return options


@pytest.mark.parametrize("kind", ["all weights, padded", "one base"])
def test_a_run_that_stops_after_every_step_ends_to_the_bit_as_one_that_does_not(kind: str, tmp_path: Path) -> None:
    """O1, O2"""
    for stage, options in options_of(kind, tmp_path / "whole").items():
        whole, stopped = (Run(stage, tmp_path / name, options) for name in ("whole", "stopped"))
        assert start(whole)
        starts = 11 if stage == "step3_ppo" else 6  # PPO: 2 iterations of 4 steps and the end of each
        ended = [start(stopped, stop_after=1) for _ in range(starts)]
        assert ended == [False] * (starts - 1) + [True], stage
        assert stopped.digest() == whole.digest(), stage
    if kind == "one base":  # and the critic, which goes on with the reward model's adapters, has moved them all
        folders = [tmp_path / "whole" / name for name in ("step2_reward/final", "step3_ppo/final/critic")]
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert before.keys() == after.keys()
        assert not any(weight.equal(after[name]) for name, weight in before.items())
