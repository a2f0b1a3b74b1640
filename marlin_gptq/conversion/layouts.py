"""What the "quantization_config" of each format says about its tensors; what can be neither held nor run is refused."""

from __future__ import annotations

from typing import Any

from marlin_gptq.config import GROUP_SIZES, QUANT_METHOD, QuantizationConfig
from marlin_gptq.conversion.settings import Layout
from marlin_gptq.errors import InputError

AUTO_ROUND = ("auto-round", "intel/auto-round")  # what settings of that tool call their method


def layout_of(settings: dict[str, Any]) -> Layout:
    """What the settings say about the tensors. InputError, by name, for what neither format nor kernel holds."""
    method = settings.get("quant_method")
    if method is None and "w_bit" in settings:
        method = "awq"
    if method == QUANT_METHOD:
        own = QuantizationConfig.from_dict(settings)
        return Layout("marlin", own.group_size, own.sym, desc_act=own.desc_act)
    if method == "gptq":
        return _gptq(settings)
    if method == "awq":
        return _awq(settings)
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    if method in AUTO_ROUND:
        return _auto_round(settings)
    raise InputError(
        f"quant_method: got {method!r}, which is none of those that can be read: {QUANT_METHOD} (marlin), gptq, awq, "
        "compressed-tensors, auto-round"
    )


def _gptq(settings: dict[str, Any]) -> Layout:
    _require_bits(settings.get("bits"))
    kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise InputError(f"checkpoint_format: got {kind!r}, expected 'gptq' or 'gptq_v2'")
    for key in ("adapter", "rotation"):  # what is computed beside the weight, or about it
        _require(settings, key, (None,))
    if settings.get("is_marlin_format"):
        raise InputError("is_marlin_format: got true, an old mixed form of GPTQ and Marlin; expected plain GPTQ")
    _require(settings, "pack_dtype", ("int32", None))
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise InputError(f"dynamic: got {dynamic!r}, expected an object of patterns")
    if differing := [pattern for pattern in dynamic if not str(pattern).startswith("-:")]:
        raise InputError(
            f"dynamic: {differing[0]!r} changes settings for single layers; one bit width and group size is needed"
        )
    return Layout(
        "gptq",
        _group_size(settings.get("group_size")),
        _flag(settings, "sym"),
        2 if kind == "gptq_v2" else 1,
        bool(_flag(settings, "desc_act")),
        declared=bool(settings.get("checkpoint_format") or settings.get("format")),
    )


def _auto_round(settings: dict[str, Any]) -> Layout:
    """Files of auto-round hold GPTQ's tensors or AWQ's, under a label of their own."""
    packing = str(settings.get("packing_format") or settings.get("backend") or "auto_round:gptq")
    _require(settings, "data_type", ("int", None))
    _require(settings, "super_bits", (None,))
    bits = settings.get("act_bits")
    if bits is not None and not (type(bits) is int and bits >= 16):
        raise InputError(f"act_bits: got {bits!r}, activations are quantized too; only weights may be")
    layers = settings.get("extra_config") or {}
    if not isinstance(layers, dict) or not all(isinstance(own, dict) for own in layers.values()):
        raise InputError(f"extra_config: got {layers!r:.80}, expected an object of settings by layer")
    for name, own in layers.items():
        differing = [
            key for key in ("bits", "group_size", "sym") if own.get(key, settings.get(key)) != settings.get(key)
        ]
        if differing and not (type(own.get("bits")) is int and own["bits"] >= 16):  # those are not quantized at all
            raise InputError(
                f"extra_config: {name!r} has {differing[0]} {own[differing[0]]!r}; one bit width and group size is "
                "needed"
            )
    if "awq" in packing:
        return _awq({"version": "gemm"} | settings)
    return _gptq({key: value for key, value in settings.items() if key != "format"})


def _awq(settings: dict[str, Any]) -> Layout:
    _require_bits(settings.get("bits", settings.get("w_bit")))
    version = settings.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise InputError(f"version: got {version!r}, expected 'gemm': the other AWQ layouts are not read")
    return Layout("awq", _group_size(settings.get("group_size", settings.get("q_group_size"))))


def _compressed_tensors(settings: dict[str, Any]) -> Layout:
    _require(settings, "format", ("pack-quantized",))
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format") not in (None, "dense"):
        raise InputError(
            f"sparsity_config: got {sparsity!r:.80}, expected none: weights that are sparse too are not read"
        )
    if transform := settings.get("transform_config"):
        raise InputError(f"transform_config: got {transform!r:.80}, expected none: rotated weights are not read")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError(f"config_groups: got {groups!r}, expected an object with at least one group")
    found = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise InputError(f"config_groups.{name}.weights: got {weights!r}, expected an object")
        for key in ("input_activations", "output_activations"):
            if group.get(key) is not None:
                raise InputError(f"config_groups.{name}.{key}: activations are quantized too; only weights may be")
        _require(group, "format", ("pack-quantized", None))
        _require_bits(weights.get("num_bits"))
        _require(weights, "type", ("int", None))
        _require(weights, "dynamic", (False, None))
        _require(weights, "strategy", ("group", "channel"))
        channel = weights["strategy"] == "channel"
        found.add((-1 if channel else _group_size(weights.get("group_size")), _flag(weights, "symmetric")))
    if len(found) > 1:
        raise InputError(f"config_groups: {len(found)} different settings; one group size for all layers is needed")
    ((group_size, symmetric),) = found
    return Layout("compressed-tensors", group_size, True if symmetric is None else symmetric)


def _require_bits(bits: Any) -> None:
    if type(bits) is not int or bits != 4:
        raise InputError(f"bits: got {bits!r}, only 4-bit codes can be held")


def _group_size(size: Any) -> int:
    if type(size) is not int or size not in GROUP_SIZES:
        raise InputError(f"group_size: got {size!r}, expected one of 128, 64, 32 or -1 (the whole row)")
    return size


def _flag(settings: dict[str, Any], key: str) -> bool | None:
    value = settings.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{key}: got {value!r}, expected true or false")
    return value


def _require(settings: dict[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    value = settings.get(key)
    if not any(type(value) is type(one) and value == one for one in allowed):
        wanted = " or ".join(repr(one) for one in allowed if one is not None)
        raise InputError(f"{key}: got {value!r}, expected {wanted}")
