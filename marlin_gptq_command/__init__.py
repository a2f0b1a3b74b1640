"""Where the console scripts begin.

`import marlin_gptq` teaches transformers the format, for which it imports torch and transformers: seconds that nobody
should wait for --help, or to be told of a typing error. In a process that began here it leaves that to the command,
which does it when it has read its arguments (`load_libraries` in cli/options.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

COMMANDS = ("quantize", "evaluate", "generate", "convert", "inspect")


def __getattr__(name: str) -> Any:
    """`quantize`, …: the click command of `marlin_gptq.cli.quantize`."""
    if name not in COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"marlin_gptq.cli.{name}").main
