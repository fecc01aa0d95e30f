"""Step 3 learns what it should: whole runs of it, on tasks whose best policy is known."""

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from step3_ppo.train import main
from tests.bandit import COUNTED, counting, response_probabilities, save_letter_model, tastes
from tests.tiny_models import write_jsonl
from training import distributed

Learn = Callable[..., tuple[PreTrainedModel, PreTrainedModel]]
Policy = Mapping[str, float]

ESTIMATORS = ("gae", "grpo", "rloo", "reinforce_pp")


@pytest.fixture(scope="module")
def letter_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_letter_model(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letter_model: str) -> Iterator[Learn]:
    """Runs step 3 in this process; gives the model that it started from and the one that it has saved."""

    def run(prompts: Sequence[str], **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
        file, output = tmp_path / "config.yaml", tmp_path / "run"
        path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
        config = {
            "actor": {"path": letter_model},
            "data": {"paths": [path], "eval_paths": [path], "format": "prompt", "template": "plain"},
            "run": {"output_dir": str(output)},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "samples_per_prompt": 8,
            "generation_batch_size": 512,
        }
        file.write_text(yaml.safe_dump(config | options))
        monkeypatch.setattr(sys, "argv", ["step3_ppo.train", "--config", str(file)])
        main()
        first, last = (AutoModelForCausalLM.from_pretrained(path) for path in (letter_model, output / "final/actor"))
        return first, last

    yield run
    distributed.stop()


# One right answer to each prompt


def expected_score(model: PreTrainedModel, prompts: Sequence[str]) -> float:
    """Mean of `counting` over the prompts and, weighted with their probabilities, all responses."""
    total = 0.0
    for prompt in prompts:
        policy = response_probabilities(model, prompt, max_new_tokens=3)
        scores = counting([prompt] * len(policy), list(policy), [])
        total += sum(probability * score for probability, score in zip(policy.values(), scores, strict=True))
    return total / len(prompts)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_prompts_are_answered_rightly_that_were_never_trained_on(learn: Learn, estimator: str) -> None:
    """L3, L6: the best score is 1. Two passes over each rollout in two minibatches take the ratios away from 1."""
    words = ["".join(letters) for letters in itertools.product(COUNTED, repeat=3)]
    random.Random(0).shuffle(words)
    first, last = learn(
        words[:150],
        reward={"function": "tests.bandit:counting"},
        estimator=estimator,
        sampling={"max_new_tokens": 3},
        # Keeps a prompt from settling on an answer before it has tried the right one. Costs less than 0.01 at the end.
        kl={"coefficient": 0.04},
        iterations=30,
        rollout_batch_size=32,
        ppo_epochs=2,
        train_batch_size=128,
        micro_batch_size=128,
        actor_optim={"lr": 2e-3},
        critic_optim={"lr": 2e-3},
    )
    held_out = words[150:]
    assert expected_score(first, held_out) < 0.1
    assert expected_score(last, held_out) > 0.95


# The best policy under a KL penalty


def best_policy(reference: Policy, scores: Mapping[str, float], beta: float) -> dict[str, float]:
    """What maximizes E[score] - beta * KL(policy || reference) (Rafailov et al. 2023, eq. 4).

    p(y) = p_ref(y) * exp(score(y) / beta) / Z
    """
    weights = {text: probability * math.exp(scores[text] / beta) for text, probability in reference.items()}
    total = sum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


def total_variation(one: Policy, other: Policy) -> float:
    return 0.5 * sum(abs(one[text] - other[text]) for text in one)


def check_converges(
    learn: Learn, prompts: Sequence[str], beta: float, sampling: Mapping[str, Any], **options: Any
) -> None:
    """Train, and sum over all responses to each prompt: the policy ends less than 0.05 from the best one.

    That one is far from where the policy started, from the single answer with the best score, and from what would be
    best if the reference preferred nothing.
    """
    first, last = learn(
        prompts,
        reward={"function": "tests.bandit:tastes"},
        sampling=dict(sampling),
        rollout_batch_size=64,
        train_batch_size=512,
        micro_batch_size=256,
        actor_optim={"lr": 3e-3},
        critic_optim={"lr": 4e-3},
        **options,
    )
    for prompt in prompts:
        reference, learnt = (response_probabilities(model, prompt, **sampling) for model in (first, last))
        scores = dict(zip(reference, tastes([prompt] * len(reference), list(reference), []), strict=True))
        best = best_policy(reference, scores, beta)
        assert total_variation(reference, best) > 0.5
        assert best[max(scores, key=lambda text: scores[text])] < 0.6
        assert total_variation(best_policy(dict.fromkeys(scores, 1.0), scores, beta), best) > 0.15
        assert total_variation(learnt, best) < 0.05


# Whitening takes one number from all advantages and divides them by another, a baseline and a step size: the policy
# is at rest where score - beta * log(p / p_ref) is one number for all answers to a prompt, with it or without. GRPO's
# division by the deviation of a group moves that point no more, as long as the penalty is part of what it divides.


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_token_converges_to_the_best_policy_in_closed_form(learn: Learn, estimator: str) -> None:
    """K1, F5"""
    beta = 0.5
    options = {"estimator": estimator, "kl": {"coefficient": beta}, "iterations": 40}
    check_converges(learn, "abc", beta, {"max_new_tokens": 1}, **options)


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_two_tokens_converge_to_the_best_policy_in_closed_form(learn: Learn, estimator: str) -> None:
    """K1, A1: of 133 responses; their optimum is that of the sequence though each token is penalized on its own."""
    beta = 0.7
    options = {"estimator": estimator, "kl": {"coefficient": beta}, "iterations": 60}
    check_converges(learn, "a", beta, {"max_new_tokens": 2}, **options)


def test_it_is_the_tempered_policy_that_converges_to_the_tempered_optimum(learn: Learn) -> None:
    """F6"""
    beta = 0.5
    options = {"estimator": "rloo", "kl": {"coefficient": beta}, "iterations": 40}
    check_converges(learn, "abc", beta, {"max_new_tokens": 1, "temperature": 0.7}, **options)


def test_a_penalty_in_the_loss_has_the_same_optimum(learn: Learn) -> None:
    """K6: k2's gradient is that of the KL. Here scaled advantages would change what the score weighs against it."""
    beta = 0.5
    kl = {"coefficient": 0.0, "loss_coefficient": beta}
    options = {"estimator": "rloo", "kl": kl, "iterations": 60}
    check_converges(learn, "a", beta, {"max_new_tokens": 1}, whiten_advantages=False, **options)
