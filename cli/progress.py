"""Progress on stderr: a bar with ETA on a terminal, plain lines elsewhere. stdout stays for results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from marlin_gptq.cli.options import show_rough_time, show_time

if TYPE_CHECKING:
    from marlin_gptq.pipeline import ProgressEvent

Update = Callable[..., None]
Left = Callable[[], str]  # what is left, as of now
# Stages that count by themselves, not linears, and what they are called.
COUNTED = {"gradients": "gradients", "write text": "write text", "teacher": "full precision", "tune": "tune"}
LINES_OF_A_RUN = 10


class Display:
    """What the user sees while a command works."""

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.silent = silent  # of several processes one tells how far they are

    def say(self, text: str) -> None:
        """One line; on a terminal it appears above a running bar."""
        if not self.silent or text.startswith(("warning: ", "error: ")):
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def quantizing(self, expected: Sequence[float] = ()) -> Iterator[Callable[[ProgressEvent], None]]:
        """Takes the events of `quantize_model`: block, linear, its relative error, elapsed time and what is left.

        expected  rough seconds of each block, if they are known.
        """
        if self.silent:
            yield lambda _: None
            return
        if not self.console.is_terminal:
            yield _QuantizeLines(self.say, expected)
            return
        remaining = Remaining(expected)
        with self._bar("quantize") as update:

            def show(event: ProgressEvent) -> None:
                if event.stage in COUNTED:
                    update(event.done, event.total, _tuning(event), COUNTED[event.stage])
                    return
                stage = {"calibrate": "running the calibration text", "write": "writing"}.get(event.stage, "")
                linear = event.note or _linear(event, short=True)
                note = f"block {event.block + 1}/{event.blocks}  {linear or stage}"
                remaining.see(event)
                update(event.done, event.total, note, left=remaining.left)

            yield show

    @contextmanager
    def counting(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Takes (done, total) steps."""
        if not self.console.is_terminal:
            yield _CountLines(self.say, title)
            return
        with self._bar(title) as update:
            yield lambda done, total: update(done, total, "")

    @contextmanager
    def _bar(self, title: str) -> Iterator[Update]:
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12, table_column=Column(min_width=6)),
            TextColumn("{task.percentage:3.0f}%", table_column=Column(no_wrap=True, min_width=4)),
            _Times(table_column=Column(no_wrap=True, min_width=18)),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=None, note="", left=None)
            now = title

            def update(
                done: int, total: int, note: str, part: str = title, left: Callable[[], str] | None = None
            ) -> None:
                nonlocal now
                begun_again = done < bar.tasks[0].completed
                if part != now or begun_again:  # another part of the work: its own time and pace
                    bar.reset(task, description=part)
                    now = part
                bar.update(task, completed=done, total=total, note=note, left=left)

            yield update


class _Times(ProgressColumn):
    """Elapsed and left: as the task tells, or the mean pace carried on. Work comes in bursts, which rich's column
    follows."""

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        told: Left | None = task.fields["left"]
        left = told() if told else _left(elapsed, task.completed, task.total or 0)
        return Text(f"{show_time(elapsed)}, {left} left" if left else show_time(elapsed))


class Remaining:
    """What is left of the pass over the blocks, learnt from whole blocks.

    A block's time is that from its first event to the next block's, so that all that is done for it counts, whenever
    its linears come. `expected` says how blocks compare and, until one is finished, how long they take; without it all
    count the same, and nothing is said before one is finished. Blocks taken from a work directory teach nothing.
    """

    def __init__(self, expected: Sequence[float] = ()) -> None:
        self.expected = list(expected) if all(seconds > 0 for seconds in expected) else []
        self.guessed = not self.expected
        self.paces: list[float] = []  # of finished blocks: their time over what was expected
        self.block, self.began, self.resumed, self.done = -1, 0.0, False, False

    def see(self, event: ProgressEvent) -> None:
        """An event, as it comes."""
        if not self.expected:
            self.expected = [1.0] * event.blocks
        if event.block != self.block:
            now = time.monotonic()
            if self.block >= 0 and not self.resumed:
                self.paces.append((now - self.began) / self.expected[self.block])
            self.block, self.began = event.block, now
        self.resumed, self.done = event.stage == "resume", event.done == event.total

    def left(self) -> str:
        """For people, as of now; "" for what is not known."""
        if self.done or self.block < 0 or (self.guessed and not self.paces):
            return ""
        inside, here = time.monotonic() - self.began, self.expected[self.block]
        # The first block takes longer than the others: kernels are compiled, caches filled.
        pace = median(self.paces[1:] or self.paces) if self.paces else max(1.0, inside / here)
        seconds = pace * sum(self.expected[self.block + 1 :]) + max(0.0, pace * here - inside)
        return show_time(round(seconds)) if self.paces else show_rough_time(seconds)


class _QuantizeLines:
    """One line for every linear; for a stage of the tuning, one for every tenth of it."""

    def __init__(self, say: Callable[[str], None], expected: Sequence[float]) -> None:
        self.say, self.started, self.remaining = say, time.monotonic(), Remaining(expected)
        self.parts: dict[str, _CountLines] = {}

    def __call__(self, event: ProgressEvent) -> None:
        if event.stage in COUNTED:
            if event.stage not in self.parts:
                self.parts[event.stage] = _CountLines(self.say, COUNTED[event.stage])
            self.parts[event.stage](event.done, event.total, _tuning(event))
            return
        self.remaining.see(event)
        tuned = event.note if event.stage == "tune block" and event.relative_error is not None else ""
        if event.linear is None and not tuned:
            return
        elapsed, left = time.monotonic() - self.started, self.remaining.left()
        self.say(
            f"[{event.done}/{event.total}] block {event.block + 1}/{event.blocks}  {tuned or _linear(event)}  "
            f"elapsed {show_time(elapsed)}" + (f"  left {left}" if left else "")
        )


class _CountLines:
    """A line for every tenth of the steps."""

    def __init__(self, say: Callable[[str], None], title: str) -> None:
        self.say, self.title, self.started, self.told, self.done = say, title, time.monotonic(), 0, 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if done < self.done:  # begun again
            self.started, self.told = time.monotonic(), 0
        self.done = done
        tenth = done * LINES_OF_A_RUN // total
        if tenth == self.told:
            return
        self.told = tenth
        elapsed = time.monotonic() - self.started
        self.say(
            f"{self.title}: {100 * done // total}%  elapsed {show_time(elapsed)}  "
            f"left {_left(elapsed, done, total) or '0:00'}" + (f"  {note}" if note else "")
        )


def _tuning(event: ProgressEvent) -> str:
    return "" if event.relative_error is None else f"KL {event.relative_error:.5f}"


def _linear(event: ProgressEvent, short: bool = False) -> str:
    if event.linear is None:
        return ""
    name = ".".join(event.linear.split(".")[-2:]) if short else event.linear  # the block stands beside it
    error = "" if event.relative_error is None else f"  error {event.relative_error:.5f}"
    return f"{name}{error}"


def _left(elapsed: float, done: float, total: float) -> str:
    return show_time(elapsed * (total - done) / done) if 0 < done < total else ""
