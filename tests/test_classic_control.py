"""Claims about scripts/classic_control.py: PPO on CartPole-v1 with the functions of `training`."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from scripts import classic_control
from scripts.classic_control import Agent, ControlConfig, Rollout, collect, estimate, evaluate
from tests.launching import ROOT, alone, environment, run_well

GAMMA, LAM = 0.9, 0.8
LAST = 9
# For each environment of a rollout of 10 steps: the steps that terminate an episode, and those that truncate it.
ENDS: list[tuple[set[int], set[int]]] = [
    (set(), set()),  # one episode, which goes on after the rollout
    ({3}, set()),
    (set(), {3}),
    ({1, 2, 6}, {4, 5}),  # episodes of one step
    ({LAST}, set()),
    (set(), {LAST}),
    ({5}, {5}),  # the pole falls at the time limit, and stays fallen
]


def rollout_with_ends() -> tuple[Rollout, Tensor]:
    """A rollout of random numbers, [env, time] in float64, and the value of what comes after each of its steps.

    An observation is its own value. Those that nobody may look at, after a termination and inside a fragment, are nan.
    """
    generator = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, len(ENDS), LAST + 1, generator=generator, dtype=torch.float64)
    terminated, truncated = torch.zeros(2, len(ENDS), LAST + 1, dtype=torch.bool)
    next_observations = torch.full_like(values, float("nan"))
    for env, (falls, timeouts) in enumerate(ENDS):
        for t in range(LAST + 1):
            terminated[env, t], truncated[env, t] = t in falls, t in timeouts
            if t in falls:
                next_values[env, t] = 0.0
            elif t in timeouts or t == LAST:
                next_observations[env, t] = next_values[env, t]
            else:
                next_values[env, t] = values[env, t + 1]
    rollout = Rollout([], values[..., None], values, values, values, rewards, next_observations, terminated, truncated)
    return rollout, next_values


def estimated(rollout: Rollout, estimator: Any) -> tuple[Tensor, Tensor]:
    critic: Any = SimpleNamespace(get_value=lambda observations: observations)
    return estimate(critic, rollout, ControlConfig(estimator=estimator, gamma=GAMMA, lam=LAM))


@pytest.mark.parametrize(("estimator", "lam"), [("gae", LAM), ("monte_carlo", 1.0), ("td", 0.0)])
def test_advantages_and_returns_equal_a_loop_over_steps(estimator, lam):
    """A2, A7: the value after a step is 0 where the episode terminated, and V after the time limit and the rollout."""
    rollout, next_values = rollout_with_ends()
    advantages, returns = estimated(rollout, estimator)
    assert advantages.dtype == returns.dtype == torch.float64
    for env, (falls, timeouts) in enumerate(ENDS):
        following = 0.0
        for t in reversed(range(LAST + 1)):
            goes_on = 0.0 if t in falls | timeouts else 1.0
            value = float(rollout.values[env, t])
            delta = float(rollout.rewards[env, t]) + GAMMA * float(next_values[env, t]) - value
            following = delta + GAMMA * lam * goes_on * following
            assert advantages[env, t].item() == pytest.approx(following, abs=1e-12), (env, t)
            assert returns[env, t].item() == pytest.approx(following + value, abs=1e-12), (env, t)


def test_monte_carlo_returns_are_discounted_rewards_and_the_value_where_they_were_cut():
    """A2, A7."""
    rollout, next_values = rollout_with_ends()
    _, returns = estimated(rollout, "monte_carlo")
    for env, (falls, timeouts) in enumerate(ENDS):
        for t in range(LAST + 1):
            end = min(step for step in {*falls, *timeouts, LAST} if step >= t)
            discounted = [GAMMA ** (k - t) * float(rollout.rewards[env, k]) for k in range(t, end + 1)]
            expected = sum(discounted) + GAMMA ** (end + 1 - t) * float(next_values[env, end])
            assert returns[env, t].item() == pytest.approx(expected, abs=1e-12), (env, t)


class Counting(gymnasium.Env):
    """Observes (episode, step of the episode) and gives 1 for each step.

    Episodes 0, 2, ... terminate after `falls` steps, and 1, 3, ... are truncated after `timeout` steps.
    """

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Box(0, 100, (2,))

    def __init__(self, falls: int, timeout: int) -> None:
        self.limits = (falls, timeout)
        self.episode, self.steps, self.all_steps = -1, 0, 0

    def observe(self):
        return torch.tensor([self.episode, self.steps], dtype=torch.float32).numpy()

    def reset(self, *, seed=None, options=None):
        self.episode, self.steps = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        self.steps, self.all_steps = self.steps + 1, self.all_steps + 1
        kind = self.episode % 2
        ended = self.steps == self.limits[kind]
        return self.observe(), 1.0, ended and kind == 0, ended and kind == 1, {}


def test_no_step_after_the_end_of_an_episode_is_learnt_from():
    """Every learnt step was chosen by the agent: none begins at an episode's last observation, none only resets."""
    torch.manual_seed(0)
    envs = SyncVectorEnv([lambda: Counting(2, 3), lambda: Counting(4, 1)], autoreset_mode=AutoresetMode.DISABLED)
    rollouts = collect(Agent(2, 2), envs, ControlConfig(num_envs=2, rollout_steps=4))
    first, second = next(rollouts), next(rollouts)
    assert [env.all_steps for env in envs.envs] == [8, 8]
    assert first.observations.tolist() == [[[0, 0], [0, 1], [1, 0], [1, 1]], [[0, 0], [0, 1], [0, 2], [0, 3]]]
    assert first.next_observations.tolist() == [[[0, 1], [0, 2], [1, 1], [1, 2]], [[0, 1], [0, 2], [0, 3], [0, 4]]]
    assert first.terminated.int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert not first.truncated.any()
    assert first.episode_returns == [2, 4]
    assert second.observations.tolist() == [[[1, 2], [2, 0], [2, 1], [3, 0]], [[1, 0], [2, 0], [2, 1], [2, 2]]]
    assert second.next_observations.tolist() == [[[1, 3], [2, 1], [2, 2], [3, 1]], [[1, 1], [2, 1], [2, 2], [2, 3]]]
    assert second.terminated.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert second.truncated.int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert second.episode_returns == [3, 1, 2]


