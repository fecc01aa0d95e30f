"""Seeded runs of the three stages on tiny models, whose numbers the files in `tests/reference_runs` keep.

    python -m tests.make_reference_runs

makes the files again, after a change that was meant to change the numbers.

The numbers are to hold to BOUND on every x86 processor. That was tried on one, limited to its kernels for SSE4, AVX,
AVX2 and AVX-512: they deviate by 2e-5 at most, and two threads give the same bits as one. A draw of step 3 can be so
close that rounding makes it another token, and all later numbers others; `main` keeps no files where it finds that.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.launching import ROOT, alone, run_well
from tests.tiny_models import save_tiny_model, write_tiny_data
from tests.tiny_runs import depends_on_machine, results_of, tiny_configs, write_configs

FOLDER = ROOT / "tests" / "reference_runs"
COMMAND = "python -m tests.make_reference_runs"
BOUND = 1e-4
WEIGHTS = "model.safetensors"

SEED = 3
"""Of step 3; to be changed where a draw is a close one, as `main` finds out."""
# torch, oneDNN and MKL as on a processor without AVX, and on one with AVX2: sums in other orders, so other last digits.
OTHER_KERNELS = (
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
)

Row = dict[str, Any]
"""The numbers of one line of metrics.jsonl; under the step "end", those of results.json and of the saved weights."""


def run_stages(folder: Path) -> dict[str, list[Row]]:
    """Run every stage in one process on one thread, in float32.

    Args:
        folder: where the runs write; empty.

    Returns: the rows of each run in order, by the name of its file.
    """
    configs = reference_configs(folder)
    run_well(alone("tests.run_stages", *(argument for config in configs for argument in write_configs(config))))
    options = [option for config in configs for option in config.values()]
    return {Path(option["run"]["output_dir"]).name: rows_of(option) for option in options}


def reference_configs(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """The options of the runs: 20 optimizer steps each, with most options on, and learning rates that move the numbers.

    Rounding must not grow. So Adam's eps is large, because Adam divides a gradient that is all rounding by its own size
    as well; a group of GRPO is large, because equal scores would be divided by the rounding between them; and step 1
    learns fast and step 3 samples at a low temperature, because a draw between few likely tokens is seldom a close one.

    Adam hides the size of a gradient, and ZeRO 0 keeps no norm of it in float32, so the last run is at ZeRO 2.
    """
    data = write_tiny_data(folder)
    configs = tiny_configs(folder, save_tiny_model(folder / "model"), data, zero_stage=0)
    for stage, lr in (("step1_sft", 2e-2), ("step2_reward", 3e-4)):
        configs[stage] |= {"epochs": 5, "max_steps": 20, "optim": {"lr": lr, "eps": 1e-5, "weight_decay": 0.1}}
        configs[stage]["run"]["eval_every"] = 5
    configs["step2_reward"]["centring"] = 0.01
    # The new head happens to prefer the good responses; so the bad ones are to win, and the accuracy has a way to go.
    configs["step2_reward"]["data"]["columns"] = {"chosen": "rejected", "rejected": "chosen"}
    optim = {"lr": 1e-3, "schedule": "linear", "eps": 1e-5, "min_lr_fraction": 0.2}
    sampling = {"max_new_tokens": 8, "temperature": 0.4}
    both = {"iterations": 5, "actor_optim": optim, "critic_optim": optim, "sampling": sampling}
    ppo, grpo = configs["step3_ppo"], tiny_configs(folder, "", data, zero_stage=2)["step3_ppo"]
    for run in ppo["run"], grpo["run"]:
        run |= {"seed": SEED, "eval_every": 2}
    ppo |= both | {
        "gamma": 0.99,
        "score_clip": 1.2,
        "kl": {"coefficient": 0.05, "adaptive": True, "target": 1.0, "horizon": 100},
        "entropy_coefficient": 0.01,
        "ema_decay": 0.9,
    }
    grpo["run"]["output_dir"] = str(folder / "step3_grpo")
    grpo |= both | {
        "estimator": "grpo",
        "rollout_batch_size": 2,
        "samples_per_prompt": 8,
        "train_batch_size": 8,
        "kl": {"coefficient": 0.02, "estimator": "k3", "loss_coefficient": 0.05},
        "ptx": {"coefficient": 0.1, "paths": [data["demonstrations"]]},
        "missing_eos_score": -2.0,
        "clip_high": 0.28,
        "whiten_advantages": False,
    }
    return [configs, {"step3_ppo": grpo}]


def rows_of(options: Mapping[str, Any]) -> list[Row]:
    """What a run has left behind."""
    output = Path(options["run"]["output_dir"])
    lines = (output / "metrics.jsonl").read_text().splitlines()
    results = results_of(options)
    # It compares scores of texts that are often the same: the last bit would decide.
    results.pop("win_rate", None)
    rows = [*map(json.loads, lines), {"step": "end"} | results | moved(options)]
    return [dict(numbers(row)) for row in rows]


def moved(options: Mapping[str, Any]) -> dict[str, float]:
    """Euclidean distance of all weights of each saved model from those that it started from."""
    final = Path(options["run"]["output_dir"]) / "final"
    folders = {"model": final, "actor": final / "actor", "critic": final / "critic"}
    starts = {"model": "model", "actor": "actor", "critic": "reward"}
    distances = {}
    for name, folder in folders.items():
        if (folder / WEIGHTS).exists():
            start = load_file(Path(options[starts[name]]["path"]) / WEIGHTS)
            saved = load_file(folder / WEIGHTS)
            squares = [float((saved[key] - start[key]).double().square().sum()) for key in saved.keys() & start.keys()]
            distances[f"moved/{name}"] = math.sqrt(math.fsum(squares))
    return distances


def numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of each number to float32's 8 digits, without times, memory and lists; nested as outer/inner."""
    for name, value in row.items():
        if depends_on_machine(name) or isinstance(value, list):
            continue
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        else:
            yield prefix + name, float(f"{value:.8g}") if isinstance(value, float) else value


