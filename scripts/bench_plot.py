"""A picture of a report of bench_kernel.py: the speed against cuBLAS, layer by layer and over the number of tokens."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

# Okabe and Ito's colours (2008), told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vP*X"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture, in the format of the ending of `path` (png, svg, pdf)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    layers = list(dict.fromkeys((row["k"], row["n"]) for row in rows))
    layers.sort(key=lambda layer: layer[0] * layer[1])
    tokens = list(dict.fromkeys(row["m"] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")

    for index, m in enumerate(tokens):
        style = {"color": COLOURS[index % 8], "marker": MARKERS[index % 8], "label": f"M = {m}"}
        by_layer = {(row["k"], row["n"]): row["times_torch"] for row in rows if row["m"] == m}
        left.plot(range(len(layers)), [by_layer[layer] for layer in layers], **style)
    left.set_xticks(range(len(layers)), [f"{k}, {n}" for k, n in layers], rotation=45, ha="right")
    left.set_xlabel("layer (K, N), smallest weight first")
    left.set_title("each layer alone")

    for name, key, style in (
        ("alone", "times_torch", {"color": COLOURS[0], "marker": "o"}),
        ("in a chain", "chain_times_torch", {"color": COLOURS[1], "marker": "s"}),
    ):
        means = [statistics.geometric_mean(row[key] for row in rows if row["m"] == m) for m in tokens]
        right.plot(tokens, means, label=name, **style)
        for m, mean in zip(tokens, means, strict=True):
            below = name == "alone"
            offset = (0, -13 if below else 7)
            right.annotate(f"{mean:.2f}", (m, mean), xytext=offset, textcoords="offset points", ha="center", fontsize=8)
    right.set_xscale("log", base=2)
    right.set_xticks(tokens, [str(m) for m in tokens])
    right.set_xlabel("tokens M")
    right.set_title(f"geometric mean over {len(layers)} layer{'s' * (len(layers) > 1)}")

    for axes in (left, right):
        axes.axhline(1, color="#7F7F7F", linewidth=1, linestyle="--")
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.set_ylabel("times as fast as cuBLAS")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(
        f"4-bit product against cuBLAS {report['dtype']}, groups of {report['group_size']}, {report['device']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
