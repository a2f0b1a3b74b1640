"""How much of a device's memory is to be had, and giving back what nobody uses."""

from __future__ import annotations

import gc

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still take of a GPU's memory.

    torch keeps what was freed for its next tensors: after work that took most of a GPU the driver calls nearly all of
    it used, though nothing is in it.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def give_back(device: torch.device) -> None:
    """Let go of what no name holds any more, cycles too, and return the memory of a GPU to its driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
