"""What a decoder model is made of: its config, its blocks in order, their linears. Names, no weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marlin_gptq.config import QUANT_METHOD, QuantizationConfig
from marlin_gptq.errors import InputError, QuantizationError
from marlin_gptq.model_directory import CONTEXT_NAMES, OLD_SETTINGS, holds_file, read_json, require_no_adapter
from marlin_gptq.modeling.classes import auto_class, text_config
from marlin_gptq.modeling.experts import routing_modules, separate_experts
from marlin_gptq.modeling.linear import MarlinLinear
from marlin_gptq.modeling.names import above
from marlin_gptq.modeling.uncalled import uncalled_linears
from marlin_gptq.quantization.weight import columns_per_group

logger = logging.getLogger(__name__)
_FINITE_AT_ONCE = 1 << 24


def read_config(model_dir: Path) -> Any:
    """The transformers config of a decoder, whatever head it has; InputError for anything else."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    raw = read_json(model_dir / "config.json")
    require_no_adapter(model_dir)
    model_type, declared = raw.get("model_type"), raw.get("architectures") or []
    if not isinstance(declared, list) or not all(isinstance(name, str) for name in declared):
        raise InputError(f"{model_dir}/config.json: architectures: got {declared!r:.80}, expected a list of names")
    if auto_class(model_type, None) is None:
        raise InputError(
            f"{model_dir}: model_type {model_type!r} is not a causal language model that this version of "
            "transformers knows; a Llama, Mistral, Qwen or similar decoder is needed"
        )
    if (declared and auto_class(model_type, declared[0]) is None) or raw.get("is_encoder_decoder") is True:
        raise InputError(
            f"{model_dir}: holds a {declared[0] if declared else model_type}; a causal language model (…ForCausalLM), "
            "one with a vision part (…ForConditionalGeneration), or a decoder with another head or none is needed"
        )
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


def context_length(config: Any) -> int | None:
    """Tokens that the decoder of this text config takes at most; None if it names no limit."""
    return next((int(getattr(config, name)) for name in CONTEXT_NAMES if getattr(config, name, None)), None)


def require_full_precision(model_dir: Path, config: Any) -> None:
    """InputError if the model is quantized already, by us or anybody else."""
    settings = quantization_settings(config)
    if settings is None:
        settings = next(
            ({"quant_method": own} for name, own in OLD_SETTINGS.items() if holds_file(model_dir, name)), None
        )
    if settings is not None:
        method = settings.get("quant_method", "an unnamed method")
        method = "marlin-gptq" if method == QUANT_METHOD else method
        raise InputError(
            f"{model_dir}: is quantized already (by {method}); give the full-precision model it was made from"
        )


def decoder_blocks(model: Any, config: Any) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder blocks: the one ModuleList as long as num_hidden_layers. Else InputError.

    config  of the decoder, or of all of the model.
    """
    count = getattr(text_config(config), "num_hidden_layers", None)
    decoder = decoder_of(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and is_within(name, decoder)
    ]
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if len(outermost) != 1:
        raise InputError(
            f"{type(model).__name__}: not understood: expected one list of {count} decoder blocks, found "
            f"{[name for name, _ in outermost] or 'none'}"
        )
    name, blocks = outermost[0]
    return above(model) + name, blocks


def decoder_of(model: Any) -> str:
    """The name of the part of a model that has the decoder blocks, as the model itself tells it; all of it is ""."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next((name for name, module in model.named_modules() if module is decoder), "")


def is_within(name: str, root: str) -> bool:
    """Whether a module or tensor of this name belongs to the module `root`."""
    return not root or name == root or name.startswith(f"{root}.")


def block_linears(block: nn.Module, prefix: str, skip: QuantizationConfig | None = None) -> dict[str, nn.Linear]:
    """Linears of a block by full name, in the order of their definition, without those the config skips.

    All else stays as it is: routers of experts, a few rows that decide about everything, and the matrices of
    `other_matrices`. Raises InputError where these, not skipped, are most of the block: they would silently stay in
    full precision.
    """
    kept = _kept(block)
    linears = {
        f"{prefix}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name not in kept
    }
    matrices = other_matrices(block, prefix)
    if skip is not None:
        matrices = {name: matrix for name, matrix in matrices.items() if not skip.skips(name)}
    if sum(matrix.numel() for matrix in matrices.values()) > sum(linear.weight.numel() for linear in linears.values()):
        raise InputError(_mostly_other(block, prefix, linears, matrices))
    return {name: linear for name, linear in linears.items() if skip is None or not skip.skips(name)}


