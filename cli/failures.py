"""Errors as one sentence on stderr and an exit code: 2 for what a user can mend, 1 for a mistake of ours."""

from __future__ import annotations

import errno
import gc
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import click

from marlin_gptq.errors import MarlinGPTQError
from marlin_gptq.placement import recover

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What transformers has for assisted generation and for the losses of object detection.
UNUSED = ("sklearn", "scipy")


class Command(click.Command):
    """A click command that ends every failure in one sentence; --debug shows the traceback before it.

    unused  packages that transformers imports where it finds them, and that take up to a second each: a process that is
            for this command alone does not find them.
    """

    def __init__(self, *args: Any, unused: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unused = unused

    def main(self, *args: Any, **kwargs: Any) -> Any:
        return _run(super().main, *args, unused=self.unused, **kwargs)


class Group(click.Group):
    """The same for a group of commands."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        return _run(super().main, *args, **kwargs)


class Interrupted(Exception):
    """Ctrl-C or another signal that ends a command, with a sentence on what it left behind."""


@contextmanager
def writing(output: Path | None, hint: str = "") -> Iterator[None]:
    """Around what makes the file or directory `output`: an interruption says what became of it, and the hint.

    What killed runs of the same output left is cleared away first.
    """
    if output is not None:
        recover(output)
    before = _stands(output)
    try:
        yield
    except KeyboardInterrupt as error:
        if output is None:
            raise
        if _stands(output) != before:
            raise Interrupted(f"interrupted: {output} was written already and is complete") from error
        rest = "; what stood there before is unchanged" if output.exists() else ""
        rest += f"; {hint}" if hint else ""
        raise Interrupted(f"interrupted: nothing was written under {output}{rest}") from error


def _stands(output: Path | None) -> int | None:
    """The number of the file that is there, or of the last one written in that directory; None for nothing."""
    if output is None:
        return None
    try:
        return (output / "config.json" if output.is_dir() else output).stat().st_ino
    except OSError:
        return None


@contextmanager
def _signals_as_exceptions() -> Iterator[list[int]]:
    """SIGTERM (docker, Slurm, timeout, kill) and SIGHUP (a closed terminal) end as Ctrl-C does: cleaning up.

    Gives a list that gets the signal that came; later ones do not disturb the cleaning. What is ignored (nohup) stays
    ignored.
    """
    ended: list[int] = []

    def end(signum: int, _: object) -> None:
        ended.append(signum)
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    heard = {each: handler for each, handler in usual.items() if signal.getsignal(each) == handler}
    for each in heard:
        signal.signal(each, end)
    try:
        yield ended
    finally:
        for each, handler in heard.items():
            signal.signal(each, handler)


_alone = False


def alone() -> bool:
    """Whether this process is for one command alone, which was not called from another program."""
    return _alone


def _run(
    click_main: Any, args: list[str] | None = None, *rest: Any, unused: tuple[str, ...] = (), **kwargs: Any
) -> Any:
    arguments = list(sys.argv[1:] if args is None else args)
    if not kwargs.pop("standalone_mode", True):
        return click_main(arguments, *rest, standalone_mode=False, **kwargs)
    global _alone
    own = _alone = args is None
    signals: AbstractContextManager[list[int]] = _signals_as_exceptions() if own else nullcontext([])
    with signals as ended:
        try:
            if own and "transformers" not in sys.modules:  # else it has looked for them already
                for package in unused:
                    sys.modules.setdefault(package, None)  # type: ignore[arg-type]
            sys.exit(click_main(arguments, *rest, standalone_mode=False, **kwargs) or 0)
        except Exception as error:  # the outermost frame: the rest is a bug of ours
            sentence, code = explain(error)
            with suppress(OSError):  # a terminal that was closed
                if "--debug" in arguments:
                    traceback.print_exc()
                click.echo(f"error: {sentence}", err=True)
            sys.exit(code if not ended or ended[0] == signal.SIGINT else 128 + ended[0])
        finally:
            if own:
                gc.freeze()  # nor do those of Python's end, which take a second


def explain(error: Exception) -> tuple[str, int]:
    """(sentence, exit code) for any exception."""
    sentence = _of_user(error)
    if sentence is not None:
        return " ".join(sentence.split()), 2
    kind = type(error).__name__
    return (
        f"unexpected {kind}: {' '.join(str(error).split())}; this is a bug: please report it with the output "
        "of the same command and --debug"
    ), 1


def _of_user(error: Exception) -> str | None:
    if isinstance(error, MarlinGPTQError | Interrupted):
        return str(error)
    if isinstance(error, click.UsageError):
        command = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return f"{error.format_message().rstrip('.')}{command}"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, click.Abort):
        return "interrupted"
    if _is_out_of_memory(error):
        where = "GPU" if "CUDA" in str(error) else "host"
        return (
            f"out of {where} memory ({str(error).split('. ')[0]}); use a smaller --seq-len, --batch-size, "
            "--n-samples or --max-new-tokens, whichever the command has, or another --device"
        )
    if isinstance(error, OSError):
        if error.errno in DISK_FULL:
            return f"disk full{_at(error)}; make room or choose another place ({error.strerror})"
        return f"{error.strerror or error}{_at(error)}"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported for --help; what it did not load it cannot have raised
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _at(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
