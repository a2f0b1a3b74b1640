"""Whether engines can split a model's quantized linears over 1, 2, 4 or 8 GPUs: pure arithmetic on shapes.

Tensor parallelism gives each GPU a slice of the output features of the linears that a block begins with (q, k, v, gate,
up: "column parallel") and of the input features of those that end it (o, down: "row parallel"). vLLM and SGLang run a
slice on their Marlin kernels where N % 64 == 0, K % 128 == 0 and whole groups fall to every GPU; q, k and v, and gate
and up, run as one linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

DEGREES = (1, 2, 4, 8)
TILE_N, TILE_K = 64, 128
ROWS = ("o_proj", "down_proj", "out_proj", "dense", "fc2", "c_proj", "w2", "wo", "dense_4h_to_h")
# Linears that engines run as one, by the name that they give it.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "w13": ("w1", "w3"),
}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")


def split_problems(
    shapes: dict[str, tuple[int, int]], kept: tuple[str, ...], group_size: int, config: Any
) -> dict[int, list[str]]:
    """For each degree of tensor parallelism, one sentence per kind of linear that engines could not split.

    shapes  (out_features, in_features) of the quantized linears by full name; kept those left in 16 bits.
    config  transformers' config, for the numbers of heads.
    """
    problems: dict[int, list[str]] = {}
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for degree in DEGREES:
        found: dict[str, list[str]] = {}
        if heads and heads % degree:
            found[f"{heads} attention heads do not divide by {degree}"] = ["all attention layers"]
        for name, members in _units(shapes).items():
            reason = _problem(members, group_size, degree, kv_heads)
            if reason:
                found.setdefault(reason, []).append(name)
        problems[degree] = [f"{_ranges(names)}: {reason}" for reason, names in found.items()]
    return {degree: found for degree, found in problems.items() if found} | _half_fused(shapes, kept)


def warnings_for(problems: dict[int, list[str]], most: int = 6) -> list[str]:
    """The problems as lines for people; what holds for a degree and all larger ones is said once."""
    lines: list[str] = []
    seen: set[str] = set()
    for degree, found in sorted(problems.items()):
        new = [text for text in found if text not in seen]
        seen.update(found)
        shown = new[:most] + ([f"and {len(new) - most} more"] if len(new) > most else [])
        lines += [f"tensor parallel {degree}: {text}" if degree else text for text in shown]
    return lines


def fused_names(left: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Names that engines give to linears of which every part stays in 16 bits: qkv_proj, gate_up_proj, experts."""
    mixed = _fused_parts(quantized)
    return [name for name in _fused_parts(left) if name not in mixed]


def _fused_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """{name that engines give: those of `names` that are part of it}; linears that run alone are left out."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        fused = next((one for one, group in FUSED.items() if own in group), None)
        expert = _EXPERT.match(name)
        together = expert[1] if expert else fused and f"{parent}.{fused}"
        if together is not None:
            parts.setdefault(together, []).append(name)
    return parts


def _units(shapes: dict[str, tuple[int, int]]) -> dict[str, list[tuple[str, int, int]]]:
    """Linears as engines run them: {name: [(own name, N, K), …]}, q/k/v and gate/up as one."""
    units: dict[str, list[tuple[str, int, int]]] = {}
    for name, (n, k) in shapes.items():
        parent, _, own = name.rpartition(".")
        together = next((group for group in FUSED.values() if own in group), None)
        mates = [mate for mate in together or () if f"{parent}.{mate}" in shapes]
        key = f"{parent}.{'/'.join(mates)}" if len(mates) > 1 else name
        units.setdefault(key, []).append((own, n, k))
    return units


def _problem(members: list[tuple[str, int, int]], group_size: int, degree: int, kv_heads: int | None) -> str | None:
    own, n, k = members[0]
    if own in ROWS:
        if k % degree:
            return f"K = {k} does not divide by {degree}"
        part = k // degree
        if part % TILE_K:
            return f"K = {_share(k, degree)} is no multiple of {TILE_K}"
        if group_size != -1 and part % group_size:
            return f"K = {_share(k, degree)} is no multiple of the group size {group_size}"
        return None if n % TILE_N == 0 else f"N = {n} is no multiple of {TILE_N}"
    total = 0
    for own, n, _ in members:
        # Key and value heads are copied where there are fewer of them than GPUs.
        split = min(degree, kv_heads) if own in ("k_proj", "v_proj") and kv_heads else degree
        if n % split:
            return f"N = {n} does not divide by {split}"
        total += n // split
    if total % TILE_N:
        return f"N = {total} on each of {degree} is no multiple of {TILE_N}"
    return None if k % TILE_K == 0 else f"K = {k} is no multiple of {TILE_K}"


def _half_fused(shapes: dict[str, tuple[int, int]], kept: tuple[str, ...]) -> dict[int, list[str]]:
    """Engines cannot fuse a quantized linear with one that is not; under the key 0, whatever the degree."""
    quantized = _fused_parts(shapes)
    mixed = [name for together, names in _fused_parts(kept).items() if together in quantized for name in names]
    text = (
        "left in 16 bits, but vLLM and SGLang run it as one with its quantized neighbours and cannot load the model; "
        "skip all of them or none"
    )
    return {0: [f"{_ranges(mixed)}: {text}"]} if mixed else {}


def _share(size: int, degree: int) -> str:
    return str(size) if degree == 1 else f"{size} / {degree} = {size // degree}"


def _ranges(names: list[str]) -> str:
    """Names with the numbers of experts, then of blocks, drawn together: model.layers.{0-3,5}.mlp.down_proj."""
    for pattern in (r"(.*\.experts\.)(\d+)(\..*)$", r"(.*?\.)(\d+)(\..*)$"):
        names = _drawn_together(names, pattern)
    return ", ".join(names)


def _drawn_together(names: list[str], pattern: str) -> list[str]:
    kinds: dict[tuple[str, str], list[int]] = {}
    plain = []
    for name in names:
        match = re.match(pattern, name)
        if match:
            kinds.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            plain.append(name)
    return plain + [f"{before}{_span(numbers)}{after}" for (before, after), numbers in kinds.items()]


def _span(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else "{" + text + "}"
