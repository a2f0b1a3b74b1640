"""report_throughput.py: measured speeds in words and units."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from marlin_gptq.eval.report import empty_report, finish
from marlin_gptq.eval.report_html import page
from marlin_gptq.eval.report_throughput import COLUMNS, throughput_notes, throughput_table
from marlin_gptq.eval.throughput import Speed

GOOD = Speed("graphs", 16, 0.1975, 41230.1, 2882.04, 0.00555, 9_900_000_000)
ROWS: list[dict[str, Any]] = [
    {"model": "some/where/llama-marlin"} | asdict(GOOD),
    {"model": "some/where/llama-marlin"} | asdict(Speed("graphs", 64, error="out of GPU memory")),
]


def test_speeds_have_words_and_units() -> None:
    heads, cells, words = throughput_table(ROWS)
    assert heads == [
        "model", "mode", "sequences at once", "first token after, ms", "prompt, tokens/s", "decoding, tokens/s",
        "decoding step, ms", "largest GPU memory",
    ]  # fmt: skip
    assert words == 2
    assert cells[0] == ["llama-marlin", "graphs", "16", "197.5", "41,230", "2,882.0", "5.55", "9.9 GB"]
    assert cells[1] == ["llama-marlin", "graphs", "64", "–", "–", "–", "–", ""]
    assert throughput_notes(ROWS)[0] == "llama-marlin, graphs, 64 at once: out of GPU memory."
    assert throughput_notes(ROWS)[-1] == "graphs: fixed cache, each decode step one CUDA graph."


def test_every_figure_of_a_speed_has_its_column() -> None:
    assert set(asdict(GOOD)) - {"error"} <= set(COLUMNS)


def test_rows_of_the_kernel_and_of_others() -> None:
    heads, cells, words = throughput_table([{"k": 4096, "m": 1, "microseconds": 8.4, "times_int4": float("nan")}])
    assert (heads, cells, words) == (["inputs (K)", "tokens (M)", "time, µs"], [["4096", "1", "8.40"]], 1)
    heads, cells, _ = throughput_table(
        [{"engine": "one", "p99_latency_ms": 1.23456789, "warm": True}, {"engine": "two"}]
    )
    assert heads == ["engine", "p99 latency ms", "warm"]
    assert cells == [["one", "1.23457", "yes"], ["two", "", ""]]
    assert throughput_notes([{"engine": "one"}]) == []
    assert throughput_table([{"batch": "all", "peak_memory": 0}])[1] == [["all"]], "no number where one is usual"


def test_the_page_shows_the_table_and_names_its_cells_for_narrow_screens() -> None:
    content = empty_report("llama-marlin", None, {"device": "cpu"}, {})
    content["throughput"] = ROWS
    finish(content, complete=True)
    html = page(content)
    assert '<td class="n" data-head="first token after, ms">197.5</td>' in html
    assert "time_to_first_token" not in html and "some/where" not in html
    assert "content: attr(data-head)" in html
