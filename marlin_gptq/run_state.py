"""What all the blocks of one quantization share: the model, the recipe, the plan, and what was found so far."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs
from marlin_gptq.distributed import Team
from marlin_gptq.job import Plan
from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.architecture import require_finite, warn_if_lost
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.output_gradients import OutputGradients
from marlin_gptq.modeling.overflow import within_float16
from marlin_gptq.modeling.packed import Packed
from marlin_gptq.modeling.staged import Staged, advance
from marlin_gptq.report import BlockRecord, LinearRecord, ProgressEvent

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """What every block of one quantization shares.

    stream, config   the model and the recipe; target is the dtype of the result.
    total            linears to quantize, for progress.
    plan, disk       how the run keeps within its memory, and where activations go that wait in a file.
    records, tuned   of the linears and blocks that are done.
    solved           linears that this process has solved and `records` does not have yet.
    full             with correct_target or tuning of blocks the samples after full-precision blocks, else None.
    gradients        with two_sided those of the loss by every block's outputs, else None.
    """

    stream: BlockStream
    config: QuantizationConfig
    target: torch.dtype
    total: int
    progress: Callable[[ProgressEvent], None] | None
    plan: Plan
    disk: Path
    team: Team
    costs: Costs
    records: list[LinearRecord] = field(default_factory=list)
    tuned: list[BlockRecord] = field(default_factory=list)
    solved: int = 0
    full: Activations | None = None
    gradients: OutputGradients | None = None
    _told_unstaged: bool = False

    def report(self, stage: str, block: int, linear: str | None, error: float | None, note: str = "") -> None:
        if self.progress is not None:
            done = min(self.total, len(self.records) + self.solved * self.team.size)
            self.progress(ProgressEvent(stage, block, self.stream.n_blocks, linear, done, self.total, error, note))

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Floats in the dtype of the result; QuantizationError where they overflow it."""
        if not tensor.is_floating_point():
            return tensor
        require_finite(name, tensor, "the checkpoint is damaged")
        cast = tensor.to(self.target)
        if cast.dtype != tensor.dtype:
            require_finite(name, cast, f"they overflow {self.target}; use --dtype bfloat16")
            warn_if_lost(name, tensor, cast)
        return cast

    def within_range(self, index: int) -> AbstractContextManager[None]:
        """Inside, QuantizationError where block `index` gets or gives what a result in float16 cannot hold.

        Needed where it runs in a wider dtype. Not for tuning, whose attempts may go astray and be thrown away.
        """
        if self.target != torch.float16 or self.stream.dtype == self.target:
            return nullcontext()
        return within_float16(self.stream.block_module(index), self.stream.block_name(index))

    def advance_full(self, index: int, samples: Packed | Staged | None) -> None:
        """The full-precision stream, if it is needed there, through block `index`, which must have its own weights."""
        if samples is None or not self.full_goes_on(index):
            return
        with self.costs.measure("full precision"):
            advance(self.stream, index, samples)

    def full_goes_on(self, index: int) -> bool:
        """Whether somebody asks for the full-precision stream behind block `index`."""
        return self.full is not None and (index + 1 < self.stream.n_blocks or self.config.tunes_blocks)

    def tell_unstaged(self, index: int) -> None:
        """Log, once, that block `index` cannot be calibrated in stages."""
        if not self._told_unstaged:
            self._told_unstaged = True
            logger.warning(
                "%s: its linears cannot be calibrated in stages of one forward; with true-sequential calibration the "
                "samples begin at its start again for each of them, which takes longer",
                self.stream.block_name(index),
            )
