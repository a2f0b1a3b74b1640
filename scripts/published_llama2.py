#!/usr/bin/env python3
"""Reports of marlin-eval beside the published figures of Llama-2 in the Marlin format.

    python scripts/published_llama2.py 7B=reports/7B.json 13B=reports/13B.json ...

Prints a markdown table: full precision → 4 bits as measured, and as published (7B, 13B and 70B; perplexity in windows
of 4096 tokens, MMLU 0-shot in percent). A figure that was not measured, or has not been published, is a dash.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("wikitext2", "redpajama", "mmlu")
PUBLISHED = {
    "7B": {"wikitext2": (5.12, 5.27), "redpajama": (6.14, 6.30), "mmlu": (41.80, 40.07)},
    "13B": {"wikitext2": (4.57, 4.67), "redpajama": (5.67, 5.79), "mmlu": (52.10, 51.13)},
    "70B": {"wikitext2": (3.12, 3.21), "redpajama": (4.74, 4.81), "mmlu": (65.43, 64.81)},
}


def measured(report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(full precision, 4 bits) of each column that the report has."""
    found = {
        entry["dataset"]: (entry["baseline"]["perplexity"], entry["model"]["perplexity"])
        for entry in report["perplexity"]
        if entry["baseline"]
    }
    for row in (report["tasks"] or {}).get("comparison", []):
        if (row["task"], row["metric"]) == ("mmlu", "acc,none"):
            found["mmlu"] = (100 * row["baseline_value"], 100 * row["value"])
    return found


def table(reports: dict[str, dict[str, Any]]) -> str:
    """One row a model and column."""
    lines = ["| model | figure | measured | published | change measured | change published |", "|---" * 6 + "|"]
    for name, report in reports.items():
        have, known = measured(report), PUBLISHED.get(name, {})
        for column in COLUMNS:
            cells = [pair(values.get(column)) for values in (have, known)]
            cells += [change(values.get(column)) for values in (have, known)]
            lines.append(f"| {name} | {column} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pair(values: tuple[float, float] | None) -> str:
    return "–" if values is None else f"{values[0]:.2f} → {values[1]:.2f}"


def change(values: tuple[float, float] | None) -> str:
    return "–" if values is None else f"{values[1] - values[0]:+.2f}"


def main(arguments: list[str]) -> int:
    if not arguments or not all("=" in argument for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    reports = {}
    for argument in arguments:
        name, _, file = argument.partition("=")
        reports[name] = json.loads(Path(file).read_text("utf-8"))
    print(table(reports))
    if any(report["settings"].get("limit") for report in reports.values()):
        print("\nLIMITED run: for tests only, comparable with nothing.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
