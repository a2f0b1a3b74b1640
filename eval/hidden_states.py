"""The decoder blocks of a model over many windows: what its head sees, every block loaded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from marlin_gptq.device_memory import free_bytes
from marlin_gptq.errors import QuantizationError
from marlin_gptq.modeling.blocks import BlockStream

Progress = Callable[[int, int], None]


class HiddenStates:
    """Hidden states of all batches, on the device or in page-locked host memory (pageable copies crawl)."""

    def __init__(self, stream: BlockStream, tokens: int, memory_share: float) -> None:
        self.device = stream.device
        self.batches: list[Tensor] = []
        self.on_device = True
        if self.device.type == "cuda":
            size = tokens * stream.config.hidden_size * stream.dtype.itemsize
            self.on_device = size <= memory_share * free_bytes(self.device)

    def append(self, hidden: Tensor) -> None:
        if self.on_device:
            self.batches.append(hidden)
        else:
            self.batches.append(torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(hidden))

    def get(self, position: int) -> Tensor:
        """Batch `position` on the device: [B, T, hidden_size]."""
        return self.batches[position].to(self.device, non_blocking=True)

    def put(self, position: int, hidden: Tensor) -> None:
        if self.on_device:
            self.batches[position] = hidden
        else:
            self.batches[position].copy_(hidden)


class Steps:
    """Counts towards `total` and tells `progress`, if there is one."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


@torch.no_grad()
def last_hidden(stream: BlockStream, batches: list[Tensor], memory_share: float, steps: Steps) -> HiddenStates:
    """Token ids int64 [B, T] through embedding and all blocks; len(batches) * (n_blocks + 1) steps.

    The states of all batches stay on the device if they fit into `memory_share` of its free memory. Raises
    QuantizationError naming the first block whose output is not finite.
    """
    hidden = HiddenStates(stream, sum(batch.numel() for batch in batches), memory_share)
    for batch in batches:
        hidden.append(stream.embed(batch.to(stream.device)))
        steps.step()
    for index in range(stream.n_blocks):
        finite = torch.ones((), dtype=torch.bool, device=stream.device)
        with stream.block(index):
            for position in range(len(batches)):
                output = stream.run(index, hidden.get(position))
                finite &= torch.isfinite(output).all()
                hidden.put(position, output)
                steps.step()
        if not finite:
            raise not_finite(f"decoder block {index}: its output holds", stream.dtype)
    return hidden


def not_finite(what: str, dtype: torch.dtype) -> QuantizationError:
    """The error for NaN or Inf in a forward pass, with the ways out."""
    name = str(dtype).removeprefix("torch.")
    return QuantizationError(
        f"{what} NaN or Inf computed in {name}; try --dtype bfloat16 or float32, and check the checkpoint"
    )
