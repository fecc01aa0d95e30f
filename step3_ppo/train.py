"""Step 3: PPO from a score. Run by `deepspeed --module step3_ppo.train --config FILE`, or by `python -m`."""

import json
import time
from collections import Counter
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
from step3_ppo.rollout import PhaseTimer, Rollout, make_experience, row_seeds, sample_responses
from training import distributed
from training.checkpoint import export
from training.config import DataConfig
from training.config_files import load_config, save_config
from training.data import Batch, collate, sample_index
from training.examples import PromptExample, build_demonstrations, build_prompts, describe_counts
from training.loop import own_steps, peak_memory_gib
from training.masking import masked_sum
from training.metrics import MetricsLogger, write_json
from training.models import load_tokenizer
from training.rewards import AdaptiveKLController, FixedKLController

KLController = FixedKLController | AdaptiveKLController


def main() -> None:
    started = time.monotonic()
    config = load_config(PpoConfig)
    distributed.start(config.run.timeout_minutes)
    distributed.seed_everything(config.run.seed, rank=0)  # ranks must draw the same new weights
    output = Path(config.run.output_dir)
    if distributed.is_main():
        save_config(config, output / "config.yaml")

    tokenizer = load_tokenizer(config.actor)
    prompts, held_out, counts = build_prompts(config.data, tokenizer)
    demonstrations = ptx_batches(config, tokenizer) if config.ptx.coefficient > 0 else None
    models = load_models(config, tokenizer)
    distributed.seed_everything(config.run.seed, distributed.rank())
    average = MovingAverage(models.actor.module, config.ema_decay) if config.ema_decay > 0 else None
    controller = kl_controller(config)
    phase_seconds: Counter[str] = Counter()
    logger = MetricsLogger(output, config.iterations, config.run, distributed.is_main())
    logger.event(describe_counts(counts))

    before = sample_held_out(models, held_out, config)
    logger.log(0, held_out_metrics(before), tokens=0)
    for iteration in range(config.iterations):
        timer = PhaseTimer()
        rollout = collect(models, prompts, config, iteration, timer)
        if iteration == 0:
            logger.event(start_up_check(models, rollout, config, timer))
        experience, kl = make_experience(rollout, config, controller.coefficient)
        with timer.phase("train"):
            metrics = update(models, experience, config, iteration, demonstrations, average)
        metrics = rollout_metrics(rollout, kl, controller.coefficient) | models.generator.metrics() | metrics
        controller.update(metrics["rollout/kl"], config.responses)
        phase_seconds.update(timer.seconds)
        tokens = distributed.sum_over_ranks(rollout.batch.attention_mask.sum())
        metrics = metrics | phase_metrics(timer) if (iteration + 1) % config.run.log_every == 0 else {}
        if config.run.eval_every and (iteration + 1) % config.run.eval_every == 0:
            metrics |= held_out_metrics(sample_held_out(models, held_out, config))
        logger.log(iteration + 1, metrics, tokens=int(tokens))
    after = sample_held_out(models, held_out, config)
    logger.log(config.iterations, held_out_metrics(after), tokens=0)

    export(models.actor, output / "final" / "actor", models.tokenizer, config.actor, ema_weights(average))
    if models.critic is not None:
        export(models.critic, output / "final" / "critic", models.tokenizer, critic_source(config))
    results = compare(before, after, models.score_scale) | {
        "data": counts,
        "iterations": config.iterations,
        "tokens": logger.tokens,
        "seconds": time.monotonic() - started,
        "phase_seconds": dict(phase_seconds),
        "peak_memory_gib": peak_memory_gib(),
    }
    if distributed.is_main():
        write_samples(output / "samples.jsonl", before, after, config.samples_shown)
        write_json(output / "results.json", results)
    logger.event(
        f"held-out score {results['score_before']['mean']:.3f} -> {results['score_after']['mean']:.3f}, "
        f"win rate {results['win_rate']['value']:.0%}, KL {results['kl']:.2f} nats; saved {output / 'final'}"
    )
    logger.close()
    distributed.stop()


def collect(
    models: Models, prompts: list[PromptExample], config: PpoConfig, iteration: int, timer: PhaseTimer
) -> Rollout:
    """This rank's share of the iteration's prompts, answered and scored."""
    share = config.rollout_batch_size // distributed.world_size()
    first = iteration * config.rollout_batch_size + distributed.rank() * share
    positions = range(first, first + share)
    chosen = [prompts[sample_index(position, len(prompts), config.run.seed)] for position in positions]
    seeds = row_seeds(config.run.seed, "rollout", positions, config.samples_per_prompt)
    return sample_responses(
        models, chosen, config.sampling, seeds, config.samples_per_prompt, config.micro_batch_size, timer
    )


def kl_controller(config: PpoConfig) -> KLController:
    if config.kl.adaptive:
        return AdaptiveKLController(config.kl.coefficient, config.kl.target, config.kl.horizon)
    return FixedKLController(config.kl.coefficient)


def ptx_batches(config: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Batch]]:
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
        seed=config.run.seed,
        num_steps=config.iterations * config.steps_per_iteration,
    )


def rollout_metrics(rollout: Rollout, kl: torch.Tensor, kl_coefficient: float) -> dict[str, float]:
    """What the rollout says of the actor, averaged over all ranks."""
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
    totals = distributed.sum_over_ranks(torch.stack([value.double() for value in sums.values()]))
    responses = len(rollout.completions) * distributed.world_size()
    metrics = {name: total / responses for name, total in zip(sums, totals.tolist(), strict=True)}
    metrics["rollout/logprob_gap"] /= max(metrics["rollout/response_tokens"], 1e-8)  # per token, not per response
    variance = metrics.pop("rollout/score_squared") - metrics["rollout/score_mean"] ** 2
    return metrics | {
        "rollout/score_std": max(variance, 0.0) ** 0.5,
        "rollout/kl_coefficient": kl_coefficient,
        "rollout/logprob_gap_p99": rollout.worst_gap,
    }


def phase_metrics(timer: PhaseTimer) -> dict[str, float]:
    """Seconds of each phase, on the main rank."""
    return {f"seconds/{name}": seconds for name, seconds in timer.seconds.items()}


def ema_weights(average: MovingAverage | None) -> dict[str, torch.Tensor] | None:
    return None if average is None else average.whole_weights()


def write_samples(path: Path, before: list[Sample], after: list[Sample], count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for phase, samples in (("before", before), ("after", after)):
            for sample in samples[:count]:
                file.write(json.dumps({"phase": phase, **vars(sample)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    distributed.run(main)
