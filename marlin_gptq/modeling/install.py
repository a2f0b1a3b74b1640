"""Put the stored tensors of a finished block back, so that it computes what it did when it was quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marlin_gptq.errors import CheckpointError
from marlin_gptq.modeling.linear import MarlinLinear


def install_block(
    block: nn.Module,
    prefix: str,
    linears: dict[str, nn.Linear],
    tensors: dict[str, Tensor],
    group_sizes: dict[str, int],
) -> None:
    """Give a block with its full-precision weights the values of `tensors`, as they stand in a checkpoint.

    block, prefix  as entered by BlockStream, and its full name.
    linears        those that were quantized, by full name; group_sizes likewise.
    A quantized weight becomes scale · code as right after quantization. Any other parameter keeps its value where the
    stored one is that value rounded, and takes the stored one where quantization changed it (tuned norms).
    """
    for name, linear in linears.items():
        weight = linear.weight
        layer = MarlinLinear(linear.in_features, linear.out_features, group_sizes[name], device="meta")
        layer.qweight = _stored(tensors, f"{name}.qweight").to(weight.device)
        layer.scales = _stored(tensors, f"{name}.scales").to(weight.device)
        linear.weight = nn.Parameter(layer.dequantize().to(weight.dtype), requires_grad=False)
    for own, value in block.state_dict().items():
        name = f"{prefix}.{own}"
        if name.removesuffix(".weight") not in linears:
            stored = _stored(tensors, name).to(value.device)
            if not torch.equal(value.to(stored.dtype), stored):
                value.copy_(stored)


def _stored(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name}: missing among the stored tensors of its block")
    return tensors[name]
