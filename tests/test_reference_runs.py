"""Seeded runs give the numbers of the committed files: a change that is not meant to change them, such as a refactor,
cannot change them unseen."""

import json
from typing import Any

import pytest

from tests.make_reference_runs import BOUND, COMMAND, FOLDER, Row, differences, run_stages, versions

NAMES = ("step1_sft", "step2_reward", "step3_ppo", "step3_grpo")
SHOWN = 5


def kept(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    return run_stages(tmp_path_factory.mktemp("reference_runs"))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_gives_the_numbers_that_are_kept(runs: dict[str, list[Row]], name: str) -> None:
    reference = kept(name)
    found = differences(reference["rows"], runs[name], BOUND)
    if found:
        lines = "\n  ".join(found[:SHOWN])
        pytest.fail(
            f"{name}: {len(found)} of {sum(map(len, reference['rows']))} numbers differ, the first ones:\n  {lines}\n"
            f"The file was made by {reference['made_by']}; here are {versions()}.\n"
            f"If the change was meant to change them, make the files again and commit them with it: {COMMAND}",
            pytrace=False,
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_kept_number_moves(name: str) -> None:
    """A number that stands still would not show that what it measures is broken."""
    rows = [row for row in kept(name)["rows"] if row["step"] != "end"]
    still = {metric for row in rows for metric in row if len({r[metric] for r in rows if metric in r}) == 1}
    good = {"train/skipped", "ppo/skipped", "tokens/padding_share"}  # 0 as long as all is well
    always = {"ppo/steps", "ppo/stopped_early"} | good
    norms = {"train/grad_norm", "ppo/actor_grad_norm", "ppo/critic_grad_norm"}  # null at ZeRO 0
    of_ppo = {"step3_ppo": always | norms, "step3_grpo": always | {"rollout/kl_coefficient"}}
    assert still <= of_ppo.get(name, norms | good)


ROWS: list[Row] = [{"step": 1, "loss": 2.0, "kl": 0.0, "lr": 1e-3, "norm": None}, {"step": "end", "score": -3.0}]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"loss": 2.00019, "kl": -0.00009}, []),
        ({"loss": 2.00021}, ["step 1  loss  was 2.0  now 2.00021"]),
        ({"kl": 0.00011}, ["step 1  kl  was 0.0  now 0.00011"]),
        ({"lr": 0.00100011}, ["step 1  lr  was 0.001  now 0.00100011"]),
        ({"norm": 1.0}, ["step 1  norm  was None  now 1.0"]),
        ({"kl": None}, ["step 1  kl  was 0.0  now None"]),
        ({"ratio": 1.0}, ["step 1  ratio  was absent  now 1.0"]),
        ({"step": 2}, ["the steps were [1, 'end'], now [2, 'end']"]),
    ],
)
def test_a_difference_beyond_the_bound_is_named(change: Row, found: list[str]) -> None:
    assert differences(ROWS, [ROWS[0] | change, ROWS[1]], bound=1e-4) == found


def test_a_number_or_a_step_that_is_gone_is_named() -> None:
    assert differences(ROWS, [ROWS[0], {"step": "end"}], bound=1e-4) == ["step end  score  was -3.0  now absent"]
    assert differences(ROWS, ROWS[:1], bound=1e-4) == ["the steps were [1, 'end'], now [1]"]
