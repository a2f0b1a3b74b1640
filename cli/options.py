"""Options that commands share, and what their values mean."""

from __future__ import annotations

import gc
import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marlin_gptq import register
from marlin_gptq.cli import failures
from marlin_gptq.errors import InputError
from marlin_gptq.model_directory import CONTEXT_NAMES, local_directory, read_json, resolve_model
from marlin_gptq.near_names import near

if TYPE_CHECKING:
    import torch

DATASETS = "demo, wikitext2, c4, redpajama, a file (.txt, .jsonl, .jsonl.gz, .parquet) or a hub id (owner/name)"
# Steps that rough times are told in: a unit in seconds, and how many of it.
_ROUGH: dict[str, tuple[int, tuple[int, ...]]] = {
    "s": (1, (1, 2, 5, 10, 20, 30)),
    "min": (60, (1, 2, 5, 10, 20, 30)),
    "h": (3600, (1, 2, 5, 10)),
    "days": (86400, (1, 2, 5, 10, 20, 50, 100)),
}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Choice(click.Choice):
    """One of several words; a near miss is told which it was."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            meant = near(str(value), map(str, self.choices))
            raise click.BadParameter(f"{error.message.rstrip('.')}{meant}", ctx=ctx, param=param) from error


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--device and `source_options`: where and how, alike for all commands that run a model."""
    device = click.option(
        "--device", type=Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True,
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


def show_rough_time(seconds: float) -> str:
    """Between what and what an estimate of `seconds` lies, for people: `2 to 5 min`, `10 to 20 h`."""
    steps = [n * size for size, steps in _ROUGH.values() for n in steps]
    low = max((step for step in steps if step <= 0.8 * seconds), default=0)
    high = min((step for step in steps if step >= 1.25 * seconds), default=math.inf)
    if low == 0:
        return "a second or less" if high <= 1 else f"{_step(high)} or less"
    if high == math.inf:
        return f"{_step(low)} or more"
    (first, one), (last, other) = _step(low).split(), _step(high).split()
    return f"{first} to {last} {other}" if one == other else f"{first} {one} to {last} {other}"


def _step(seconds: float) -> str:
    unit = max((unit for unit, (size, _) in _ROUGH.items() if size <= seconds), key=lambda unit: _ROUGH[unit][0])
    return f"{round(seconds / _ROUGH[unit][0])} {unit}"


def with_error(value: float, error: float | None, form: str) -> str:
    """A figure and its standard error, if there is one: 0.01234 ± 0.00012."""
    return format(value, form) + ("" if error is None else f" ± {format(error, form.lstrip('+'))}")


def table_console() -> Any:
    """A rich console on stdout: as wide as the terminal, or wide enough for tables elsewhere."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def open_models(
    say: Callable[[str], None], model: str, baseline: str | None, revision: str | None, offline: bool
) -> tuple[Path, Path | None]:
    """The directories of MODEL and --baseline; the libraries are there behind it, and what is wrong was said before."""
    directory = find_model(say, model, revision, offline)
    base = None if baseline is None else find_model(say, baseline, None, offline)
    if baseline is not None and base is not None:
        require_baseline(say, model, directory, baseline, base)
    load_libraries(say)
    return directory, base


def require_baseline(say: Callable[[str], None], model: str, directory: Path, baseline: str, base: Path) -> None:
    """InputError where MODEL and --baseline stand in each other's place; a warning where they are of two models."""
    one, other = read_json(directory / "config.json"), read_json(base / "config.json")
    if "quantization_config" in other and "quantization_config" not in one:
        raise InputError(
            f"--baseline: got {baseline}, which is quantized, for {model}, which is not; the two have changed places: "
            f"give {baseline} --baseline {model}"
        )
    differing = [
        f"{key} {mine} and {theirs}"
        for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
        if (mine := _setting(one, key)) != (theirs := _setting(other, key))
    ]
    if differing:
        say(f"warning: --baseline {baseline} is not the model that {model} was made from: {', '.join(differing)}")


def _setting(config: dict[str, Any], key: str) -> Any:
    """Of a model with several parts, that of its text part."""
    inner = config.get("text_config")
    return inner[key] if isinstance(inner, dict) and key in inner else config.get(key)


def find_model(
    say: Callable[[str], None], model: str, revision: str | None, offline: bool, config_only: bool = False
) -> Path:
    """As `resolve_model`, which may have to fetch it: what is done is said first."""
    say(f"reading {model}" if local_directory(model) or offline else f"fetching {model} from the hub")
    return resolve_model(model, revision=revision, offline=offline, config_only=config_only)


def find_checkpoint(say: Callable[[str], None], model: str, revision: str | None, offline: bool) -> Path:
    """As `find_model`, of a command that takes a state dict in a file as well."""
    if Path(model).is_file():
        say(f"reading {model}")
        return Path(model)
    return find_model(say, model, revision, offline)


def load_libraries(say: Callable[[str], None]) -> None:
    """Import torch and transformers, which takes seconds: the caller has read its arguments and said what it does.

    No progress bars of theirs between ours; warnings become one line each, and none is hidden.
    """

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
    register()
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    if failures.alone():
        gc.freeze()  # they are millions of objects, which no collection needs to walk through


def context_length(model_dir: Path) -> int | None:
    """The longest sequence the model was made for, if its config says so."""
    raw = read_json(model_dir / "config.json")
    text = raw.get("text_config") or raw  # of a model with a vision part
    settings = text if isinstance(text, dict) else {}
    return next((settings[name] for name in CONTEXT_NAMES if isinstance(settings.get(name), int)), None)
