"""`marlin_gptq.load`: a quantized directory of any format as a model of MarlinLinear layers."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from marlin_gptq.checkpoint import CheckpointWarning
from marlin_gptq.conversion.convert import checked_target, result_settings
from marlin_gptq.conversion.linears import with_scales, write_linear
from marlin_gptq.conversion.original import open_source
from marlin_gptq.conversion.source import Source
from marlin_gptq.conversion.survey import Survey, run_linear, survey
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.model_directory import resolve_model
from marlin_gptq.modeling.architecture import replace_linears, require_finite
from marlin_gptq.modeling.classes import empty_model
from marlin_gptq.modeling.hf import MarlinGPTQConfig, MarlinGPTQQuantizer
from marlin_gptq.modeling.names import StoredNames, above


def load(
    model: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> nn.Module:
    """A 4-bit checkpoint, ready to run on the Marlin kernel: a transformers model in evaluation mode.

    model   a directory or hub id (Marlin, GPTQ, AWQ or compressed-tensors), or a state dict of the original Marlin
            repository (*.marlin.g128), whose full-precision model is then `base`.
    device  by default a GPU if there is one.
    dtype   by default that of the scales, which keeps every bit; another one rounds the scales.

    Codes, zero points and moved groups (act-order) are re-laid in memory, nothing is written. `save_pretrained` writes
    a Marlin directory. Raises InputError for what cannot run, by name, and CheckpointError for damaged files.
    """
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise InputError(f"dtype: got {dtype}, expected float16 or bfloat16, which the kernel runs in")
    path = Path(model)
    if not path.is_file():
        path = resolve_model(str(model), revision=revision, offline=offline)
    source = open_source(path, None if base is None else Path(base))
    if source.settings.get("kv_cache_scheme"):
        warnings.warn(
            f"{model}: kv_cache_scheme: the KV cache stays in 16 bits here, its scales are not read",
            CheckpointWarning,
            stacklevel=2,
        )
    found = survey(source)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _assembled(source, found, dtype or found.scale_dtype).to(place)


def _assembled(source: Source, found: Survey, dtype: torch.dtype) -> nn.Module:
    target = checked_target(source, found)
    config = source.architecture.config
    if hasattr(config, "quantization_config"):  # the source's own
        del config.quantization_config
    settings = MarlinGPTQConfig(**result_settings(source, target))
    model = empty_model(config, dtype)
    replace_linears(model, config, settings.settings, dtype)
    for name in source.linears:
        linear = run_linear(source, name, found.scale_dtype)
        if dtype != found.scale_dtype:
            linear = with_scales(linear, linear.weight.scales.to(dtype))
            require_finite(f"{name}.scales", linear.weight.scales, f"they overflow {dtype}")
        layer = model.get_submodule(source.architecture.modules[name].removeprefix(above(model)))
        for full, tensor in write_linear(name, linear, target).items():
            setattr(layer, full.rpartition(".")[2], tensor)
    _assign_others(source, model)
    config.dtype = dtype
    config.quantization_config = settings
    quantizer = MarlinGPTQQuantizer(settings, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.eval().requires_grad_(False)
    _read_generation_config(source.directory, model)
    return quantizer._process_model_after_weight_loading(model)


def _assign_others(source: Source, model: nn.Module) -> None:
    """Every tensor that is not quantized, in the dtype of the model; CheckpointError if one is missing."""
    states, names = model.state_dict(), StoredNames(model, source.store.names).known
    inner = {stored: name.removeprefix(above(model)) for stored, name in names.items()}
    wanted = {stored: (name, states[name]) for stored, name in inner.items() if name in states}
    for name in source.others():
        if name not in wanted:
            continue  # rotary tables of old checkpoints
        tensor, (place, like) = source.store.get(name), wanted[name]
        if tensor.shape != like.shape:
            raise CheckpointError(f"{name}: got {list(tensor.shape)}, expected {list(like.shape)} from config.json")
        require_finite(name, tensor, "the checkpoint is damaged")
        cast = tensor.to(like.dtype)
        require_finite(name, cast, f"they overflow {like.dtype}")
        model.load_state_dict({place: cast}, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    if missing := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise CheckpointError(f"{missing[0]}: missing from {source.path}; fetch the checkpoint again")


def _read_generation_config(directory: Path, model: nn.Module) -> None:
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)  # type: ignore[assignment]
