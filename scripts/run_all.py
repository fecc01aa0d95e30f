"""Runs the three steps one after the other: `python -m scripts.run_all --config RECIPE [--name value ...]`.

Each step is a `deepspeed` process of its own. The same command again goes on at the first step that is not finished.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.processes import Stopped, run_group, stage_command, stage_environment
from scripts.report import build_report
from scripts.summary import STEP_FOLDERS, build_summary, describe_environment, measured_seconds, read_results
from step1_sft.config import SftConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PpoConfig
from training.config_files import Setting, list_options, load_config, read_arguments, read_yaml, save_config
from training.durable import OutputLock
from training.formats import FORMATS, check_format
from training.metrics import write_json
from training.records import READERS, read_records


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The three steps from a pretrained model to a chat model.

    Each step starts from the folder that an earlier one left, unless its own path says otherwise.
    """

    output_dir: str
    """Folder of the run; each step gets a folder inside."""
    model: str
    """Hub name or folder of the pretrained model that step 1 starts from."""
    seed: int = 1
    """Seed of every step that does not set its own."""
    num_gpus: int = 1
    """GPUs to use on this machine, or processes where there is none."""
    step1_sft: SftConfig
    step2_reward: RewardConfig
    step3_ppo: PpoConfig

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"num_gpus is {self.num_gpus}: it needs at least 1")
        for name, config in self.steps().items():
            folder = str(Path(self.output_dir) / name)
            if config.run.output_dir != folder:
                raise ValueError(
                    f"{name}.run.output_dir is {config.run.output_dir}: leave it out, it is always {folder}"
                )

    def steps(self) -> dict[str, SftConfig | RewardConfig | PpoConfig]:
        """The steps' configs in order, by the name of their package."""
        return {folder: getattr(self, folder) for folder in STEP_FOLDERS.values()}


