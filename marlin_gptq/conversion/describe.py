"""What a quantized checkpoint is: format, layers, checksums; and how near it is to the weights it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.conversion.linears import StoredLinear
from marlin_gptq.conversion.original import open_source
from marlin_gptq.conversion.settings import stored_settings
from marlin_gptq.conversion.source import Source
from marlin_gptq.errors import CheckpointError
from marlin_gptq.model_directory import read_json

# Squared error over squared weight of a linear that is still taken for a quantization of the original. Rounding to 4
# bits costs 0.005 to 0.02, the compensation of GPTQ and clipping a few times that; unrelated weights give 1 or more.
LARGEST_ERROR = 0.2
_CHUNK = 2**22


@dataclass(frozen=True)
class LinearDescription:
    """One quantized linear.

    scale_min, scale_max  of the absolute values; negative_scales counts those below 0.
    zero_min, zero_max    of the zero points; 8 and 8 where none are stored.
    digest                SHA-256 of codes, scales, zero points and input order, the same in every format.
    """

    name: str
    out_features: int
    in_features: int
    groups: int
    scale_min: float
    scale_max: float
    negative_scales: int
    zero_min: int
    zero_max: int
    act_order: bool
    digest: str


@dataclass(frozen=True)
class Verified:
    """A linear beside the original weight.

    relative_error  squared error of the dequantized weight over the squared original.
    largest         largest error of one weight in steps (|w − dq| / |scale|): rounding alone stays at 0.5; more is a
                    clipped weight, or one that GPTQ moved to make up for others.
    beyond          share of weights further than half a step off, the rounding of the scales allowed for.
    """

    name: str
    relative_error: float
    largest: float
    beyond: float


@dataclass(frozen=True)
class Description:
    """A quantized checkpoint. Sizes in bytes; checksums are SHA-256 of whole files."""

    path: str
    format: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    scale_dtype: str
    model_type: str
    size: int
    quantized_size: int
    tensors: int
    kept: list[str]
    checksums: dict[str, str]
    linears: list[LinearDescription]
    verified: list[Verified] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def describe_checkpoint(
    path: Path,
    *,
    base: Path | None = None,
    original: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Description:
    """Read a quantized checkpoint of any format, all of it, one linear in memory at a time.

    base      of a state dict of the original Marlin repository: the model it was made from.
    original  the full-precision model (or another quantized form of the same, which must then be equal): every linear
              is dequantized and compared, and so is every other tensor.

    Raises CheckpointError for damaged files, and where a linear is no quantization of the original's: a relative error
    above LARGEST_ERROR, another shape, or any difference at all from a quantized original. InputError for what is no
    quantized checkpoint.
    """
    source = open_source(path, base)
    against = None if original is None else _Original(original)
    linears, verified = [], []
    scale_dtypes: dict[str, None] = {}
    for done, name in enumerate(source.linears, 1):
        linear = source.linear(name)
        linears.append(_described(name, linear))
        scale_dtypes[str(linear.weight.scales.dtype).removeprefix("torch.")] = None
        if against is not None:
            verified.append(_verified(name, linear, against))
        if progress is not None:
            progress(done, len(source.linears))
    taken = {part for name in source.linears for part in source.parts(name)}
    return Description(
        path=str(path),
        format=source.layout.title,
        bits=4,
        group_size=source.layout.group_size,
        symmetric=all(one.zero_min == one.zero_max == 8 for one in linears),
        act_order=any(one.act_order for one in linears),
        scale_dtype=", ".join(scale_dtypes),
        model_type=str(source.config.get("model_type")),
        size=sum(source.store.size(name) for name in source.store.names),
        quantized_size=sum(source.store.size(name) for name in taken),
        tensors=len(source.store.names),
        kept=list(source.kept),
        checksums={file.name: file_digest(file) for file in _files(source)},
        linears=linears,
        verified=verified,
        differing=[] if against is None else _differing(source, against),
    )


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def linear_digest(linear: StoredLinear) -> str:
    """SHA-256 of what a linear holds, whatever the format: equal digests are equal codes, scales, zeros and order.

    Scales count as float32 values, so that float16 and bfloat16 of one value are the same.
    """
    weight = linear.weight
    zeros = torch.full(weight.scales.shape, 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    order = torch.arange(weight.codes.shape[1]) if linear.input_order is None else linear.input_order
    digest = hashlib.sha256()
    for tensor in (weight.codes, weight.scales.float(), zeros, order.to(torch.int32)):
        digest.update(str(list(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _files(source: Source) -> list[Path]:
    if isinstance(source.store, TensorStore):
        return [source.directory / "config.json", *source.store.files]
    return [source.path]


def _described(name: str, linear: StoredLinear) -> LinearDescription:
    weight = linear.weight
    size, zeros = weight.scales.float().abs(), weight.zeros
    return LinearDescription(
        name=name,
        out_features=weight.codes.shape[0],
        in_features=weight.codes.shape[1],
        groups=weight.scales.shape[1],
        scale_min=float(size.min()),
        scale_max=float(size.max()),
        negative_scales=int((weight.scales < 0).sum()),
        zero_min=8 if zeros is None else int(zeros.min()),
        zero_max=8 if zeros is None else int(zeros.max()),
        act_order=linear.input_order is not None,
        digest=linear_digest(linear),
    )


class _Original:
    """The weights to compare with: full precision as stored, quantized ones dequantized."""

    def __init__(self, directory: Path) -> None:
        quantized = stored_settings(directory, read_json(directory / "config.json")) is not None
        self.directory = directory
        self.source = Source.of_directory(directory) if quantized else None
        self.store = TensorStore(directory) if self.source is None else self.source.store

    def weight(self, name: str) -> Tensor:
        """float32 [out_features, in_features] of a linear."""
        if self.source is not None and name in self.source.linears:
            return self.source.linear(name).dequantize()
        if f"{name}.weight" not in self.store:
            raise CheckpointError(f"{name}.weight: missing from {self.directory}; give the model this was made from")
        return self.store.get(f"{name}.weight").float()


def _verified(name: str, linear: StoredLinear, against: _Original) -> Verified:
    weight, dequantized = against.weight(name), linear.dequantize()
    if weight.shape != dequantized.shape:
        raise CheckpointError(
            f"{name}: got {list(dequantized.shape)}, but the original's is {list(weight.shape)}; give the model this "
            "was made from"
        )
    error = (weight - dequantized).abs()
    if against.source is not None and not torch.equal(weight, dequantized):
        raise CheckpointError(
            f"{name}: {int((error > 0).sum())} of {error.numel()} weights differ from those of {against.directory}: "
            "this is no conversion of it"
        )
    steps = _steps(linear)
    if linear.weight.zeros is not None:
        off_by = float(((weight - dequantized) / steps.clamp_min(1e-30)).mean())
        if abs(off_by) > 0.5:
            raise CheckpointError(
                f"{name}: its weights lie {abs(off_by):.2f} steps from those of {against.directory} on average: its "
                "zero points are of another GPTQ version than is assumed; name it as checkpoint_format ('gptq' or "
                "'gptq_v2') in its settings"
            )
    relative = float((error.double() ** 2).sum() / (weight.double() ** 2).sum().clamp_min(1e-300))
    if not relative <= LARGEST_ERROR:
        raise CheckpointError(
            f"{name}: its relative error against {against.directory} is {relative:.3g}, above {LARGEST_ERROR}: this is "
            "no quantization of that weight"
        )
    off = error / steps
    off[steps == 0] = 0  # a group of scale 0 holds no weights
    # A largest weight of 7.5 steps is that much further than half a step off once the step is rounded to its dtype.
    rounding = 8 * torch.finfo(linear.weight.scales.dtype).eps / 2
    beyond = (off > 0.5 + rounding).float().mean()
    return Verified(name, relative, float(off.max()), float(beyond))


def _steps(linear: StoredLinear) -> Tensor:
    """|scale| of every weight, float32 [out_features, in_features], input features in their natural order."""
    scales = linear.weight.scales.float().abs()
    steps = scales.repeat_interleave(linear.weight.codes.shape[1] // scales.shape[1], dim=1)
    if linear.input_order is None:
        return steps
    natural = torch.empty_like(steps)
    natural[:, linear.input_order.long()] = steps
    return natural


def _differing(source: Source, against: _Original) -> list[str]:
    """Unquantized tensors that differ from the original's by more than their own rounding, or are not there."""
    found = []
    for name in source.others():
        if name not in against.store:
            found.append(name)
            continue
        ours, theirs = source.store.get(name), against.store.get(name)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs.to(ours.dtype)):
            found.append(name)
    return found
