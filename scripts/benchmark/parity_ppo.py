"""TRL's PPO beside this project's, from the token ids of the same rollouts."""

import copy
from collections.abc import Callable
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.benchmark.comparison import Group, Row
from scripts.benchmark.formulas import whitened_by_sample_variance
from scripts.benchmark.trl_runs import EOS, PAD, TEMPERATURE, peer, run_ppo, scalar_model, word_ids
from training.advantages import gae
from training.config import OptimConfig
from training.data import Batch, collate
from training.forward import critic_values, response_logprobs, reward_scores
from training.logprobs import token_entropy
from training.losses import clipped_policy_loss, clipped_value_loss, policy_statistics
from training.masking import masked_whiten
from training.optim import adamw, parameter_groups
from training.rewards import KL_ESTIMATORS, kl_k2, token_rewards

# TRL's defaults; TRL_ADAM is what its optimizer is made with in these runs.
KL_COEFFICIENT, GAMMA, LAM, CLIP, VALUE_COEFFICIENT = 0.05, 1.0, 0.95, 0.2, 0.1
TRL_ADAM = OptimConfig(lr=3e-3, betas=(0.9, 0.999), eps=1e-8)
DIVISOR = TEMPERATURE + 1e-7  # what PPOTrainer divides logits by
EPOCHS = {"num_ppo_epochs": 4}


