import json
import math

import pytest

from scripts.summary import build_summary, describe_environment, read_results
from tests.fake_run import fake_results, write_fake_run, write_results


def contains_key(tree, key) -> bool:
    return isinstance(tree, dict) and (key in tree or any(contains_key(value, key) for value in tree.values()))


def test_summary_keeps_the_numbers_and_leaves_out_the_long_lists():
    summary = build_summary(fake_results(), {})
    assert summary["step2"]["normalization"] == {"gain": 0.8, "bias": -0.1}
    assert summary["step3"]["score_after"] == {"mean": 2.01, "median": 2.1}
    assert summary["step3"]["kl"] == 6.5
    for name in ("values", "scores_chosen", "scores_rejected"):
        assert not contains_key(summary, name)


def test_summary_of_a_part_of_the_steps():
    assert set(build_summary({}, {})) == {"seconds"}
    assert set(build_summary({"step1": fake_results()["step1"]}, {})) == {"step1", "seconds"}


def test_time_is_what_was_measured_and_else_what_the_step_counted():
    summary = build_summary(fake_results(), {"step1": 130.0})
    assert summary["seconds"] == {"step1": 130.0, "step2": 120.0, "step3": 300.0, "total": 550.0}


@pytest.mark.parametrize(
    ("step", "change", "helped", "words"),
    [
        ("step1", {}, True, "Step 1 helped: the held-out loss went from 3.500 to 1.250"),
        ("step1", {"loss_after": 3.6}, False, "did not help"),
        ("step1", {"loss_after": math.nan}, False, "did not help"),
        ("step2", {}, True, "in 93.0% of the pairs, before training in 51.0%"),
        ("step2", {"accuracy_before": 0.3, "accuracy_after": 0.49}, False, "did not help"),
        ("step3", {}, True, "stayed close to where it began (KL 6.5 nats per response"),
        ("step3", {"win_rate": {"value": 0.55, "low": 0.46, "high": 0.64, "pairs": 128}}, False, "did not help"),
        ("step3", {"kl": 43.0}, True, "But the text drifted far from where it began (KL 43.0"),
        ("step3", {"distinct_2_ratio": 0.5}, True, "But the text drifted"),
    ],
)
def test_verdicts(step, change, helped, words):
    result = build_summary({step: fake_results()[step] | change}, {})[step]
    assert result["helped"] is helped
    assert words in result["verdict"]


def test_results_of_finished_steps_are_read(tmp_path):
    write_fake_run(tmp_path)
    (tmp_path / "step2_reward" / "results.json").unlink()
    assert list(read_results(tmp_path)) == ["step1", "step3"]


def test_a_number_that_was_not_finite_is_read_as_nan(tmp_path):
    write_results(tmp_path / "step1_sft", fake_results()["step1"] | {"loss_after": None})
    results = read_results(tmp_path)
    assert math.isnan(results["step1"]["loss_after"])
    assert build_summary(results, {})["step1"]["helped"] is False


def test_environment_holds_no_variables(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "hunter2-secret")
    assert "hunter2-secret" not in json.dumps(describe_environment())
