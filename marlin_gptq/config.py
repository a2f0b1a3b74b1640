"""Settings of a quantization, as they stand in config.json under "quantization_config"."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from marlin_gptq.errors import InputError

QUANT_METHOD = "marlin_gptq"
CHECKPOINT_FORMAT = "marlin"
GROUP_SIZES = (128, 64, 32, -1)


@dataclass(frozen=True)
class QuantizationConfig:
    """One recipe; the defaults are the preset `marlin`, the recipe of the original Marlin repository.

    bits          width of a code; the Marlin format holds 4.
    group_size    input features that share a scale; -1 is the whole row.
    sym           symmetric grid: no zero points are stored, code 8 means zero.
    desc_act      act-order; False, groups keep their place.
    method        "gptq", or "rtn" for plain round-to-nearest without calibration.
    preset        name of the recipe; every claim is measured against `marlin`.
    damp_percent  added to the Hessian's diagonal, as a fraction of its mean.
    block_size    columns that GPTQ finishes before it updates the rest.
    clip          search each group's clipping ratio under the Hessian.
    true_sequential  quantize a block's linears in the order of their inputs, each seeing the ones before.
    skip          regular expressions; linears whose full name matches one (re.search) stay as they are.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    method: str = "gptq"
    preset: str = "marlin"
    damp_percent: float = 0.1
    block_size: int = 128
    clip: bool = True
    true_sequential: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.bits == 4, f"bits: got {self.bits}, the Marlin format holds 4-bit codes only; use 4")
        _require(
            self.group_size in GROUP_SIZES,
            f"group_size: got {self.group_size}, expected one of 128, 64, 32 or -1 (the whole row)",
        )
        _require(self.sym is True, "sym: got false, only symmetric quantization (zero point 8) is supported")
        _require(self.desc_act is False, "desc_act: got true, groups must keep their place; use false")
        _require(self.method in ("gptq", "rtn"), f"method: got {self.method!r}, expected 'gptq' or 'rtn'")
        _require(self.preset == "marlin", f"preset: got {self.preset!r}, expected 'marlin'")
        _require(
            isinstance(self.damp_percent, int | float) and 0 < self.damp_percent <= 10,
            f"damp_percent: got {self.damp_percent}, expected a number above 0 and at most 10 (0.1 is usual)",
        )
        _require(
            isinstance(self.block_size, int) and self.block_size > 0 and self.block_size % 32 == 0,
            f"block_size: got {self.block_size}, expected a positive multiple of 32",
        )
        _require(not isinstance(self.skip, str), f"skip: got the string {self.skip!r}, expected a list of them")
        object.__setattr__(self, "skip", tuple(self.skip))
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise InputError(f"skip: {pattern!r} is not a regular expression: {error}") from error

    def skips(self, name: str) -> bool:
        """Whether the linear of this full name (`model.layers.0.mlp.up_proj`) stays in full precision."""
        return any(re.search(pattern, name) for pattern in self.skip)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        settings = asdict(self) | {"skip": list(self.skip)}
        return {"quant_method": QUANT_METHOD, "checkpoint_format": CHECKPOINT_FORMAT, **settings}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> QuantizationConfig:
        """Inverse of `to_dict`; keys of other tools are ignored, a foreign format is an InputError."""
        method = settings.get("quant_method", QUANT_METHOD)
        _require(
            method == QUANT_METHOD,
            f"quant_method: got {method!r}, expected {QUANT_METHOD!r}: this checkpoint was made by another tool",
        )
        layout = settings.get("checkpoint_format", CHECKPOINT_FORMAT)
        _require(layout == CHECKPOINT_FORMAT, f"checkpoint_format: got {layout!r}, expected {CHECKPOINT_FORMAT!r}")
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in settings.items() if key in known})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
