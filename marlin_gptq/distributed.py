"""Several processes, one run: each takes some of the calibration samples, and solves some of the linears.

Every process holds the block that is quantized and its own samples' activations. Hessians are summed over all
processes, so each has the same; a group of linears is solved by one process, which sends the others codes and scales;
the first process alone writes. All take the same decisions: what could differ between them is decided by the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from marlin_gptq.quantization.hessian import Cross, Hessian

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of a run, and which this is. A team of one needs no torch, and sends nothing.

    With more, the default process group must have been made: gloo for the CPU, nccl for GPUs.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    def mine(self, items: list[T], costs: list[float]) -> list[T]:
        """This process's share of items whose costs are known to all."""
        owners = share_out(costs, self.size)
        return [item for item, owner in zip(items, owners, strict=True) if owner == self.rank]

    def add_up(self, hessians: Iterable[Hessian | Cross]) -> None:
        """Sum Hessians, or what goes with them, their tokens and their weights over all processes, in place."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        for hessian in hessians:
            dist.all_reduce(hessian.sum)
            counts = torch.tensor([hessian.tokens, hessian.total], dtype=torch.float64, device=hessian.sum.device)
            dist.all_reduce(counts)
            tokens, hessian.total = counts.tolist()
            hessian.tokens = int(tokens)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its sum over all processes, in place."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)

    def from_leader(self, thing: T) -> T:
        """What the first process has; anything that pickle takes."""
        return self.object_from(0, thing)

    def object_from(self, owner: int, thing: T) -> T:
        """What process `owner` has; what the others give is ignored."""
        if self.size == 1:
            return thing
        import torch.distributed as dist

        parcel: list[Any] = [thing]
        dist.broadcast_object_list(parcel, src=owner)
        return parcel[0]

    def tensor_from(self, owner: int, tensor: Tensor) -> Tensor:
        """The tensor of process `owner`; the others give one of its shape and dtype, which is overwritten."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            tensor = tensor.contiguous()
            dist.broadcast(tensor.view(torch.uint8), src=owner)  # bytes: any dtype, whatever the backend knows
        return tensor

    def digest(self, own: str) -> str:
        """One digest of the processes' own, the same in each."""
        if self.size == 1:
            return own
        import torch.distributed as dist

        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, own)
        return hashlib.sha256("\n".join(every).encode()).hexdigest()


def share_out(costs: list[float], size: int) -> list[int]:
    """The owner of each item: the dearest first, each to the process with the least so far (of equals the first).

    The longest-processing-time rule, at most 4/3 of the best (Graham, "Bounds on multiprocessing timing anomalies",
    1969).
    """
    owners = [0] * len(costs)
    loads = [0.0] * size
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[item] = min(range(size), key=loads.__getitem__)
        loads[owners[item]] += costs[item]
    return owners
