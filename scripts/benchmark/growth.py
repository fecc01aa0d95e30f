"""How the time of an iteration grows with its size: `python -m scripts.benchmark.ppo --grow True --shape small`."""

import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from scripts.benchmark.ceilings import Ceilings
from scripts.benchmark.floors import DTYPES, empty_model, floor_of, measure_best
from scripts.benchmark.ppo_sides import PpoBenchmark, check_lengths, chosen_sides, job_of, make_job, starter
from scripts.benchmark.reporting import circumstances
from scripts.benchmark.sides import take_turns
from scripts.benchmark.workloads import MODEL_SHAPES
from scripts.figures import COLOURS, SETTINGS

FACTORS = (1, 2, 4, 8)
# Prompts, and the longest prompt and response, of factor 1.
BASE = {"cpu": (8, 32, 32), "cuda": (64, 128, 128)}
AXES = {"samples": "responses", "context": "tokens of prompt and response", "parameters": "parameters"}


def grow(config: PpoBenchmark) -> dict[str, Any]:
    """Times every size, prints them, and plots them beside `output`, as SVG and PNG."""
    if config.shape is None:
        raise ValueError("the number of layers is varied, which needs random weights: give shape in place of model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_best(device, DTYPES[config.precision], BASE[device.type][0])
    smallest = measure(config, "samples", 1, device, ceilings)
    points = {
        axis: [measure(config, axis, factor, device, ceilings) if factor > 1 else {**smallest} for factor in FACTORS]
        for axis in AXES
    }
    for axis, measured in points.items():
        first, last = measured[0], measured[-1]
        for side, seconds in last["seconds"].items():
            times = [one["seconds"].get(side) for one in measured]
            grown = seconds / first["seconds"][side]
            print(f"{axis} x{FACTORS[-1]}, {side}: {', '.join(f'{t:.2f}' for t in times if t)} s, {grown:.1f} times")
    if config.output is not None:
        draw(points, Path(config.output))
    return {
        **circumstances("scripts.benchmark.ppo", config, device, ("torch", "transformers", "deepspeed")),
        "ceilings": vars(ceilings),
        "growth": points,
    }


def measure(config: PpoBenchmark, axis: str, factor: int, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """One size: what it is, its floor, and the median seconds of each side that could run it."""
    prompts, prompt_tokens, response_tokens = BASE[device.type]
    longer = factor if axis == "context" else 1
    sized = replace(
        config,
        prompts=prompts * (factor if axis == "samples" else 1),
        prompt_tokens=prompt_tokens * longer,
        response_tokens=response_tokens * longer,
        layers=base_layers(config) * (factor if axis == "parameters" else 1),
    )
    sides = [side for side in chosen_sides(config) if side != "trl-tuned"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(sized, folder)
        starts = {side: starter(sized, side, job_of(side, job), folder) for side in sides}
        measured = take_turns(starts, config.repeats, interleaved=False, look=partial(check_lengths, job))
        floor = sum(cost.seconds for cost in floor_of(job, config.precision, ceilings).values())
        parameters = sum(p.numel() for p in empty_model(job.actor, AutoModelForCausalLM).parameters())
    return {
        "samples": job.rows,
        "context": sized.work.max_prompt + sized.work.max_response,
        "parameters": parameters,
        "floor_seconds": floor,
        "seconds": {side: statistics.median(one.seconds) for side, one in measured.items() if one.failure is None},
        "peak_memory_bytes": {
            side: max(turn["peak_memory_bytes"] for turn in one.turns)
            for side, one in measured.items()
            if one.failure is None
        },
        "failures": {side: one.failure for side, one in measured.items() if one.failure is not None},
    }


def base_layers(config: PpoBenchmark) -> int:
    return max(1, MODEL_SHAPES[str(config.shape)]["num_hidden_layers"] // FACTORS[-1])


def draw(points: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Seconds over size, both logarithmic; a dotted line grows as the size does."""
    import matplotlib.pyplot as plt

    with plt.rc_context(SETTINGS):
        figure, panels = plt.subplots(1, len(points), figsize=(4 * len(points), 3), constrained_layout=True)
        for panel, (axis, measured) in zip(panels, points.items(), strict=True):
            sizes = [one[axis] for one in measured]
            names = list(measured[0]["seconds"])
            for colour, side in zip(COLOURS, names, strict=False):
                line = [(one[axis], one["seconds"][side]) for one in measured if side in one["seconds"]]
                panel.plot(*zip(*line, strict=True), marker="o", color=colour, label=side)
                start = line[0][1]
                panel.plot(sizes, [start * size / sizes[0] for size in sizes], ":", color=colour, linewidth=1)
            panel.plot(sizes, [one["floor_seconds"] for one in measured], "--", color="grey", label="floor")
            panel.set(xscale="log", yscale="log", title=AXES[axis], ylabel="seconds of an iteration")
            panel.set_xticks(sizes, [f"{size:,}" if size < 10**6 else f"{size / 1e6:.0f}M" for size in sizes])
            panel.minorticks_off()
            panel.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers as mathematics, which is off
        panels[0].legend()
        for suffix in (".svg", ".png"):
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(output.with_suffix(suffix), metadata=None if suffix == ".png" else {"Date": None})
        plt.close(figure)
