"""The comparison with peers, as far as it runs without them: formulas, table, README. TRL's own rows need TRL."""

import math
import re
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.benchmark import formulas, parity_trl
from scripts.benchmark.comparison import Group, Result, Row, largest_difference, measured
from scripts.benchmark.trl_runs import ENVIRONMENT, peer
from step3_ppo.config import PpoConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "scripts" / "benchmark" / "README.md").read_text(encoding="utf-8")
FORMULA_ROWS = {f"{g.title.split()[0]} {r.quantity}": (g, r) for g in formulas.FORMULA_GROUPS for r in g.rows}


def result(difference: float, corrected: float | None = None) -> Result:
    return Result(Row("", "", "", lambda _: (), "because" if corrected is not None else ""), difference, corrected)


def one_row(*sides: float, because: str = "") -> Group:
    return Group("a title", lambda: sides, (Row("a number", "ours", "theirs", lambda x: x, because),))


@pytest.mark.parametrize("name", FORMULA_ROWS)
def test_a_formula_of_verl_or_openrlhf_agrees_or_differs_as_its_row_says(name):
    group, row = FORMULA_ROWS[name]
    (measurement,) = measured(Group(group.title, group.prepare, (row,)))
    assert measurement.as_expected, str(measurement)


def test_the_formulas_carry_a_reward_over_a_gap_as_worked_out_by_hand():
    """A4: verl takes .3 and .2 + .95 * .3; OpenRLHF takes .3, .7 + .95 * .3 and -.5 + .95 * .985."""
    x = SimpleNamespace(
        rewards=torch.tensor([[0.0, 9.0, 1.0]]).double(), values=torch.tensor([[0.5, 9.0, 0.7]]).double()
    )
    gap = torch.tensor([[True, False, True]])
    torch.testing.assert_close(formulas.verl_gae(x, gap, gamma=1.0), torch.tensor([[0.485, 0.0, 0.3]]).double())
    torch.testing.assert_close(formulas.openrlhf_gae(x, gap, gamma=1.0), torch.tensor([[0.43575, 0.0, 0.3]]).double())


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2():
    """K6: for log p = -1 and a reference of -1.5, k3 is exp(-.5) - 1 + .5, and k2's gradient is .5."""
    logprobs = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    kl = formulas.k3_plus(logprobs, torch.tensor(-1.5, dtype=torch.float64))
    kl.backward()
    assert kl.item() == pytest.approx(math.exp(-0.5) - 0.5, rel=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("broken", "row"),
    [
        ("gae", "OpenRLHF advantages, no gaps"),
        ("rloo", "verl advantages, RLOO"),
        ("token_rewards", "verl rewards"),
        ("kl_k2", "verl gradient of the KL loss"),
        ("clipped_policy_loss", "OpenRLHF policy loss"),
        ("clipped_value_loss", "verl value loss"),
    ],
)
def test_a_function_of_ours_that_is_a_ten_thousandth_off_is_found(broken, row, monkeypatch):
    right = getattr(formulas, broken)

    def wrong(*args, **kwargs):
        numbers = right(*args, **kwargs)
        return tuple(n * 1.0001 for n in numbers) if isinstance(numbers, tuple) else numbers * 1.0001

    monkeypatch.setattr(formulas, broken, wrong)
    group, found = FORMULA_ROWS[row]
    (measurement,) = measured(Group(group.title, group.prepare, (found,)))
    assert not measurement.as_expected


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [
        (result(9e-6), True),
        (result(2e-5), False),
        (result(math.inf), False),
        (result(0.1, corrected=9e-6), True),
        (result(0.1, corrected=2e-5), False),  # something else differs, too
        (result(9e-6, corrected=0.0), False),  # the peer has changed: the row's sentence is no longer so
    ],
)
def test_a_row_is_as_expected_only_where_its_verdict_holds(measurement, expected):
    assert measurement.as_expected is expected
    assert ("NOT AS EXPECTED" in str(measurement)) is not expected


