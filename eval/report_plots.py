"""Per-layer plots as SVG text that stands inside a page: no file, no network."""

from __future__ import annotations

import io
import re
from typing import Any

# Okabe and Ito's colours (2008), told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vP*X"


def error_plot(records: list[dict[str, Any]]) -> str:
    """Relative error of every linear over the blocks, one line a kind of linear, logarithmic."""
    figure, axes = _figure("relative output error")
    for kind, rows, style in _kinds(records):
        axes.plot([row["block"] for row in rows], [row["relative_error"] for row in rows], label=kind, **style)
    if any(row["relative_error"] > 0 for row in records):
        axes.set_yscale("log")
    return _svg(figure, axes, records, "error")


def scale_plot(records: list[dict[str, Any]]) -> str:
    """Mean scale of every linear over the blocks, with a thin bar from its smallest to its largest scale."""
    figure, axes = _figure("scale")
    kinds = list(_kinds(records))
    for place, (kind, rows, style) in enumerate(kinds):
        shift = 0.5 * (place / max(1, len(kinds) - 1) - 0.5) if len(kinds) > 1 else 0.0
        x = [row["block"] + shift for row in rows]
        low, high = ([row[key] for row in rows] for key in ("scale_min", "scale_max"))
        axes.vlines(x, low, high, color=style["color"], lw=1, alpha=0.5)
        axes.plot(x, [row["scale_mean"] for row in rows], label=kind, **(style | {"linestyle": "none"}))
    if all(row["scale_min"] > 0 for row in records):
        axes.set_yscale("log")
    return _svg(figure, axes, records, "scale")


def _kinds(records: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """(kind of linear, its records by block, style of its line), in the order of the model."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        kinds.setdefault(record["name"].rpartition(".")[2], []).append(record)
    small = 5 if len(records) < 300 else 3
    return [
        (
            kind,
            sorted(rows, key=lambda row: row["block"]),
            {
                "color": COLOURS[place % len(COLOURS)],
                "marker": MARKERS[place % len(MARKERS)],
                "markersize": small,
                "lw": 1.4,
            },
        )
        for place, (kind, rows) in enumerate(kinds.items())
    ]


def _figure(label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no windows, no state shared with others

    figure = Figure(figsize=(6.2, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("decoder block")
    axes.set_ylabel(label)
    return figure, axes


def _svg(figure: Any, axes: Any, records: list[dict[str, Any]], salt: str) -> str:
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    blocks = [row["block"] for row in records]
    axes.set_xlim(min(blocks) - 0.5, max(blocks) + 0.5)
    axes.grid(True, which="major", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    buffer = io.StringIO()
    # Text stays text (the reader's font), and names inside the two plots of a page must differ: hence the salt.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r'\bid="([^"]+)"', rf'id="{salt}-\1"', text[text.index("<svg") :])
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{salt}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The page decides on the size: only the viewBox stays.
    opening, _, rest = text.partition(">")
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} role="img">{rest}'
