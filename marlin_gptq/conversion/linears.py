"""One quantized linear, free of any format; its tensors in a format, and what a format cannot hold of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marlin_gptq.conversion.settings import ORIGINAL, Layout
from marlin_gptq.formats import awq, compressed_tensors, gptq, marlin
from marlin_gptq.modeling.linear import pack, pack_zeros, padded_features
from marlin_gptq.quantization.weight import QuantizedWeight

ZERO_CODE = marlin.ZERO_CODE


@dataclass(frozen=True)
class StoredLinear:
    """A linear free of its format.

    weight       codes, scales and zero points (uint8, or None where all are 8), columns in the order of their groups.
    input_order  int32 [in_features]: column j of the weight is input feature input_order[j]; None where all are in
                 place.
    """

    weight: QuantizedWeight
    input_order: Tensor | None

    def dequantize(self) -> Tensor:
        """float32 [out_features, in_features], input features in their natural order."""
        packed = self.weight.dequantize()
        if self.input_order is None:
            return packed
        natural = torch.empty_like(packed)
        natural[:, self.input_order.long()] = packed
        return natural


def write_linear(name: str, linear: StoredLinear, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a linear in a format, by full name; `refusal` has said that it can hold them.

    layout.sym False writes zero points, of 8 where the linear has none, in the formats that can do without.
    """
    weight, order = linear.weight, linear.input_order
    groups = weight.scales.shape[1]
    zeros = torch.full(weight.scales.shape, ZERO_CODE, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    tensors: dict[str, Tensor | None]
    if layout.format == "marlin":
        qweight, scales = pack(weight)
        tensors = {
            "qweight": qweight,
            "scales": scales,
            "qzeros": None if layout.sym else pack_zeros(zeros),
            "input_order": torch.arange(weight.codes.shape[1], dtype=torch.int32)
            if layout.desc_act and order is None
            else order,
        }
    elif layout.format == ORIGINAL:
        tensors = dict(zip(("B", "s"), pack(weight), strict=True))
    elif layout.format == "gptq":
        natural, g_idx = _natural_order(weight.codes, order, groups)
        tensors = {
            "qweight": gptq.pack_codes(natural),
            "qzeros": gptq.pack_zeros(zeros, layout.version),
            "scales": weight.scales.t(),
            "g_idx": g_idx,
        }
    elif layout.format == "awq":
        tensors = {
            "qweight": awq.pack_codes(weight.codes),
            "qzeros": awq.pack_zeros(zeros),
            "scales": weight.scales.t(),
        }
    else:
        natural, g_idx = _natural_order(weight.codes, order, groups)
        tensors = {
            "weight_packed": compressed_tensors.pack_codes(natural),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
            "weight_zero_point": None if layout.sym else compressed_tensors.pack_zeros(zeros),
            "weight_g_idx": None if order is None else g_idx,
        }
    return {f"{name}.{own}": tensor.contiguous() for own, tensor in tensors.items() if tensor is not None}


def refusal(linear: StoredLinear, layout: Layout, out_features: int, in_features: int) -> str | None:
    """Why a format cannot hold a linear, or None. Needs no codes."""
    zeros = linear.weight.zeros
    if layout.sym and zeros is not None and bool((zeros != ZERO_CODE).any()):
        return "its zero points: the symmetric form has none"
    if linear.input_order is not None and layout.format in ("awq", ORIGINAL):
        return "its act-order groups (a g_idx that is not static): there is no g_idx in it"
    if layout.format == ORIGINAL:
        if layout.group_size not in (-1, 128):
            return f"groups of {layout.group_size}: it knows 128 and -1 (the whole row)"
        if padded_features(in_features, out_features) != (in_features, out_features):
            return f"its shape [{out_features}, {in_features}]: N % 64 == 0 and K % 16 == 0 are needed"
    if layout.format in ("gptq", "awq"):
        if layout.version == 1 and layout.format == "gptq" and zeros is not None and bool((zeros == 0).any()):
            return "a zero point of 0: version 1 stores zero points less one; use version 2"
        if out_features % 8 or (in_features % 8 and layout.format == "gptq"):
            return f"its shape [{out_features}, {in_features}]: words hold 8 values, so both must be multiples of 8"
    return None


def exact_cast(scales: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Scales in another dtype if not one of them changes its value, else None."""
    cast = scales.to(dtype)
    return cast if torch.equal(cast.to(torch.float32), scales.to(torch.float32)) else None


def with_scales(linear: StoredLinear, scales: Tensor) -> StoredLinear:
    """The same linear with these scales."""
    return replace(linear, weight=replace(linear.weight, scales=scales))


def _natural_order(codes: Tensor, order: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """(codes, g_idx) with input features in their natural order: the inverse of `_ordered`."""
    if order is None:
        return codes, gptq.plain_groups(codes.shape[1], groups)
    natural = torch.empty_like(codes)
    natural[:, order.long()] = codes
    return natural, gptq.groups_of_order(order, groups)
