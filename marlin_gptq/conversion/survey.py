"""What a checkpoint holds that only its values say: read from scales, zero points and group orders, without codes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from marlin_gptq.checkpoint import CheckpointWarning
from marlin_gptq.conversion.linears import StoredLinear, exact_cast, with_scales
from marlin_gptq.conversion.source import Source
from marlin_gptq.errors import CheckpointError


@dataclass(frozen=True)
class Survey:
    """What only the values say; from scales, zero points and group orders, without codes.

    symmetric    every zero point is 8.
    reordered    linears whose groups moved.
    scale_dtype  float16 or bfloat16: the one that the layers run in, into which every scale goes exactly.
    """

    symmetric: bool
    reordered: tuple[str, ...]
    scale_dtype: torch.dtype


def survey(source: Source) -> Survey:
    """Read all of a directory but its codes.

    Scales keep their stored dtype, but where a model of bfloat16 was written with float16 scales (GPTQ and AWQ
    files hold no others) and all of them are bfloat16 values, they are bfloat16 again; float32 scales go where they
    fit exactly, or CheckpointError names the layer.
    """
    symmetric, reordered = True, []
    wanted = _model_dtype(source)
    fits = {torch.float16: True, torch.bfloat16: True}
    first_stored: torch.dtype | None = None
    awkward = ""
    wrapped = 0
    for name in source.linears:
        linear = source.linear(name, with_codes=False)
        zeros = linear.weight.zeros
        if source.layout.format == "gptq" and source.layout.version == 1 and zeros is not None:
            wrapped += int((zeros == 0).sum())
        symmetric &= linear.weight.zeros is None
        if linear.input_order is not None:
            reordered.append(name)
        scales = linear.weight.scales
        first_stored = first_stored or scales.dtype
        for dtype in fits:
            if fits[dtype] and exact_cast(scales, dtype) is None:
                fits[dtype] = False
                awkward = name
    if wrapped:
        warnings.warn(
            f"{source.path}: {wrapped} zero points are stored as 15 in version 1, which programs read as 0 or as 16; "
            "they are read as 0; compare with the model it was made from (marlin-inspect DIR --verify MODEL)",
            CheckpointWarning,
            stacklevel=2,
        )
    candidates = [wanted, first_stored, torch.float16, torch.bfloat16]
    for candidate in candidates:
        if candidate is not None and fits.get(candidate):
            return Survey(symmetric, tuple(reordered), candidate)
    raise CheckpointError(
        f"{awkward}: its scales go exactly neither into float16 nor into bfloat16 with those of the other layers"
    )


def _model_dtype(source: Source) -> torch.dtype | None:
    """The dtype config.json names, if the layers can run in it."""
    named = source.config.get("dtype") or source.config.get("torch_dtype")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(named) if isinstance(named, str) else None


def run_linear(source: Source, name: str, dtype: torch.dtype) -> StoredLinear:
    """The linear with scales of `dtype`, which `survey` found to be exact."""
    linear = source.linear(name)
    scales = exact_cast(linear.weight.scales, dtype)
    if scales is None:
        raise CheckpointError(f"{name}: its scales do not go exactly into {dtype}")
    return with_scales(linear, scales)
