import json
import re
import sys
from html.parser import HTMLParser

import pytest

from scripts.report import build_report, main, pair_samples, read_metrics, series_by_chart
from tests.fake_run import write_fake_run, write_lines, write_results

VOID = {"meta", "br", "img", "link", "hr"}


class TagChecker(HTMLParser):
    """Refuses tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report_of(folder) -> str:
    text = build_report(folder).read_text(encoding="utf-8")
    checker = TagChecker()
    checker.feed(text)
    assert not checker.open
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_fake_run(folder)
    return folder, report_of(folder)


def test_report_holds_verdicts_plots_samples_costs_and_provenance(whole):
    _, text = whole
    for words in (
        "✓ helped",
        "3.500 → 1.250",
        "51.0% → 93.0%",
        "0.02 → 2.01",
        "Scores of held-out responses",
        "Accuracy by length",
        "Calibration",
        "Scores of held-out prompts",
        "rollout/kl",
        "skipped empty response",
        "I watched film number 0",
        "8 min 40 s",
        "some/model",
    ):
        assert words in text
    assert re.search(r"<td>generate</td><td>3 min 00 s</td><td>60%", text)


def test_report_needs_no_other_file_and_no_script(whole):
    _, text = whole
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    # Names of XML vocabularies, which nothing loads, are the only addresses.
    assert set(re.findall(r"https?://[^/\"]*", text)) == {"http://www.w3.org"}


def test_report_escapes_text(whole):
    _, text = whole
    assert "superb &amp; &lt;b&gt;magical&lt;/b&gt;" in text
    assert "python -m x &lt;y&gt;" in text


def test_same_run_gives_the_same_bytes(whole):
    folder, text = whole
    assert build_report(folder).read_text(encoding="utf-8") == text


def test_report_of_a_run_whose_later_steps_are_not_finished(tmp_path):
    write_fake_run(tmp_path)
    (tmp_path / "step2_reward" / "results.json").unlink()
    for path in (tmp_path / "step3_ppo").iterdir():
        path.unlink()
    text = report_of(tmp_path)
    assert text.count("Not finished.") == 2
    assert "Step 1 helped" in text
    assert text.count("<svg") == 2 + 1 + 2  # loss, perplexity, lr; the curves that step 2 has so far


def test_report_of_an_empty_folder(tmp_path):
    assert report_of(tmp_path).count("Not finished.") == 3


def test_report_with_numbers_that_are_not_finite(tmp_path):
    write_fake_run(tmp_path)
    path = tmp_path / "step3_ppo" / "results.json"
    results = json.loads(path.read_text())
    results |= {"distinct_2_ratio": None, "peak_memory_gib": None}
    results["score_after"] = {"mean": None, "median": None, "values": [None, 1.0]}
    write_results(tmp_path / "step3_ppo", results)
    assert "0.02 → nan" in report_of(tmp_path)


def test_report_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    write_fake_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report_of(tmp_path)
    assert "pip install matplotlib" in text and "<svg" not in text


def test_steps_that_a_restarted_run_did_twice_are_shown_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = [{"step": step, "train/loss": 9.0} for step in (0, 10, 20, 30)]
    second = [{"step": step, "train/loss": 1.0} for step in (20, 30, 40)]
    write_lines(path, first + second + [{"step": 40, "eval/loss": 2.0}])
    assert [(row["step"], row.get("train/loss")) for row in read_metrics(path)] == [
        (0, 9.0),
        (10, 9.0),
        (20, 1.0),
        (30, 1.0),
        (40, 1.0),
        (40, None),
    ]


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra')
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.0}]


def test_training_and_evaluation_share_a_chart():
    charts = series_by_chart([{"step": 1, "train/loss": 3.0, "eval/loss": 2.0, "ppo/kl": None, "rollout/kl": 1.0}])
    assert charts == {
        "loss": {"train": ([1], [3.0]), "eval": ([1], [2.0])},
        "rollout/kl": {"rollout/kl": ([1], [1.0])},
    }


def test_samples_are_paired_by_prompt_also_when_one_comes_twice():
    def sample(phase, prompt, response):
        return {"phase": phase, "prompt": prompt, "response": response, "score": 0.0}

    samples = [sample("before", "a", "1"), sample("before", "b", "2"), sample("before", "a", "3")]
    samples += [sample("after", "a", "4"), sample("after", "a", "5")]
    pairs = [(before["response"], after["response"]) for before, after in pair_samples(samples)]
    assert pairs == [("1", "4"), ("3", "5")]


def test_command_prints_where_the_report_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "missing")])
    with pytest.raises(SystemExit):
        main()
    assert "is not a folder" in capsys.readouterr().err
