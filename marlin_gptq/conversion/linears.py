"""One quantized linear ↔ its tensors in a format: names, shapes and dtypes are checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from marlin_gptq.conversion.settings import ORIGINAL, Layout
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.formats import awq, compressed_tensors, gptq, marlin
from marlin_gptq.modeling.linear import pack, pack_zeros, padded_features
from marlin_gptq.quantization.weight import QuantizedWeight

SCALE_DTYPES = (torch.float16, torch.bfloat16)
ZERO_CODE = marlin.ZERO_CODE
NO_CODES = torch.empty(0, 0, dtype=torch.uint8)
# The tensor that makes a linear a quantized one, and what else may stand beside it.
CODES = {"marlin": "qweight", "gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"} | {
    ORIGINAL: "B"
}
PARTS = {
    "marlin": ("qweight", "scales", "qzeros", "input_order"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    ORIGINAL: ("B", "s", "workspace"),
}


class Tensors(Protocol):
    """What a source needs of its tensors: a TensorStore, or a state dict that answers like one."""

    directory: Path

    @property
    def names(self) -> list[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def get(self, name: str) -> Tensor: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def size(self, name: str) -> int: ...


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


def groups_of(in_features: int, group_size: int) -> int:
    """Rows of scales; InputError for groups that do not fill the row."""
    if group_size == -1:
        return 1
    if in_features % group_size:
        raise InputError(f"group size {group_size} does not divide {in_features} input features")
    return in_features // group_size


def read_linear(
    store: Tensors, layout: Layout, name: str, out_features: int, in_features: int, *, with_codes: bool = True
) -> StoredLinear:
    """The linear `name` of a directory of this layout; without codes (an empty tensor) where only the rest is wanted.

    Raises CheckpointError, naming the tensor, what came and what is needed; InputError for a g_idx or group size that
    no order of the input features makes whole groups of.
    """
    try:
        groups = groups_of(in_features, layout.group_size)
        shapes = _shapes(layout.format, out_features, in_features, groups)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    part = _Parts(store, name, shapes)
    linear = _READ[layout.format](part, layout, out_features, in_features, groups, with_codes)
    scales = linear.weight.scales
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{name}: {int((~torch.isfinite(scales)).sum())} of its scales are NaN or Inf; damaged")
    zeros = linear.weight.zeros
    if zeros is not None and layout.sym and bool((zeros != ZERO_CODE).any()):
        other = " (a version 1 file marked as version 2, or the reverse?)" if layout.format == "gptq" else ""
        raise CheckpointError(
            f"{name}: the settings say symmetric, but a zero point is {int(zeros[zeros != ZERO_CODE][0])}, not "
            f"{ZERO_CODE}{other}"
        )
    return linear


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


class _Parts:
    """The tensors of one linear; `get` compares their headers with what is expected before it reads."""

    def __init__(self, store: Tensors, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        self.store, self.name, self.shapes = store, name, shapes

    def __contains__(self, own: str) -> bool:
        return f"{self.name}.{own}" in self.store

    def require(self, own: str, *dtypes: torch.dtype) -> str:
        """The full name; CheckpointError for a tensor that is missing, misshaped or of another dtype."""
        full = f"{self.name}.{own}"
        if full not in self.store:
            raise CheckpointError(f"{full}: missing from {self.store.directory}")
        shape, dtype = self.store.shape(full), self.store.dtype(full)
        if shape != self.shapes[own] or dtype not in dtypes:
            wanted = " or ".join(str(one).removeprefix("torch.") for one in dtypes)
            raise CheckpointError(
                f"{full}: got {list(shape)} {str(dtype).removeprefix('torch.')}, expected {list(self.shapes[own])} "
                f"{wanted}"
            )
        return full

    def get(self, own: str, *dtypes: torch.dtype) -> Tensor:
        return self.store.get(self.require(own, *dtypes))


def _shapes(format: str, n: int, k: int, groups: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a linear [n, k] in a format."""
    if format == ORIGINAL:
        if padded_features(k, n) != (k, n):
            raise InputError(f"got [{n}, {k}], expected N % 64 == 0 and K % 16 == 0: this format knows no padding")
        return {"B": (k // 16, 2 * n), "s": (groups, n)}
    if format == "marlin":
        rows, columns = padded_features(k, n)
        return {
            "qweight": (rows // 16, 2 * columns),
            "scales": (groups, columns),
            "qzeros": (groups, columns // 8),
            "input_order": (k,),
        }
    if format == "compressed-tensors":
        return {
            "weight_packed": (n, -(-k // 8)),
            "weight_scale": (n, groups),
            "weight_shape": (2,),
            "weight_zero_point": (-(-n // 8), groups),
            "weight_g_idx": (k,),
        }
    if n % 8 or k % 8:
        raise InputError(f"got [{n}, {k}], expected multiples of 8, which fill the words of this format")
    qweight = (k // 8, n) if format == "gptq" else (k, n // 8)
    return {"qweight": qweight, "qzeros": (groups, n // 8), "scales": (groups, n), "g_idx": (k,)}


def _read_marlin(part: _Parts, layout: Layout, n: int, k: int, groups: int, with_codes: bool) -> StoredLinear:
    scales = marlin.unpack_scales(part.get("scales", *SCALE_DTYPES))
    part.require("qweight", torch.int32)
    codes = marlin.unpack_codes(part.get("qweight", torch.int32)) if with_codes else NO_CODES
    zeros = None if layout.sym else marlin.unpack_zeros(part.get("qzeros", torch.int32))[:n]
    order = part.get("input_order", torch.int32) if "input_order" in part else None
    if order is not None:
        plain = torch.arange(k, dtype=torch.int32)
        if not torch.equal(order.sort().values, plain):
            raise CheckpointError(f"{part.name}.input_order: not a permutation of its {k} input features")
        order = None if torch.equal(order, plain) else order
    weight = QuantizedWeight(codes[:n, :k].contiguous(), scales[:n].contiguous(), zeros, layout.group_size)
    return StoredLinear(weight, order)


def _read_original(part: _Parts, layout: Layout, n: int, k: int, groups: int, with_codes: bool) -> StoredLinear:
    scales = marlin.unpack_scales(part.get("s", *SCALE_DTYPES))
    part.require("B", torch.int32)
    codes = marlin.unpack_codes(part.get("B", torch.int32)) if with_codes else NO_CODES
    return StoredLinear(QuantizedWeight(codes, scales, None, layout.group_size), None)


def _read_gptq(part: _Parts, layout: Layout, n: int, k: int, groups: int, with_codes: bool) -> StoredLinear:
    scales = part.get("scales", *SCALE_DTYPES, torch.float32).t().contiguous()
    zeros = gptq.unpack_zeros(part.get("qzeros", torch.int32), layout.version)
    order = _order(part, "g_idx", groups)
    if layout.desc_act and groups > 1 and "g_idx" not in part:
        raise CheckpointError(f"{part.name}.g_idx: missing, but the settings say act-order (desc_act)")
    part.require("qweight", torch.int32)
    codes = gptq.unpack_codes(part.get("qweight", torch.int32)) if with_codes else NO_CODES
    return _ordered(codes, scales, zeros, layout, order)


def _read_awq(part: _Parts, layout: Layout, n: int, k: int, groups: int, with_codes: bool) -> StoredLinear:
    scales = part.get("scales", *SCALE_DTYPES, torch.float32).t().contiguous()
    zeros = awq.unpack_zeros(part.get("qzeros", torch.int32))
    part.require("qweight", torch.int32)
    codes = awq.unpack_codes(part.get("qweight", torch.int32)) if with_codes else NO_CODES
    return _ordered(codes, scales, zeros, layout, None)


def _read_compressed(part: _Parts, layout: Layout, n: int, k: int, groups: int, with_codes: bool) -> StoredLinear:
    if "weight_shape" in part:
        said = part.get("weight_shape", torch.int64, torch.int32).tolist()
        if said != [n, k]:
            raise CheckpointError(f"{part.name}.weight_shape: got {said}, expected {[n, k]} from config.json")
    scales = part.get("weight_scale", *SCALE_DTYPES, torch.float32)
    zeros = None
    if not layout.sym:
        zeros = compressed_tensors.unpack_zeros(part.get("weight_zero_point", torch.int32), n)
    order = _order(part, "weight_g_idx", groups)
    part.require("weight_packed", torch.int32)
    codes = compressed_tensors.unpack_codes(part.get("weight_packed", torch.int32), k) if with_codes else NO_CODES
    return _ordered(codes, scales, zeros, layout, order)


_READ = {
    "marlin": _read_marlin,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
    ORIGINAL: _read_original,
}


def _order(part: _Parts, own: str, groups: int) -> Tensor | None:
    if own not in part:
        return None
    try:
        return gptq.order_of_groups(part.get(own, torch.int32, torch.int64), groups)
    except ValueError as error:
        raise InputError(f"{part.name}.{own}: {str(error).removeprefix('g_idx: ')}") from error


def _ordered(codes: Tensor, scales: Tensor, zeros: Tensor | None, layout: Layout, order: Tensor | None) -> StoredLinear:
    if order is not None and codes.numel():
        codes = codes[:, order.long()]
    return StoredLinear(QuantizedWeight(codes, scales, zeros, layout.group_size), order)


def _natural_order(codes: Tensor, order: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """(codes, g_idx) with input features in their natural order: the inverse of `_ordered`."""
    if order is None:
        return codes, gptq.plain_groups(codes.shape[1], groups)
    natural = torch.empty_like(codes)
    natural[:, order.long()] = codes
    return natural, gptq.groups_of_order(order, groups)
