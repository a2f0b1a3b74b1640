"""marlin-gptq: quantize Llama-family checkpoints to 4 bits, pack them for the Marlin kernel, evaluate them.

Importing this module teaches transformers the format: afterwards
`AutoModelForCausalLM.from_pretrained(DIR)` loads a quantized directory with a MarlinLinear in place of every
decoder linear. It needs no GPU. The names below are imported when they are asked for.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marlin_gptq.config import QuantizationConfig
    from marlin_gptq.conversion.convert import convert_checkpoint
    from marlin_gptq.conversion.load import load
    from marlin_gptq.errors import CheckpointError, InputError, MarlinGPTQError, QuantizationError
    from marlin_gptq.modeling.fused import fuse_projections, split_projections
    from marlin_gptq.modeling.linear import MarlinLinear
    from marlin_gptq.modeling.lora import add_lora
    from marlin_gptq.pipeline import quantize_model

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "InputError",
    "MarlinGPTQError",
    "MarlinLinear",
    "QuantizationConfig",
    "QuantizationError",
    "__version__",
    "add_lora",
    "convert_checkpoint",
    "fuse_projections",
    "load",
    "quantize_model",
    "split_projections",
]
_PLACES = {
    "CheckpointError": "errors",
    "InputError": "errors",
    "MarlinGPTQError": "errors",
    "MarlinLinear": "modeling.linear",
    "QuantizationConfig": "config",
    "QuantizationError": "errors",
    "add_lora": "modeling.lora",
    "convert_checkpoint": "conversion.convert",
    "fuse_projections": "modeling.fused",
    "load": "conversion.load",
    "quantize_model": "pipeline",
    "split_projections": "modeling.fused",
}


# The console scripts. Nobody should wait seconds for --help, or to be told of a typing error: they register the format
# when they have read their arguments (`load_libraries` in cli/options.py), and this module leaves it to them.
COMMANDS = ("marlin-quantize", "marlin-eval", "marlin-generate", "marlin-convert", "marlin-inspect")


def register() -> None:
    """Import torch and transformers and teach the latter the format; done once."""
    collecting = gc.isenabled()
    gc.disable()  # they make a million objects that stay: looking through them takes half a second
    try:
        import_module("marlin_gptq.modeling.hf")
    finally:
        if collecting:
            gc.enable()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"marlin_gptq.{_PLACES[name]}"), name)


if os.path.basename(next(iter(sys.argv), "")) not in COMMANDS:
    register()
