"""A worker that runs passes of TRL's SFTTrainer or RewardTrainer: `scripts.benchmark.sft_reward` starts it."""

import contextlib
import tempfile
from typing import Any

from transformers import TrainerCallback

from scripts.benchmark.supervised import SupervisedJob
from scripts.benchmark.turns import Turns
from scripts.benchmark.workers.forced import peer, precision_options, tokenizer


class NobodyAsks(Exception):
    """Leaves the trainer's `train`."""


class Passes(TrainerCallback):
    """Pauses a trainer between passes over its data."""

    def __init__(self, turns: Turns, tokens: int) -> None:
        self.turns, self.tokens = turns, tokens

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.turns.begin("train"):
            raise NobodyAsks

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.turns.end(tokens=self.tokens)


def main() -> None:
    turns = Turns()
    job = SupervisedJob(**turns.job)
    trl, datasets = peer("trl"), peer("datasets")
    examples = [job.with_ends(example) for example in job.sequences]
    options: dict[str, Any] = {
        **precision_options(job.precision),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1000,
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.train_batch_size // job.micro_batch_size,
        "model_init_kwargs": {"dtype": {"bf16": "bfloat16", "fp32": "float32"}[job.precision]},
        "max_length": job.longest,
    }
    if job.tuned:
        options["gradient_checkpointing"] = False
    if job.packed:
        # A row holds as many tokens as a micro-batch.
        options |= {"packing": True, "packing_strategy": "bfd", "max_length": job.micro_batch_size * job.mean_tokens}
        options["per_device_train_batch_size"] = 1
    if job.stage == "sft":
        trainer_class, config_class, columns = trl.SFTTrainer, trl.SFTConfig, ["input_ids"]
    else:
        trainer_class, config_class, columns = trl.RewardTrainer, trl.RewardConfig, ["chosen_ids", "rejected_ids"]
    rows = [dict(zip(columns, example, strict=True)) for example in examples]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(NobodyAsks):
        trainer = trainer_class(
            model=job.model,
            args=config_class(output_dir=folder, **options),
            processing_class=tokenizer(job.model),
            train_dataset=datasets.Dataset.from_list(rows),
            callbacks=[Passes(turns, job.tokens)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