def main() -> None:
    try:
        raise SystemExit(run(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except Stopped as stopped:
        raise SystemExit(stopped.exit_code) from stopped


def run(arguments: Sequence[str]) -> int:
    """Runs what is not finished. Returns the exit code: 0, or that of the step that failed."""
    recipe = load_recipe(arguments)
    check_inputs(recipe)
    output = Path(recipe.output_dir)
    with OutputLock(output):
        finished = finished_steps(recipe)
        save_config(recipe, output / "config.yaml")
        write_json(output / "environment.json", describe_environment())
        seconds = measured_seconds(output)
        for number, (key, name) in enumerate(STEP_FOLDERS.items(), start=1):
            if name in finished:
                print(f"[{number}/3] {name} is finished: skipped", flush=True)
                continue
            print(f"[{number}/3] {name}", flush=True)
            started = time.monotonic()
            code = run_step(name, recipe.steps()[name], recipe.num_gpus)
            if code != 0:
                return code
            seconds[key] = time.monotonic() - started
            write_json(output / "summary.json", build_summary(read_results(output), seconds))
            build_report(output)
        print_verdicts(output, seconds)
    return 0


def load_recipe(arguments: Sequence[str]) -> RecipeConfig:
    """The recipe, in which each step is given the folder that an earlier one makes and the seed of the whole run."""
    asks_for_help = "--help" in arguments or "-h" in arguments
    defaults = {} if asks_for_help else passed_along(given_options(arguments))
    return load_config(RecipeConfig, arguments, defaults=defaults)


def given_options(arguments: Sequence[str]) -> dict[str, str]:
    """What the command line and its YAML files say, as text by dotted names."""
    options = list_options(RecipeConfig)
    files, on_command_line = read_arguments(arguments, options)
    given: dict[str, Setting] = {}
    for path in files:
        given |= read_yaml(path, options)
    return {name: " ".join(setting.values) for name, setting in (given | on_command_line).items()}


def passed_along(given: Mapping[str, str]) -> dict[str, Any]:
    """Defaults of the steps' options, by dotted names; what the recipe says itself wins over them."""
    output, model = Path(given.get("output_dir", "unknown")), given.get("model", "unknown")
    defaults: dict[str, Any] = {
        "step1_sft.model.path": model,
        "step2_reward.model.path": output / "step1_sft" / "final",
        "step3_ppo.actor.path": output / "step1_sft" / "final",
    }
    if given.get("step3_ppo.reward.function", "None") == "None":
        defaults["step3_ppo.reward.path"] = output / "step2_reward" / "final"
    for name in STEP_FOLDERS.values():
        defaults |= {f"{name}.run.output_dir": output / name, f"{name}.run.seed": given.get("seed", 1)}
    return defaults


def check_inputs(recipe: RecipeConfig) -> None:
    """Refuses now what would end a later step in hours. Raises: ValueError."""
    num_gpus_here = count_gpus()
    if 0 < num_gpus_here < recipe.num_gpus:
        raise ValueError(f"num_gpus is {recipe.num_gpus}, but this machine has {num_gpus_here}: ask for fewer")
    for name, config in recipe.steps().items():
        data = config.data
        try:
            config.check_ranks(recipe.num_gpus)
            check_first_records((*data.paths, *data.eval_paths), data.format, data.split, data.columns)
            if isinstance(config, PpoConfig):
                check_format(config.ptx.format, "demonstration")
                check_first_records(config.ptx.paths, config.ptx.format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    check_shared_base(recipe.step1_sft, recipe.step2_reward, recipe.step3_ppo)


def check_shared_base(sft: SftConfig, reward: RewardConfig, ppo: PpoConfig) -> None:
    """Refuses steps that leave something else than `share_base` of step 3 needs."""
    if not ppo.share_base:
        return
    if ppo.actor.path == str(Path(sft.run.output_dir) / "final"):
        lora = sft.model.lora
        if lora.rank > 0 and not lora.merge_on_save:
            raise ValueError("step3_ppo.share_base needs a whole model: set step1_sft.model.lora.merge_on_save to True")
    if ppo.reward.path == str(Path(reward.run.output_dir) / "final"):
        lora = reward.model.lora
        if lora.rank == 0 or lora.merge_on_save:
            raise ValueError(
                "step3_ppo.share_base needs adapters of a reward model: set step2_reward.model.lora.rank above 0, and "
                "leave out its merge_on_save"
            )
        critic = ppo.critic.lora
        if ppo.uses_critic and not ppo.critic.path and (critic.rank, critic.alpha) != (lora.rank, lora.alpha):
            raise ValueError(
                "step3_ppo.share_base lets the critic go on with the reward model's adapters: set "
                f"step3_ppo.critic.lora.rank to {lora.rank} and step3_ppo.critic.lora.alpha to {lora.alpha}"
            )


def check_first_records(
    paths: Sequence[str], format: str, split: str = "train", columns: Mapping[str, str] | None = None
) -> None:
    """Reads the first record of every local file as an example."""
    for path in paths:
        if Path(path).suffix.lower() in READERS:
            source, record = next(read_records(path, split, columns))
            FORMATS[format].parse(record, source)


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def finished_steps(recipe: RecipeConfig) -> list[str]:
    """Names of the steps whose results are there and come from this very recipe.

    Raises: ValueError, if a finished step was made otherwise than the recipe asks.
    """
    steps = recipe.steps()
    finished = [name for name, config in steps.items() if (Path(config.run.output_dir) / "results.json").exists()]
    outdated: dict[str, str] = {}
    for name in finished:
        folder = Path(steps[name].run.output_dir)
        changed = changed_options(folder / "config.yaml", steps[name])
        if changed:
            raise ValueError(
                f"{name} is finished, but with other options:\n"
                + "".join(f"  {line}\n" for line in changed)
                + f"Choose another --output_dir, or delete {folder} to run this step anew"
            )
        options = flatten(as_saved(steps[name])).values()
        for other in [other for other in steps if other not in finished]:
            if any(str(value).startswith(os.path.join(steps[other].run.output_dir, "")) for value in options):
                outdated[name] = other
    if outdated:
        made_from = ", ".join(f"{name} from {other}" for name, other in outdated.items())
        folders = " and ".join(steps[name].run.output_dir for name in outdated)
        raise ValueError(
            f"what is finished was made from a step that is to run now ({made_from}): "
            f"choose another --output_dir, or delete {folders} as well"
        )
    return finished


def changed_options(saved_path: Path, config: Any) -> list[str]:
    """One line for each option whose saved value differs from that of `config`."""
    if not saved_path.exists():
        return [f"{saved_path} is missing, so they are not known"]
    saved, asked = flatten(yaml.safe_load(saved_path.read_text(encoding="utf-8"))), flatten(as_saved(config))
    absent = "(not an option)"
    names = [*asked, *(name for name in saved if name not in asked)]
    return [
        f"{name}: it was {saved.get(name, absent)}, now {asked.get(name, absent)}"
        for name in names
        if saved.get(name, absent) != asked.get(name, absent)
    ]


def as_saved(config: Any) -> Any:
    """The config as it reads after being saved, when tuples are lists."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        save_config(config, path)
        return yaml.safe_load(path.read_text(encoding="utf-8"))


def flatten(tree: Any) -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(item, f"{name}.{key}" if name else str(key))
        else:
            yield name, value

    return dict(walk(tree, ""))


def run_step(name: str, config: Any, num_gpus: int) -> int:
    """Runs one step to its end on this console. Returns its exit code."""
    folder = Path(config.run.output_dir)
    save_config(config, folder / "config.yaml")
    command = stage_command(f"{name}.train", folder / "config.yaml", num_gpus)
    again = "The same command starts again at this step."
    try:
        code = run_group(command, stage_environment(num_gpus, count_gpus()))
    except Stopped as stopped:
        print(f"run_all: stopped by {stopped} in {name}. {again}", file=sys.stderr)
        raise
    if code == 0 and not (folder / "results.json").exists():
        # The launcher says 0 when the process that watches the ranks was killed.
        print(f"run_all: {name} ended before it was finished: was it killed? {again}", file=sys.stderr)
        return 1
    if code != 0:
        killed = " (killed from outside; often for want of memory)" if code in (137, 247) else ""
        print(
            f"run_all: {name} failed with exit code {code}{killed}; the reason stands above. {again}", file=sys.stderr
        )
    return code


def print_verdicts(output: Path, seconds: Mapping[str, float]) -> None:
    """Brings the summary and the report up to date and says what they say."""
    summary = build_summary(read_results(output), seconds)
    write_json(output / "summary.json", summary)
    report = build_report(output)
    for key in STEP_FOLDERS:
        print(summary[key]["verdict"])
    print(f"{summary['seconds']['total']:.0f} s in all. Numbers: {output / 'summary.json'}   Report: {report}")


if __name__ == "__main__":
    main()