def differences(was: list[Row], now: list[Row], bound: float) -> list[str]:
    """A line for each number that is gone, new, or further than bound * max(1, |was|) from what it was."""
    steps = [row["step"] for row in was], [row["step"] for row in now]
    if steps[0] != steps[1]:
        return [f"the steps were {steps[0]}, now {steps[1]}"]
    lines = []
    for before, after in zip(was, now, strict=True):
        for name in before | after:
            old, new = before.get(name, "absent"), after.get(name, "absent")
            # Learning rates are small and owe nothing to the processor.
            if not agree(old, new, bound, smallest_scale=0.0 if name.endswith("lr") else 1.0):
                lines.append(f"step {before['step']}  {name}  was {old}  now {new}")
    return lines


def agree(was: Any, now: Any, bound: float, smallest_scale: float) -> bool:
    if not isinstance(was, int | float) or not isinstance(now, int | float):
        return was == now  # null, or a number that only one side has
    return abs(now - was) <= bound * max(smallest_scale, abs(was))


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))


def write(path: Path, rows: list[Row]) -> None:
    """One row to a line, so that a diff shows the steps that changed."""
    made_by = json.dumps(f"{COMMAND}, on the CPU in float32, with {versions()}")
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"made_by": {made_by},\n"rows": [\n{lines}\n]}}\n')


def main() -> None:
    """Writes the files, unless other kernels give other numbers: then they would hold on this processor alone."""
    runs = run_in_new_folder()
    for kernels in OTHER_KERNELS:
        os.environ.update(kernels)
        for name, rows in run_in_new_folder().items():
            found = differences(runs[name], rows, BOUND / 2)
            if found:
                raise SystemExit(
                    f"{name} depends on rounding: {kernels} changes {len(found)} numbers, the first: {found[0]}\n"
                    "In step 3 a draw may have been a close one: set another SEED in tests/make_reference_runs.py"
                )
    FOLDER.mkdir(exist_ok=True)
    for name, rows in runs.items():
        write(FOLDER / f"{name}.json", rows)
        print(f"wrote {FOLDER / name}.json")


def run_in_new_folder() -> dict[str, list[Row]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_stages(Path(folder))


if __name__ == "__main__":
    main()
