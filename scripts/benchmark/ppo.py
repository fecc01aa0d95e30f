"""Seconds of a PPO iteration, ours and TRL's: `python -m scripts.benchmark.ppo --workload D --shape 135m`.

Every system runs in a process of its own with the same models, prompts and response lengths, and they take turns. TRL
comes from `bash scripts/benchmark/peers.sh`. `--check True` compares losses in place of times, and `--grow True` varies
sizes.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from scripts.benchmark.floors import DTYPES, empty_model, floor_of, measure_best
from scripts.benchmark.growth import grow
from scripts.benchmark.peers import peer_versions, tune
from scripts.benchmark.ppo_check import compare
from scripts.benchmark.ppo_sides import BASELINES, PpoBenchmark, check_lengths, chosen_sides, job_of, make_job, starter
from scripts.benchmark.reporting import circumstances, run_and_keep, spread_of
from scripts.benchmark.sides import figures, ratio_text, take_turns
from scripts.benchmark.turns import Worker
from scripts.benchmark.workloads import PpoJob
from training.config_files import load_config

NOT_MEASURED = "DeepSpeed-Chat's step 3 is not measured: it is no package, and its examples pin a transformers of 2023."


def run(config: PpoBenchmark) -> dict[str, Any]:
    """Measures, prints the table and returns what the JSON holds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides = chosen_sides(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(config, folder)
        jobs = {side: job_of(side, job) for side in sides}
        tuning = tune_peer(config, jobs["trl-tuned"], folder) if "trl-tuned" in jobs else None
        if tuning is not None:
            jobs["trl-tuned"] = replace(jobs["trl-tuned"], **tuning["chosen"])
        starts = {side: starter(config, side, job, folder) for side, job in jobs.items()}
        look = partial(check_lengths, job)
        interleaved = device.type == "cpu" if config.interleaved is None else config.interleaved
        measured = take_turns(starts, config.repeats, interleaved=interleaved, look=look)
        ceilings = {
            precision: measure_best(device, DTYPES[precision], job.rows)
            for precision in sorted({one.precision for one in jobs.values()})
        }
        floors = {precision: floor_of(job, precision, rates) for precision, rates in ceilings.items()}
        parameters = sum(p.numel() for p in empty_model(job.actor, AutoModelForCausalLM).parameters())
    result = {
        **circumstances("scripts.benchmark.ppo", config, device, ("torch", "transformers", "deepspeed")),
        "peers": peer_versions(config.peer_python) if any(side in BASELINES for side in sides) else {},
        "not_measured": NOT_MEASURED,
        "parameters": parameters,
        "workload": {
            "prompt_tokens": [len(ids) for ids in job.prompt_ids],
            "response_tokens": job.response_lengths,
            "interleaved": interleaved,
        },
        "tuning": tuning,
        "precisions": {side: one.precision for side, one in jobs.items()},
        "ceilings": {precision: asdict(rates) for precision, rates in ceilings.items()},
        "floor": {p: {phase: asdict(cost) for phase, cost in floor.items()} for p, floor in floors.items()},
        "sides": figures(measured, BASELINES),
    }
    print_report(result)
    return result


def tune_peer(config: PpoBenchmark, job: PpoJob, folder: Path) -> dict[str, Any]:
    """The batches with which TRL is fastest, and what else was tried."""
    if config.tuned_micro_batch_size is not None:
        return {"chosen": {"micro_batch_size": config.tuned_micro_batch_size, "chunk_size": job.rows, "parts": 1}}

    def start(choice: Mapping[str, Any]) -> Worker:
        return starter(config, "trl-tuned", replace(job, **choice), folder)()

    return tune(start, job.rows, len(job.prompt_ids), partial(check_lengths, job))


def print_report(result: Mapping[str, Any]) -> None:
    """The header and the table for the terminal."""
    config, work = result["config"], result["workload"]
    responses = [length for lengths in work["response_tokens"] for length in lengths]
    print(
        f"workload {config['workload']} with {config['model'] or config['shape']}, {result['parameters'] / 1e6:.0f}M "
        f"parameters, on {result['device']['name']}, {result['device']['threads']} threads\n"
        f"{len(work['prompt_tokens'])} prompts of {spread_of(work['prompt_tokens'])} tokens, {len(responses)} "
        f"responses of {spread_of(responses)}, {'in turns' if work['interleaved'] else 'one side after the other'}"
    )
    for precision, rates in result["ceilings"].items():
        floor = sum(cost["seconds"] for cost in result["floor"][precision].values())
        print(
            f"{precision}: copy {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, GEMM "
            f"{rates['gemm_flops_per_second'] / 1e12:.3g} TFLOP/s, floor of the iteration {floor:.3g} s"
        )
    if result["tuning"] is not None:
        print(f"trl-tuned: {result['tuning']['chosen']}")
    print(f"{result['not_measured']}\n\n{'':16}{'seconds':>9}{'spread':>8}", end="")
    print(f"{'generate':>10}{'score':>8}{'train':>8}{'trl / it':>19}{'trl-tuned / it':>19}{'floor':>8}{'memory':>11}")
    for side, one in result["sides"].items():
        label = f"{side} {result['precisions'][side]}" if side != "ours-bf16" else "ours bf16"
        if "failure" in one:
            print(f"{label:16}{one['failure']}")
            continue
        floor = sum(cost["seconds"] for cost in result["floor"][result["precisions"][side]].values())
        phases = "".join(f"{one['phases'].get(phase, math.nan):{w}.2f}" for phase, w in PHASE_WIDTHS.items())
        ratios = "".join(f"{ratio_text(one['ratios'].get(baseline)):>19}" for baseline in BASELINES)
        print(
            f"{label:16}{one['median_seconds']:9.2f}{one['spread']:8.0%}{phases}{ratios}"
            f"{floor / one['median_seconds']:8.1%}{one['peak_memory_bytes'] / 2**20:7.0f} MiB"
        )


PHASE_WIDTHS = {"generate": 10, "score": 8, "train": 8}


def main() -> None:
    config = load_config(PpoBenchmark)
    work = compare if config.check else grow if config.grow else run
    run_and_keep(work, config)


if __name__ == "__main__":
    main()
