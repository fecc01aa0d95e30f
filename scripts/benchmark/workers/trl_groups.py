"""A worker that runs iterations of TRL's RLOOTrainer: `scripts.benchmark.ppo` starts it."""

import contextlib
import tempfile
from typing import Any

from transformers import TrainerCallback

from scripts.benchmark.turns import Turns
from scripts.benchmark.workers.forced import ForcedLengths, common_options, lora, peer, scalar_model, tokenizer
from scripts.benchmark.workloads import END, PpoJob


class NobodyAsks(Exception):
    """Leaves `RLOOTrainer.train`."""


class GroupTurns(TrainerCallback):
    """Pauses RLOOTrainer between optimizer steps, each of which has a rollout of its own."""

    def __init__(self, turns: Turns, job: PpoJob) -> None:
        self.turns, self.job = turns, job
        self.parts_left = 0

    def attach(self, trainer: Any) -> None:
        self.forced = ForcedLengths(trainer.model, self.job, END, self.turns.phase)
        make_batch = trainer._generate_and_score_completions

        def generate_and_score(inputs: Any) -> Any:
            batch = make_batch(inputs)
            self.turns.phase("train")
            return batch

        trainer._generate_and_score_completions = generate_and_score
        trainer.add_callback(self)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.parts_left == 0:
            if not self.turns.begin("other"):
                raise NobodyAsks
            self.forced.start()
            self.parts_left = self.job.parts

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.parts_left -= 1
        if self.parts_left == 0:
            lengths = [len(row) for ids in self.job.prompt_ids for row in self.forced.drawn[tuple(ids)]]
            self.turns.end(response_tokens=lengths, metrics={})
        else:
            self.turns.phase("other")


def main() -> None:
    turns = Turns()
    job = PpoJob(**turns.job)
    trl, datasets = peer("trl"), peer("datasets")
    # A space, because TRL glues the text of the response to it.
    prompts = [{"prompt": "".join(f"w{index} " for index in ids)} for ids in job.prompt_ids]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(NobodyAsks):
        config = trl.RLOOConfig(
            **common_options(job, folder),
            num_generations=job.samples_per_prompt,
            max_completion_length=job.max_response,
            max_steps=10**6,
            model_init_kwargs={"dtype": {"bf16": "bfloat16", "fp32": "float32"}[job.precision]},
            **({"gradient_checkpointing": False} if job.tuned else {}),
        )
        trainer = trl.RLOOTrainer(
            model=job.actor,
            reward_funcs=scalar_model(job.reward, job.precision),
            reward_processing_classes=tokenizer(job.reward),
            args=config,
            processing_class=tokenizer(job.actor),
            train_dataset=datasets.Dataset.from_list(prompts),
            peft_config=lora(job),
        )
        GroupTurns(turns, job).attach(trainer)
        trainer.train()


if __name__ == "__main__":
    main()
