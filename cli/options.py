"""Options that commands share, and what their values mean."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marlin_gptq.errors import InputError
from marlin_gptq.model_directory import CONTEXT_NAMES, read_json

if TYPE_CHECKING:
    import torch

DATASETS = "demo, wikitext2, c4, redpajama, a file (.txt, .jsonl, .jsonl.gz, .parquet) or a hub id (owner/name)"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--device and `source_options`: where and how, alike for all commands that run a model."""
    device = click.option(
        "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True,
        help="Where to compute; auto takes a GPU if there is one.",
    )  # fmt: skip
    return device(source_options(command))


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--revision, --offline, --json, --debug: alike for all commands."""
    options = (
        click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub MODEL."),
        click.option(
            "--offline", is_flag=True, envvar=["HF_HUB_OFFLINE"],
            help="Never use the network, only the hub's local cache. Also switched on by HF_HUB_OFFLINE=1.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def torch_device(name: str) -> torch.device:
    """The device behind --device; InputError for cuda without one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU"
        raise InputError(f"--device cuda: {reason} (torch {torch.__version__}); use --device cpu or auto")
    return torch.device(name)


def torch_dtype(name: str) -> torch.dtype | None:
    """The dtype behind --dtype; None for auto."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def fused_loops() -> bool:
    """Whether MARLIN_GPTQ_FUSED allows GPTQ's fused GPU kernels: 1 (so it is unset) or 0; else InputError."""
    value = os.environ.get("MARLIN_GPTQ_FUSED") or "1"
    if value not in ("0", "1"):
        raise InputError(f"MARLIN_GPTQ_FUSED: got {value!r}, expected 0 (plain torch) or 1 (fused GPU kernels)")
    return value == "1"


def parse_size(text: str, option: str = "--shard-size") -> int:
    """Bytes in `5GB`, `500MB`, `2GiB` or a plain number; else InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        number, unit, binary = match.groups()
        factor = UNITS[unit.upper()]
        if binary:
            factor = 1024 ** "KMGT".find(unit.upper()) * 1024 if unit else 0
        size = int(float(number) * factor)
    if size < 1:
        raise InputError(f"{option}: got {text!r}, expected a size such as 5GB, 500MB or 2GiB")
    return size


def show_size(size: int) -> str:
    """`size` bytes for people: 13.5 GB, 11.0 MB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def show_time(seconds: float) -> str:
    """`seconds` for people: 0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def with_error(value: float, error: float | None, form: str) -> str:
    """A figure and its standard error, if there is one: 0.01234 ± 0.00012."""
    return format(value, form) + ("" if error is None else f" ± {format(error, form.lstrip('+'))}")


def table_console() -> Any:
    """A rich console on stdout: as wide as the terminal, or wide enough for tables elsewhere."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def quiet_libraries(say: Callable[[str], None]) -> None:
    """No progress bars of libraries between ours; warnings become one line each, and none is hidden."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {message}")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"{record.levelname.lower()}: {record.getMessage()}")

    warnings.showwarning = show
    handler = Handler(logging.WARNING)
    library = logging.getLogger("marlin_gptq")
    library.handlers = [handler]

    # `datasets` is slow to import and often not needed: told ahead, for when it is.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()


def context_length(model_dir: Path) -> int | None:
    """The longest sequence the model was made for, if its config says so."""
    raw = read_json(model_dir / "config.json")
    text = raw.get("text_config") or raw  # of a model with a vision part
    settings = text if isinstance(text, dict) else {}
    return next((settings[name] for name in CONTEXT_NAMES if isinstance(settings.get(name), int)), None)
