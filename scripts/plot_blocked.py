#!/usr/bin/env python3
"""Draw docs/kernel_speed.svg: x cuBLAS over M, geometric means, beside the best of other kernels.

    python scripts/plot_blocked.py [docs/kernel_blocked_h200.csv] [-o docs/kernel_speed.svg]

The CSV has the columns k, n, m, microseconds and torch_microseconds (scripts/bench_blocked.py writes them too). The
values of the other kernels are those of docs/benchmarks.md: the best correct one of each shape.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
OTHERS = {1: 2.07, 8: 2.14, 16: 1.98, 32: 1.82, 64: 1.48, 128: 1.15}
OTHERS |= {256: 0.95, 512: 0.95, 1024: 1.01, 2048: 0.96, 4096: 0.95}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 60, 180, 20, 50
LARGEST = 3.75  # of the y axis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?", type=Path, default=DOCS / "kernel_blocked_h200.csv")
    parser.add_argument("-o", "--output", type=Path, default=DOCS / "kernel_speed.svg")
    options = parser.parse_args()
    options.output.write_text(draw(read(options.csv)))


def read(path: Path) -> dict[int, list[float]]:
    """M → x cuBLAS of every layer."""
    speeds = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            speeds[int(row["m"])].append(float(row["torch_microseconds"]) / float(row["microseconds"]))
    return dict(sorted(speeds.items()))


def draw(speeds: dict[int, list[float]]) -> str:
    first, last = math.log2(min(speeds)), math.log2(max(speeds))

    def x(m: float) -> float:
        return LEFT + (math.log2(m) - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT)

    def y(speed: float) -> float:
        return TOP + (1 - speed / LARGEST) * (HEIGHT - TOP - BOTTOM)

    def line(points: dict[int, float], color: str, name: str, at: float) -> list[str]:
        path = " ".join(f"{x(m):.1f},{y(speed):.1f}" for m, speed in points.items())
        legend = WIDTH - RIGHT + 20
        return [
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>',
            *(f'<circle cx="{x(m):.1f}" cy="{y(speed):.1f}" r="3.5" fill="{color}"/>' for m, speed in points.items()),
            f'<line x1="{legend}" x2="{legend + 24}" y1="{at}" y2="{at}" stroke="{color}" stroke-width="2.5"/>',
            f'<text x="{legend + 30}" y="{at + 4}">{name}</text>',
        ]

    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in (0, 0.5, 1, 1.5, 2, 2.5, 3):
        color, width = ("#444", 1.5) if tick == 1 else ("#ddd", 1)
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
        parts.append(f'<line {ends} stroke="{color}" stroke-width="{width}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for m, values in speeds.items():
        parts.append(f'<text x="{x(m):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{m}</text>')
        parts += [f'<circle cx="{x(m):.1f}" cy="{y(v):.1f}" r="2" fill="#1f77b4" opacity="0.35"/>' for v in values]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">tokens M</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">times cuBLAS FP16</text>')
    means = {m: statistics.geometric_mean(values) for m, values in speeds.items()}
    parts += line({m: speed for m, speed in OTHERS.items() if m in speeds}, "#d95f02", "best of others", TOP + 34)
    parts += line(means, "#1f77b4", "gemm_blocked", TOP + 12)
    parts.append(f'<text x="{WIDTH - RIGHT + 20}" y="{TOP + 62}" fill="#666">dots: single layers</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
