"""A whole model on one device, to run and not to score: for throughput and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from marlin_gptq.errors import InputError
from marlin_gptq.eval.harness_model import compute_in_float32
from marlin_gptq.modeling.architecture import quantization_settings, read_config
from marlin_gptq.modeling.classes import auto_class_of, has_language_head


def load_whole(model_dir: Path, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The model of a directory, full-precision or quantized, in eval mode on `device`.

    dtype  that of activations; by default the checkpoint's on a GPU and float32 elsewhere, as in marlin-eval
           perplexity. A quantized model runs in the dtype of its scales on a GPU.

    Raises InputError, CheckpointError.
    """
    config = read_config(model_dir)
    if not has_language_head(config):
        raise InputError(
            f"{model_dir}: holds a {config.architectures[0]}, which gives no logits of the next token; a model with a "
            "language model's head (…ForCausalLM) is needed"
        )
    quantized = quantization_settings(config) is not None
    on_cpu = device.type == "cpu"
    asked: Any = "auto" if dtype is None else dtype
    if on_cpu and dtype in (None, torch.float32):
        asked = "auto" if quantized else torch.float32
    place = {"": "cpu" if on_cpu else device.index if device.index is not None else torch.cuda.current_device()}
    try:
        model = auto_class_of(config).from_pretrained(model_dir, local_files_only=True, dtype=asked, device_map=place)
    except OSError as error:
        raise InputError(f"{model_dir}: not loaded: {' '.join(str(error).split())}") from error
    except ImportError as error:  # transformers reads other tools' formats with packages of theirs
        raise InputError(
            f"{model_dir}: not loaded: {' '.join(str(error).split())}; marlin-convert {model_dir} -o OUT --to marlin "
            "makes a directory that needs nothing more"
        ) from error
    if on_cpu and quantized and dtype in (None, torch.float32):
        compute_in_float32(model)
    return model.eval().requires_grad_(False)
