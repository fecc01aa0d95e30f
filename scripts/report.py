"""Builds report.html, one self-contained page about a staged run: `python -m scripts.report RUN_DIR`."""

import argparse
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scripts import figures
from scripts.page import fold, minutes, number, number_table, page, paragraph, plots, section
from scripts.summary import STEP_FOLDERS, build_summary, measured_seconds, read_json, read_results

TITLES = {"step1": "Step 1: supervised fine-tuning", "step2": "Step 2: reward model", "step3": "Step 3: PPO"}
# The curves that tell the story of each step; the others are folded away.
MAIN_CURVES = {
    "step1": ("loss", "perplexity"),
    "step2": ("loss", "accuracy"),
    "step3": ("rollout/score_mean", "rollout/kl", "rollout/response_tokens"),
}
HEADLINES = {
    "step1": ("held-out loss", lambda r: f"{r['loss_before']:.3f} → {r['loss_after']:.3f}"),
    "step2": ("held-out accuracy", lambda r: f"{r['accuracy_before']:.1%} → {r['accuracy_after']:.1%}"),
    "step3": ("mean held-out score", lambda r: f"{r['score_before']['mean']:.2f} → {r['score_after']['mean']:.2f}"),
}
SAMPLES_SHOWN = 16
PHASE_PREFIX = "seconds/"

Row = Mapping[str, Any]


def build_report(run_dir: str | Path) -> Path:
    """Writes RUN_DIR/report.html, with the curves of steps that are not finished. Returns its path."""
    run = Path(run_dir)
    results = read_results(run)
    summary = build_summary(results, measured_seconds(run))
    sections = [header(run, summary, read_json(run / "environment.json") or {})]
    for key, folder in STEP_FOLDERS.items():
        metrics = read_metrics(run / folder / "metrics.jsonl")
        if key in results or metrics:
            parts = [main_curves(key, metrics), other_curves(key, metrics)]
            if key in results:
                parts = [paragraph(summary[key]["verdict"]), parts[0], DETAILS[key](results[key]), parts[1]]
            if key == "step3":
                parts.append(samples_table(read_lines(run / folder / "samples.jsonl")))
            sections.append(section(TITLES[key], parts))
    sections += [section("What it cost", [costs(run, summary)]), section("What ran", [provenance(run)])]
    path = run / "report.html"
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(page(run.resolve().name, sections), encoding="utf-8", errors="backslashreplace")
    unfinished.replace(path)
    return path


def read_lines(path: Path) -> list[Row]:
    """The objects of a JSONL file; none if there is no file. A last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.strip() and line.endswith("\n")]


def read_metrics(path: Path) -> list[Row]:
    """The lines of metrics.jsonl. Where a run began again at an earlier step, what it did twice is there once."""
    kept: list[Row] = []
    for row in read_lines(path):
        if kept and row["step"] < kept[-1]["step"]:
            kept = [earlier for earlier in kept if earlier["step"] < row["step"]]
        kept.append(row)
    return kept


def series_by_chart(metrics: Sequence[Row]) -> dict[str, dict[str, figures.Points]]:
    """x and y of every metric. Training and evaluation share a chart: train/loss and eval/loss are lines of `loss`."""
    charts: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name not in ("step", "seconds", "tokens") and isinstance(value, (int, float)):
                prefix, _, rest = name.partition("/")
                chart, line = (rest, prefix) if prefix in ("train", "eval") else (name, name)
                x, y = charts.setdefault(chart, {}).setdefault(line, ([], []))
                x.append(row["step"])
                y.append(value)
    return {chart: dict(lines) for chart, lines in charts.items()}


def header(run: Path, summary: Row, environment: Row) -> str:
    device = ", ".join(environment.get("gpus") or [f"{environment.get('cpu_cores', '?')} CPU cores"])
    facts = [environment.get("started", ""), device, f"{minutes(summary['seconds']['total'])} in all"]
    cards = "".join(card(key, summary.get(key)) for key in STEP_FOLDERS)
    name = html.escape(run.resolve().name)
    facts_line = html.escape(" · ".join(fact for fact in facts if fact))
    return f'<header><h1>{name}</h1><p class="soft">{facts_line}</p></header><div class="cards">{cards}</div>'


def card(key: str, result: Row | None) -> str:
    title = html.escape(TITLES[key])
    if result is None:
        return f'<div class="card"><div class="label">{title}</div><p class="soft">Not finished.</p></div>'
    what, number = HEADLINES[key]
    kind, word = ("good", "✓ helped") if result["helped"] else ("bad", "✗ did not help")
    return (
        f'<div class="card {kind}"><div class="label">{word}</div>{title}'
        f'<div class="number">{html.escape(number(result))}</div><div class="soft">{html.escape(what)}</div></div>'
    )


def main_curves(key: str, metrics: Sequence[Row]) -> str:
    charts = series_by_chart(metrics)
    return draw_curves(key, {name: charts[name] for name in MAIN_CURVES[key] if name in charts})


def other_curves(key: str, metrics: Sequence[Row]) -> str:
    """All other metrics but the phases' seconds, which stand under the costs."""
    charts = series_by_chart(metrics)
    others = {
        name: lines
        for name, lines in charts.items()
        if name not in MAIN_CURVES[key] and not name.startswith(PHASE_PREFIX)
    }
    return fold(f"More curves ({len(others)})", draw_curves(key, others)) if others else ""


