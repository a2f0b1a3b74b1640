"""Errors as one sentence on stderr and an exit code: 2 for what a user can mend, 1 for a mistake of ours."""

from __future__ import annotations

import errno
import gc
import sys
import traceback
from typing import Any

import click

from marlin_gptq.errors import MarlinGPTQError

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
    """Ctrl-C, with a sentence on what it left behind."""


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
    try:
        if own and "transformers" not in sys.modules:  # else it has looked for them already
            for package in unused:
                sys.modules.setdefault(package, None)  # type: ignore[arg-type]
        sys.exit(click_main(arguments, *rest, standalone_mode=False, **kwargs) or 0)
    except Exception as error:  # the outermost frame: the rest is a bug of ours
        if "--debug" in arguments:
            traceback.print_exc()
        sentence, code = explain(error)
        click.echo(f"error: {sentence}", err=True)
        sys.exit(code)
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
