"""Judges the samples of a PPO run with a classifier that PPO never saw: TF-IDF and logistic regression.

The classifier learns from labelled reviews, and its accuracy is measured on a fifth of them that it did not learn from.
Then it says which share of the samples is positive before and after PPO, once for the whole text and once for the
response without its prompt.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.recipes.movie_reviews.prepare import PREFIX, read_reviews, split_reviews
from training.records import DataError, read_records

PHASES = ("before", "after")
Judge = Callable[[Sequence[str]], list[bool]]


def train_judge(texts: Sequence[str], labels: Sequence[str]) -> Judge:
    """Fits the classifier.

    Returns: a function that says of each text whether it is positive.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise ImportError("the judge needs scikit-learn: pip install '.[recipes]'") from error
    # Words are what stands between spaces: in these reviews punctuation stands alone and "n't" carries meaning.
    vectorizer = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2), sublinear_tf=True)
    classifier = make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=1000))
    classifier.fit(list(texts), [label == "positive" for label in labels])

    def judge(texts: Sequence[str]) -> list[bool]:
        return [bool(verdict) for verdict in classifier.predict(list(texts))]

    return judge


def read_samples(path: Path) -> dict[str, list[dict[str, str]]]:
    """The samples of `path` (lines of {"phase", "prompt", "response"}) by phase, "before" and "after"."""
    samples: dict[str, list[dict[str, str]]] = {phase: [] for phase in PHASES}
    for source, record in read_records(str(path)):
        if not {"phase", "prompt", "response"} <= record.keys():
            raise DataError(f'{source}: needs "phase", "prompt" and "response"')
        if record["phase"] in samples:
            samples[record["phase"]].append(dict(record))
    empty = [phase for phase in PHASES if not samples[phase]]
    if empty:
        raise ValueError(f"{path}: no sample of phase {' or '.join(empty)}")
    return samples


def positive_share(judge: Judge, texts: Sequence[str]) -> float:
    """Share of the texts, from 0 to 1, that the judge calls positive."""
    verdicts = judge(texts)
    return sum(verdicts) / len(verdicts)


def judge_samples(reviews: Path, samples: Path, seed: int) -> dict[str, Any]:
    """Trains the judge on four fifths of the reviews and applies it to both phases of the samples.

    Returns: `judge_accuracy` on the other fifth, and for each phase `samples`, `positive_share` (prompt and response
    together) and `positive_share_response`.
    """
    train, held_out = split_reviews(read_reviews(reviews), seed)
    judge = train_judge([text for text, _ in train], [label for _, label in train])
    verdicts = judge([text for text, _ in held_out])
    correct = sum(verdict == (label == "positive") for verdict, (_, label) in zip(verdicts, held_out, strict=True))
    report: dict[str, Any] = {"judge_accuracy": correct / len(held_out), "judge_held_out_reviews": len(held_out)}
    for phase, rows in read_samples(samples).items():
        reviews_of_phase = [row["prompt"].removeprefix(PREFIX) + row["response"] for row in rows]
        report[phase] = {
            "samples": len(rows),
            "positive_share": positive_share(judge, reviews_of_phase),
            "positive_share_response": positive_share(judge, [row["response"] for row in rows]),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, help='JSONL file of {"text", "label"}')
    parser.add_argument("--samples", type=Path, required=True, help="samples.jsonl of a PPO run")
    parser.add_argument("--seed", type=int, default=1, help="decides which reviews the judge learns from")
    arguments = parser.parse_args()
    print(json.dumps(judge_samples(arguments.reviews, arguments.samples, arguments.seed), indent=2))


if __name__ == "__main__":
    main()