def draw_curves(key: str, charts: Mapping[str, Mapping[str, figures.Points]]) -> str:
    x_label = "iteration" if key == "step3" else "optimizer step"
    return plots([partial(figures.line_chart, name, x_label, lines) for name, lines in charts.items()])


def details_of_sft(result: Row) -> str:
    rows = [
        ("held-out loss (nats per token)", result["loss_before"], result["loss_after"]),
        ("held-out perplexity", result["perplexity_before"], result["perplexity_after"]),
    ]
    return number_table(("", "before", "after"), rows) + counts_table(result)


def details_of_reward(result: Row) -> str:
    lengths, calibration = result["accuracy_by_length_difference"], result["calibration"]
    labels = [f"{bucket['low']:.0f} to {bucket['high']:.0f}" for bucket in lengths]
    scores = {"chosen": result["scores_chosen"], "rejected": result["scores_rejected"]}
    accuracies = [bucket["accuracy"] for bucket in lengths]
    predicted, observed = [row["predicted"] for row in calibration], [row["observed"] for row in calibration]
    drawings = [
        partial(figures.histogram, "Scores of held-out responses", "score", scores),
        partial(figures.share_bars, "Accuracy by length", "tokens of chosen minus rejected", labels, accuracies),
        partial(figures.calibration_chart, "Calibration", predicted, observed),
    ]
    rows = [
        ("held-out accuracy", result["accuracy_before"], result["accuracy_after"]),
        ("held-out loss", result["loss_before"], result["loss_after"]),
    ]
    length_rows = [(label, row["pairs"], row["accuracy"]) for label, row in zip(labels, lengths, strict=True)]
    calibration_rows = [(f"{row['predicted']:.3f}", row["pairs"], row["observed"]) for row in calibration]
    return (
        plots(drawings)
        + number_table(("", "before", "after"), rows)
        + fold(
            "Length and calibration in numbers",
            number_table(("tokens of chosen minus rejected", "pairs", "accuracy"), length_rows)
            + number_table(("predicted probability", "pairs", "observed share"), calibration_rows),
        )
        + counts_table(result)
    )


def details_of_ppo(result: Row) -> str:
    before, after, win_rate = result["score_before"], result["score_after"], result["win_rate"]
    scores = {"before": before["values"], "after": after["values"]}
    rows = [
        ("mean score", before["mean"], after["mean"]),
        ("median score", before["median"], after["median"]),
        *(
            (label, result[f"{name}_before"], result[f"{name}_after"])
            for name, label in (
                ("distinct_2", "distinct-2 (share of word pairs that are new)"),
                ("response_tokens", "tokens per response"),
                ("eos_share", "share of responses that end by themselves"),
            )
        ),
        ("KL to the reference (nats per response)", "", result["kl"]),
        (f"win rate over {win_rate['pairs']} prompts", "", win_rate["value"]),
        ("its 95% interval", win_rate["low"], win_rate["high"]),
    ]
    drawing = partial(figures.histogram, "Scores of held-out prompts", "score", scores)
    return plots([drawing]) + number_table(("", "before", "after"), rows) + counts_table(result)


