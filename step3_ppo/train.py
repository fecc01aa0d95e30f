"""Step 3: PPO from a score. Run by `deepspeed --module step3_ppo.train --config FILE`, or by `python -m`."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from step3_ppo.check import start_up_check
from step3_ppo.config import PpoConfig
from step3_ppo.ema import MovingAverage
from step3_ppo.evaluate import Sample, compare, held_out_metrics, sample_held_out
from step3_ppo.models import Models, critic_source, load_models
from step3_ppo.ppo import update
from step3_ppo.progress import Progress
from step3_ppo.rollout import Rollout, make_experience, row_seeds, sample_responses
from training import distributed
from training.accounting import Accounting, peak_memory_gib
from training.checkpoint import Checkpoints, RunState
from training.config import DataConfig
from training.config_files import load_config
from training.data import Batch, collate, sample_index
from training.engine import DTYPES
from training.examples import PromptExample, build_demonstrations, build_prompts, describe_counts, digest
from training.export import export
from training.loop import own_steps, skipped_steps
from training.masking import masked_sum
from training.metrics import MetricsLogger
from training.models import load_tokenizer
from training.run import has_finished, running, write_results
from training.supervision import Supervisor


def main() -> None:
    config = load_config(PpoConfig)
    if has_finished(config):
        return
    with running(config) as supervisor:
        train(config, supervisor)


def train(config: PpoConfig, supervisor: Supervisor) -> None:
    output = Path(config.run.output_dir)
    tokenizer = load_tokenizer(config.actor)
    prompts, held_out, counts = build_prompts(config.data, tokenizer)
    distributed.announce(describe_counts(counts))
    models = load_models(config, tokenizer)
    distributed.seed_everything(config.run.seed, distributed.rank())
    average = MovingAverage(models.actor.module, config.ema_decay) if config.ema_decay > 0 else None

    checkpoints = Checkpoints(config, models.trained, supervisor, data=digest(prompts))
    start = checkpoints.restore() or RunState(step=0)
    progress = Progress.restored(start, config, average)
    skipped = skipped_steps(config, start.values.get("skipped", 0))
    actor_steps = progress.actor_steps + progress.updates.actor_steps
    demonstrations = ptx_batches(config, tokenizer, actor_steps) if config.ptx.coefficient > 0 else None
    logger = MetricsLogger(output, config.iterations, config.run, distributed.is_main(), start.values.get("log"))
    if not progress.before:
        progress.before = sample_held_out(models, held_out, config)
        logger.log(0, held_out_metrics(progress.before), tokens=0)

    def after_step(*, may_save: bool = False, metric: float | None = None) -> None:
        """Save, or stop if asked to: also half way through a rollout's updates, which then go on as they would have."""

        def state() -> RunState:
            log, work = logger.state(progress.iteration), accounting.state()
            return progress.state(average, metric, log=log, work=work, skipped=skipped.in_a_row)

        checkpoints.after_step(progress.iteration, state, may_save=may_save)

    accounting = Accounting(DTYPES[config.engine.precision], start.values.get("work"))
    clock = accounting.clock
    clock.lap()
    while progress.iteration < config.iterations:
        if progress.experience is None:
            supervisor.progress("rollout", progress.iteration)
            rollout = collect(models, prompts, config, progress.iteration, accounting)
            if progress.iteration == 0:
                logger.event(start_up_check(models, rollout, config, clock.seconds()))
            coefficient = progress.controller.coefficient
            progress.experience, kl = make_experience(rollout, config, coefficient)
            progress.metrics = rollout_metrics(rollout, kl, coefficient) | models.generator.metrics()
        with clock.phase("train"):
            metrics = update(
                models,
                progress.experience,
                config,
                progress.iteration,
                demonstrations,
                average,
                progress.updates,
                accounting,
                skipped,
                after_step,
            )
        metrics = progress.metrics | metrics
        tokens = progress.experience.batch.num_tokens
        progress.end_iteration(config.responses)

        step = progress.iteration
        evaluated: dict[str, float] = {}
        if config.run.eval_every and step % config.run.eval_every == 0:
            supervisor.progress("evaluate", step)
            with clock.phase("evaluate"):
                evaluated = held_out_metrics(sample_held_out(models, held_out, config))
        is_logged = step % config.run.log_every == 0 or evaluated
        logger.log(step, metrics | evaluated | accounting.metrics() if is_logged else {}, tokens=tokens)
        after_step(may_save=True, metric=evaluated.get("eval/score_mean"))
    checkpoints.close()
    supervisor.progress("evaluate", config.iterations)
    after = sample_held_out(models, held_out, config)
    logger.log(config.iterations, held_out_metrics(after), tokens=0)

    supervisor.progress("export", config.iterations)
    export(models.actor, output / "final" / "actor", models.tokenizer, config.actor, ema_weights(average))
    if models.critic is not None:
        export(models.critic, output / "final" / "critic", models.tokenizer, critic_source(config))
    results = compare(progress.before, after, models.score_scale) | {
        "data": counts,
        "iterations": config.iterations,
        "tokens": logger.tokens,
        "seconds": logger.seconds,
        "peak_memory_gib": peak_memory_gib(),
    }
    if distributed.is_main():
        write_samples(output / "samples.jsonl", progress.before, after, config.samples_shown)
    write_results(config, results)
    logger.event(
        f"held-out score {results['score_before']['mean']:.3f} -> {results['score_after']['mean']:.3f}, "
        f"win rate {results['win_rate']['value']:.0%}, KL {results['kl']:.2f} nats; saved {output / 'final'}"
    )
    logger.close()


