"""The tensors of one linear in a format → the linear; names, shapes and dtypes are checked before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from marlin_gptq.conversion.linears import ZERO_CODE, StoredLinear
from marlin_gptq.conversion.settings import ORIGINAL, Layout
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.formats import awq, compressed_tensors, gptq, marlin
from marlin_gptq.modeling.linear import padded_features
from marlin_gptq.quantization.weight import QuantizedWeight

SCALE_DTYPES = (torch.float16, torch.bfloat16)
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


def groups_of(in_features: int, layout: Layout) -> tuple[int, int]:
    """(rows of scales, group size that the linear can run in): a smaller one where the last group is not full.

    GPTQ and compressed-tensors know such groups. They become whole ones, exactly, where 64 or 32 divides the row;
    InputError for groups that do not fill it.
    """
    size = layout.group_size
    if size == -1:
        return 1, size
    if in_features % size == 0:
        return in_features // size, size
    whole = [smaller for smaller in (64, 32) if smaller < size and in_features % smaller == 0]
    if not whole or layout.format not in ("gptq", "compressed-tensors"):
        raise InputError(
            f"group size {size} does not divide its {in_features} input features, and neither format nor kernel can "
            "hold a last group that is not full; quantize the model with a group size that divides them "
            "(marlin-quantize --group-size 32, or -1 for whole rows), or leave this linear in 16 bits"
        )
    return -(-in_features // size), whole[0]


def read_linear(
    store: Tensors, layout: Layout, name: str, out_features: int, in_features: int, *, with_codes: bool = True
) -> StoredLinear:
    """The linear `name` of a directory of this layout; without codes (an empty tensor) where only the rest is wanted.

    Raises CheckpointError, naming the tensor, what came and what is needed; InputError for a g_idx or group size that
    no order of the input features makes whole groups of.
    """
    try:
        groups, size = groups_of(in_features, layout)
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
    return linear if size == layout.group_size else _in_whole_groups(linear, layout.group_size, size, in_features)


def _in_whole_groups(linear: StoredLinear, stored: int, size: int, in_features: int) -> StoredLinear:
    """The same weights in groups of `size`, which divides both the `stored` group size and the row."""
    weight = linear.weight

    def repeated(groups: Tensor) -> Tensor:
        return groups.repeat_interleave(stored // size, dim=1)[:, : in_features // size].contiguous()

    zeros = None if weight.zeros is None else repeated(weight.zeros)
    return StoredLinear(QuantizedWeight(weight.codes, repeated(weight.scales), zeros, size), linear.input_order)


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
    zeros = None
    if not layout.sym or "qzeros" in part:
        zeros = marlin.unpack_zeros(part.get("qzeros", torch.int32))[:n]
    if "input_order" in part and not layout.desc_act:
        raise CheckpointError(f"{part.name}.input_order: there, but the settings say no act-order (desc_act)")
    order = part.get("input_order", torch.int32) if layout.desc_act else None
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
    order = _order(part, "g_idx", layout, k, groups)
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
    if not layout.sym or "weight_zero_point" in part:  # some tools write it for symmetric weights too
        zeros = _compressed_zeros(part, n, groups)
    order = _order(part, "weight_g_idx", layout, k, groups)
    part.require("weight_packed", torch.int32)
    codes = compressed_tensors.unpack_codes(part.get("weight_packed", torch.int32), k) if with_codes else NO_CODES
    return _ordered(codes, scales, zeros, layout, order)


def _compressed_zeros(part: _Parts, n: int, groups: int) -> Tensor:
    """Zero points uint8 [n, groups]; old files hold them unpacked and signed."""
    full = f"{part.name}.weight_zero_point"
    if full in part.store and part.store.dtype(full) == torch.int8:
        part.shapes["weight_zero_point"] = (n, groups)
        signed = part.get("weight_zero_point", torch.int8).to(torch.int16)
        if bool(((signed < -8) | (signed > 7)).any()):
            raise CheckpointError(f"{full}: got {int(signed.min())} to {int(signed.max())}, expected -8 to 7")
        return (signed + ZERO_CODE).to(torch.uint8)
    return compressed_tensors.unpack_zeros(part.get("weight_zero_point", torch.int32), n)


_READ = {
    "marlin": _read_marlin,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
    ORIGINAL: _read_original,
}


def _order(part: _Parts, own: str, layout: Layout, k: int, groups: int) -> Tensor | None:
    if own not in part:
        return None
    g_idx = part.get(own, torch.int32, torch.int64)
    unmoved = torch.arange(k) // layout.group_size if groups > 1 else torch.zeros(k)
    if bool((g_idx == -1).all()) or torch.equal(g_idx.long(), unmoved.long()):
        return None  # -1: compressed-tensors before September 2024, for "no order"
    try:
        return gptq.order_of_groups(g_idx, groups)
    except ValueError as error:
        raise InputError(f"{part.name}.{own}: {str(error).removeprefix('g_idx: ')}") from error


def _ordered(codes: Tensor, scales: Tensor, zeros: Tensor | None, layout: Layout, order: Tensor | None) -> StoredLinear:
    if order is not None and codes.numel():
        codes = codes[:, order.long()]
    return StoredLinear(QuantizedWeight(codes, scales, zeros, layout.group_size), order)
