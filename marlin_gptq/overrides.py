"""Per-module settings from a file: which linears get other bits or another group size, or stay as they are.

    # regular expression (searched in the full name of each linear): settings; the first that matches decides
    'layers\\.(0|31)\\.': {bits: 16}
    'down_proj$': {group_size: 64}
    'self_attn\\.o_proj$': {skip: true}

`skip: true` and `bits: 16` mean the same: left in full precision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from marlin_gptq.config import Override, QuantizationConfig
from marlin_gptq.errors import InputError
from marlin_gptq.near_names import near_path
from marlin_gptq.text_files import utf8

SETTINGS = ("bits", "group_size", "skip")


def read_overrides(path: Path) -> tuple[Override, ...]:
    """The overrides of a YAML file, in its order. InputError names what is wrong with it, and where."""
    try:
        content = yaml.load(utf8(path.read_bytes(), str(path)), Loader=_Loader)
    except FileNotFoundError as error:
        meant = near_path(str(path)) or ";"
        raise InputError(f"{path}: no such file{meant} --config takes a YAML file of per-module settings") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path}: got {_kind(content)}, expected a mapping from regular expressions to settings, for instance "
            "'down_proj$': {group_size: 64}"
        )
    return tuple(_override(path, match, settings) for match, settings in content.items())


def require_matches(config: QuantizationConfig, names: Sequence[str], others: Sequence[str]) -> None:
    """InputError for the first override or `skip` that matches nothing: a slip of the pen, surely.

    names   linears of the decoder blocks, by full name; an override must decide about one of them.
    others  what else has a name in the model: `skip` may name it as well, for it stays in full precision anyway.
    """
    for pattern in config.skip:
        if not any(re.search(pattern, name) for name in (*names, *others)):
            example = f"; a linear of this model is called {names[0]}" if names else ""
            raise InputError(f"skip: {pattern!r} matches no linear of the decoder blocks{example}")
    deciding = {config.override(name) for name in names}
    for rule in config.overrides:
        if rule not in deciding:
            example = f"; a linear of this model is called {names[0]}" if names else ""
            raise InputError(
                f"overrides: {rule.match!r} matches no linear of the decoder blocks that an earlier line has not "
                f"taken{example}"
            )


def _override(path: Path, match: Any, settings: Any) -> Override:
    where = f"{path}: {match!r}"
    if not isinstance(match, str):
        raise InputError(f"{where}: got {_kind(match)}, expected a regular expression in quotes")
    if not isinstance(settings, dict) or not settings:
        raise InputError(f"{where}: got {_kind(settings)}, expected settings such as {{group_size: 64}}")
    unknown = [key for key in settings if key not in SETTINGS]
    if unknown:
        raise InputError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(SETTINGS)}")
    skip = settings.get("skip", False)
    if not isinstance(skip, bool):
        raise InputError(f"{where}: skip: got {skip!r}, expected true or false")
    bits = settings.get("bits", 16 if skip else 4)
    if skip and bits == 4:
        raise InputError(f"{where}: bits: got 4 together with skip: true; leave one of the two out")
    try:
        return Override(match, bits, settings.get("group_size"))
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix('overrides: ')}") from error


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return "nothing in it" if value in ({}, []) else f"a {type(value).__name__}"


class _Loader(yaml.SafeLoader):
    """YAML without the silent loss of a key that stands there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.YAMLError(f"a {type(key).__name__} cannot be a key, line {key_node.start_mark.line + 1}")
            if key in seen:
                raise yaml.YAMLError(f"{key!r} stands there twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
