"""PPO on CartPole-v1 with the functions that train the language model: `python -m scripts.classic_control --seed 1`.

Only the agent, the rollout and this story are about classic control; the estimators, the losses, the whitening and the
learning-rate schedule come from `training`. The exit code is 0 where the task is solved, else 1.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from training.advantages import ADVANTAGE_ESTIMATORS
from training.config import OptimConfig, check_positive, check_range
from training.losses import clipped_policy_loss, clipped_value_loss, entropy_bonus, policy_statistics
from training.masking import masked_whiten
from training.optim import adamw, lr_lambda

TASK = "CartPole-v1"
SOLVED_RETURN = 475.0  # gymnasium's own threshold for this task; no episode returns more than 500
EVALUATION_EPISODES = 100


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """PPO on CartPole-v1."""

    seed: int = 1
    """Seed of the environments, of new weights and of sampling."""
    output_dir: str = "runs/classic_control"
    """Folder that gets results.json and the learning curve, curve.png."""
    estimator: Literal["gae", "monte_carlo", "td"] = "gae"
    """Where advantages and returns come from."""
    total_steps: int = 100_000
    """Steps in all environments together, below 500,000; rounded down to whole rollouts."""
    num_envs: int = 8
    """Environments that step together."""
    rollout_steps: int = 64
    """Steps of each environment between two rounds of updates. More give better estimates and fewer updates."""
    epochs: int = 10
    """Passes over each rollout. More learn more from it, until the policy has moved too far from it."""
    minibatch_size: int = 128
    """Steps in one optimizer step."""
    lr: float = 1e-3
    """Learning rate at the start; it falls linearly to 0."""
    gamma: float = 0.98
    """Discount, from 0 to 1: 0.98 looks about 50 steps ahead."""
    lam: float = 0.9
    """For gae, from 0 to 1: 0 trusts the critic (least variance), 1 trusts the rewards (no bias)."""
    clip: float = 0.2
    """How far a ratio may leave 1 before a step stops teaching."""
    value_clip: float | None = None
    """How far a value may move in one round of updates, in units of the return; None for any distance."""
    value_coefficient: float = 0.5
    """Weight of the critic's loss. Only gradient clipping feels it, because actor and critic share no weights."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus. Larger values explore more and settle later."""
    max_grad_norm: float = 0.5
    """Longer gradients are cut to this length."""

    def __post_init__(self) -> None:
        check_range(self, "seed", "value_coefficient", "entropy_coefficient", low=0)
        check_range(self, "num_envs", "rollout_steps", "epochs", "minibatch_size", low=1)
        check_range(self, "gamma", "lam", "clip", low=0, high=1)
        check_positive(self, "lr", "value_clip", "max_grad_norm")
        if not self.rollout_size <= self.total_steps < 500_000:
            limits = f"at least num_envs x rollout_steps ({self.rollout_size}) and less than 500000"
            raise ValueError(f"total_steps is {self.total_steps}: it needs {limits}")

    @property
    def rollout_size(self) -> int:
        return self.num_envs * self.rollout_steps


class Agent(nn.Module):
    """An actor and a critic that share no weights.

    Observations are [batch, size] float, actions [batch] long; log-probabilities, entropies (nats) and values [batch].
    """

    def __init__(self, observation_size: int, num_actions: int) -> None:
        super().__init__()
        self.critic = mlp(observation_size, 1, last_gain=1.0)
        self.actor = mlp(observation_size, num_actions, last_gain=0.01)

    def get_value(self, observations: Tensor) -> Tensor:
        return self.critic(observations).squeeze(-1)

    def get_action_and_value(self, observations: Tensor, actions: Tensor | None = None) -> tuple[Tensor, ...]:
        """Actions, which are drawn where none are given, their log-probabilities, the entropies and the values."""
        policy = Categorical(logits=self.actor(observations))
        actions = policy.sample() if actions is None else actions
        return actions, policy.log_prob(actions), policy.entropy(), self.get_value(observations)


