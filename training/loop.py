"""The supervised loop of steps 1 and 2."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor

from training.accounting import Accounting, phase_of
from training.data import Batch, PairBatch, eval_batches, train_batches
from training.distributed import device, rank, sum_over_ranks, world_size
from training.engine import backward_and_step, gradient_norm
from training.examples import PreferenceDataset, TokenizedDataset
from training.metrics import MetricsLogger
from training.packing import repeated_tokens
from training.supervision import alive

Micro = TypeVar("Micro", Batch, PairBatch)
LossFunction = Callable[[Any, Any, Tensor], tuple[Tensor, Mapping[str, Tensor]]]


class SkippedSteps:
    """Counts optimizer steps whose gradient is not finite, and ends the run when too many follow each other."""

    def __init__(self, limit: int, folder: Path, in_a_row: int = 0) -> None:
        """
        Args:
            limit: how many may follow each other.
            folder: where what such steps were to learn from is put.
            in_a_row: how many there were last.
        """
        self.limit, self.folder, self.in_a_row = limit, folder, in_a_row

    def count(self, applied: bool, step: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Every rank must call this after each step, with the same answer.

        Args:
            applied: whether the step changed weights.
            step: its number, for the name of the file.
            tensors: called for what this rank was to learn from, by name.

        Raises:
            RuntimeError: there were too many.
        """
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if applied:
            return
        file = self.folder / f"step-{step:06d}-rank-{rank():05d}.safetensors"
        if self.in_a_row == 1 or self.in_a_row > self.limit:  # the first is the cause, the last has the final word
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors().items()}, file)
        if self.in_a_row > self.limit:
            raise RuntimeError(
                f"{self.in_a_row} steps in a row had a gradient that is not finite, and were left out; what they were "
                f"to learn from is in {self.folder}. Look for a broken example there, or lower the learning rate"
            )


def skipped_steps(config: Any, in_a_row: int = 0) -> SkippedSteps:
    """As the options of a stage have it."""
    # In fp16 the loss scale begins too high on purpose, and halves with each step that is left out.
    limit = config.run.max_skipped_steps + (20 if config.engine.precision == "fp16" else 0)
    return SkippedSteps(limit, Path(config.run.output_dir) / "skipped", in_a_row)


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
    accounting: Accounting | None = None,
    skipped: SkippedSteps | None = None,
    after_step: Callable[[int, Mapping[str, float]], None] = lambda step, evaluated: None,
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
        start_step: steps that were taken before those of `steps`.
        accounting: is told of what is computed, and makes metrics of it.
        skipped: is told of every step.
        after_step: called with the number of steps taken, and with what an evaluation after this step has found.
    """
    if accounting is not None:
        accounting.clock.lap()
    for step, micro_batches in enumerate(steps, start=start_step + 1):
        lengths = [batch_of(micro_batch).lengths for micro_batch in micro_batches]  # while they are in host memory
        logits = [batch_of(micro_batch).num_response_tokens for micro_batch in micro_batches]
        repeated = [repeated_tokens(b.input_ids, b.attention_mask) for b in map(batch_of, micro_batches)]
        micro_batches = [micro_batch.to(device()) for micro_batch in micro_batches]
        denominator = sum_over_ranks(torch.stack([count_fn(micro_batch) for micro_batch in micro_batches]).sum())
        sums: dict[str, Tensor] = {}
        lr, applied = engine.get_lr()[0], True
        for number, micro_batch in enumerate(micro_batches):
            ids = batch_of(micro_batch).input_ids
            if accounting is not None:
                sizes = lengths[number], logits[number]
                accounting.add_pass("train", engine, ids, *sizes, repeated=repeated[number], training=True)
            with phase_of(accounting, "train"):
                loss, extra = loss_fn(engine, micro_batch, denominator.clamp(min=1e-8))
                last = number == len(micro_batches) - 1
                applied = backward_and_step(engine, loss, last=last, stepping=phase_of(accounting, "optimizer"))
            for name, value in {"loss": loss.detach() * denominator, **extra}.items():
                sums[name] = sums.get(name, torch.zeros((), device=device())) + value
        if skipped is not None:
            skipped.count(applied, step, partial(tensors_of, micro_batches))
        tokens = sum_over_ranks(torch.tensor(float(sum(map(sum, lengths)))))
        metrics: dict[str, float] = {}
        evaluated: Mapping[str, float] = {}
        if step % log_every == 0 or step == 1 or not applied:
            metrics = named("train", {name: float(sum_over_ranks(value) / denominator) for name, value in sums.items()})
            metrics |= {"train/lr": lr, "train/grad_norm": gradient_norm(engine), "train/skipped": float(not applied)}
        if eval_every and step % eval_every == 0:
            with phase_of(accounting, "evaluate"):
                evaluated = evaluate()
            metrics |= named("eval", evaluated)
        if metrics and accounting is not None:
            metrics |= accounting.metrics()
        logger.log(step, metrics, tokens=int(tokens))
        after_step(step, evaluated)


def batch_of(micro_batch: Batch | PairBatch) -> Batch:
    """Its sequences."""
    return micro_batch.batch if isinstance(micro_batch, PairBatch) else micro_batch


def tensors_of(micro_batches: Sequence[Batch | PairBatch]) -> dict[str, Tensor]:
    """All tensors of the micro-batches, by number and name."""
    result: dict[str, Tensor] = {}
    for number, micro_batch in enumerate(micro_batches):
        parts = vars(micro_batch) | vars(batch_of(micro_batch))
        result |= {f"{number}/{name}": part for name, part in parts.items() if isinstance(part, Tensor)}
    return result


def own_steps(
    dataset: TokenizedDataset | PreferenceDataset, collate_fn: Callable[[list[Any]], Micro], **schedule: Any
) -> Iterator[list[Micro]]:
    """This process's share of `data.train_batches`, whose sizes, seed and number of steps are `schedule`."""
    return train_batches(dataset, collate_fn, rank=rank(), world_size=world_size(), **schedule)


def own_held_out(
    dataset: TokenizedDataset | PreferenceDataset, collate_fn: Callable[[list[Any]], Micro], **sizes: Any
) -> Iterator[Micro]:
    """This process's share of `data.eval_batches`, whose sizes of micro-batches are `sizes`, on its device."""
    for batch in eval_batches(dataset, collate_fn, rank=rank(), world_size=world_size(), **sizes):
        alive()
        yield batch.to(device())


def named(group: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as the log names them, `group/name`."""
    return {f"{group}/{name}": value for name, value in metrics.items()}
