"""Step 1: supervised fine-tuning. Run by `deepspeed --module step1_sft.train --config FILE`, or by `python -m`."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step1_sft.config import SftConfig
from training import distributed
from training.checkpoint import export
from training.config_files import load_config, save_config
from training.data import Batch, collate, num_steps
from training.engine import DTYPES, evaluation_mode, loading_options, train_engine
from training.examples import TokenizedDataset, build_demonstrations, describe_counts
from training.forward import response_logprobs
from training.loop import fit, named, own_held_out, own_steps, peak_memory_gib
from training.losses import sft_loss
from training.masking import masked_sum
from training.metrics import MetricsLogger, write_json
from training.models import load_causal_lm, load_tokenizer


def main() -> None:
    started = time.monotonic()
    config = load_config(SftConfig)
    distributed.start(config.run.timeout_minutes)
    distributed.seed_everything(config.run.seed, rank=0)  # ranks must draw the same new weights
    output = Path(config.run.output_dir)
    if distributed.is_main():
        save_config(config, output / "config.yaml")

    tokenizer = load_tokenizer(config.model)
    train_data, held_out, counts = build_demonstrations(config.data, tokenizer, loss_on=config.loss_on)
    total_steps = num_steps(len(train_data), config.train_batch_size, config.epochs, config.max_steps)
    logger = MetricsLogger(output, total_steps, config.run, distributed.is_main())
    logger.event(describe_counts(counts))

    model = load_causal_lm(
        config.model, DTYPES[config.engine.precision], loading_options(config.engine, config.engine.zero_stage)
    )
    engine = train_engine(
        model,
        config.engine,
        config.optim,
        micro_batch_size=config.micro_batch_size,
        train_batch_size=config.train_batch_size,
        total_steps=total_steps,
    )
    distributed.seed_everything(config.run.seed, distributed.rank())

    collate_fn = partial(collate, pad_id=tokenizer.pad_token_id)
    evaluate = partial(held_out_loss, engine, held_out, collate_fn, config.micro_batch_size)
    before = evaluate()
    logger.log(0, named("eval", before), tokens=0)
    fit(
        engine,
        own_steps(
            train_data,
            collate_fn,
            train_batch_size=config.train_batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=config.run.seed,
            num_steps=total_steps,
        ),
        demonstration_loss,
        lambda batch: batch.response_mask.sum(),
        logger,
        log_every=config.run.log_every,
        evaluate=evaluate,
        eval_every=config.run.eval_every,
    )
    after = evaluate()
    logger.log(total_steps, named("eval", after), tokens=0)

    export(engine, output / "final", tokenizer, config.model)
    results: dict[str, Any] = {f"{name}_before": value for name, value in before.items()}
    results |= {f"{name}_after": value for name, value in after.items()}
    results |= {
        "data": counts,
        "steps": total_steps,
        "tokens": logger.tokens,
        "seconds": time.monotonic() - started,
        "peak_memory_gib": peak_memory_gib(),
    }
    if distributed.is_main():
        write_json(output / "results.json", results)
    logger.event(f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f}; saved {output / 'final'}")
    logger.close()
    distributed.stop()


def demonstration_loss(engine: torch.nn.Module, batch: Batch, denominator: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the response tokens, divided by `denominator`."""
    logprobs, _ = response_logprobs(engine, batch)
    return sft_loss(logprobs, batch.response_mask, denominator), {}


def held_out_loss(
    engine: torch.nn.Module, dataset: TokenizedDataset, collate_fn: partial, micro_batch_size: int
) -> dict[str, float]:
    """Mean loss per response token over the held-out demonstrations, and its perplexity."""
    total = torch.zeros(2, device=distributed.device())
    with evaluation_mode(engine):
        for batch in own_held_out(dataset, collate_fn, micro_batch_size):
            logprobs, _ = response_logprobs(engine, batch)
            total += torch.stack([-masked_sum(logprobs, batch.response_mask), batch.response_mask.sum()])
    negative_logprob, count = distributed.sum_over_ranks(total).tolist()
    loss = negative_logprob / max(count, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}


if __name__ == "__main__":
    distributed.run(main)
