"""One training step, called from Python or, on a GPU, recorded once and replayed.

A step of a small model is thousands of short kernels: launching them one by one takes longer than running them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor], Tensor]


class Direct:
    """The step as it is."""

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self.step, self.optimizer = step, optimizer

    def __call__(self, ids: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return self.step(ids, target)


class Replayed:
    """The step as a CUDA graph, after a direct one that makes the optimizer's state and warms the libraries up.

    All inputs must have the shapes of the first. With `fall_back` a step that cannot be recorded, because it waits for
    the device or lacks the memory, is called directly from then on.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, *, fall_back: bool = False) -> None:
        self.direct = Direct(step, optimizer)
        self.fall_back = fall_back
        self.calls, self.recorded_after = 0, 1
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, ids: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.recorded_after:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = self.direct(ids, target)
            torch.cuda.current_stream().wait_stream(side)
            return loss
        if self.graph is None:
            try:
                self.graph = self._record(ids, target)
            except RuntimeError as error:  # recording runs nothing, so nothing has moved yet
                if not self.fall_back:
                    raise
                logger.info("a step is not recorded: %s", " ".join(str(error).split()))
                self.recorded_after = sys.maxsize
                return self.direct(ids, target)
        self.ids.copy_(ids)
        self.target.copy_(target)
        self.graph.replay()
        return self.loss

    def _record(self, ids: Tensor, target: Tensor) -> torch.cuda.CUDAGraph:
        self.ids, self.target = ids.clone(), target.clone()
        self.direct.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()  # while recording, memory that is merely kept cannot be had
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.direct.step(self.ids, self.target)
        return graph
