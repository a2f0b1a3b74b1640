"""What a decoder model is made of: its config, its blocks in order, their linears. Names, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from marlin_gptq.config import QUANT_METHOD, QuantizationConfig
from marlin_gptq.errors import InputError, QuantizationError
from marlin_gptq.model_directory import read_json
from marlin_gptq.modeling.experts import routing_modules, separate_experts
from marlin_gptq.modeling.linear import MarlinLinear
from marlin_gptq.quantization.weight import columns_per_group

_FINITE_AT_ONCE = 1 << 24


def read_config(model_dir: Path) -> Any:
    """The transformers config of a causal language model; InputError for anything else."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    raw = read_json(model_dir / "config.json")
    if raw.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{model_dir}: model_type {raw.get('model_type')!r} is not a causal language model that this version of "
            "transformers knows; a Llama, Mistral, Qwen or similar decoder is needed"
        )
    declared = raw.get("architectures") or []
    if declared and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in declared):
        raise InputError(f"{model_dir}: holds a {declared[0]}; a causal language model (…ForCausalLM) is needed")
    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{model_dir}/config.json: not understood by transformers: {said}") from error


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """The "quantization_config" of a transformers config as a dictionary, or None for a full-precision model."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    return dict(settings) if isinstance(settings, dict) else dict(settings.to_dict())


def require_full_precision(model_dir: Path, config: Any) -> None:
    """InputError if the model is quantized already, by us or anybody else."""
    settings = quantization_settings(config)
    if settings is not None:
        method = settings.get("quant_method", "an unnamed method")
        method = "marlin-gptq" if method == QUANT_METHOD else method
        raise InputError(
            f"{model_dir}: is quantized already (by {method}); give the full-precision model it was made from"
        )


def decoder_blocks(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder blocks: the one ModuleList as long as num_hidden_layers. Else InputError."""
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if len(outermost) != 1:
        raise InputError(
            f"{type(model).__name__}: not understood: expected one list of {count} decoder blocks, found "
            f"{[name for name, _ in outermost] or 'none'}"
        )
    return outermost[0]


def block_linears(block: nn.Module, prefix: str, skip: QuantizationConfig | None = None) -> dict[str, nn.Linear]:
    """Linears of a block by full name, in the order of their definition, without those the config skips.

    Raises InputError for a matrix that belongs to no nn.Linear (fused experts, Conv1D, …): it would silently stay
    in full precision. Routers of experts stay in full precision: a few rows that decide about everything.
    """
    found: dict[str, nn.Linear] = {}
    routing = routing_modules(block)
    for name, module in block.named_modules():
        full = f"{prefix}.{name}" if name else prefix
        if name in routing:
            continue
        if isinstance(module, nn.Linear):
            if skip is None or not skip.skips(full):
                found[full] = module
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and not (skip and skip.skips(f"{full}.{own}")):
                raise InputError(
                    f"{full}.{own}: a {type(module).__name__} parameter of shape {list(parameter.shape)} is not an "
                    f"nn.Linear weight and is not understood; --skip '{own}' leaves it in full precision"
                )
    return found


def linear_names(block: nn.Module, prefix: str) -> list[str]:
    """Full names of all linears of a block that could be quantized."""
    routing = routing_modules(block)
    named = block.named_modules()
    return [f"{prefix}.{name}" for name, module in named if isinstance(module, nn.Linear) and name not in routing]


def require_divisible(linears: dict[str, nn.Linear], settings: int | QuantizationConfig) -> None:
    """InputError naming the first linear whose in_features its group size (one for all, or by name) does not divide."""
    for name, linear in linears.items():
        group_size = settings if isinstance(settings, int) else settings.group_size_of(name)
        try:
            columns_per_group(linear.in_features, group_size)
        except ValueError as error:
            widths = [other.in_features for other in linears.values()]
            fits = [size for size in (64, 32) if size < group_size and not any(width % size for width in widths)]
            instead = f"--group-size {fits[0]}" if fits else "--group-size -1"
            raise InputError(
                f"{name}: group size {group_size} does not divide its {linear.in_features} input features; use "
                f"{instead}, or --skip to leave the layer in full precision"
            ) from error


def replace_linears(model: nn.Module, config: Any, settings: QuantizationConfig, dtype: torch.dtype) -> list[str]:
    """Put an empty MarlinLinear in place of every decoder linear the settings do not skip; returns their names.

    Scales and biases are of `dtype`; the new layers live on the device of the old ones (normally meta).
    """
    separate_experts(model, config)
    prefix, blocks = decoder_blocks(model, config)
    replaced = []
    for index, block in enumerate(blocks):
        linears = block_linears(block, f"{prefix}.{index}", settings)
        require_divisible(linears, settings)
        for name, linear in linears.items():
            layer = MarlinLinear(
                linear.in_features,
                linear.out_features,
                settings.group_size_of(name),
                bias=linear.bias is not None,
                symmetric=settings.sym,
                act_order=settings.desc_act,
                dtype=dtype,
                device=linear.weight.device,
            )
            set_module(model, name, layer)
            _leave_uninitialised(model.get_submodule(name.rpartition(".")[0]))
            replaced.append(name)
    return replaced


def _leave_uninitialised(parent: nn.Module) -> None:
    """Some models draw the weights of a module's linears when they initialise the module: here there are none."""
    if not parent._parameters and not parent._buffers:
        parent._is_hf_initialized = True  # type: ignore[assignment]  # transformers' mark


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of this dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def require_finite(name: str, tensor: torch.Tensor, hint: str) -> None:
    """QuantizationError naming the tensor if it holds NaN or Inf."""
    # In pieces: the check takes five bytes a value, which of a large embedding table would be gigabytes.
    pieces = tensor.reshape(-1).split(_FINITE_AT_ONCE)
    if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
        bad = sum(int((~torch.isfinite(piece)).sum()) for piece in pieces)
        raise QuantizationError(f"{name}: {bad} of {tensor.numel()} values are NaN or Inf; {hint}")
