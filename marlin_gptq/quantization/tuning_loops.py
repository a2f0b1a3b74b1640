"""Which functions the tuning runs at every step, decided here: fused GPU kernels or plain torch.

Where and after what trial is as for GPTQ's inner loops (`loops.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from marlin_gptq.quantization import fused_tuning, tuning_steps
from marlin_gptq.quantization.loops import may_be_fused, reason_of

logger = logging.getLogger(__name__)


class TuningLoops(NamedTuple):
    """The functions, as `tuning_steps.py` describes them."""

    moved_weight: Callable[[Tensor, Tensor, Tensor, torch.dtype, torch.dtype], Tensor]
    moved_gradients: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
    differences: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


PLAIN = TuningLoops(tuning_steps.moved_weight, tuning_steps.moved_gradients, tuning_steps.differences)
FUSED = TuningLoops(fused_tuning.moved_weight, fused_tuning.moved_gradients, fused_tuning.differences)

_works: dict[torch.device, bool] = {}


def tuning_loops(device: torch.device) -> TuningLoops:
    """For tensors on `device`."""
    if not may_be_fused(device):
        return PLAIN
    if device not in _works:
        reason = _trial(device)
        _works[device] = reason is None
        if reason is not None:
            logger.warning("tuning's steps run in plain torch, which is slower: the fused ones %s", reason)
    return FUSED if _works[device] else PLAIN


def _trial(device: torch.device) -> str | None:
    """What speaks against the fused functions, from a small problem solved by them and by plain torch."""
    generator = torch.Generator().manual_seed(0)
    position, gradient = (4 * torch.randn(16, 128, generator=generator).to(device) for _ in range(2))
    shift, start = (0.1 * torch.randn(16, 2, generator=generator).to(device) for _ in range(2))
    logits = 3 * torch.randn(2, 8, 5000, generator=generator).to(device)
    try:
        with torch.autocast(device.type, enabled=False):  # which would round what plain torch adds up
            found, expected = (
                [
                    loops.moved_weight(position, shift, start, torch.float16, torch.bfloat16),
                    *loops.moved_gradients(gradient.bfloat16(), position, shift, start, torch.float16),
                    *loops.differences(logits[0].clone(), logits[1].clone()),
                ]
                for loops in (FUSED, PLAIN)
            )
        pairs = zip(found, expected, strict=True)
        far = max(float((one - other).float().norm() / other.float().norm()) for one, other in pairs)
    except Exception as error:  # whatever Triton, its compiler or the file system raise
        return reason_of(error)
    return None if far < 1e-3 else f"disagree with it on this GPU (relative difference {far:.1e})"