def other_matrices(block: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """Parameters of two and more dimensions that belong to no linear and no router, by full name: depth-wise
    convolutions, norms by head, states, experts of a form of their own."""
    kept = _kept(block)
    return {
        ".".join(part for part in (prefix, name, own) if part): parameter
        for name, module in block.named_modules()
        if not isinstance(module, nn.Linear) and name not in kept
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    }


def _mostly_other(
    block: nn.Module, prefix: str, linears: dict[str, nn.Linear], matrices: dict[str, nn.Parameter]
) -> str:
    """Why a block is not understood, and what can be done about it, if anything."""
    name, matrix = max(matrices.items(), key=lambda item: item[1].numel())
    kind = type(block.get_submodule(name.removeprefix(f"{prefix}.").rpartition(".")[0])).__name__
    what = f"{name}: a {kind} parameter of shape {list(matrix.shape)} is not an nn.Linear weight"
    owners = sorted({re.escape(full.split(".")[-2]) for full in matrices})
    pattern = rf"\.{owners[0]}\." if len(owners) == 1 else rf"\.({'|'.join(owners)})\."
    if not any(re.search(pattern, linear) is None for linear in linears):
        return f"{what}, and all matrices of the block are of that kind: this model cannot be quantized"
    return (
        f"{what} and is not understood; --skip '{pattern}' leaves what is like it in full precision and quantizes the "
        "rest"
    )


def _kept(block: nn.Module) -> set[str]:
    """Modules of a block that are never quantized: they route tokens, or the model reads their weight by itself."""
    return routing_modules(block) | uncalled_linears(block)


def linear_names(block: nn.Module, prefix: str) -> list[str]:
    """Full names of all linears of a block that could be quantized."""
    kept = _kept(block)
    named = block.named_modules()
    return [f"{prefix}.{name}" for name, module in named if isinstance(module, nn.Linear) and name not in kept]


def known_names(model: nn.Module, prefix: str, blocks: Iterable[nn.Module]) -> tuple[list[str], list[str]]:
    """What a pattern of the settings may mean: (linears of the blocks, other parameters of the model), by full name.

    blocks: those of the list called `prefix`, which need not be in the model.
    """
    linears: list[str] = []
    others: list[str] = []
    inside: set[int] = set()
    for index, block in enumerate(blocks):
        own = linear_names(block, f"{prefix}.{index}")
        linears += own
        of_linears = set(own)
        for name, parameter in block.named_parameters():
            inside.add(id(parameter))
            full = f"{prefix}.{index}.{name}"
            if full.rpartition(".")[0] not in of_linears:
                others.append(full)
    outer = model.named_parameters(remove_duplicate=False)
    others += [name for name, parameter in outer if id(parameter) not in inside]
    return linears, others + [name.removesuffix(".weight") for name in others]


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
    separate_experts(model)
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
            _leave_uninitialised(model.get_submodule(name.removeprefix(above(model)).rpartition(".")[0]))
            replaced.append(name)
    return replaced


def _leave_uninitialised(parent: nn.Module) -> None:
    """Some models draw the weights of a module's linears when they initialise the module: here there are none."""
    if not parent._non_persistent_buffers_set:  # which come from nowhere else
        parent._is_hf_initialized = True  # type: ignore[assignment]  # transformers' mark


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of this dotted name, which may be the one it has in the model with its head."""
    parent, _, child = name.removeprefix(above(model)).rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def require_finite(name: str, tensor: torch.Tensor, hint: str) -> None:
    """QuantizationError naming the tensor if it holds NaN or Inf."""
    # In pieces: the check takes five bytes a value, which of a large embedding table would be gigabytes.
    pieces = tensor.reshape(-1).split(_FINITE_AT_ONCE)
    if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
        bad = sum(int((~torch.isfinite(piece)).sum()) for piece in pieces)
        raise QuantizationError(f"{name}: {bad} of {tensor.numel()} values are NaN or Inf; {hint}")


def warn_if_lost(name: str, tensor: torch.Tensor, cast: torch.Tensor) -> None:
    """Log where a tensor became nothing but zeros in the dtype of `cast`."""
    if not bool(cast.any()) and bool(tensor.any()):
        dtype = str(cast.dtype).removeprefix("torch.")
        logger.warning("%s: all its values are too small for %s and become 0; use --dtype bfloat16", name, dtype)
