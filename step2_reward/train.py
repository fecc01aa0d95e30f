"""Step 2: a pairwise reward model. Run by `deepspeed --module step2_reward.train --config FILE`, or by `python -m`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from step2_reward.config import RewardConfig
from step2_reward.evaluate import Comparisons, compare_held_out, normalization
from training import distributed
from training.accounting import Accounting, peak_memory_gib
from training.checkpoint import Checkpoints, RunState
from training.config_files import load_config
from training.data import PairBatch, collate_pairs, num_steps
from training.engine import DTYPES, loading_options, train_engine
from training.examples import build_preferences, describe_counts, digest
from training.export import export
from training.forward import reward_scores
from training.loop import fit, named, own_steps, skipped_steps
from training.losses import pairwise_reward_loss
from training.metrics import MetricsLogger
from training.models import load_scalar_model, load_tokenizer
from training.run import has_finished, running, write_results
from training.supervision import Supervisor


def main() -> None:
    config = load_config(RewardConfig)
    if has_finished(config):
        return
    with running(config) as supervisor:
        train(config, supervisor)


def train(config: RewardConfig, supervisor: Supervisor) -> None:
    output = Path(config.run.output_dir)
    tokenizer = load_tokenizer(config.model)
    train_data, held_out, counts = build_preferences(config.data, tokenizer)
    total_steps = num_steps(len(train_data), config.train_batch_size, config.epochs, config.max_steps)
    distributed.announce(describe_counts(counts))

    model = load_scalar_model(
        config.model,
        DTYPES[config.engine.precision],
        loading_options(config.engine, config.engine.zero_stage),
        head="normal",
    )
    engine = train_engine(
        model, config.engine, config.optim, train_batch_size=config.train_batch_size, total_steps=total_steps
    )
    distributed.seed_everything(config.run.seed, distributed.rank())

    sizes = {"micro_batch_size": config.micro_batch_size, "micro_batch_tokens": config.micro_batch_tokens}
    collate_fn = partial(collate_pairs, pad_id=tokenizer.pad_token_id)
    compare = partial(compare_held_out, engine, held_out, collate_fn, **sizes)

    checkpoints = Checkpoints(config, {"model": engine}, supervisor, data=digest(train_data))
    start = checkpoints.restore() or RunState(step=0)
    logger = MetricsLogger(output, total_steps, config.run, distributed.is_main(), start.values.get("log"))
    skipped = skipped_steps(config, start.values.get("skipped", 0))
    accounting = Accounting(DTYPES[config.engine.precision], start.values.get("work"))
    before = Comparisons(**start.values["before"]) if start.values else compare()
    if start.step == 0:
        logger.log(0, named("eval", before.metrics()), tokens=0)

    def after_step(step: int, evaluated: Mapping[str, float]) -> None:
        def state() -> RunState:
            values = {
                "log": logger.state(step),
                "work": accounting.state(),
                "skipped": skipped.in_a_row,
                "before": vars(before),
            }
            return RunState(step, values, metric=evaluated["accuracy"] if evaluated else None)

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
        partial(preference_loss, centring=config.centring, use_margins=config.use_margins),
        lambda pairs: pairs.weights.sum(),
        logger,
        log_every=config.run.log_every,
        evaluate=lambda: compare().metrics(),
        eval_every=config.run.eval_every,
        start_step=start.step,
        accounting=accounting,
        skipped=skipped,
        after_step=after_step,
    )
    checkpoints.close()
    supervisor.progress("evaluate", total_steps)
    after = compare()
    logger.log(total_steps, named("eval", after.metrics()), tokens=0)

    if config.normalize:
        model.gain, model.bias = normalization(after, model.gain, model.bias)
    supervisor.progress("export", total_steps)
    export(engine, output / "final", tokenizer, config.model)
    results = results_of(before, after) | {
        "normalization": {"gain": model.gain, "bias": model.bias},
        "data": counts,
        "steps": total_steps,
        "tokens": logger.tokens,
        "seconds": logger.seconds,
        "peak_memory_gib": peak_memory_gib(),
    }
    write_results(config, results)
    logger.event(f"held-out accuracy {before.accuracy:.3f} -> {after.accuracy:.3f}; saved {output / 'final'}")
    logger.close()


def preference_loss(
    engine: torch.nn.Module, pairs: PairBatch, denominator: Tensor, *, centring: float, use_margins: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry loss of the micro-batch's pairs, divided by `denominator`; and how many pairs are in order."""
    scores = reward_scores(engine, pairs.batch)
    loss = pairwise_reward_loss(
        scores,
        pairs.better,
        pairs.worse,
        pairs.weights,
        denominator,
        margins=pairs.margins if use_margins else None,
        centring=centring,
    )
    in_order = (scores[pairs.better] > scores[pairs.worse]) * pairs.weights
    return loss, {"accuracy": in_order.sum().detach()}


def results_of(before: Comparisons, after: Comparisons) -> dict:
    """What `results.json` says about the held-out preferences."""
    return {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "scores_chosen": after.chosen,
        "scores_rejected": after.rejected,
        "accuracy_by_length_difference": after.accuracy_by_length_difference(),
        "calibration": after.calibration(),
    }


if __name__ == "__main__":
    distributed.run(main)
