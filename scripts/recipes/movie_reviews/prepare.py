"""Makes the three data sets of the film review recipe from labelled reviews.

The input is a JSONL file of {"text", "label"}, label "positive" or "negative". Four fifths of the reviews go into

    demonstrations.jsonl   {"prompt", "response"}: every review, for supervised fine-tuning
    pairs.jsonl            {"prompt", "chosen", "rejected"}: a positive review over a negative one
    prompts.jsonl          {"prompt"}: the first 3 to 8 words of a review

and the rest into demonstrations_heldout.jsonl, pairs_heldout.jsonl and prompts_heldout.jsonl, which share no review
with them. Every prompt begins with "Review:", so that all three steps see a review in the same place. The text is kept
as it is, apart from the cap on its length.
"""

import argparse
import json
import random
from collections.abc import Sequence, Set
from pathlib import Path

from scripts.recipes.quickstart.prepare import write_jsonl
from training.records import DataError, read_records

LABELS = ("positive", "negative")
HELD_OUT_FRACTION = 0.2
PROMPT_WORDS = (3, 8)
PREFIX = "Review:"


def read_reviews(path: Path) -> list[tuple[str, str]]:
    """The distinct reviews of `path` as (text, label), in the order of the file."""
    found: dict[str, str] = {}
    for source, record in read_records(str(path)):
        text, label = record.get("text"), record.get("label")
        if not isinstance(text, str) or label not in LABELS:
            raise DataError(f'{source}: needs a "text" and a "label", which is one of {", ".join(LABELS)}')
        if text.strip():
            found.setdefault(text.strip(), label)
    missing = set(LABELS) - set(found.values())
    if missing:
        raise ValueError(f"{path}: no {' and no '.join(sorted(missing))} review; both labels are needed")
    return list(found.items())


def split_reviews(reviews: Sequence[tuple[str, str]], seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The reviews to train on and those held out, each label split in the same proportion."""
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for label in LABELS:
        group = [review for review in reviews if review[1] == label]
        random.Random(f"split {label} {seed}").shuffle(group)
        size = round(len(group) * HELD_OUT_FRACTION)
        held_out += group[:size]
        train += group[size:]
    random.Random(f"order {seed}").shuffle(train)
    random.Random(f"held-out order {seed}").shuffle(held_out)
    return train, held_out


def cap_words(text: str, max_words: int) -> str:
    """The first `max_words` words of a text whose words are separated by spaces."""
    return " ".join(text.split()[:max_words])


def make_pairs(reviews: Sequence[tuple[str, str]], pairs_per_review: int, seed: int) -> list[tuple[str, str]]:
    """Distinct (positive, negative) pairs: both labels shuffled `pairs_per_review` times and laid side by side."""
    rng = random.Random(f"pairs {seed}")
    positive, negative = ([text for text, label in reviews if label == wanted] for wanted in LABELS)
    pairs: dict[tuple[str, str], None] = {}
    for _ in range(pairs_per_review):
        rng.shuffle(positive)
        rng.shuffle(negative)
        pairs.update(dict.fromkeys(zip(positive, negative, strict=False)))
    return list(pairs)


def make_prompts(texts: Sequence[str], count: int, seed: int, exclude: Set[str]) -> list[str]:
    """Up to `count` distinct openings of 3 to 8 words, none of them in `exclude`.

    Going through the reviews again gives openings of other lengths. A review that ends within its opening is left out:
    nothing would remain to be said.
    """
    rng = random.Random(f"prompts {seed}")
    shortest, longest = PROMPT_WORDS
    found: dict[str, None] = {}
    for _ in range(longest - shortest + 1):
        order = list(texts)
        rng.shuffle(order)
        for text in order:
            words = text.split()
            length = rng.randint(shortest, longest)
            opening = " ".join(words[:length])
            if len(words) > length and opening not in exclude:
                found.setdefault(opening)
            if len(found) == count:
                return list(found)
    return list(found)


def prepare(
    reviews: Path,
    output_dir: Path,
    *,
    seed: int,
    max_words: int,
    pairs_per_review: int,
    num_prompts: int,
    num_heldout_prompts: int,
) -> dict[str, int]:
    """Writes the six files into `output_dir`.

    Returns: the number of lines of each file.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    train, held_out = (
        [(cap_words(text, max_words), label) for text, label in part]
        for part in split_reviews(read_reviews(reviews), seed)
    )
    prompts = make_prompts([text for text, _ in train], num_prompts, seed, exclude=frozenset())
    # Two reviews may begin alike.
    held_out_prompts = make_prompts([text for text, _ in held_out], num_heldout_prompts, seed, frozenset(prompts))
    counts = {}
    for suffix, part, openings, repeats in (
        ("", train, prompts, pairs_per_review),
        ("_heldout", held_out, held_out_prompts, 1),
    ):
        pairs = make_pairs(part, repeats, seed)
        records: dict[str, list[dict[str, str]]] = {
            "demonstrations": [{"prompt": PREFIX, "response": f" {text}"} for text, _ in part],
            "pairs": [{"prompt": PREFIX, "chosen": f" {good}", "rejected": f" {bad}"} for good, bad in pairs],
            "prompts": [{"prompt": f"{PREFIX} {opening}"} for opening in openings],
        }
        for name, rows in records.items():
            write_jsonl(output_dir / f"{name}{suffix}.jsonl", rows)
            counts[f"{name}{suffix}"] = len(rows)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, help='JSONL file of {"text", "label"}')
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the six files")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other splits, pairs and prompts")
    parser.add_argument("--max_words", type=int, default=40, help="longer reviews are cut after so many words")
    parser.add_argument("--pairs_per_review", type=int, default=3, help="how often each review appears in pairs.jsonl")
    parser.add_argument("--num_prompts", type=int, default=6000, help="the most prompts to train on")
    parser.add_argument("--num_heldout_prompts", type=int, default=256, help="the most prompts to measure on")
    print(json.dumps(prepare(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
