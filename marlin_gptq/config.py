"""Settings of a quantization, as they stand in config.json under "quantization_config"."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from marlin_gptq.errors import InputError

QUANT_METHOD = "marlin_gptq"
CHECKPOINT_FORMAT = "marlin"
GROUP_SIZES = (128, 64, 32, -1)
METHODS = ("gptq", "rtn", "imported")
MOST_REPEATS = 4


@dataclass(frozen=True)
class Override:
    """Other settings for the linears whose full name `match` finds (re.search).

    bits        4, or 16: they stay in full precision.
    group_size  of those linears; None is that of the recipe.
    """

    match: str
    bits: int = 4
    group_size: int | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.match, str) and bool(self.match), f"overrides: got {self.match!r}, expected a regex")
        where = f"overrides: {self.match!r}"
        require_quick_pattern("overrides", self.match)
        _require(
            type(self.bits) is int and self.bits in (4, 16),
            f"{where}: bits: got {self.bits!r}, expected 4 or 16 (left in full precision)",
        )
        _require(
            self.group_size is None or (type(self.group_size) is int and self.group_size in GROUP_SIZES),
            f"{where}: group_size: got {self.group_size!r}, expected one of 128, 64, 32 or -1 (the whole row)",
        )
        _require(
            self.bits == 4 or self.group_size is None,
            f"{where}: group_size: got {self.group_size} for linears left in full precision; leave one of the two out",
        )


# The recipes by name, as differences from the defaults of QuantizationConfig, which are those of `marlin`. What each
# field is worth, and how these values were chosen: docs/accuracy.md.
PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "damp_percent": 0.01,
        "signed_scales": True,
        "act_order": "groups",
        "refine_sweeps": 2,
        "tune_steps": 4000,
        "tune_codes": True,
        "tune_batch": 16,
        "tune_rate": 5e-4,
        "tune_written": 8192,
    },
    "fast": {
        "damp_percent": 0.01,
        "signed_scales": True,
        "act_order": "groups",
        "refine_sweeps": 2,
        "pack": True,
        "tune_block_steps": 100,
        "tune_codes": True,
    },
    "marlin": {},
}
# What `marlin-quantize` takes unless told otherwise; README, help and documents are tested against it.
DEFAULT_PRESET = "fast"
# Fields that no preset decides about.
_NOT_OF_A_PRESET = ("bits", "group_size", "sym", "desc_act", "method", "preset", "skip", "overrides")
_SWITCHES = ("clip", "true_sequential", "signed_scales", "equal_samples", "two_sided", "pack", "tune_codes")
_CHOICES = {"clip_hessian": ("conditional", "plain"), "act_order": ("none", "groups", "columns")}
_KINDS: dict[Any, str] = {int: "a whole number", (int, float): "a number"}
_RANGES: dict[str, tuple[Any, float, float]] = {
    "beam_width": (int, 1, 64),
    "token_cap": ((int, float), 0, 1e6),
    "correct_target": ((int, float), 0, 1),
    "refine_sweeps": (int, 0, 100),
    "tune_steps": (int, 0, 10**6),
    "tune_batch": (int, 1, 10**4),
    "tune_rate": ((int, float), 1e-7, 1),
    "tune_scale_rate": ((int, float), 1e-7, 1),
    "tune_written": (int, 0, 10**6),
    "tune_block_steps": (int, 0, 10**6),
}


@dataclass(frozen=True)
class QuantizationConfig:
    """One recipe; the defaults are the preset `marlin`, the recipe of the original Marlin repository.

    bits          width of a code; the Marlin format holds 4.
    group_size    input features that share a scale; -1 is the whole row.
    sym           symmetric grid: no zero points are stored, code 8 means zero; False only where imported.
    desc_act      act-order whose groups moved: the layers gather their inputs first; True only where imported.
    method        "gptq", "rtn" for plain round-to-nearest without calibration, or "imported": another tool's codes.
    preset        name of the recipe that it started from; every claim is measured against `marlin`; "none" where
                  imported. Files say in what the settings differ from it: `preset_name`.
    damp_percent  added to the Hessian's diagonal, as a fraction of its mean.
    block_size    columns that GPTQ finishes before it updates the rest.
    clip          search each group's clipping ratio under the Hessian.
    true_sequential  quantize a block's linears in the order of their inputs, each seeing the ones before.
    signed_scales search negative scales too, which use the code -8 for a group's extremum.
    clip_hessian  "conditional": clipping is judged as if the columns still to come made up for errors; "plain": not.
    act_order     "none"; "groups": groups and columns inside them by falling diagonal of the Hessian; "columns": all
                  columns so, with scales found beforehand. Groups keep their place on disk in every case.
    beam_width    of a K-best search: the beginnings of each row's codes that are kept from column to column; 1 is GPTQ.
    token_cap     limit a token's weight in the Hessian: squared norm over this many times the median; 0 is no limit.
    equal_samples every sample weighs the same in the Hessian, whatever its length, instead of every token.
    correct_target  share of the correction for inputs that come through quantized blocks, 0 to 1.
    refine_sweeps sweeps of coordinate descent over scales and codes after the pass.
    two_sided     round under both sides of a linear: its inputs, and the gradients of the loss by its outputs.
    pack          calibrate on equal windows of the documents laid end to end, instead of on each document.
    tune_steps    steps of end-to-end tuning of scales and norm weights against the full-precision model; 0 is none.
    tune_codes    let the end-to-end tuning move codes too.
    tune_batch    windows of text in a step of the tuning.
    tune_rate     its learning rate for codes, in units of a code.
    tune_scale_rate  its learning rate for scales and norm weights, relative to their sizes.
    tune_written  windows of text that the model writes itself, which the tuning adds to the calibration text.
    tune_block_steps  steps of tuning of each block by itself, against the full-precision model's stream; 0 is none.
                  tune_codes, tune_batch (samples a step), tune_rate and tune_scale_rate hold for it too.
    skip          regular expressions; linears whose full name matches one (re.search) stay as they are.
    overrides     other settings for some linears; the first whose regular expression matches decides.
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
    beam_width: int = 1
    token_cap: float = 0.0
    equal_samples: bool = False
    correct_target: float = 0.0
    refine_sweeps: int = 0
    two_sided: bool = False
    pack: bool = False
    tune_steps: int = 0
    tune_codes: bool = False
    tune_batch: int = 8
    tune_rate: float = 1e-3
    tune_scale_rate: float = 3e-4
    tune_written: int = 0
    tune_block_steps: int = 0
    skip: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        _require(self.bits == 4, f"bits: got {self.bits}, the Marlin format holds 4-bit codes only; use 4")
        _require(
            type(self.group_size) is int and self.group_size in GROUP_SIZES,
            f"group_size: got {self.group_size}, expected one of 128, 64, 32 or -1 (the whole row)",
        )
        imported = self.method == "imported"
        for name in ("sym", "desc_act", *_SWITCHES):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name}: got {value!r}, expected true or false")
        _require(
            self.sym or imported,
            "sym: got false, only symmetric quantization (zero point 8) is made here; zero points come with imports",
        )
        _require(
            not self.desc_act or imported, "desc_act: got true, groups must keep their place unless imported; use false"
        )
        _require(self.method in METHODS, f"method: got {self.method!r}, expected 'gptq' or 'rtn' (or 'imported')")
        _require(
            (isinstance(self.preset, str) and self.preset in PRESETS) or (imported and self.preset == "none"),
            f"preset: got {self.preset!r}, expected one of {', '.join(PRESETS)}",
        )
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
        _require(isinstance(self.skip, list | tuple), f"skip: got {self.skip!r}, expected a list of strings")
        object.__setattr__(self, "skip", tuple(self.skip))
        for pattern in self.skip:
            require_quick_pattern("skip", pattern)
        _require(isinstance(self.overrides, list | tuple), f"overrides: got {self.overrides!r}, expected a list")
        object.__setattr__(self, "overrides", tuple(map(_override, self.overrides)))

    @property
    def tunes(self) -> bool:
        """Whether the whole model is tuned end to end after the blocks."""
        return self.method == "gptq" and self.tune_steps > 0

    @property
    def tunes_blocks(self) -> bool:
        """Whether each block is tuned by itself when its linears are solved."""
        return self.method == "gptq" and self.tune_block_steps > 0

    @property
    def preset_name(self) -> str:
        """The preset, and what differs from it if something does: `best, changed: tune_steps 0`."""
        if self.method != "gptq":
            return self.preset
        usual = {field.name: field.default for field in fields(self)} | PRESETS[self.preset]
        steps = {name for name in usual if name not in _NOT_OF_A_PRESET}
        if not (self.tunes or self.tunes_blocks):  # then how they would tune says nothing
            steps -= {name for name in steps if name.startswith("tune_") and not name.endswith("_steps")}
        changed = [
            f"{name} {str(value).lower()}"
            for name, value in asdict(self).items()
            if name in steps and value != usual[name]
        ]
        return f"{self.preset}, changed: {', '.join(changed)}" if changed else self.preset

    @property
    def recipe(self) -> str:
        """What was done, for people: `gptq, preset best, changed: tune_steps 0`, or `rtn`, which has no preset."""
        return f"{self.method}, preset {self.preset_name}" if self.method == "gptq" else self.method

    def override(self, name: str) -> Override | None:
        """The override that decides about the linear of this full name, if one does."""
        return next((rule for rule in self.overrides if re.search(rule.match, name)), None)

    @classmethod
    def from_preset(cls, preset: str = DEFAULT_PRESET, **changes: Any) -> QuantizationConfig:
        """The recipe of this name with some fields changed; InputError for an unknown name."""
        _require(preset in PRESETS, f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
        return cls(**({"preset": preset} | PRESETS[preset] | changes))

    def skips(self, name: str) -> bool:
        """Whether the linear of this full name (`model.layers.0.mlp.up_proj`) stays in full precision."""
        rule = self.override(name)
        return any(re.search(pattern, name) for pattern in self.skip) or (rule is not None and rule.bits == 16)

    def group_size_of(self, name: str) -> int:
        """The group size of the linear of this full name."""
        rule = self.override(name)
        return self.group_size if rule is None or rule.group_size is None else rule.group_size

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        settings = asdict(self) | {"skip": list(self.skip), "overrides": [asdict(rule) for rule in self.overrides]}
        settings["preset"] = self.preset_name
        return {"quant_method": QUANT_METHOD, "checkpoint_format": CHECKPOINT_FORMAT, **settings}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> QuantizationConfig:
        """Inverse of `to_dict`; keys of other tools are ignored, a foreign format is an InputError."""
        method = settings.get("quant_method", QUANT_METHOD)
        _require(
            method == QUANT_METHOD,
            f"quant_method: got {method!r}, expected {QUANT_METHOD!r}: this checkpoint was made by another tool; "
            "marlin-convert DIR --to marlin imports GPTQ, AWQ and compressed-tensors",
        )
        layout = settings.get("checkpoint_format", CHECKPOINT_FORMAT)
        _require(layout == CHECKPOINT_FORMAT, f"checkpoint_format: got {layout!r}, expected {CHECKPOINT_FORMAT!r}")
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in settings.items() if key in known}
        if isinstance(values.get("preset"), str):
            values["preset"] = values["preset"].partition(", changed:")[0]
        return cls(**values)


