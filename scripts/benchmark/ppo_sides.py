"""What both sides of the PPO benchmark are asked to do, and by which programs."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from scripts.benchmark.peers import PEERS_PYTHON, has_trl
from scripts.benchmark.sides import Start
from scripts.benchmark.turns import Worker, WorkerFailed
from scripts.benchmark.workloads import WORKLOADS, PpoJob, Workload, draw_lengths, draw_prompts, write_models
from training.config import check_range

BASELINES = ("trl", "trl-tuned")
Side = Literal["ours", "ours-bf16", "trl", "trl-tuned"]


@dataclass(frozen=True, kw_only=True)
class PpoBenchmark:
    """Seconds of an iteration of PPO (workload C: of RLOO), ours beside TRL's."""

    workload: Literal["A", "B", "C", "D"] = "D"
    """A: prompts and responses of 256 tokens. B: lengths as in chats. C: those in groups of 8. D: short, for a CPU."""
    model: str | None = None
    """Folder of a causal language model in the Hugging Face layout: actor, reference, and the body of the other two."""
    shape: Literal["tiny", "small", "135m", "1b", "3b", "8b"] | None = None
    """In place of a model: random weights in the sizes of SmolLM2-135M, Llama-3.2-1B and 3B, or Llama-3.1-8B; small has
    24M parameters."""
    layers: int | None = None
    """Layers of a model with random weights; None takes the shape's."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of all models. TRL then trains bf16 weights; ours keeps float32 ones beside them."""
    sides: tuple[Side, ...] = ()
    """What to run; empty means all. ours-bf16 is ours in bf16 whatever `precision` says. trl is TRL as it comes, with
    one pass over the rollout; trl-tuned has the batches with which it is fastest."""
    repeats: int = 3
    """Rounds in which every side has a turn. More give steadier medians."""
    prompts: int | None = None
    """Number of prompts; None takes the workload's, as the next two."""
    prompt_tokens: int | None = None
    """Longest prompt; the shortest one moves with it."""
    response_tokens: int | None = None
    """Longest response; the mean moves with it."""
    micro_batch_size: int = 8
    """Responses of one forward and backward pass, ours and TRL's as it comes, whose default this is."""
    tuned_micro_batch_size: int | None = None
    """The same for trl-tuned; None finds it, and the largest part of the batch that fits into memory."""
    lora_rank: int = 0
    """Rank of adapters for actor and critic, of all sides, in place of full fine-tuning; 0 for none."""
    ours: tuple[str, ...] = ()
    """More options of step 3 for our side, as in `micro_batch_tokens=2048 engine.zero_stage=2`."""
    interleaved: bool | None = None
    """Keep all sides in memory and let them take turns; None does so on a CPU. Else one runs after the other."""
    peer_python: str = PEERS_PYTHON
    """Interpreter that has TRL: .venv-peers, or this one where that is missing."""
    check: bool = False
    """Compare the losses of both sides, given the same responses, in place of their times."""
    grow: bool = False
    """Time 1, 2, 4 and 8 times the responses, the tokens and the layers, in place of the workload, and plot them."""
    seed: int = 1
    """Seed of weights, lengths and prompts."""
    output: str | None = None
    """File for all figures as JSON; None writes none."""

    def __post_init__(self) -> None:
        if not self.check and (self.model is None) == (self.shape is None):
            raise ValueError("model and shape are both given or both missing: give one of them")
        if self.layers is not None and self.shape is None:
            raise ValueError("layers belongs to a shape: leave it out with a model")
        check_range(self, "layers", "repeats", "prompts", "prompt_tokens", "micro_batch_size", low=1)
        check_range(self, "response_tokens", low=2)
        wrong = [option for option in self.ours if "=" not in option]
        if wrong:
            raise ValueError(f"ours has {wrong[0]}: write name=value, as in micro_batch_tokens=2048")

    @property
    def work(self) -> Workload:
        """The workload, with what the options change."""
        usual = WORKLOADS[self.workload]
        prompt, response = self.prompt_tokens or usual.max_prompt, self.response_tokens or usual.max_response
        return replace(
            usual,
            prompts=self.prompts or usual.prompts,
            min_prompt=max(1, prompt * usual.min_prompt // usual.max_prompt),
            max_prompt=prompt,
            mean_response=max(1, response * usual.mean_response // usual.max_response),
            max_response=response,
        )


def chosen_sides(config: PpoBenchmark) -> list[str]:
    """Those asked for; else all that there are, without TRL where it is not installed."""
    installed = has_trl(config.peer_python)
    if not config.sides:
        ours = ["ours"] if config.precision == "bf16" else ["ours", "ours-bf16"]
        if not installed:
            print(
                f"{config.peer_python} has no TRL, so ours runs alone: see scripts/benchmark/peers.sh", file=sys.stderr
            )
        return [*ours, *BASELINES] if installed else ours
    if not installed and set(BASELINES) & set(config.sides):
        raise ValueError(
            f"{config.peer_python} has no TRL: run `bash scripts/benchmark/peers.sh`, or choose other sides"
        )
    return list(config.sides)


def make_job(config: PpoBenchmark, folder: Path) -> PpoJob:
    """Models, written to `folder`, prompts and lengths."""
    models = write_models(folder, config.model, config.shape, config.layers, config.seed)
    prompt_lengths, response_lengths = draw_lengths(config.work, config.seed)
    vocab_size = AutoConfig.from_pretrained(models["actor"]).vocab_size
    return PpoJob(
        **models,
        precision=config.precision,
        prompt_ids=draw_prompts(prompt_lengths, vocab_size, config.seed),
        response_lengths=response_lengths,
        micro_batch_size=config.micro_batch_size,
        lora_rank=config.lora_rank,
        settings=[
            part for option in config.ours for part in (f"--{option.partition('=')[0]}", option.partition("=")[2])
        ],
    )


def job_of(side: str, job: PpoJob) -> PpoJob:
    if side == "ours-bf16":
        return replace(job, precision="bf16")
    return replace(job, tuned=side == "trl-tuned")


def starter(config: PpoBenchmark, side: str, job: PpoJob, folder: Path) -> Start:
    """What starts the side's worker."""
    if side in BASELINES:
        python, module = config.peer_python, "trl_ppo" if job.samples_per_prompt == 1 else "trl_groups"
    else:
        python, module = sys.executable, "ours_ppo"
    return lambda: Worker(python, f"scripts.benchmark.workers.{module}", asdict(job), folder / f"{side}.log")


def check_lengths(job: PpoJob, answer: Mapping[str, Any]) -> None:
    """Raises WorkerFailed if a side has not done the work that all of them are asked for."""
    wanted = sorted(length for lengths in job.response_lengths for length in lengths)
    if sorted(answer["response_tokens"]) != wanted:
        found = sum(answer["response_tokens"])
        raise WorkerFailed(f"its responses have {found} tokens, where {sum(wanted)} in other lengths were asked for")
