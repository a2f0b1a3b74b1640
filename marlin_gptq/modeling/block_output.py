"""What decoder blocks return: hidden states alone, or as the first of a tuple, a list or a ModelOutput."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Stands where a block returns something beside hidden states.
NOT_THERE = object()


def hidden_of(output: Any) -> Tensor:
    """The hidden states [B, T, hidden_size] in what a block returned."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor), type(hidden)
    return hidden


def output_like(example: Any, hidden: Tensor) -> Any:
    """`hidden` as a block returns it that returned `example`; beside it stands NOT_THERE, or nothing."""
    if isinstance(example, dict):  # a ModelOutput
        return type(example)(**{next(iter(example)): hidden})
    if hasattr(example, "_fields"):  # a named tuple
        return type(example)(hidden, *[NOT_THERE] * (len(example) - 1))
    if isinstance(example, tuple | list):
        return type(example)([hidden, *[NOT_THERE] * (len(example) - 1)])
    return hidden
