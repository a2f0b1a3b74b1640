"""Measured speeds as a table of a report: words and units for the keys that this project's measurements have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from marlin_gptq.eval.throughput import MEANINGS

# Key in the JSON → heading, and how a value is shown. First those of `marlin-eval throughput`, then those of
# scripts/bench_kernel.py; of other keys the underscores become spaces.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("model", lambda path: str(path).rstrip("/").rpartition("/")[2]),
    "mode": ("mode", str),
    "batch": ("sequences at once", str),
    "time_to_first_token": ("first token after, ms", lambda seconds: f"{1000 * seconds:,.1f}"),
    "prefill_tokens_per_second": ("prompt, tokens/s", lambda rate: f"{rate:,.0f}"),
    "decode_tokens_per_second": ("decoding, tokens/s", lambda rate: f"{rate:,.1f}"),
    "decode_step_seconds": ("decoding step, ms", lambda seconds: f"{1000 * seconds:,.2f}"),
    "peak_memory": ("largest GPU memory", lambda size: shown_size(size)),
    "shape": ("weight", str),
    "k": ("inputs (K)", str),
    "n": ("outputs (N)", str),
    "m": ("tokens (M)", str),
    "microseconds": ("time, µs", lambda time: f"{time:.2f}"),
    "gigabytes_per_second": ("GB/s", lambda rate: f"{rate:,.0f}"),
    "of_stream": ("of the memory's rate, %", lambda share: f"{100 * share:.0f}"),
    "teraflops": ("TFLOP/s", lambda rate: f"{rate:,.1f}"),
    "torch_microseconds": ("torch, µs", lambda time: f"{time:.2f}"),
    "times_torch": ("times as fast as torch", lambda ratio: f"{ratio:.2f}"),
    "chain_microseconds": ("in a chain, µs", lambda time: f"{time:.2f}"),
    "chain_times_torch": ("in a chain, times torch", lambda ratio: f"{ratio:.2f}"),
    "times_int4": ("times torch's int4", lambda ratio: f"{ratio:.2f}"),
    "relative_error": ("relative error", lambda error: f"{error:.0e}"),
}
WORDS = ("model", "mode", "shape")  # columns that are no numbers
_OF_A_REQUEST = ("time_to_first_token", "prefill_tokens_per_second", "decode_tokens_per_second", "decode_step_seconds")


def throughput_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]], int]:
    """(heads, cells, how many columns at the left are words) of measured rows; columns without a value are left out."""
    shown = [{key: _cell(row, key) for key in row} for row in rows]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys = [key for key in keys if key != "error" and any(row.get(key) for row in shown)]
    keys.sort(key=lambda key: key not in WORDS)
    heads = [COLUMNS[key][0] if key in COLUMNS else key.replace("_", " ") for key in keys]
    return heads, [[row.get(key, "") for key in keys] for row in shown], max(1, sum(key in WORDS for key in keys))


def throughput_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why rows have no figures, and what those of `marlin-eval throughput` mean."""
    failed = [
        f"{', '.join(_cell(row, key) for key in WORDS if key in row)}, {row.get('batch')} at once: {row['error']}."
        for row in rows
        if row.get("error")
    ]
    if not any("decode_tokens_per_second" in row for row in rows):
        return failed
    modes = [mode for mode in dict.fromkeys(row.get("mode") for row in rows) if mode in MEANINGS]
    return [
        *failed,
        "Tokens per second are those of all sequences together; a decoding step makes one token of each.",
        *(f"{mode}: {MEANINGS[mode]}." for mode in modes),
    ]


def shown_size(size: int) -> str:
    """`size` bytes for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _cell(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if value is None or value == "" or value != value or (key == "peak_memory" and not value):  # NaN is not itself
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if row.get("error") and key in _OF_A_REQUEST:
        return "–"
    known = COLUMNS.get(key)
    if known is not None and (known[1] is str or key == "model" or isinstance(value, int | float)):
        return known[1](value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
