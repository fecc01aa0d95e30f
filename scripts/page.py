"""Pieces of an HTML page. Titles, texts and cells are escaped here; content is HTML already."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def page(title: str, sections: Iterable[str]) -> str:
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def plots(drawings: Sequence[Callable[[], str]]) -> str:
    """A grid of pictures; where matplotlib is missing, a line that says so."""
    try:
        pictures = [drawing() for drawing in drawings]
    except ImportError:
        return '<p class="soft">Plots need matplotlib: pip install matplotlib, then python -m scripts.report.</p>'
    return f'<div class="plots">{"".join(pictures)}</div>' if pictures else ""


def section(title: str, parts: Iterable[str]) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def fold(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def number_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{number(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="numbers"><tr>{top}</tr>{body}</table>'


def number(value: Any) -> str:
    """A cell's text: whole numbers with separators, others with about four digits, text escaped."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
    return html.escape(str(value))


def minutes(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 60 else f"{whole // 60} min {whole % 60:02d} s"
