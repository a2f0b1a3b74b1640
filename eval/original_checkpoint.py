"""The seed's own call shape: a base model and a torch state dict of the original Marlin repository.

Per quantized linear the state dict holds `B` int32 [K/16, 2N] (our qweight) and `s` float16 [groups, N] (our scales);
everything else has the names it has in the model. The group size follows from the shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.conversion.original import COMPUTED, SCRATCH, read_state_dict
from marlin_gptq.errors import CheckpointError
from marlin_gptq.modeling.architecture import read_config, require_full_precision, set_module
from marlin_gptq.modeling.linear import MarlinLinear


def load_original(base_dir: Path, checkpoint: Path) -> nn.Module:
    """The model of `base_dir`'s config, on the CPU, with every tensor from the state dict `checkpoint`.

    Raises CheckpointError for files that are no state dict, for tensors that are missing, left over or misshaped, and
    InputError for a base that is quantized already.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = read_config(base_dir)
    require_full_precision(base_dir, config)
    tensors = read_state_dict(checkpoint)
    quantized = sorted(name[: -len(".B")] for name in tensors if name.endswith(".B"))
    if not quantized:
        raise CheckpointError(f"{checkpoint}: holds no quantized linear (a tensor NAME.B beside NAME.s)")
    scales = tensors.get(f"{quantized[0]}.s")
    dtype = scales.dtype if scales is not None else torch.float16
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name in quantized:
        linear = _linear(model, name, checkpoint)
        set_module(model, name, _marlin_linear(name, linear, tensors, checkpoint))
        tensors[f"{name}.qweight"] = tensors.pop(f"{name}.B")
        tensors[f"{name}.scales"] = tensors.pop(f"{name}.s")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith((*COMPUTED, SCRATCH))}
    _assign(model, config, tensors, checkpoint)
    model.eval().requires_grad_(False)
    return model


def _linear(model: nn.Module, name: str, checkpoint: Path) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"{checkpoint}: holds {name}.B, the base model has no linear {name}; give its own base")
    return module


def _marlin_linear(name: str, linear: nn.Linear, tensors: dict[str, Tensor], checkpoint: Path) -> MarlinLinear:
    scales, qweight = tensors.get(f"{name}.s"), tensors[f"{name}.B"]
    if scales is None:
        raise CheckpointError(f"{checkpoint}: {name}.B has no {name}.s beside it")
    if scales.dim() != 2 or scales.dtype not in (torch.float16, torch.bfloat16) or not len(scales):
        raise CheckpointError(
            f"{name}.s: got {list(scales.shape)} {scales.dtype}, expected [groups, out_features] float16"
        )
    groups = len(scales)
    if linear.in_features % groups:
        raise CheckpointError(f"{name}.s: got {groups} groups, which do not divide {linear.in_features} input features")
    layer = MarlinLinear(
        linear.in_features,
        linear.out_features,
        -1 if groups == 1 else linear.in_features // groups,
        bias=linear.bias is not None,
        dtype=scales.dtype,
        device="meta",
    )
    for own, tensor, like in (("B", qweight, layer.qweight), ("s", scales, layer.scales)):
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise CheckpointError(
                f"{name}.{own}: got {list(tensor.shape)} {tensor.dtype}, expected {list(like.shape)} {like.dtype} "
                "from the base model's config"
            )
    return layer


def _assign(model: nn.Module, config: Any, tensors: dict[str, Tensor], checkpoint: Path) -> None:
    wanted = model.state_dict()
    for name, tensor in tensors.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            expected = list(wanted[name].shape)
            raise CheckpointError(f"{name}: got {list(tensor.shape)}, expected {expected} from the base")
    cast = {
        name: tensor.to(wanted[name].dtype) if name in wanted and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    missing, left_over = model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    missing = [name for name in missing if model.state_dict()[name].is_meta]
    if missing or left_over:
        what = f"lacks {missing[0]}" if missing else f"holds {left_over[0]}, which the base model has not"
        raise CheckpointError(
            f"{checkpoint}: {what} ({len(missing)} missing, {len(left_over)} left over); give its own base model"
        )
