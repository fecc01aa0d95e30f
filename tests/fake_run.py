"""A run's folder as the three stages leave it, made up in no time: for the tests of the summary and the report."""

import json
import math
import random
from pathlib import Path
from typing import Any


def fake_results() -> dict[str, dict[str, Any]]:
    """results.json of each step, with numbers of the shape that a good run has."""
    draw = random.Random(0)
    chosen, rejected = [draw.gauss(1, 1) for _ in range(200)], [draw.gauss(-1, 1) for _ in range(200)]
    before, after = [draw.gauss(0, 1) for _ in range(128)], [draw.gauss(2, 1) for _ in range(128)]
    return {
        "step1": {
            "loss_before": 3.5,
            "loss_after": 1.25,
            "perplexity_before": math.exp(3.5),
            "perplexity_after": math.exp(1.25),
            "data": {"kept": 4000, "skipped_empty_response": 3},
            "tokens": 210_000,
            "seconds": 100.0,
            "peak_memory_gib": 2.5,
        },
        "step2": {
            "accuracy_before": 0.51,
            "accuracy_after": 0.93,
            "loss_before": 0.7,
            "loss_after": 0.2,
            "scores_chosen": chosen,
            "scores_rejected": rejected,
            "accuracy_by_length_difference": [
                {"low": 5 * i - 10, "high": 5 * i - 6, "pairs": 50, "accuracy": 0.9 + 0.02 * i} for i in range(4)
            ],
            "calibration": [{"predicted": p / 10, "observed": (p / 10) ** 1.2, "pairs": 40} for p in range(5, 10)],
            "normalization": {"gain": 0.8, "bias": -0.1},
            "data": {"kept": 3000},
            "tokens": 300_000,
            "seconds": 120.0,
            "peak_memory_gib": 3.0,
        },
        "step3": {
            "score_before": {"mean": 0.02, "median": 0.01, "values": before},
            "score_after": {"mean": 2.01, "median": 2.1, "values": after},
            "kl": 6.5,
            "win_rate": {"value": 0.95, "low": 0.91, "high": 0.98, "pairs": 128},
            "distinct_2_before": 0.41,
            "distinct_2_after": 0.37,
            "distinct_2_ratio": 0.90,
            "response_tokens_before": 24.5,
            "response_tokens_after": 26.0,
            "eos_share_before": 0.99,
            "eos_share_after": 1.0,
            "data": {"kept": 1024},
            "tokens": 90_000,
            "seconds": 300.0,
            "peak_memory_gib": 5.0,
        },
    }


def write_results(step_dir: Path, results: dict[str, Any]) -> None:
    step_dir.mkdir(parents=True, exist_ok=True)
    (step_dir / "results.json").write_text(json.dumps(results), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_fake_run(run: Path) -> None:
    """All three steps finished."""
    results = fake_results()
    for key, folder in (("step1", "step1_sft"), ("step2", "step2_reward"), ("step3", "step3_ppo")):
        write_results(run / folder, results[key])
    draw = random.Random(1)
    write_lines(
        run / "step1_sft" / "metrics.jsonl",
        [{"step": 0, "seconds": 1.0, "tokens": 0, "eval/loss": 3.5, "eval/perplexity": 33.1}]
        + [
            {
                "step": step,
                "seconds": float(step),
                "tokens": step * 1000,
                "train/loss": 1.2 + 2.3 * math.exp(-step / 40) + draw.gauss(0, 0.05),
                "train/lr": 1e-5,
            }
            for step in range(1, 200)
        ]
        + [{"step": 199, "seconds": 200.0, "tokens": 199_000, "eval/loss": 1.25, "eval/perplexity": 3.49}],
    )
    write_lines(
        run / "step2_reward" / "metrics.jsonl",
        [
            {
                "step": step,
                "seconds": float(step),
                "tokens": step * 1000,
                "train/loss": 0.2 + 0.5 * math.exp(-step / 20),
                "train/accuracy": 0.95 - 0.45 * math.exp(-step / 20),
            }
            for step in range(1, 80)
        ],
    )
    write_lines(
        run / "step3_ppo" / "metrics.jsonl",
        [
            {
                "step": step,
                "seconds": float(5 * step),
                "tokens": step * 1000,
                "rollout/score_mean": 2 - 2 * math.exp(-step / 20) + draw.gauss(0, 0.1),
                "rollout/kl": 6.5 - 6.5 * math.exp(-step / 25),
                "rollout/response_tokens": 25 + draw.gauss(0, 1),
                "ppo/clip_fraction": abs(draw.gauss(0.05, 0.02)),
                "seconds/generate": 3.0,
                "seconds/score": 0.5,
                "seconds/train": 1.5,
            }
            for step in range(1, 61)
        ],
    )
    write_lines(
        run / "step3_ppo" / "samples.jsonl",
        [
            {
                "phase": phase,
                "prompt": f"I watched film number {i} with my sister last night, and",
                "response": f" the acting was {'superb & <b>magical</b>' if phase == 'after' else 'so-so'}. We agreed.",
                "score": (2.0 if phase == "after" else 0.1) - 0.2 * i * (i % 3 == 0),
            }
            for phase in ("before", "after")
            for i in range(24)
        ],
    )
    (run / "config.yaml").write_text("output_dir: runs/fake\nmodel: some/model\n", encoding="utf-8")
    environment = {"started": "2030-01-02 03:04:05 +0000", "gpus": [], "cpu_cores": 2, "command": "python -m x <y>"}
    (run / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
