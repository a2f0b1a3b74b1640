"""What a command shows while it works: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from marlin_gptq.cli.progress import Display, Remaining
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
        "[1/4] block 1/2  model.layers.0.q_proj  error 0.01250  elapsed 0:20",
        "[2/4] block 1/2  model.layers.0.o_proj  error 0.50000  elapsed 0:30",
        "",
    ]


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("marlin_gptq.cli.progress.time.monotonic", lambda: self.now)

    def left(self, remaining: Remaining, now: float, stage: str, block: int, done: int) -> str:
        """What is said of what is left, at a time, for four blocks of ten linears."""
        self.now = now
        remaining.see(ProgressEvent(stage, block, 4, None, done, 40, None))
        return remaining.left()


def test_what_is_left_is_learnt_from_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears come in bursts: in the first 90 of a block's 100 seconds there is none."""
    clock, remaining = Clock(monkeypatch), Remaining([100, 100, 100, 200])
    assert clock.left(remaining, 0, "calibrate", 0, 0) == "5 to 20 min", "an estimate is told as one"
    assert clock.left(remaining, 90, "quantize", 0, 1) == "5 to 10 min"
    assert clock.left(remaining, 200, "calibrate", 1, 10) == "13:20", "twice what was expected: 200 + 200 + 400"
    assert clock.left(remaining, 250, "quantize", 1, 11) == "12:30"
    assert clock.left(remaining, 320, "calibrate", 2, 20) == "6:00", "the first block is not the rule: 120 + 240"
    assert clock.left(remaining, 460, "quantize", 2, 29) == "4:00", "a late block is nearly done"
    assert clock.left(remaining, 460, "calibrate", 3, 30) == "4:20", "between 1.2 and 1.4 times what was expected"
    assert clock.left(remaining, 700, "write", 3, 40) == ""


def test_a_first_block_that_takes_longer_than_expected_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, remaining = Clock(monkeypatch), Remaining([10] * 4)
    assert clock.left(remaining, 0, "calibrate", 0, 0) == "30 s to 1 min"
    assert clock.left(remaining, 100, "quantize", 0, 1) == "2 to 10 min"


def test_what_is_left_of_a_resumed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, remaining = Clock(monkeypatch), Remaining([100] * 4)
    for done in range(1, 11):
        assert clock.left(remaining, 1, "resume", 0, done) == "5 to 10 min"
    assert clock.left(remaining, 3, "calibrate", 1, 10) == "2 to 10 min", "a stored block says nothing about others"
    assert clock.left(remaining, 53, "calibrate", 2, 20) == "1:40"


def test_without_an_estimate_the_first_block_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    for expected in ([], [0.0] * 4):
        clock, remaining = Clock(monkeypatch), Remaining(expected)
        assert clock.left(remaining, 0, "calibrate", 0, 0) == clock.left(remaining, 30, "quantize", 0, 1) == ""
        assert clock.left(remaining, 60, "calibrate", 1, 10) == "3:00"


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
