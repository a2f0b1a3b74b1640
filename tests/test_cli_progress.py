"""What a command shows while it works: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from marlin_gptq.cli.progress import Display
from marlin_gptq.pipeline import ProgressEvent

EVENTS = [
    ProgressEvent("calibrate", 0, 2, None, 0, 4, None),
    ProgressEvent("quantize", 0, 2, "model.layers.0.q_proj", 1, 4, 0.0125),
    ProgressEvent("quantize", 0, 2, "model.layers.0.o_proj", 2, 4, 0.5),
    ProgressEvent("write", 1, 2, None, 4, 4, None),
]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes ten seconds from one look to the next."""
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr("marlin_gptq.cli.progress.time.monotonic", lambda: next(ticks))


def display(terminal: bool) -> tuple[Display, io.StringIO]:
    shown, output = Display(), io.StringIO()
    shown.console = Console(file=output, force_terminal=terminal, width=80, highlight=False)
    return shown, output


@pytest.mark.usefixtures("clock")
def test_lines_of_a_quantization() -> None:
    shown, output = display(terminal=False)
    with shown.quantizing() as progress:
        for event in EVENTS:
            progress(event)
    assert output.getvalue().split("\n") == [
        "[1/4] block 1/2  model.layers.0.q_proj  error 0.01250  elapsed 0:10  left 0:30",
        "[2/4] block 1/2  model.layers.0.o_proj  error 0.50000  elapsed 0:20  left 0:20",
        "",
    ]


@pytest.mark.usefixtures("clock")
def test_lines_of_a_count_come_every_tenth() -> None:
    shown, output = display(terminal=False)
    with shown.counting("perplexity of x") as progress:
        for done in range(1, 41):
            progress(done, 40)
    lines = output.getvalue().strip().split("\n")
    assert len(lines) == 10
    assert lines[0] == "perplexity of x: 10%  elapsed 0:10  left 1:30"
    assert lines[-1].startswith("perplexity of x: 100%")


def test_a_bar_on_a_terminal() -> None:
    shown, output = display(terminal=True)
    with shown.quantizing() as progress:
        for event in EVENTS[:3]:
            progress(event)
        shown.say("warning: [brackets] are no markup")
    text = output.getvalue()
    assert "quantize" in text and " 50%" in text
    assert "block 1/2  0.o_proj  error 0.50000" in text
    assert "warning: [brackets] are no markup" in text
