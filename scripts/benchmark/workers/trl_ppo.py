"""A worker that runs iterations of TRL's PPOTrainer: `scripts.benchmark.ppo` starts it."""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scripts.benchmark.turns import Turns
from scripts.benchmark.workers.forced import (
    ForcedLengths,
    causal_lm,
    common_options,
    lora,
    peer,
    scalar_model,
    tokenizer,
)
from scripts.benchmark.workloads import PAD, PpoJob


class NobodyAsks(Exception):
    """Leaves `PPOTrainer.train`."""


class PpoTurns:
    """Pauses `PPOTrainer.train` between iterations, which it fetches a batch for, and tells its phases apart."""

    def __init__(self, turns: Turns, job: PpoJob) -> None:
        self.turns, self.job = turns, job
        self.metrics: list[dict[str, float]] = []

    def attach(self, trainer: Any, module: Any) -> None:
        trainer.dataloader = self
        trainer.log = lambda metrics, *_: self.metrics.append(dict(metrics))
        self.forced = ForcedLengths(trainer.policy_model, self.job)
        generate, accumulate = module.batch_generation, trainer.accelerator.accumulate

        def batch_generation(*args: Any) -> Any:
            self.turns.phase("generate")
            result = generate(*args)
            self.turns.phase("score")
            return result

        def accumulating(*args: Any) -> Any:
            self.turns.phase("train")
            return accumulate(*args)

        module.batch_generation, trainer.accelerator.accumulate = batch_generation, accumulating

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        size = len(self.job.prompt_ids) // self.job.parts
        while self.turns.begin("other"):
            self.forced.start()
            self.metrics.clear()
            for start in range(0, len(self.job.prompt_ids), size):
                yield {"input_ids": left_padded(self.job.prompt_ids[start : start + size])}
                self.turns.phase("other")
            responses = [self.forced.drawn[tuple(ids)] for ids in self.job.prompt_ids]
            self.turns.end(
                response_tokens=[len(response) for drawn in responses for response in drawn],
                responses=responses,
                metrics={name: sum(m[name] for m in self.metrics) / len(self.metrics) for name in self.metrics[0]},
            )
        raise NobodyAsks


def critic(job: PpoJob) -> Any:
    """The value model. TRL has no adapters for it, so they are put into the model itself; its head learns as well."""
    model = scalar_model(job.reward, job.precision)
    if job.lora_rank:
        peer("peft").inject_adapter_in_model(lora(job), model)
        model.score.requires_grad_(True)
    return model


def left_padded(prompts: list[list[int]]) -> Tensor:
    """[prompts, time] ids."""
    width = max(map(len, prompts))
    return torch.tensor([[PAD] * (width - len(ids)) + ids for ids in prompts])


def main() -> None:
    turns = Turns()
    job = PpoJob(**turns.job)
    module, datasets = peer("trl.experimental.ppo.ppo_trainer"), peer("datasets")
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(NobodyAsks):
        rows = job.rows // job.parts
        config = module.PPOConfig(
            **common_options(job, folder),
            num_ppo_epochs=job.epochs,
            num_mini_batches=1,
            response_length=job.max_response,
            local_rollout_forward_batch_size=min(job.chunk_size, rows),
            total_episodes=10**6 * rows,
            num_sample_generations=0,
            temperature=1.0,
        )
        trainer = module.PPOTrainer(
            args=config,
            processing_class=tokenizer(job.actor),
            model=causal_lm(job.actor, job.precision),
            # With adapters TRL switches them off for the reference.
            ref_model=None if job.lora_rank else causal_lm(job.reference, job.precision),
            peft_config=lora(job),
            reward_model=scalar_model(job.reward, job.precision),
            value_model=critic(job),
            train_dataset=datasets.Dataset.from_list([{"input_ids": ids} for ids in job.prompt_ids]),
        )
        PpoTurns(turns, job).attach(trainer, module)
        trainer.train()


if __name__ == "__main__":
    main()