def test_no_learnt_state_of_cartpole_has_fallen():
    """A fallen pole leans by more than 12 degrees, or its cart is more than 2.4 away; a new one stands almost still."""
    torch.manual_seed(0)
    config = ControlConfig(num_envs=4, rollout_steps=100)
    rollout = next(collect(Agent(4, 2), classic_control.make_envs(config.num_envs), config))
    assert rollout.terminated.any()
    assert not fallen(rollout.observations).any()
    assert torch.equal(fallen(rollout.next_observations), rollout.terminated)
    begins, goes_on = rollout.terminated[:, :-1], ~rollout.terminated[:, :-1]
    assert rollout.observations[:, 1:][begins].abs().max() <= 0.05
    assert torch.equal(rollout.observations[:, 1:][goes_on], rollout.next_observations[:, :-1][goes_on])


def fallen(observations: Tensor) -> Tensor:
    return (observations[..., 0].abs() > 2.4) | (observations[..., 2].abs() > 12 * torch.pi / 180)


def test_evaluation_is_one_episode_of_the_likeliest_actions_in_each_environment():
    torch.manual_seed(0)
    agent = Agent(4, 2)
    expected = []
    for i in range(5):
        env = gymnasium.make("CartPole-v1")
        state, _ = env.reset(seed=7 + i)
        total, over = 0.0, False
        while not over:
            left, right = agent.actor(torch.as_tensor(state)).tolist()
            state, reward, terminated, truncated, _ = env.step(int(right > left))
            total, over = total + float(reward), terminated or truncated
        expected.append(total)
    assert len(set(expected)) > 1
    assert evaluate(agent, 5, seed=7).tolist() == expected


def test_seed_1_is_solved(tmp_path):
    """Mean return of at least 475 over 100 episodes after fewer than 500,000 steps; the exit code is 0."""
    output = tmp_path / "run"
    printed = run_well(alone("scripts.classic_control", "--seed", "1", "--output_dir", str(output)), 300)
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["final_mean_return"] >= 475
    assert results["config"]["total_steps"] < 500_000
    assert f"likeliest actions: {results['final_mean_return']:.1f}" in printed
    # Steps of finished episodes are steps of the run, and each gave 1.
    assert sum(value for _, value in results["curve"]) <= results["config"]["total_steps"]
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_too_little_training_is_a_failure(tmp_path, monkeypatch, capsys):
    arguments = ["classic_control", "--total_steps", "2000", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        classic_control.main()
    assert stopped.value.code == 1
    assert "not solved" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["final_mean_return"] < 475


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--estimator", "grpo"], "estimator"),
        (["--total_steps", "500000"], "total_steps is 500000"),
        (["--total_steps", "100"], "total_steps is 100"),
        (["--minibatch_size", "0"], "minibatch_size is 0"),
        (["--gamma", "1.5"], "gamma is 1.5"),
        (["--lr", "0"], "lr is 0"),
        (["--learning_rate", "1"], "learning_rate"),
    ],
)
def test_a_wrong_option_is_refused(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["classic_control", *arguments])
    with pytest.raises(SystemExit) as stopped:
        classic_control.main()
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_it_needs_nothing_of_the_language_models():
    """Not even matplotlib, before there is a curve to draw."""
    heavy = ("deepspeed", "transformers", "datasets", "peft", "yaml", "rich", "matplotlib")
    program = f"import sys, scripts.classic_control; print(*sorted(set(sys.modules) & set({heavy})))"
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert (finished.returncode, finished.stdout.strip()) == (0, ""), finished.stderr
