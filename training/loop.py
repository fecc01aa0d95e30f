"""The supervised loop of steps 1 and 2."""

import resource
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import deepspeed
import torch
from torch import Tensor

from training.data import Batch, PairBatch, eval_batches, train_batches
from training.distributed import device, max_over_ranks, rank, sum_over_ranks, world_size
from training.engine import backward_and_step, gradient_norm
from training.examples import PreferenceDataset, TokenizedDataset
from training.metrics import MetricsLogger

Micro = TypeVar("Micro", Batch, PairBatch)
LossFunction = Callable[[Any, Any, Tensor], tuple[Tensor, Mapping[str, Tensor]]]


def fit(
    engine: deepspeed.DeepSpeedEngine,
    steps: Iterable[list[Micro]],
    loss_fn: LossFunction,
    count_fn: Callable[[Micro], Tensor],
    logger: MetricsLogger,
    *,
    log_every: int,
    evaluate: Callable[[], Mapping[str, float]],
    eval_every: int = 0,
    start_step: int = 0,
) -> None:
    """Train `engine` on each step's micro-batches.

    Args:
        engine: what to train.
        steps: for each optimizer step, this rank's micro-batches; as many on every rank.
        loss_fn: (engine, micro-batch, denominator) -> loss, a sum over the micro-batch divided by the denominator; and
            sums to log, which are divided by the same count.
        count_fn: how many terms a micro-batch adds to the sum: response tokens, or weights of pairs. The denominator is
            their total over all micro-batches and ranks, so neither changes what is learnt.
        logger: receives `train/...` every `log_every` steps and `eval/...` every `eval_every` (0: never).
    """
    for step, micro_batches in enumerate(steps, start=start_step + 1):
        micro_batches = [micro_batch.to(device()) for micro_batch in micro_batches]
        denominator = sum_over_ranks(torch.stack([count_fn(micro_batch) for micro_batch in micro_batches]).sum())
        sums: dict[str, Tensor] = {}
        lr = engine.get_lr()[0]
        for micro_batch in micro_batches:
            loss, extra = loss_fn(engine, micro_batch, denominator.clamp(min=1e-8))
            backward_and_step(engine, loss)
            for name, value in {"loss": loss.detach() * denominator, **extra}.items():
                sums[name] = sums.get(name, torch.zeros((), device=device())) + value
        tokens = sum_over_ranks(torch.tensor(float(sum(micro_batch.num_tokens for micro_batch in micro_batches))))
        metrics = {}
        if step % log_every == 0 or step == 1:
            metrics = named("train", {name: float(sum_over_ranks(value) / denominator) for name, value in sums.items()})
            metrics |= {"train/lr": lr, "train/grad_norm": gradient_norm(engine)}
        if eval_every and step % eval_every == 0:
            metrics |= named("eval", evaluate())
        logger.log(step, metrics, tokens=int(tokens))


def own_steps(
    dataset: TokenizedDataset | PreferenceDataset, collate_fn: Callable[[list[Any]], Micro], **schedule: int
) -> Iterator[list[Micro]]:
    """This process's share of `data.train_batches`, whose sizes, seed and number of steps are `schedule`."""
    return train_batches(dataset, collate_fn, rank=rank(), world_size=world_size(), **schedule)


def own_held_out(
    dataset: TokenizedDataset | PreferenceDataset, collate_fn: Callable[[list[Any]], Micro], micro_batch_size: int
) -> Iterator[Micro]:
    """This process's share of `data.eval_batches`, on its device."""
    batches = eval_batches(dataset, collate_fn, micro_batch_size=micro_batch_size, rank=rank(), world_size=world_size())
    return (batch.to(device()) for batch in batches)


def named(group: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as the log names them, `group/name`."""
    return {f"{group}/{name}": value for name, value in metrics.items()}


def peak_memory_gib() -> float:
    """Largest memory that any rank has used so far: of its GPU, or of its process where there is none."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return float(max_over_ranks(torch.tensor(peak)))