def _override(settings: Override | dict[str, Any]) -> Override:
    if isinstance(settings, Override):
        return settings
    known = {field.name for field in fields(Override)}
    fits = isinstance(settings, dict) and "match" in settings and set(settings) <= known
    _require(fits, f"overrides: got {settings!r}, expected an object of {', '.join(sorted(known))}")
    return Override(**settings)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_quick_pattern(setting: str, pattern: Any) -> None:
    """InputError for what is no regular expression, or one that can take forever on a name of a layer.

    Backtracking is exponential where repetitions or alternatives stand inside a repetition, and polynomial in the
    number of repetitions; a checkpoint from elsewhere may hold such a pattern on purpose.
    """
    from re import _parser  # type: ignore[attr-defined]

    try:
        re.compile(pattern)
        parsed = _parser.parse(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"{setting}: {pattern!r} is not a regular expression: {error}") from error
    repeats, nested = _repeats(parsed, inside=False)
    _require(
        not nested and repeats <= MOST_REPEATS,
        f"{setting}: {pattern!r} can take very long: it repeats what repeats or branches, or has more than "
        f"{MOST_REPEATS} repetitions; write several simpler patterns",
    )


def _repeats(parsed: Any, inside: bool) -> tuple[int, bool]:
    """(number of repetitions, whether one holds another or an alternative) of a parsed regular expression."""
    count, nested = 0, False
    for operation, argument in parsed:
        name = str(operation)
        repeats = name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
        count += repeats
        nested |= inside and (repeats or name == "BRANCH")
        for part in _subpatterns(argument):
            more, deeper = _repeats(part, inside or repeats)
            count, nested = count + more, nested or deeper
    return count, nested


def _subpatterns(argument: Any) -> list[Any]:
    if hasattr(argument, "getwidth"):  # a SubPattern
        return [argument]
    if isinstance(argument, list | tuple):
        return [part for item in argument for part in _subpatterns(item)]
    return []
