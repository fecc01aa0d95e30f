"""Plots as SVG text, to stand inside an HTML page. The same numbers always give the same bytes."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Told apart in grey and by colour-blind readers as well (Wong 2011).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
MOST_POINTS = 400
INCHES = (4.8, 2.7)

Points = tuple[Sequence[float], Sequence[float]]


def line_chart(title: str, x_label: str, series: Mapping[str, Points]) -> str:
    """Lines over a common axis.

    Args:
        series: for each name in the legend, x and y of as many points.
    """

    def draw(axes: Any) -> None:
        for colour, (name, (x, y)) in zip(COLOURS, series.items(), strict=False):
            stride = max(1, math.ceil(len(x) / MOST_POINTS))
            # The last point is always shown.
            kept = sorted({*range(0, len(x), stride), len(x) - 1})
            marker = "o" if len(kept) < 30 else None
            axes.plot([x[i] for i in kept], [y[i] for i in kept], color=colour, label=name, marker=marker, markersize=3)
        axes.set_xlabel(x_label)
        if len(series) > 1:
            axes.legend()

    return render(title, draw)


def histogram(title: str, x_label: str, groups: Mapping[str, Sequence[float]], bins: int = 30) -> str:
    """How often each number comes, for groups that share their bins."""
    finite = {name: [value for value in values if math.isfinite(value)] for name, values in groups.items()}
    everything = [value for values in finite.values() for value in values]

    def draw(axes: Any) -> None:
        low, high = (min(everything), max(everything)) if everything else (0.0, 1.0)
        if high == low:
            low, high = low - 0.5, high + 0.5
        edges = [low + (high - low) * i / bins for i in range(bins + 1)]
        for colour, (name, values) in zip(COLOURS, finite.items(), strict=False):
            axes.hist(values, bins=edges, color=colour, alpha=0.55, label=f"{name} ({len(values)})")
        axes.set_xlabel(x_label)
        axes.set_ylabel("number")
        axes.legend()

    return render(title, draw)


def share_bars(title: str, x_label: str, labels: Sequence[str], shares: Sequence[float]) -> str:
    """One bar per label for a share between 0 and 1, beside the line of chance at one half."""

    def draw(axes: Any) -> None:
        places = range(len(labels))
        axes.bar(places, shares, color=COLOURS[0], width=0.7)
        axes.axhline(0.5, color="#52606d", linestyle="--", linewidth=1)
        axes.set_xticks(places, labels, rotation=20 if len(labels) > 5 else 0)
        axes.set_ylim(0, 1)
        axes.set_xlabel(x_label)
        axes.grid(axis="x", visible=False)

    return render(title, draw)


def calibration_chart(title: str, predicted: Sequence[float], observed: Sequence[float]) -> str:
    """Observed shares over predicted probabilities; a perfect model lies on the diagonal."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="#52606d", linestyle="--", linewidth=1, label="perfect")
        axes.plot(predicted, observed, color=COLOURS[0], marker="o", markersize=4, label="this model")
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("observed share")
        axes.legend()

    return render(title, draw)


def render(title: str, draw: Any) -> str:
    """One plot as an `<svg>` element.

    Raises: ImportError, where matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # The salt goes into the names that parts of the picture refer to each other by, which a page shares.
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": title}):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        draw(axes)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=True, metadata=NO_METADATA)
    text = picture.getvalue()
    return text[text.index("<svg") :]
