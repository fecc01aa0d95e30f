"""Two ranks do what one does, and none waits for a rank that is gone."""

import time
from collections.abc import Callable

import pytest

from tests.launching import failures_of, run, under_deepspeed, under_torchrun


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What went wrong in each check, all run in one launch."""
    return failures_of(under_torchrun("tests.distributed_checks"), timeout_seconds=240)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param("sft_zero0", id="L5: SFT on two ranks equals plain torch"),
        pytest.param("sft_zero3", id="L5: SFT at ZeRO 3 equals plain torch"),
        pytest.param("reward_zero0", id="L5: a reward model on two ranks equals plain torch"),
        pytest.param("reward_zero2", id="L5: a reward model at ZeRO 2 equals plain torch"),
        pytest.param("compiled_zero3", id="L5: SFT with compiled layers at ZeRO 3 equals plain torch"),
        pytest.param("rollout", id="L5: a rollout on two ranks is that of one, also where a rank has fewer prompts"),
        pytest.param("losses_zero0", id="L5: unequal numbers of tokens on the ranks change no gradient"),
        pytest.param("losses_zero3", id="L5: nor at ZeRO 3"),
        pytest.param("generation", id="G7: generation at ZeRO 3 waits for no other rank"),
        pytest.param("held_out", id="held-out examples that do not divide among ranks count once"),
        pytest.param("moving_average", id="L11: a moving average over shards is that of the weights"),
        pytest.param("early_stop", id="L12: all ranks stop when one has moved too far"),
        pytest.param("groups_zero0", id="L5: samples of prompts that do not divide among ranks are learnt once"),
        pytest.param("groups_zero3", id="L5: and at ZeRO 3"),
        pytest.param("tied_export", id="O5: tied embeddings are exported from shards"),
    ],
)
def test_two_ranks(failures: dict[str, str], check: str) -> None:
    assert failures[check] == ""


def test_no_check_of_two_ranks_is_forgotten(failures: dict[str, str]) -> None:
    asked = next(mark for mark in test_two_ranks.pytestmark if mark.name == "parametrize").args[1]  # type: ignore[attr-defined]
    assert failures.keys() == {param.values[0] for param in asked}


@pytest.mark.parametrize("end", ["raises", "is_killed"])
@pytest.mark.parametrize("launcher", [under_deepspeed, under_torchrun])
def test_the_end_of_one_rank_ends_the_run(launcher: Callable[..., list[str]], end: str) -> None:
    started = time.monotonic()
    result = run(launcher("tests.dying_rank", end), timeout_seconds=60)
    assert result.returncode != 0
    assert time.monotonic() - started < 45
    if end == "raises":
        assert "rank 1 has met something" in result.stderr