def positions(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A sequence-classification model as `training.forward` calls it: [batch, time], a number at every position."""
    return lambda ids, mask: model.score(model.model(input_ids=ids, attention_mask=mask).last_hidden_state)[..., 0]


class Sides:
    """A run of TRL's PPO, and what this project computes from its token ids alone, padded on the right.

    mask: our response tokens. longer: the same and, in responses that ended before the limit, the position after EOS,
    which TRL counts as one more step.
    """

    def __init__(self, stops_at_eos: bool, **options: Any) -> None:
        self.run = run_ppo(**options | ({"stop_token": "eos"} if stops_at_eos else {}))
        rollout = self.run.rollout
        rows, finished = [], []
        for query, response in zip(rollout["queries"].tolist(), rollout["responses"].tolist(), strict=True):
            prompt = [token for token in query if token != PAD]
            if stops_at_eos and EOS in response:
                response = response[: response.index(EOS) + 1]
            rows.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
            finished.append(EOS in response)
        self.batch = collate(rows, pad_id=PAD, pad_to_multiple=32)
        self.mask = self.batch.response_mask
        is_short = self.mask.sum(1, keepdim=True) < rollout["responses"].shape[1]
        self.longer = self.mask | (is_short & self.mask.roll(1, dims=1))
        self.finished = torch.tensor(finished)
        models = self.run.models
        # From here on both sides start from the log p that TRL sampled with, which `generate` rounds to float32.
        self.logprobs = torch.zeros(self.mask.shape, dtype=torch.float64)
        self.logprobs[self.mask] = self.theirs("logprobs").double()
        with torch.no_grad():
            self.own_logprobs = response_logprobs(models["policy"], self.batch, DIVISOR)[0]
            self.ref_logprobs = response_logprobs(models["reference"], self.batch, DIVISOR)[0]
            self.values = critic_values(positions(models["critic"]), self.batch)
            self.scores = reward_scores(positions(models["reward"]), self.batch)
        penalty = options.get("missing_eos_penalty", 0.0)
        self.punished = torch.where(self.finished, self.scores, self.scores - penalty)

    def theirs(self, name: str, padding: str = "padding_mask") -> Tensor:
        """A variable of TRL's rollout on its response tokens, which stand in the order of ours."""
        return self.run.rollout[name][~self.run.rollout[padding]]

    def ours(self, values: Tensor) -> Tensor:
        return values[self.mask]

    def kl(self, estimator: str) -> Tensor:
        return KL_ESTIMATORS[estimator](self.logprobs, self.ref_logprobs)

    def rewards(self, mask: Tensor, estimator: str = "k1") -> Tensor:
        """Our rewards; with `longer` as the mask the score goes to the position after EOS, which has no KL."""
        logprobs, ref_logprobs = (torch.where(self.mask, x, 0.0) for x in (self.logprobs, self.ref_logprobs))
        return token_rewards(self.punished, logprobs, ref_logprobs, mask, KL_COEFFICIENT, estimator)[0]

    def gae(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        return gae(self.rewards(mask), self.values, mask, gamma=GAMMA, lam=LAM)

    def moved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """How far weights are from where policy and critic began."""
        models = {"policy": self.run.models["policy"], "value_model": self.run.models["critic"]}
        start = dict(nn.ModuleDict(models).named_parameters())
        return {name: tensor - start[name] for name, tensor in weights.items()}

    @cached_property
    def updates(self) -> "Updates":
        return Updates(self).replay()

    def last_update(self, name: str) -> Tensor:
        """A variable of TRL's last update: a scalar, or its values on response tokens."""
        variables = list(self.run.updates.values())[-1]
        if variables[name].dim() == 0:
            return variables[name]
        return variables[name][~self.run.rollout["padding_mask"][variables["micro_batch_inds"]]]

    def logged(self, name: str) -> Tensor:
        """TRL's mean over all positions in its last update, in float32."""
        return self.run.statistics[f"{name}_stats"].flatten()[-1]

    def over_all_positions(self, on_tokens: Tensor, elsewhere: float) -> Tensor:
        """Mean over TRL's [batch, response length], of which the response tokens are a part."""
        count = self.run.rollout["responses"].numel()
        return (on_tokens.sum() + elsewhere * (count - on_tokens.numel())) / count


class Updates:
    """Our updates on the rows that TRL took, from the same weights, with its place for the score and its variance.

    gradients, weights: by TRL's names, one dictionary for each step. last: the parts of the last micro-batch's loss.
    """

    def __init__(self, sides: Sides) -> None:
        self.sides = sides
        self.policy, self.critic = (copy.deepcopy(sides.run.models[name]) for name in ("policy", "critic"))
        self.both = nn.ModuleDict({"policy": self.policy, "value_model": self.critic})
        raw, self.returns = sides.gae(sides.longer)
        self.advantages = whitened_by_sample_variance(raw, sides.mask)
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.last: Any = None

    def replay(self) -> "Updates":
        """Take every step of a run in which each micro-batch is a step."""
        optimizer = adamw(parameter_groups(self.both, weight_decay=0.0), TRL_ADAM)
        for variables in self.sides.run.updates.values():
            self.gradients.append(self.gradient([variables["micro_batch_inds"]]))
            optimizer.step()
            self.weights.append({name: p.detach().clone() for name, p in self.both.named_parameters()})
        return self

    def gradient(self, parts: list[Tensor], over_step: bool = False) -> dict[str, Tensor]:
        """Of the losses of some micro-batches: over the count of the whole step, or the mean of their own means."""
        self.both.zero_grad()
        mask, longer = self.sides.mask, self.sides.longer
        for rows in parts:
            counted = torch.cat(parts) if over_step else rows
            share = 1 if over_step else len(parts)
            self.loss(rows, mask[counted].sum() * share, longer[counted].sum() * share).backward()
        return {name: p.grad.clone() for name, p in self.both.named_parameters() if p.grad is not None}

    def loss(self, rows: Tensor, num_tokens: Tensor, num_values: Tensor) -> Tensor:
        sides, whole = self.sides, self.sides.batch
        micro = Batch(whole.input_ids[rows], whole.attention_mask[rows], whole.response_mask[rows])
        mask, longer, old = micro.response_mask, sides.longer[rows], sides.logprobs[rows]
        logprobs, entropy = response_logprobs(self.policy, micro, DIVISOR, with_entropy=True)
        assert entropy is not None
        values = critic_values(positions(self.critic), micro)
        advantages = self.advantages[rows]
        policy_loss = clipped_policy_loss(logprobs, old, advantages, mask, num_tokens, CLIP, CLIP)
        arguments = (values, sides.values[rows], self.returns[rows])
        value_loss = clipped_value_loss(*arguments, longer, num_values, CLIP)
        ratio = (logprobs - old).exp()
        statistics = policy_statistics(logprobs, old, mask, CLIP, CLIP)
        count = statistics.pop("count")
        self.last = SimpleNamespace(
            policy_loss=policy_loss,
            value_loss=value_loss,
            value_loss_until_eos=clipped_value_loss(*arguments, mask, mask.sum(), CLIP),
            entropy=entropy[mask],
            ratio=ratio[mask],
            k2=kl_k2(logprobs, old)[mask],
            means={name: total / count for name, total in statistics.items()},
            # the clip acts where a good token has become too likely, or a bad one too unlikely
            binding=torch.where(advantages > 0, ratio > 1 + CLIP, ratio < 1 - CLIP)[mask].double().mean(),
        )
        return policy_loss + VALUE_COEFFICIENT * value_loss


def entropy_of_their_logits(sides: Sides) -> Tensor:
    """Our entropies of the logits of TRL's last update, padding included."""
    logits = list(sides.run.updates.values())[-1]["logits"]
    return token_entropy(F.pad(logits, (0, 0, 0, 1)), logits.shape[1] + 1)[:, 1:]


def accumulated() -> SimpleNamespace:
    """The first step's gradient, of two micro-batches of unequal lengths."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_ppo_epochs": 1}
    sides = Sides(True, iterations=2, **options)
    parts = [update["micro_batch_inds"] for place, update in sides.run.updates.items() if place[0] == 1]
    updates = Updates(sides)
    return SimpleNamespace(
        ours=updates.gradient(parts, over_step=True),
        theirs=sides.run.gradients[0],
        ours_by_micro_batch=updates.gradient(parts),
    )


def steps_of_iterations() -> SimpleNamespace:
    """Four micro-batches of 2 rows in 2 mini-batches, so 2 steps are due in each iteration; the third ends the data."""
    run = run_ppo(
        iterations=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_mini_batches=2,
        num_ppo_epochs=1,
        max_grad_norm=0.1,
    )
    norms = [torch.cat([g.flatten() for g in step.values()]).norm() for step in run.gradients]
    return SimpleNamespace(steps=torch.tensor(run.steps), norm=norms[0])


def eos_that_pads() -> SimpleNamespace:
    """Scores of sequences that end with EOS, where EOS is the pad token too."""
    model, sequences = scalar_model(3), [[*ids, EOS] for ids in word_ids(4, [5, 6, 7, 8])]

    def our_scores(rows: list[list[int]]) -> Tensor:
        return reward_scores(positions(model), collate([(ids, [True] * len(ids)) for ids in rows], pad_id=EOS))

    padded = collate([(ids, [True] * len(ids)) for ids in sequences], pad_id=EOS).input_ids
    return SimpleNamespace(
        ours=our_scores(sequences),
        theirs=peer("trl.experimental.utils").get_reward(model, padded, EOS, context_length=3)[1],
        ours_without_eos=our_scores([ids[:-1] for ids in sequences]),
    )


BESSEL = "divides the variance by n - 1; ours by n"
AFTER_EOS = "the score goes to the padding after EOS, one more step with a value of its own; ours to EOS"
BEFORE_EOS = "reads the token before EOS, by `!= pad_token_id`; ours reads EOS, by position"
PADDED = "its mean counts padding; ours is over response tokens"

PPO_GROUPS = (
    Group("TRL PPO: 8 prompts of 3 to 6 tokens, responses of 12 tokens, 4 epochs", partial(Sides, False, **EPOCHS), (
        Row("log p of the response, policy", "`response_logprobs`, padded right", "`logprobs`, padded left",
            lambda s: (s.ours(s.own_logprobs), s.theirs("logprobs"))),
        Row("log p of the response, reference", "`response_logprobs`, padded right", "`ref_logprobs`, padded left",
            lambda s: (s.ours(s.ref_logprobs), s.theirs("ref_logprobs"))),
        Row("values", "`critic_values`", "`values`", lambda s: (s.ours(s.values), s.theirs("values"))),
        Row("scores", "`reward_scores`", "`get_reward`", lambda s: (s.scores, s.run.rollout["scores"])),
        Row("KL, k1", "`kl_k1`", "`kl`", lambda s: (s.ours(s.kl("k1")), s.theirs("kl"))),
        Row("KL part of the reward", "-coefficient x `kl_k1`", "`non_score_reward`",
            lambda s: (-KL_COEFFICIENT * s.ours(s.kl("k1")), s.theirs("non_score_reward"))),
        Row("rewards", "`token_rewards`", "`rewards`", lambda s: (s.ours(s.rewards(s.mask)), s.theirs("rewards"))),
        Row("advantages", "`gae`", "`returns` - `values`",
            lambda s: (s.ours(s.gae(s.mask)[0]), s.theirs("returns") - s.theirs("values"))),
        Row("returns", "`gae`", "`returns`", lambda s: (s.ours(s.gae(s.mask)[1]), s.theirs("returns"))),
        Row("whitened advantages", "`masked_whiten`", "`masked_whiten`",
            lambda s: (s.ours(masked_whiten(s.gae(s.mask)[0], s.mask)), s.theirs("advantages"),
                       s.ours(whitened_by_sample_variance(s.gae(s.mask)[0], s.mask))), because=BESSEL),
        Row("gradient of every weight, 1st update", "policy loss + 0.1 x value loss", "`loss.backward()`",
            lambda s: (s.updates.gradients[0], s.run.gradients[0])),
        Row("ratio, 4th update", "exp(log p - old log p)", "`ratio`",
            lambda s: (s.updates.last.ratio, s.last_update("ratio"))),
        Row("policy loss, 4th update", "`clipped_policy_loss`", "`pg_loss`",
            lambda s: (s.updates.last.policy_loss, s.last_update("pg_loss"))),
        Row("value loss, 4th update", "`clipped_value_loss`", "`vf_loss`",
            lambda s: (s.updates.last.value_loss, s.last_update("vf_loss"))),
        Row("entropy, 4th update", "`token_entropy`", "`policy/entropy_avg`",
            lambda s: (s.updates.last.entropy.mean(), s.logged("entropy"))),
        Row("gradient of every weight, 4th update", "policy loss + 0.1 x value loss", "`loss.backward()`",
            lambda s: (s.updates.gradients[-1], s.run.gradients[-1])),
        Row("change of every weight in 4 updates", "`optim.adamw`", "its AdamW",
            lambda s: (s.moved(s.updates.weights[-1]), s.moved(s.run.weights[-1]))),
        Row("clip fraction, 4th update", "`policy_statistics`", "`policy/clipfrac_avg`",
            lambda s: (s.updates.last.means["clipped"], s.logged("pg_clipfrac"), s.updates.last.binding),
            because="counts the tokens on which the clip acts; ours all whose ratio is out of range"),
        Row("approximate KL, 4th update", "`policy_statistics`, k3", "`policy/approxkl_avg`",
            lambda s: (s.updates.last.means["approx_kl"], s.logged("approxkl"), s.updates.last.k2.mean()),
            because="is k2, a biased estimate; ours is k3, an unbiased one"),
    )),
    Group("TRL PPO: responses of 1 to 12 tokens that may end with EOS, missing_eos_penalty 1, 4 epochs",
          partial(Sides, True, missing_eos_penalty=1.0, **EPOCHS), (
        Row("values, until after EOS", "`critic_values`", "`values`",
            lambda s: (s.values[s.longer], s.theirs("values", "padding_mask_p1"))),
        Row("`objective/kl`", "sum of `kl_k1` per response", "`objective/kl`",
            lambda s: (torch.where(s.mask, s.kl("k1"), 0.0).sum(1).mean(), s.run.logged[0]["objective/kl"])),
        Row("`objective/entropy`", "-`rollout/sequence_logprob`", "`objective/entropy`",
            lambda s: (-torch.where(s.mask, s.own_logprobs, 0.0).sum(1).mean(), s.run.logged[0]["objective/entropy"])),
        Row("score of a response without EOS", "`missing_eos_score: -1`", "`missing_eos_penalty=1`",
            lambda s: (torch.where(s.finished, s.scores, -1.0), s.run.rollout["scores"], s.punished),
            because="is the score minus 1; ours is -1 whatever the score (Huang et al. 2024)"),
        Row("rewards", "`token_rewards`", "`rewards`",
            lambda s: (s.ours(s.rewards(s.mask)), s.theirs("rewards"), s.ours(s.rewards(s.longer))),
            because=AFTER_EOS),
        Row("advantages", "`gae`", "`returns` - `values`",
            lambda s: (s.ours(s.gae(s.mask)[0]), s.theirs("returns") - s.theirs("values"), s.ours(s.gae(s.longer)[0])),
            because=AFTER_EOS),
        Row("returns", "`gae`", "`returns`",
            lambda s: (s.ours(s.gae(s.mask)[1]), s.theirs("returns"), s.ours(s.gae(s.longer)[1])), because=AFTER_EOS),
        Row("value loss on TRL's returns, 4th update", "`clipped_value_loss`", "`vf_loss`",
            lambda s: (s.updates.last.value_loss_until_eos, s.last_update("vf_loss"), s.updates.last.value_loss),
            because=AFTER_EOS),
        Row("policy loss on TRL's advantages, 4th update", "`clipped_policy_loss`", "`pg_loss`",
            lambda s: (s.updates.last.policy_loss, s.last_update("pg_loss"))),
        Row("change of every weight in 4 updates on them", "`optim.adamw`", "its AdamW",
            lambda s: (s.moved(s.updates.weights[-1]), s.moved(s.run.weights[-1]))),
        Row("mean ratio, 4th update", "`policy_statistics`", "`val/ratio`",
            lambda s: (s.updates.last.means["ratio"], s.logged("ratio"),
                       s.over_all_positions(s.updates.last.ratio, 1.0)), because=PADDED),
        Row("k2, 4th update", "mean of `kl_k2`", "`policy/approxkl_avg`",
            lambda s: (s.updates.last.k2.mean(), s.logged("approxkl"),
                       s.over_all_positions(s.updates.last.k2, 0.0)), because=PADDED),
        Row("entropy, 4th update", "`token_entropy`", "`policy/entropy_avg`",
            lambda s: (s.updates.last.entropy.mean(), s.logged("entropy"), entropy_of_their_logits(s).mean()),
            because=PADDED),
    )),
    Group("TRL PPO: kl_estimator k3, whiten_rewards, responses that may end with EOS",
          partial(Sides, True, num_ppo_epochs=1, kl_estimator="k3", whiten_rewards=True), (
        Row("KL, k3", "`kl_k3`", "`kl`", lambda s: (s.ours(s.kl("k3")), s.theirs("kl"))),
        Row("whitened rewards", "`masked_whiten`, mean kept", "`masked_whiten(shift_mean=False)`",
            lambda s: (s.ours(masked_whiten(s.rewards(s.mask, "k3"), s.mask, shift_mean=False)), s.theirs("rewards"),
                       s.ours(whitened_by_sample_variance(s.rewards(s.longer, "k3"), s.longer, shift_mean=False))),
            because=f"{AFTER_EOS}; and {BESSEL}"),
    )),
    Group("TRL PPO: two micro-batches of 4 responses in a step", accumulated, (
        Row("gradient of every weight", "sum over tokens / tokens of the step", "`accelerator.accumulate`",
            lambda s: (s.ours, s.theirs, s.ours_by_micro_batch),
            because="is the mean of the micro-batches' means: tokens of a short one count more; ours count alike"),
    )),
    Group("TRL PPO: 4 micro-batches in 2 mini-batches, 3 iterations over 24 prompts, max_grad_norm 0.1",
          steps_of_iterations, (
        Row("optimizer steps of each iteration", "epochs x rows / rows of a step: 2, 2, 2", "1, 1, 4",
            lambda s: (torch.tensor([2, 2, 2]), s.steps, torch.tensor([1, 1, 4])),
            because="accumulates across mini-batches, but steps at every micro-batch of an epoch's last batch"),
        Row("norm of the first step's gradient", "at most `gradient_clipping`", "`max_grad_norm`",
            lambda s: (s.norm.clamp(max=0.1), s.norm, s.norm),
            because="is not clipped: PPOTrainer does not read max_grad_norm"),
    )),
    Group("TRL PPO: sequences that end with EOS, which is the pad token too", eos_that_pads, (
        Row("scores where EOS pads", "`reward_scores`", "`get_reward`",
            lambda s: (s.ours, s.theirs, s.ours_without_eos), because=BEFORE_EOS),
    )),
)  # fmt: skip
