"""One training step, called from Python or, on a GPU, recorded once and replayed.

A step of a small model is thousands of short kernels: launching them one by one takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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

    All inputs must have the shapes of the first.
    """

    WARM = 1

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self.direct = Direct(step, optimizer)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, ids: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.WARM:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = self.direct(ids, target)
            torch.cuda.current_stream().wait_stream(side)
            return loss
        if self.graph is None:
            self.ids, self.target = ids.clone(), target.clone()
            self.direct.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.loss = self.direct.step(self.ids, self.target)
            self.graph = graph
        self.ids.copy_(ids)
        self.target.copy_(target)
        self.graph.replay()
        return self.loss
