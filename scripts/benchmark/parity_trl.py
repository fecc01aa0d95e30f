"""Compares this project with TRL and others, function by function, and prints the table that README.md keeps.

    python -m scripts.benchmark.parity_trl

Runs TRL's own trainers on tiny models, in the environment that README.md sets up, and this project's functions on the
same token ids. Exits 1 if a row that should agree does not, or if a row that should differ does not do so as it says.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import sys
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from scripts.benchmark.comparison import HEADER, Group, Row, measured
from scripts.benchmark.formulas import FORMULA_GROUPS
from scripts.benchmark.parity_ppo import BEFORE_EOS, PPO_GROUPS, positions
from scripts.benchmark.trl_runs import (
    EOS,
    PAD,
    TEMPERATURE,
    gradients,
    peer,
    run_groups,
    run_reward,
    run_sft,
    text,
    tokenizer,
    word_ids,
)
from training.advantages import grpo, rloo
from training.data import collate
from training.formats import Demonstration
from training.forward import response_logprobs, reward_scores
from training.losses import clipped_policy_loss, kl_loss, pairwise_reward_loss, sft_loss
from training.masking import last_true, masked_sum
from training.rewards import kl_k3, token_rewards
from training.tokenization import tokenize_demonstration

CENTRING, BETA, GROUP_SIZE = 0.01, 0.1, 4


def gradient_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return gradients(model)


def reward_training() -> SimpleNamespace:
    """Four pairs in one batch: with margins and centring, and with EOS as the pad token."""
    chosen, rejected = ([[*ids, EOS] for ids in word_ids(seed, [4, 9, 6, 3])] for seed in (1, 2))
    rejected[0] = rejected[0][2:]
    margins = [0.1, 0.5, 1.0, 0.0]
    keys = ("chosen_ids", "rejected_ids", "margin")
    pairs = [dict(zip(keys, values, strict=True)) for values in zip(chosen, rejected, margins, strict=True)]
    run = run_reward(pairs, center_rewards_coefficient=CENTRING)

    def ours(sequences: list[list[int]], **options: Any) -> Tensor:
        batch = collate([(ids, [True] * len(ids)) for ids in sequences], pad_id=PAD)
        scores, rows = reward_scores(positions(run.model), batch), torch.arange(len(pairs))
        weights = torch.ones(len(pairs), dtype=scores.dtype)
        return pairwise_reward_loss(scores, rows, rows + len(pairs), weights, len(pairs), **options)

    loss = ours(chosen + rejected, margins=torch.tensor(margins).double(), centring=CENTRING)
    without = [{key: pair[key] for key in keys[:2]} for pair in pairs]
    return SimpleNamespace(
        run=run,
        loss=loss,
        gradient=gradient_of(run.model, loss),
        plain=(ours(chosen + rejected), run_reward(without).losses[0]),
        eos_pads=run_reward(without, pad="<eos>").losses[0],
        without_eos=ours([ids[:-1] for ids in chosen + rejected]),
    )


def sft() -> SimpleNamespace:
    """Four demonstrations of unequal lengths in two micro-batches."""
    lengths = ([4, 9, 6, 3], [7, 2, 5, 12])
    rows = [
        {"prompt": text(prompt), "completion": " " + text(completion)}
        for prompt, completion in zip(word_ids(1, lengths[0]), word_ids(2, lengths[1]), strict=True)
    ]
    two_rows = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
    run = run_sft(rows, **two_rows)
    examples = [Demonstration(row["prompt"], row["completion"], "") for row in rows]
    batch = collate([tokenize_demonstration(e, tokenizer(), "plain") for e in examples], pad_id=PAD)
    parts = [batch.rows(torch.tensor(pair)) for pair in ([0, 1], [2, 3])]

    def ours(denominators: list[int]) -> Tensor:
        losses = [
            sft_loss(response_logprobs(run.model, part)[0], part.response_mask, denominator)
            for part, denominator in zip(parts, denominators, strict=True)
        ]
        return torch.stack(losses).sum()

    loss = ours([batch.num_response_tokens] * 2)
    return SimpleNamespace(
        run=run,
        loss=loss,
        gradient=gradient_of(run.model, loss),
        mean_of_means=ours([2 * part.num_response_tokens for part in parts]),
    )


class Responses:
    """Two prompts with four responses each, in two micro-batches; two steps, the second with ratios other than 1."""

    def __init__(self, method: str, **options: Any) -> None:
        self.run = run_groups(method, **options)
        sent, rows = self.run.batch, []
        for i in range(len(self.run.scores)):
            prompt = sent["prompt_ids"][i, sent["prompt_mask"][i].bool()].tolist()
            response = sent["completion_ids"][i, sent["completion_mask"][i].bool()].tolist()
            rows.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
        self.batch = collate(rows, pad_id=PAD)
        self.mask = self.batch.response_mask
        self.models = [copy.deepcopy(self.run.model) for _ in range(2)]
        self.models[1].load_state_dict(self.run.weights[0], strict=False)
        with torch.no_grad():
            self.old, self.ref = (self.logprobs(model) for model in (self.run.model, self.run.reference))
        scores = torch.tensor(self.run.scores, dtype=torch.float64)
        estimate, beta = (grpo, 0.0) if method == "GRPO" else (rloo, BETA)
        rewards, _ = token_rewards(scores, self.old, self.ref, self.mask, beta)
        self.advantages, _ = estimate(rewards, None, self.mask, group_size=GROUP_SIZE)

    @property
    def per_response(self) -> Tensor:
        return self.advantages[last_true(self.mask)]

    def logprobs(self, model: nn.Module) -> Tensor:
        return response_logprobs(model, self.batch, TEMPERATURE)[0]

    def loss(self, step: int, counts: Tensor | None = None, kl: str | None = None) -> Tensor:
        """Our loss at a step's weights, of rows divided by `counts` [batch], or by the tokens of all."""
        logprobs = self.logprobs(self.models[step])
        counts = self.mask.sum().expand(len(self.batch)) if counts is None else counts
        total = torch.zeros(())
        for row, count in enumerate(counts):
            one = slice(row, row + 1)
            arguments = (logprobs[one], self.old[one], self.advantages[one], self.mask[one], count)
            total = total + clipped_policy_loss(*arguments)
            if kl == "k2":
                total = total + BETA * kl_loss(logprobs[one], self.old[one], self.ref[one], self.mask[one], count)
            elif kl == "k3":
                total = total + BETA * masked_sum(kl_k3(logprobs[one], self.ref[one]), self.mask[one]) / count
        return total

    def their_loss(self, step: int) -> Tensor:
        return torch.stack(self.run.losses[2 * step : 2 * step + 2]).sum()

    def gradient(self, step: int, **options: Any) -> dict[str, Tensor]:
        return gradient_of(self.models[step], self.loss(step, **options))

    @property
    def one_per_response(self) -> Tensor:
        """Counts that leave the sum over the tokens of a response."""
        return torch.full((len(self.batch),), len(self.batch))


