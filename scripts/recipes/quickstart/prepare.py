"""Writes the data of the quickstart: short film reviews that `reviews.py` generates.

demonstrations.jsonl (prompt, response), pairs.jsonl (prompt, chosen, rejected) and prompts.jsonl (prompt); no prompt is
in two of the files. A response starts with a space, so prompt + response is the review.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from scripts.recipes.quickstart import reviews


def write_jsonl(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    """Writes one JSON object a line; the file appears only when it is complete."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    unfinished.rename(path)


def prepare(output_dir: Path, seed: int, num_demonstrations: int, num_pairs: int, num_prompts: int) -> None:
    """Writes the three files into `output_dir`, which is made if needed."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        output_dir / "demonstrations.jsonl",
        (
            {"prompt": review.prompt, "response": review.response}
            for review in reviews.demonstrations(num_demonstrations, seed)
        ),
    )
    write_jsonl(
        output_dir / "pairs.jsonl",
        (
            {"prompt": chosen.prompt, "chosen": chosen.response, "rejected": rejected.response}
            for chosen, rejected in reviews.preference_pairs(num_pairs, seed)
        ),
    )
    write_jsonl(output_dir / "prompts.jsonl", ({"prompt": prompt} for prompt in reviews.prompts(num_prompts, seed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other reviews")
    parser.add_argument("--num_demonstrations", type=int, default=20_000)
    parser.add_argument("--num_pairs", type=int, default=20_000)
    parser.add_argument("--num_prompts", type=int, default=10_000)
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
