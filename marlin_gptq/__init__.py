"""marlin-gptq: quantize Llama-family checkpoints to 4 bits, pack them for the Marlin kernel, evaluate them.

Importing this module teaches transformers the format: afterwards
`AutoModelForCausalLM.from_pretrained(DIR)` loads a quantized directory with a MarlinLinear in place of every
decoder linear. It needs no GPU.
"""

from __future__ import annotations

import gc

_collecting = gc.isenabled()
gc.disable()  # torch and transformers make a million objects that stay: looking through them takes half a second
try:
    import marlin_gptq.modeling.hf  # noqa: F401 (registers the format)
    from marlin_gptq.config import QuantizationConfig
    from marlin_gptq.conversion.convert import convert_checkpoint
    from marlin_gptq.conversion.load import load
    from marlin_gptq.errors import CheckpointError, InputError, MarlinGPTQError, QuantizationError
    from marlin_gptq.modeling.fused import fuse_projections, split_projections
    from marlin_gptq.modeling.linear import MarlinLinear
    from marlin_gptq.modeling.lora import add_lora
    from marlin_gptq.pipeline import quantize_model
finally:
    if _collecting:
        gc.enable()

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
