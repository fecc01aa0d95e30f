"""Step 1: supervised fine-tuning. Run by `deepspeed --module step1_sft.train --config FILE`, or by `python -m`."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step1_sft.config import SftConfig
from training import distributed
from training.accounting import Accounting, peak_memory_gib
from training.checkpoint import Checkpoints, RunState
from training.config_files import load_config
from training.data import Batch, collate, num_steps
from training.engine import DTYPES, evaluation_mode, loading_options, train_engine
from training.examples import TokenizedDataset, build_demonstrations, describe_counts, digest
from training.export import export
from training.forward import response_logprobs
from training.loop import fit, named, own_held_out, own_steps, skipped_steps
from training.losses import sft_loss
from training.masking import masked_sum
from training.metrics import MetricsLogger
from training.models import load_causal_lm, load_tokenizer
from training.run import has_finished, running, write_results
from training.supervision import Supervisor


def main() -> None:
    config = load_config(SftConfig)
    if has_finished(config):
        return
    with running(config) as supervisor:
        train(config, supervisor)


def train(config: SftConfig, supervisor: Supervisor) -> None:
    output = Path(config.run.output_dir)
    tokenizer = load_tokenizer(config.model)
    train_data, held_out, counts = build_demonstrations(config.data, tokenizer, loss_on=config.loss_on)
    total_steps = num_steps(len(train_data), config.train_batch_size, config.epochs, config.max_steps)
    distributed.announce(describe_counts(counts))

    model = load_causal_lm(
        config.model, DTYPES[config.engine.precision], loading_options(config.engine, config.engine.zero_stage)
    )
    engine = train_engine(
        model, config.engine, config.optim, train_batch_size=config.train_batch_size, total_steps=total_steps
    )
    distributed.seed_everything(config.run.seed, distributed.rank())

    sizes = {"micro_batch_size": config.micro_batch_size, "micro_batch_tokens": config.micro_batch_tokens}
    collate_fn = partial(collate, pad_id=tokenizer.pad_token_id)
    evaluate = partial(held_out_loss, engine, held_out, collate_fn, **sizes)

    checkpoints = Checkpoints(config, {"model": engine}, supervisor, data=digest(train_data))
    start = checkpoints.restore() or RunState(step=0)
    logger = MetricsLogger(output, total_steps, config.run, distributed.is_main(), start.values.get("log"))
    skipped = skipped_steps(config, start.values.get("skipped", 0))
    accounting = Accounting(DTYPES[config.engine.precision], start.values.get("work"))
    before = start.values.get("before") or evaluate()
    if start.step == 0:
        logger.log(0, named("eval", before), tokens=0)

    def after_step(step: int, evaluated: Mapping[str, float]) -> None:
        def state() -> RunState:
            values = {
                "log": logger.state(step),
                "work": accounting.state(),
                "skipped": skipped.in_a_row,
                "before": before,
            }
            return RunState(step, values, metric=-evaluated["loss"] if evaluated else None)

        checkpoints.after_step(step, state)

    fit(
        engine,
        own_steps(
            train_data,
            collate_fn,
            train_batch_size=config.train_batch_size,
            **sizes,
            seed=config.run.seed,
            start_step=start.step,
            num_steps=total_steps,
        ),
        demonstration_loss,
        lambda batch: batch.response_mask.sum(),
        logger,
        log_every=config.run.log_every,
        evaluate=evaluate,
        eval_every=config.run.eval_every,
        start_step=start.step,
        accounting=accounting,
        skipped=skipped,
        after_step=after_step,
    )
    checkpoints.close()
    supervisor.progress("evaluate", total_steps)
    after = evaluate()
    logger.log(total_steps, named("eval", after), tokens=0)

    supervisor.progress("export", total_steps)
    export(engine, output / "final", tokenizer, config.model)
    results: dict[str, Any] = {f"{name}_before": value for name, value in before.items()}
    results |= {f"{name}_after": value for name, value in after.items()}
    results |= {
        "data": counts,
        "steps": total_steps,
        "tokens": logger.tokens,
        "seconds": logger.seconds,
        "peak_memory_gib": peak_memory_gib(),
    }
    write_results(config, results)
    logger.event(f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f}; saved {output / 'final'}")
    logger.close()


def demonstration_loss(engine: torch.nn.Module, batch: Batch, denominator: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the response tokens, divided by `denominator`."""
    logprobs, _ = response_logprobs(engine, batch)
    return sft_loss(logprobs, batch.response_mask, denominator), {}


def held_out_loss(
    engine: torch.nn.Module, dataset: TokenizedDataset, collate_fn: partial, **sizes: int | None
) -> dict[str, float]:
    """Mean loss per response token over the held-out demonstrations, and its perplexity."""
    total = torch.zeros(2, device=distributed.device())
    with evaluation_mode(engine):
        for batch in own_held_out(dataset, collate_fn, **sizes):
            logprobs, _ = response_logprobs(engine, batch)
            total += torch.stack([-masked_sum(logprobs, batch.response_mask), batch.response_mask.sum()])
    negative_logprob, count = distributed.sum_over_ranks(total).tolist()
    loss = negative_logprob / max(count, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}


if __name__ == "__main__":
    distributed.run(main)
