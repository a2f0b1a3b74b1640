"""Activations beyond float16's range, noticed where they are computed in float32.

On a GPU blocks run in the dtype of the result, and such a value shows as Inf or NaN in what comes behind it. On a CPU
they run in float32, which holds it, so that nothing would be noticed before the result runs somewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.errors import QuantizationError

LARGEST = torch.finfo(torch.float16).max


@contextmanager
def within_float16(block: nn.Module, prefix: str) -> Iterator[None]:
    """Inside, QuantizationError where a linear of the block, or the block, gets or gives what float16 cannot hold."""
    with ExitStack() as entered:
        for name, module in block.named_modules():
            if not name or isinstance(module, nn.Linear):
                full = f"{prefix}.{name}" if name else prefix
                # Inputs before other hooks, which may end the forward.
                before = module.register_forward_pre_hook(
                    lambda _, args, full=full: _require(full, "gets", args), prepend=True
                )
                behind = module.register_forward_hook(lambda _, args, out, full=full: _require(full, "gives", out))
                entered.callback(before.remove)
                entered.callback(behind.remove)
        yield


def _require(name: str, does: str, values: Any) -> None:
    first = values[0] if isinstance(values, tuple) and values else values
    if not isinstance(first, Tensor) or not first.is_floating_point() or not first.numel():
        return
    lowest, highest = torch.aminmax(first.detach())
    largest = max(-float(lowest), float(highest))
    if largest > LARGEST:
        raise QuantizationError(
            f"{name}: {does} activations of up to {largest:.3g}, beyond the {LARGEST:.0f} of float16: the result would "
            "give NaN; use --dtype bfloat16"
        )
