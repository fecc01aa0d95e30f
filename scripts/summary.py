"""What a staged run leaves to read: environment.json (what it ran on) and summary.json (whether each step helped)."""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.processes import ROOT

STEP_FOLDERS = {"step1": "step1_sft", "step2": "step2_reward", "step3": "step3_ppo"}
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "tyro")
LONG_LISTS = ("values", "scores_chosen", "scores_rejected")

# Above these the text has left the model that PPO started from, whatever its score.
LARGEST_KL = 10.0
SMALLEST_DISTINCT_RATIO = 0.8


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, commit and command. No environment variables: they may hold secrets."""
    return {
        "command": shlex.join(["python", "-m", "scripts.run_all", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        "system": platform.platform(),
        **describe_device(),
        "commit": git_commit(),
        "packages": {name: installed_version(name) for name in PACKAGES},
    }


def describe_device() -> dict[str, Any]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found: dict[str, Any] = {"cpu_cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found["gpus"] = [f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in properties]
        found["cuda"] = torch.version.cuda
    else:
        found["gpus"] = []
    return found


def git_commit() -> str | None:
    """The commit of this repository, with "+changes" if files differ from it; None outside git."""
    try:
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def read_results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """results.json of each finished step, by "step1", "step2", "step3"."""
    found = {key: read_json(run_dir / folder / "results.json") for key, folder in STEP_FOLDERS.items()}
    return {key: nan_for_null(results) for key, results in found.items() if results is not None}


def nan_for_null(value: Any) -> Any:
    """Undoes what JSON does to a number that is not finite, so that every number can be compared and printed."""
    if isinstance(value, dict):
        return {key: nan_for_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nan_for_null(item) for item in value]
    return math.nan if value is None else value


def build_summary(results: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of every finished step without its long lists, a verdict for each, and the time.

    Args:
        results: the steps' results, by "step1", "step2", "step3".
        seconds: how long each step took from start to end; the step's own count is taken where it is not known.
    """
    summary: dict[str, Any] = {}
    for key, result in results.items():
        helped, sentence = VERDICTS[key](result)
        summary[key] = {**without_long_lists(result), "helped": helped, "verdict": sentence}
    spent = {key: float(seconds.get(key, result["seconds"])) for key, result in results.items()}
    return summary | {"seconds": {**spent, "total": sum(spent.values())}}


def measured_seconds(run_dir: Path) -> dict[str, float]:
    """How long each step took, as an earlier summary says."""
    return (read_json(run_dir / "summary.json") or {}).get("seconds", {})


def without_long_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_long_lists(item) for key, item in value.items() if key not in LONG_LISTS}
    return value


def verdict_of_sft(result: Mapping[str, Any]) -> tuple[bool, str]:
    helped = result["loss_after"] < result["loss_before"]
    change = (
        f"the held-out loss went from {result['loss_before']:.3f} to {result['loss_after']:.3f} "
        f"(perplexity {result['perplexity_before']:.2f} to {result['perplexity_after']:.2f})"
    )
    return helped, f"Step 1 {'helped' if helped else 'did not help'}: {change}."


def verdict_of_reward(result: Mapping[str, Any]) -> tuple[bool, str]:
    helped = result["accuracy_after"] > max(result["accuracy_before"], 0.5)
    change = (
        "the better response of a held-out pair got the higher score in "
        f"{result['accuracy_after']:.1%} of the pairs, before training in {result['accuracy_before']:.1%}"
    )
    return helped, f"Step 2 {'helped' if helped else 'did not help'}: {change}."


def verdict_of_ppo(result: Mapping[str, Any]) -> tuple[bool, str]:
    """PPO helped if it beats step 1 beyond chance; the sentence adds what the text paid for it."""
    before, after, win_rate = result["score_before"], result["score_after"], result["win_rate"]
    helped = win_rate["low"] > 0.5 and after["mean"] > before["mean"]
    change = (
        f"the mean held-out score went from {before['mean']:.2f} to {after['mean']:.2f}, and its responses beat "
        f"those of step 1 in {win_rate['value']:.1%} of {win_rate['pairs']} prompts "
        f"(95% interval {win_rate['low']:.1%} to {win_rate['high']:.1%})"
    )
    distinct = result["distinct_2_ratio"]
    natural = result["kl"] <= LARGEST_KL and distinct >= SMALLEST_DISTINCT_RATIO
    cost = f"KL {result['kl']:.1f} nats per response, {distinct:.2f} of step 1's variety of word pairs"
    text = "The text stayed close to where it began" if natural else "But the text drifted far from where it began"
    return helped, f"Step 3 {'helped' if helped else 'did not help'}: {change}. {text} ({cost})."


VERDICTS = {"step1": verdict_of_sft, "step2": verdict_of_reward, "step3": verdict_of_ppo}