def collect(
    models: Models,
    prompts: list[PromptExample],
    config: PpoConfig,
    iteration: int,
    accounting: Accounting | None = None,
) -> Rollout:
    """The iteration's prompts, answered and scored."""
    first = iteration * config.rollout_batch_size
    positions = range(first, first + config.rollout_batch_size)
    chosen = [prompts[sample_index(position, len(prompts), config.run.seed)] for position in positions]
    seeds = row_seeds(config.run.seed, "rollout", positions, config.samples_per_prompt)
    return sample_responses(models, chosen, config, seeds, config.samples_per_prompt, accounting)


def ptx_batches(config: PpoConfig, tokenizer: PreTrainedTokenizerBase, start_step: int) -> Iterator[list[Batch]]:
    """Step 1's demonstrations, as many per optimizer step as there are responses."""
    data = DataConfig(
        paths=config.ptx.paths,
        format=config.ptx.format,
        template=config.data.template,
        eval_size=0,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.data.max_response_tokens,
    )
    dataset, _, _ = build_demonstrations(data, tokenizer)
    return own_steps(
        dataset,
        partial(collate, pad_id=tokenizer.pad_token_id),
        train_batch_size=config.train_batch_size,
        micro_batch_size=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.run.seed,
        start_step=start_step,
        num_steps=config.iterations * config.steps_per_iteration,
    )


def rollout_metrics(rollout: Rollout, kl: torch.Tensor, kl_coefficient: float) -> dict[str, float]:
    """What the rollout says of the actor."""
    gap = (rollout.sampler_logprobs - rollout.logprobs).abs()
    sums = {
        "rollout/score_mean": rollout.scores.sum(),
        "rollout/score_squared": rollout.scores.double().square().sum(),
        "rollout/kl": rollout.sequence_kl.sum(),
        "rollout/kl_penalty": kl_coefficient * kl.sum(),
        "rollout/response_tokens": rollout.mask.sum(),
        "rollout/eos_share": rollout.finished.sum(),
        "rollout/logprob_gap": masked_sum(gap, rollout.mask),
        "rollout/sequence_logprob": masked_sum(rollout.logprobs, rollout.mask),
    }
    metrics = {name: float(value) / len(rollout.completions) for name, value in sums.items()}
    metrics["rollout/logprob_gap"] /= max(metrics["rollout/response_tokens"], 1e-8)  # per token, not per response
    variance = metrics.pop("rollout/score_squared") - metrics["rollout/score_mean"] ** 2
    return metrics | {
        "rollout/score_std": max(variance, 0.0) ** 0.5,
        "rollout/kl_coefficient": kl_coefficient,
        "rollout/logprob_gap_p99": rollout.worst_gap,
    }


def ema_weights(average: MovingAverage | None) -> dict[str, torch.Tensor] | None:
    return None if average is None else average.whole_weights()


def write_samples(path: Path, before: list[Sample], after: list[Sample], count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for phase, samples in (("before", before), ("after", after)):
            for sample in samples[:count]:
                file.write(json.dumps({"phase": phase, **vars(sample)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    distributed.run(main)