def counts_table(result: Row) -> str:
    """How many records were used and left out, by reason."""
    rows = [(name.replace("_", " "), count) for name, count in result.get("data", {}).items()]
    return fold("Data: what was used and left out", number_table(("", "records"), rows)) if rows else ""


DETAILS = {"step1": details_of_sft, "step2": details_of_reward, "step3": details_of_ppo}


def samples_table(samples: Sequence[Row]) -> str:
    """Responses to the same prompt side by side; the first ones in the open, the others folded away."""
    pairs = pair_samples(samples)
    if not pairs:
        return ""
    head = "<tr><th>prompt</th><th>before PPO</th><th>after PPO</th></tr>"
    rows = [
        f'<tr><td><div class="text">{html.escape(str(before["prompt"]))}</div></td>'
        f"<td>{response(before, 'score')}</td><td>{response(after, better_or_worse(before, after))}</td></tr>"
        for before, after in pairs
    ]
    table = '<table class="samples">{}{}</table>'
    shown = "<h3>Responses to held-out prompts</h3>" + table.format(head, "".join(rows[:SAMPLES_SHOWN]))
    hidden = rows[SAMPLES_SHOWN:]
    return shown + (fold(f"{len(hidden)} more", table.format(head, "".join(hidden))) if hidden else "")


def pair_samples(samples: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The responses before and after to each prompt; the n-th response to a prompt goes with the n-th."""
    after: dict[str, list[Row]] = {}
    for sample in samples:
        if sample["phase"] == "after":
            after.setdefault(sample["prompt"], []).append(sample)
    before = [sample for sample in samples if sample["phase"] == "before"]
    return [(sample, after[sample["prompt"]].pop(0)) for sample in before if after.get(sample["prompt"])]


def response(sample: Row, kind: str) -> str:
    score = f'<span class="{kind}">{number(sample["score"])}</span>'
    return f'{score}<div class="text">{html.escape(str(sample["response"]))}</div>'


def better_or_worse(before: Row, after: Row) -> str:
    if before["score"] is None or after["score"] is None or before["score"] == after["score"]:
        return "score"
    return "score good" if after["score"] > before["score"] else "score bad"


def costs(run: Path, summary: Row) -> str:
    """Seconds, tokens and memory of each step, and the phases of PPO."""
    seconds = summary["seconds"]
    rows = []
    for key in (key for key in STEP_FOLDERS if key in summary):
        result = summary[key]
        tokens, memory = result.get("tokens", math.nan), result.get("peak_memory_gib", math.nan)
        rows.append((TITLES[key], minutes(seconds[key]), tokens, tokens / max(seconds[key], 1e-9), memory))
    rows.append(("total", minutes(seconds["total"]), "", "", ""))
    table = number_table(("", "time", "tokens", "tokens per second", "peak memory (GiB)"), rows)
    phases = phase_seconds(read_metrics(run / STEP_FOLDERS["step3"] / "metrics.jsonl"))
    if not phases:
        return table
    whole = sum(phases.values())
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{minutes(spent)}</td><td>{spent / whole:.0%}"
        f'<span class="bar" style="width:{160 * spent / whole:.0f}px"></span></td></tr>'
        for name, spent in phases.items()
    )
    return f'{table}<h3>Phases of PPO</h3><table class="numbers">{body}</table>'


def phase_seconds(metrics: Iterable[Row]) -> dict[str, float]:
    """Seconds of each phase over all iterations, from the metrics named seconds/PHASE."""
    total: dict[str, float] = {}
    for row in metrics:
        for name, value in row.items():
            if name.startswith(PHASE_PREFIX) and value is not None:
                phase = name.removeprefix(PHASE_PREFIX)
                total[phase] = total.get(phase, 0.0) + value
    return total if sum(total.values()) > 0 else {}


def provenance(run: Path) -> str:
    """The environment and the whole config, as the run wrote them."""
    parts = [
        fold(name, f"<pre>{html.escape((run / name).read_text(encoding='utf-8'))}</pre>")
        for name in ("environment.json", "config.yaml")
        if (run / name).exists()
    ]
    return "".join(parts) or paragraph("environment.json and config.yaml are missing from the run's folder.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder that scripts.run_all wrote")
    run_dir = parser.parse_args().run_dir
    if not run_dir.is_dir():
        parser.error(f"{run_dir} is not a folder")
    print(build_report(run_dir))


if __name__ == "__main__":
    main()
