"""Whether both sides of the PPO benchmark compute the same: `python -m scripts.benchmark.ppo --check True`.

TRL samples responses from a tiny model in float32 and takes two updates; ours gets the token ids and does the same.
"""

import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scripts.benchmark.ppo_sides import PpoBenchmark, chosen_sides, starter
from scripts.benchmark.reporting import circumstances
from scripts.benchmark.workloads import MODEL_SHAPES, PpoJob, Workload, draw_lengths, draw_prompts, write_models

RELATIVE_TOLERANCE = 1e-4
"""Of float32, after two updates with a large learning rate."""
LOGPROBS = (
    ("mean score", "rollout/score_mean", "objective/scores"),
    ("KL of a response", "rollout/kl", "objective/kl"),
    ("log p of a response", "rollout/sequence_logprob", "objective/entropy"),
)
LOSSES = (
    ("policy loss of 2 updates", "ppo/policy_loss", "loss/policy_avg"),
    ("value loss of 2 updates", "ppo/value_loss", "loss/value_avg"),
)
# TRL's optimizer, which does not clip.
SETTINGS = ["--engine.gradient_clipping", "0"] + [
    part
    for model in ("actor", "critic")
    for part in (f"--{model}_optim.betas", "0.9", "0.999", f"--{model}_optim.eps", "1e-8")
]


@dataclass(frozen=True)
class Compared:
    """One number of both sides."""

    name: str
    ours: float
    theirs: float

    @property
    def difference(self) -> float:
        return abs(self.ours - self.theirs) / abs(self.theirs)

    @property
    def agrees(self) -> bool:
        return self.difference < RELATIVE_TOLERANCE


def compare(config: PpoBenchmark) -> dict[str, Any]:
    """Prints each number of both sides; ends the process with code 1 if two differ.

    Where a response ends before the limit, TRL gives the score to the position after it (README.md of this folder), so
    losses are compared where all fill the limit.
    """
    chosen_sides(replace(config, sides=("ours", "trl")))
    rows: list[Compared] = []
    for name, work in (("full", Workload(8, 1, 3, 8, 12, 12)), ("unequal", Workload(8, 1, 3, 8, 5, 12))):
        with tempfile.TemporaryDirectory() as folder:
            job = tiny_job(work, Path(folder), config.seed)
            theirs = one_turn(config, "trl", job, Path(folder))
            given = replace(job, responses=theirs["responses"], settings=SETTINGS)
            ours = one_turn(config, "ours", given, Path(folder))
        rows += pairs(name, ours["metrics"], theirs["metrics"], sum(map(sum, job.response_lengths)))
    print(f"{'':42}{'ours':>14}{'TRL':>14}{'relative difference':>22}")
    for row in rows:
        print(
            f"{row.name:42}{row.ours:14.7f}{row.theirs:14.7f}{row.difference:22.1e}{'' if row.agrees else '  DIFFERS'}"
        )
    print(f"\n{sum(row.agrees for row in rows)} of {len(rows)} agree to {RELATIVE_TOLERANCE:g}")
    if not all(row.agrees for row in rows):
        raise SystemExit(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **circumstances("scripts.benchmark.ppo", config, device, ("torch", "transformers")),
        "tolerance": RELATIVE_TOLERANCE,
        "compared": [asdict(row) for row in rows],
    }


def tiny_job(work: Workload, folder: Path, seed: int) -> PpoJob:
    """Weights wide enough for a mistake to show, a reference of its own, two updates that move the actor."""
    models = write_models(folder / "policy", None, "tiny", None, seed, scale=3.0)
    models["reference"] = write_models(folder / "reference", None, "tiny", None, seed + 1, scale=3.0)["actor"]
    prompt_lengths, response_lengths = draw_lengths(work, seed)
    prompt_ids = draw_prompts(prompt_lengths, MODEL_SHAPES["tiny"]["vocab_size"], seed)
    return PpoJob(
        **models,
        precision="fp32",
        prompt_ids=prompt_ids,
        response_lengths=response_lengths,
        micro_batch_size=work.prompts,
        lr=1e-3,
        epochs=2,
    )


def one_turn(config: PpoBenchmark, side: str, job: PpoJob, folder: Path) -> dict[str, Any]:
    worker = starter(config, side, job, folder)()
    try:
        return worker.turn()
    finally:
        worker.close()


def pairs(name: str, ours: dict[str, float], theirs: dict[str, float], tokens: int) -> list[Compared]:
    """The numbers that are to agree, each as both sides log it."""
    # What TRL logs as the entropy is minus the log-probability of the response.
    ours = {**ours, "rollout/sequence_logprob": -ours["rollout/sequence_logprob"]}
    # TRL whitens with a variance that divides by n - 1, ours by n: the policy loss is linear in the advantages.
    ours["ppo/policy_loss"] *= math.sqrt((tokens - 1) / tokens)
    rows = LOGPROBS + LOSSES if name == "full" else LOGPROBS
    return [Compared(f"{label}, {name} responses", ours[own], theirs[other]) for label, own, other in rows]
