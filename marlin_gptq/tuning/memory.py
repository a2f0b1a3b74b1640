"""Whether a model's tuning fits the device, and how a step is cut up so that it does. Pure functions of sizes."""

from __future__ import annotations

from dataclasses import dataclass

from marlin_gptq.errors import QuantizationError

# Bytes a weight takes while its code may move: position, its gradient and Adam's two moments in float32.
_MOVING, _FIXED = 16, 1
# Of a scale: start, shift, gradient, two moments.
_SCALE = 20
# Tables of logits and workspaces of libraries.
_CONSTANT = 3 << 30
# Of the free memory, as allocators leave gaps.
SHARE = 0.9


@dataclass(frozen=True)
class Sizes:
    """A model as tuning sees it: elements of its quantized linears, of all else, and the shape of its blocks."""

    weights: int
    others: int
    group_size: int
    blocks: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True)
class Plan:
    """How a step runs: `micro_batch` windows at a time, with or without computing activations a second time."""

    micro_batch: int
    checkpointing: bool
    bytes: int


def fixed_bytes(sizes: Sizes, tune_codes: bool) -> int:
    """What stays from step to step."""
    per_weight = _MOVING if tune_codes else _FIXED
    groups = sizes.weights // (sizes.group_size if sizes.group_size > 0 else sizes.hidden_size)
    return sizes.weights * per_weight + groups * _SCALE + sizes.others * 4


def activation_bytes(sizes: Sizes, tokens: int, checkpointing: bool) -> int:
    """What the backward pass keeps of `tokens` tokens: about 12 hidden and 4 intermediate vectors a block in float32,
    or, with checkpointing, the input of every block and one block's worth. The dequantized weights in bfloat16 too."""
    block = (12 * sizes.hidden_size + 4 * sizes.intermediate_size) * 4
    if checkpointing:
        return tokens * (sizes.blocks * sizes.hidden_size * 4 + block) + 6 * sizes.weights // max(1, sizes.blocks)
    return tokens * sizes.blocks * block + 2 * sizes.weights


def needed_bytes(sizes: Sizes, *, batch: int, length: int, tune_codes: bool) -> tuple[int, int]:
    """(least, most) that tuning takes on the device: one window at a time with activations computed again, and whole
    batches with all activations kept."""
    fixed = fixed_bytes(sizes, tune_codes) + _CONSTANT
    return (
        fixed + activation_bytes(sizes, length, checkpointing=True),
        fixed + activation_bytes(sizes, batch * length, checkpointing=False),
    )


def plan(sizes: Sizes, *, batch: int, length: int, tune_codes: bool, free: int) -> Plan:
    """The largest micro-batch that fits `free` bytes, activations kept if possible. QuantizationError if none does."""
    fixed = fixed_bytes(sizes, tune_codes) + _CONSTANT
    micro = batch
    while micro >= 1:
        for checkpointing in (False, True):
            needed = fixed + activation_bytes(sizes, micro * length, checkpointing)
            if needed <= SHARE * free:
                return Plan(micro, checkpointing, needed)
        micro //= 2
    raise QuantizationError(
        f"tuning end to end needs about {needed / 1e9:.1f} GB on the device and {free / 1e9:.1f} GB are free; use "
        + ("--no-tune-codes (scales and norm weights only) or " if tune_codes else "")
        + "--tune-steps 0"
    )