OTHER_GROUPS = (
    Group("TRL RewardTrainer: 4 pairs, with margins and center_rewards_coefficient 0.01", reward_training, (
        Row("loss, neither", "`pairwise_reward_loss`", "`compute_loss`", lambda s: s.plain),
        Row("loss, both", "`pairwise_reward_loss`", "`compute_loss`", lambda s: (s.loss, s.run.losses[0])),
        Row("gradient of every weight, both", "`pairwise_reward_loss`", "`compute_loss`",
            lambda s: (s.gradient, s.run.gradients[0])),
        Row("loss where EOS pads, neither", "`reward_scores`", "the sequence-classification model",
            lambda s: (s.plain[0], s.eos_pads, s.without_eos), because=BEFORE_EOS),
    )),
    Group("TRL SFTTrainer: 4 demonstrations of unequal lengths, loss on completions, 2 micro-batches a step", sft, (
        Row("loss of a step", "`sft_loss`", "`compute_loss`, chunked_nll",
            lambda s: (s.loss, torch.stack(s.run.losses).sum())),
        Row("gradient of every weight", "`sft_loss`", "`compute_loss`, chunked_nll",
            lambda s: (s.gradient, s.run.gradients[0])),
        Row("held-out loss", "mean over tokens", "`evaluate()`",
            lambda s: (s.loss, s.run.eval_loss, s.mean_of_means),
            because="is the mean of the batches' means, so it changes with the batch size; ours is per token"),
    )),
    Group("TRL GRPOTrainer: 2 prompts with 4 responses each, 2 micro-batches a step", partial(Responses, "GRPO"), (
        Row("advantages", "`grpo`", "`advantages`", lambda s: (s.per_response, s.run.batch["advantages"])),
        Row("loss, 1st step", "`clipped_policy_loss`", "loss_type dapo", lambda s: (s.loss(0), s.their_loss(0))),
        Row("loss, 2nd step", "`clipped_policy_loss`", "loss_type dapo", lambda s: (s.loss(1), s.their_loss(1))),
        Row("gradient of every weight, 2nd step", "`clipped_policy_loss`", "loss_type dapo",
            lambda s: (s.gradient(1), s.run.gradients[1])),
    )),
    Group("TRL GRPOTrainer: the same with loss_type grpo", partial(Responses, "GRPO", loss_type="grpo"), (
        Row("gradient of every weight, 2nd step", "mean over tokens", "loss_type grpo",
            lambda s: (s.gradient(1), s.run.gradients[1], s.gradient(1, counts=s.mask.sum(1) * len(s.batch))),
            because="is the mean of the responses' means: tokens of a short one count more; ours count alike"),
    )),
    Group("TRL GRPOTrainer: the same with beta 0.1", partial(Responses, "GRPO", beta=BETA), (
        Row("gradient of every weight, 1st step", "`kl_loss`", "KL loss k3 x ratio",
            lambda s: (s.gradient(0, kl="k2"), s.run.gradients[0])),
        Row("gradient of every weight, 2nd step", "`kl_loss`", "KL loss k3 x ratio",
            lambda s: (s.gradient(1, kl="k2"), s.run.gradients[1])),
    )),
    Group("TRL GRPOTrainer: the same with beta 0.1 and use_bias_correction_kl off",
          partial(Responses, "GRPO", beta=BETA, use_bias_correction_kl=False), (
        Row("gradient of every weight, 1st step", "`kl_loss`", "KL loss k3",
            lambda s: (s.gradient(0, kl="k2"), s.run.gradients[0], s.gradient(0, kl="k3")),
            because="has the gradient of KL(reference, policy); ours that of KL(policy, reference)"),
    )),
    Group("TRL RLOOTrainer: 2 prompts with 4 responses each, beta 0.1", partial(Responses, "RLOO", beta=BETA), (
        Row("advantages", "`rloo`", "`advantages`", lambda s: (s.per_response, s.run.batch["advantages"])),
        Row("gradient of every weight, 1st step", "mean over tokens", "`compute_loss`",
            lambda s: (s.gradient(0), s.run.gradients[0], s.gradient(0, counts=s.one_per_response)),
            because="is summed over tokens and averaged over responses; ours is averaged over tokens"),
    )),
)  # fmt: skip
GROUPS = (*PPO_GROUPS, *OTHER_GROUPS, *FORMULA_GROUPS)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    transformers_logging.set_verbosity_error()
    try:
        peer("trl")
    except ValueError as error:
        sys.exit(str(error))
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    failed = 0
    for group in GROUPS:
        noise = io.StringIO()
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = list(measured(group))
        print(f"\n**{group.title}**\n\n{HEADER}")
        print(*results, sep="\n", flush=True)
        failed += sum(not result.as_expected for result in results)
    count = sum(len(group.rows) for group in GROUPS)
    print(f"\n{count} rows, {failed} not as expected")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
