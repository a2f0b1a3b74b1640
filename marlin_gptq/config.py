"""Settings of a quantization, as they stand in config.json under "quantization_config"."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from marlin_gptq.errors import InputError

QUANT_METHOD = "marlin_gptq"
CHECKPOINT_FORMAT = "marlin"
GROUP_SIZES = (128, 64, 32, -1)

# The recipes by name, as differences from the defaults of QuantizationConfig, which are those of `marlin`. What each
# field is worth, and how these values were chosen: docs/accuracy.md.
PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "damp_percent": 0.01,
        "signed_scales": True,
        "act_order": "groups",
        "refine_sweeps": 2,
        "tune_steps": 1000,
        "tune_codes": True,
        "tune_batch": 16,
        "tune_rate": 5e-4,
        "tune_written": 2048,
    },
    "fast": {
        "damp_percent": 0.01,
        "signed_scales": True,
        "act_order": "groups",
        "refine_sweeps": 2,
        "pack": True,
        "tune_steps": 250,
        "tune_codes": True,
        "tune_batch": 8,
        "tune_rate": 1e-3,
    },
    "marlin": {},
}
DEFAULT_PRESET = "best"
_CHOICES = {"clip_hessian": ("conditional", "plain"), "act_order": ("none", "groups", "columns")}
_KINDS: dict[Any, str] = {int: "a whole number", (int, float): "a number"}
_RANGES: dict[str, tuple[Any, float, float]] = {
    "token_cap": ((int, float), 0, 1e6),
    "correct_target": ((int, float), 0, 1),
    "refine_sweeps": (int, 0, 100),
    "tune_steps": (int, 0, 10**6),
    "tune_batch": (int, 1, 10**4),
    "tune_rate": ((int, float), 1e-7, 1),
    "tune_scale_rate": ((int, float), 1e-7, 1),
    "tune_written": (int, 0, 10**6),
}


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
    signed_scales search negative scales too, which use the code -8 for a group's extremum.
    clip_hessian  "conditional": clipping is judged as if the columns still to come made up for errors; "plain": not.
    act_order     "none"; "groups": groups and columns inside them by falling diagonal of the Hessian; "columns": all
                  columns so, with scales found beforehand. Groups keep their place on disk in every case.
    token_cap     limit a token's weight in the Hessian: squared norm over this many times the median; 0 is no limit.
    correct_target  share of the correction for inputs that come through quantized blocks, 0 to 1.
    refine_sweeps sweeps of coordinate descent over scales and codes after the pass.
    pack          calibrate on equal windows of the documents laid end to end, instead of on each document.
    tune_steps    steps of end-to-end tuning of scales and norm weights against the full-precision model; 0 is none.
    tune_codes    let the end-to-end tuning move codes too.
    tune_batch    windows of text in a step of the tuning.
    tune_rate     its learning rate for codes, in units of a code.
    tune_scale_rate  its learning rate for scales and norm weights, relative to their sizes.
    tune_written  windows of text that the model writes itself, which the tuning adds to the calibration text.
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
    signed_scales: bool = False
    clip_hessian: str = "conditional"
    act_order: str = "none"
    token_cap: float = 0.0
    correct_target: float = 0.0
    refine_sweeps: int = 0
    pack: bool = False
    tune_steps: int = 0
    tune_codes: bool = False
    tune_batch: int = 8
    tune_rate: float = 1e-3
    tune_scale_rate: float = 3e-4
    tune_written: int = 0
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
        _require(self.preset in PRESETS, f"preset: got {self.preset!r}, expected one of {', '.join(PRESETS)}")
        _require(
            isinstance(self.damp_percent, int | float) and 0 < self.damp_percent <= 10,
            f"damp_percent: got {self.damp_percent}, expected a number above 0 and at most 10 (0.1 is usual)",
        )
        _require(
            isinstance(self.block_size, int) and self.block_size > 0 and self.block_size % 32 == 0,
            f"block_size: got {self.block_size}, expected a positive multiple of 32",
        )
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            _require(value in allowed, f"{name}: got {value!r}, expected one of {', '.join(allowed)}")
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            inside = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
            _require(inside, f"{name}: got {value!r}, expected {_KINDS[kind]} from {low} to {high}")
        _require(
            not (self.act_order == "columns" and not self.clip),
            "act_order: got 'columns' without clip, but its scales are found by the search for clipping; use 'groups'",
        )
        _require(not isinstance(self.skip, str), f"skip: got the string {self.skip!r}, expected a list of them")
        object.__setattr__(self, "skip", tuple(self.skip))
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise InputError(f"skip: {pattern!r} is not a regular expression: {error}") from error

    @classmethod
    def from_preset(cls, preset: str = DEFAULT_PRESET, **changes: Any) -> QuantizationConfig:
        """The recipe of this name with some fields changed; InputError for an unknown name."""
        _require(preset in PRESETS, f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
        return cls(**({"preset": preset} | PRESETS[preset] | changes))

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