def test_the_difference_is_relative_to_the_largest_number_of_theirs():
    assert largest_difference(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -4.0])) == 7 / 4
    assert largest_difference({"a": torch.ones(2), "b": 3.0}, {"b": 2.0, "a": torch.ones(2)}) == 1 / 2
    assert largest_difference(0.25, 0.0) == 0.25


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.ones(2), torch.ones(1)),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan])),
        ({"a": 1.0}, {"b": 1.0}),
    ],
    ids=["shapes", "nan", "names"],
)
def test_what_cannot_be_compared_does_not_agree(ours, theirs):
    assert largest_difference(ours, theirs) == math.inf


@pytest.mark.parametrize(
    ("group", "code"),
    [
        (one_row(1.0, 1.0), 0),
        (one_row(1.0, 1.1), 1),
        (one_row(1.0, 1.1, 1.1, because="it adds a tenth"), 0),
        (one_row(1.0, 1.1, 1.2, because="it adds a tenth"), 1),
    ],
)
def test_the_exit_code_is_1_unless_every_row_is_as_expected(group, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity_trl"])
    monkeypatch.setattr(parity_trl, "peer", lambda module: None)
    monkeypatch.setattr(parity_trl.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(parity_trl, "GROUPS", (one_row(2.0, 2.0), group))
    with pytest.raises(SystemExit) as exit_:
        parity_trl.main()
    assert exit_.value.code == code
    assert f"2 rows, {code} not as expected" in capsys.readouterr().out


def test_without_trl_the_error_says_how_to_make_its_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parity_trl"])
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit) as exit_:
        parity_trl.main()
    commands = [line.strip() for line in ENVIRONMENT.splitlines()[1:]]
    assert len(commands) == 2
    for command in commands:
        assert command in str(exit_.value.code)
        assert f"\n{command}\n" in README


def test_a_module_that_is_there_is_handed_over():
    assert peer("math") is math


def table() -> dict[str, list[list[str]]]:
    """The cells of README's rows by the title above them."""
    rows: dict[str, list[list[str]]] = {}
    title = ""
    for line in README.splitlines():
        if found := re.fullmatch(r"\*\*(.+)\*\*", line):
            title = found[1]
        elif line.startswith("#"):
            title = ""
        elif line.startswith("| ") and title and not line.startswith("| quantity |"):
            rows.setdefault(title, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_readme_has_every_row_with_its_sentence_and_no_other():
    expected = {
        group.title: [
            [row.quantity, row.ours, row.theirs, f"differs: {row.because}" if row.because else "agrees"]
            for row in group.rows
        ]
        for group in parity_trl.GROUPS
    }
    assert {title: [[*row[:3], row[4]] for row in rows] for title, rows in table().items()} == expected


def test_the_numbers_in_readme_bear_out_its_verdicts():
    for rows in table().values():
        for quantity, _, _, numbers, verdict in rows:
            first, *corrected = [float(number) for number in numbers.split(", corrected ")]
            assert result(first, *corrected).as_expected, quantity
            assert bool(corrected) == verdict.startswith("differs"), quantity


def test_readme_states_the_versions_that_are_pinned():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins |= dict(re.findall(r"^(trl)==(\S+)$", (ROOT / "scripts/benchmark/peers.txt").read_text(), re.MULTILINE))
    stated = re.search(r"^trl (\S+), transformers (\S+), torch (\d+\.\d+\.\d+)", README, re.MULTILINE)
    assert stated and stated.groups() == (pins["trl"], pins["transformers"], pins["torch"])


def test_the_options_that_readme_names_exist():
    rows = re.findall(r"^\| .+ \| (.+) \|$", README.partition("\n## Options by their names in TRL\n")[2], re.MULTILINE)
    names = [name for row in rows[1:] for name in re.findall(r"`([a-z_.]+)`", row)]
    assert len(names) > 15
    for name in names:
        options: Any = PpoConfig
        for part in name.split("."):
            options = typing.get_type_hints(options)[part]
