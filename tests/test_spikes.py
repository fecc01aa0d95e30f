"""Spikes: what jumps is told at its step, and noise is not."""

import itertools
import math

import numpy as np
import pytest

from training.config import RunConfig
from training.metrics import MetricsLogger
from training.spikes import FEWEST, WATCHED, WINDOW, Spikes


def noisy(seed: int, count: int, deviation: float) -> list[float]:
    """A number that falls to a third on its way and varies by factors, as losses and gradients do."""
    draw = np.random.default_rng(seed)
    falling = np.linspace(math.log(3.0), 0.0, count)
    return np.exp(falling + draw.normal(0.0, deviation, count)).tolist()


@pytest.mark.parametrize("seed", range(100))
def test_a_number_five_times_as_large_is_found_at_its_step(seed: int) -> None:
    values = noisy(seed, 300, deviation=0.1)
    step = int(np.random.default_rng(seed + 1000).integers(FEWEST, 300))
    values[step] *= 5
    spikes = Spikes()
    found = [number for number, value in enumerate(values) if spikes.look({"train/loss": value})]
    assert found == [step]


def test_noise_is_no_spike() -> None:
    """10,000 lines each of light and heavy noise, and of noise with the tails of a t distribution of 6 degrees."""
    tails = np.exp(0.3 * np.random.default_rng(7).standard_t(6, 10_000)).tolist()
    alarms = []
    for values in (noisy(1, 10_000, 0.02), noisy(2, 10_000, 0.5), tails):
        spikes = Spikes()
        alarms.append(sum(bool(spikes.look({"train/grad_norm": value})) for value in values))
    assert max(alarms) <= 1, alarms


def test_the_sentence_by_hand() -> None:
    spikes = Spikes()
    for value in [1.0, 4.0] * (FEWEST // 2):  # logarithms 0 and 2 log 2: mean log 2, deviation log 2
        assert spikes.look({"rollout/kl": value, "unwatched": 10**9}) == []
    assert spikes.look({"rollout/kl": 2.0 * 2**6 * 0.99}) == []
    spikes = Spikes()
    for value in [1.0, 4.0] * (FEWEST // 2):
        spikes.look({"rollout/kl": value})
    sentence = "rollout/kl jumps to 129.3: its mean over 32 lines is 2"
    assert spikes.look({"rollout/kl": 2.0 * 2**6 * 1.01}) == [sentence]


def test_a_number_that_never_varied_may_vary() -> None:
    spikes = Spikes()
    for _ in range(2 * WINDOW):
        spikes.look({"rollout/response_tokens": 64.0})
    assert spikes.look({"rollout/response_tokens": 127.0}) == []
    assert spikes.look({"rollout/response_tokens": 129.0}) != []


@pytest.mark.parametrize("value", [None, math.nan, math.inf, 0.0, -1.0])
def test_what_has_no_logarithm_is_passed_over(value: float | None) -> None:
    spikes = Spikes()
    for _ in range(FEWEST):
        assert spikes.look(dict.fromkeys(WATCHED, 1.0)) == []
    assert spikes.look(dict.fromkeys(WATCHED, value)) == []
    assert len(spikes.look(dict.fromkeys(WATCHED, 3.0))) == len(WATCHED)


def test_a_run_that_goes_on_remembers_what_was_usual(tmp_path, capsys) -> None:
    config = RunConfig(output_dir=str(tmp_path))
    logger = MetricsLogger(tmp_path, 100, config, is_main=True)
    for step, value in enumerate(itertools.repeat(2.0, FEWEST), start=1):
        logger.log(step, {"train/loss": value}, tokens=1)
    state = logger.state(FEWEST)
    logger.log(FEWEST + 1, {"train/loss": 9.0}, tokens=1)
    logger.close()
    told = f"step {FEWEST + 1}: train/loss jumps to 9: its mean over {FEWEST} lines is 2"
    assert capsys.readouterr().out.count(told) == 1
    again = MetricsLogger(tmp_path, 100, config, is_main=True, resumed=state)
    again.log(FEWEST + 1, {"train/loss": 9.0}, tokens=1)
    again.close()
    assert capsys.readouterr().out.count(told) == 1