def mlp(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units, orthogonal at the start; `last_gain` scales the last layer's weights."""
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


@dataclass(frozen=True)
class Rollout:
    """What the agent did in every environment, [env, time] (observations [env, time, size])."""

    episode_returns: list[float]  # of the episodes that ended meanwhile
    observations: Tensor
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    rewards: Tensor
    next_observations: Tensor  # where the action led: the last of its episode where that ended, never one after a reset
    terminated: Tensor  # the pole fell: nothing comes after
    truncated: Tensor  # only the time was up


def main() -> None:
    config = tyro.cli(ControlConfig, use_underscores=True)
    started = time.monotonic()
    torch.set_num_threads(1)  # the networks are too small to share
    torch.manual_seed(config.seed)
    envs = make_envs(config.num_envs)
    num_rollouts = config.total_steps // config.rollout_size
    agent = Agent(envs.single_observation_space.shape[0], int(envs.single_action_space.n))
    optim = OptimConfig(lr=config.lr, betas=(0.9, 0.999), eps=1e-5, schedule="linear", warmup_fraction=0.0)
    optimizer = adamw(agent.parameters(), optim)
    scheduler = LambdaLR(optimizer, lr_lambda(optim, num_rollouts))

    curve: list[tuple[int, float]] = []  # steps so far, return of an episode that ended there
    for i, rollout in enumerate(itertools.islice(collect(agent, envs, config), num_rollouts), start=1):
        advantages, returns = estimate(agent, rollout, config)
        metrics = update(agent, optimizer, rollout, advantages, returns, config)
        scheduler.step()
        curve += [(i * config.rollout_size, episode_return) for episode_return in rollout.episode_returns]
        if i % math.ceil(num_rollouts / 10) == 0:
            metrics["mean_return"] = recent_mean(curve)
            print(f"step {i * config.rollout_size:6d}", *(f"{name} {value:.4g}" for name, value in metrics.items()))

    final = float(evaluate(agent, EVALUATION_EPISODES, seed=config.seed + 1_000_000).mean())
    seconds = time.monotonic() - started
    write(Path(config.output_dir), {"final_mean_return": final, "seconds": seconds, "curve": curve}, config)
    print(f"mean return of the last 100 training episodes, actions drawn: {recent_mean(curve):.1f}")
    print(f"mean return of {EVALUATION_EPISODES} evaluation episodes, likeliest actions: {final:.1f}")
    print(f"{'solved' if final >= SOLVED_RETURN else 'not solved'}: {SOLVED_RETURN:.0f} is needed ({seconds:.0f} s)")
    raise SystemExit(0 if final >= SOLVED_RETURN else 1)


def make_envs(number: int) -> SyncVectorEnv:
    """Environments that leave it to `step` to begin a new episode."""
    return SyncVectorEnv([lambda: gymnasium.make(TASK)] * number, autoreset_mode=AutoresetMode.DISABLED)


def step(envs: SyncVectorEnv, actions: Tensor) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """One step in every environment; where it ended an episode, the next one begins at once.

    So no step is a dummy that only resets. Returns the observations to go on from, and what the actions led to:
    rewards, next observations (the last of the episode where it ended), terminated, truncated.
    """
    next_observations, rewards, terminated, truncated, _ = envs.step(actions.numpy())
    ended = terminated | truncated
    observations = envs.reset(options={"reset_mask": ended})[0] if ended.any() else next_observations
    return observations, (rewards.astype(np.float32), next_observations, terminated, truncated)


def collect(agent: Agent, envs: SyncVectorEnv, config: ControlConfig) -> Iterator[Rollout]:
    """Rollouts without end, each going on where the one before stopped."""
    observations, _ = envs.reset(seed=config.seed)
    running_returns = np.zeros(envs.num_envs)
    while True:
        steps: list[tuple[Tensor, ...]] = []
        episode_returns: list[float] = []
        for _ in range(config.rollout_steps):
            seen = torch.as_tensor(observations)
            with torch.no_grad():
                actions, logprobs, _, values = agent.get_action_and_value(seen)
            observations, outcome = step(envs, actions)
            steps.append((seen, actions, logprobs, values, *map(torch.as_tensor, outcome)))
            rewards, _, terminated, truncated = outcome
            running_returns += rewards
            episode_returns += running_returns[terminated | truncated].tolist()
            running_returns[terminated | truncated] = 0.0
        columns = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
        yield Rollout(episode_returns, *columns)


def estimate(agent: Agent, rollout: Rollout, config: ControlConfig) -> tuple[Tensor, Tensor]:
    """Advantages and returns of a rollout, [env, time], by an estimator made for responses of a language model.

    A row of the estimator is a fragment of an episode, padded on the right: it begins with the episode or the rollout
    and ends with it. The estimator takes the value after a row's last step T as 0, which is true where the episode
    terminated. Where it was cut, by the time limit or by the end of the rollout, the last reward carries that value,

        r'_T = r_T + gamma * V(s_{T+1}),   so   r'_T + gamma * 0 - V(s_T) = r_T + gamma * V(s_{T+1}) - V(s_T)

    and every recursion starts from the bootstrapped delta (or return) and is the bootstrapped one from there on.
    """
    last = rollout.terminated | rollout.truncated
    last[:, -1] = True
    cut = last & ~rollout.terminated
    rewards = rollout.rewards.clone()
    with torch.no_grad():
        rewards[cut] += config.gamma * agent.get_value(rollout.next_observations[cut])
    # Row by row, the true positions of `mask` are the steps in the order of env and time.
    lengths = last.flatten().nonzero().flatten().diff(prepend=torch.tensor([-1]))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padding = torch.zeros(mask.shape, dtype=rewards.dtype)
    rewards, values = (padding.masked_scatter(mask, steps) for steps in (rewards, rollout.values))
    estimator = ADVANTAGE_ESTIMATORS[config.estimator]
    advantages, returns = estimator(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    return advantages[mask].view_as(last), returns[mask].view_as(last)


def update(
    agent: Agent, optimizer: Optimizer, rollout: Rollout, advantages: Tensor, returns: Tensor, config: ControlConfig
) -> dict[str, float]:
    """PPO's updates from one rollout, in shuffled minibatches. Returns means over the last minibatch."""
    fields = (rollout.observations, rollout.actions, rollout.logprobs, rollout.values, advantages, returns)
    batch = [field.flatten(0, 1) for field in fields]
    for _ in range(config.epochs):
        for rows in torch.randperm(config.rollout_size).split(config.minibatch_size):
            observations, actions, old_logprobs, old_values, advantage, target = (field[rows] for field in batch)
            count, mask = len(rows), torch.ones(len(rows), dtype=torch.bool)  # no padding: it went with the fragments
            _, logprobs, entropy, values = agent.get_action_and_value(observations, actions)
            whitened = masked_whiten(advantage, mask)
            policy_loss = clipped_policy_loss(logprobs, old_logprobs, whitened, mask, count, config.clip, config.clip)
            value_loss = clipped_value_loss(values, old_values, target, mask, count, config.value_clip)
            bonus = entropy_bonus(entropy, mask, count)
            loss = policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * bonus
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()
    moved = policy_statistics(logprobs, old_logprobs, mask, config.clip, config.clip)
    return {name: float(moved[name] / count) for name in ("approx_kl", "clipped")} | {"entropy": bonus.item()}


def evaluate(agent: Agent, episodes: int, seed: int) -> np.ndarray:
    """[episodes] returns of the likeliest action in every state, one episode in each of as many fresh environments."""
    envs = make_envs(episodes)
    observations, _ = envs.reset(seed=seed)
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():
        with torch.no_grad():
            actions = agent.actor(torch.as_tensor(observations)).argmax(dim=-1)
        observations, (rewards, _, terminated, truncated) = step(envs, actions)
        returns += running * rewards  # where the first episode is over, another runs that does not count
        running &= ~(terminated | truncated)
    return returns


def recent_mean(curve: list[tuple[int, float]]) -> float:
    return float(np.mean([episode_return for _, episode_return in curve[-100:]])) if curve else float("nan")


def write(output: Path, results: dict[str, Any], config: ControlConfig) -> None:
    """Writes results.json and curve.png."""
    from matplotlib.figure import Figure

    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results | {"config": dataclasses.asdict(config)}, indent=1)
    (output / "results.json").write_text(text + "\n", encoding="utf-8")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot(title=TASK, xlabel="environment steps", ylabel="return of a training episode")
    axes.plot([step for step, _ in results["curve"]], [value for _, value in results["curve"]], ".", markersize=3)
    axes.axhline(SOLVED_RETURN, color="grey", linestyle="--", linewidth=1)
    figure.savefig(output / "curve.png", dpi=150)


if __name__ == "__main__":
    main()
