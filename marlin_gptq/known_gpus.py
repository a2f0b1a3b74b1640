"""GPUs that are known by name, for estimates alone: a run asks the GPU that is there."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """title as people say; memory in bytes; products: multiplications a second of a large 16-bit matrix product."""

    title: str
    memory: int
    products: float


# Share of the data sheet's rate that a run reaches: with it a 7B on an H200 is estimated at 26 and 49 s where 27 and 47
# were measured (docs/benchmarks.md), loading and saving aside. Of other GPUs none was measured.
_REACHED = 0.6


def _gpu(title: str, gigabytes: int, teraflops: float) -> Gpu:
    """From a data sheet: GB, and TFLOPS of dense 16-bit products summed in 32 bits, two to a multiplication."""
    return Gpu(title, gigabytes * 10**9, _REACHED * teraflops * 1e12 / 2)


# NVIDIA's data sheets and architecture white papers (of GeForce and RTX cards the tables of peak rates at boost clocks:
# GA102, Ada, Blackwell), figures without sparsity; SXM modules where there are several kinds.
KNOWN = {
    "b200": _gpu("B200", 180, 2250),
    "h200": _gpu("H200", 141, 989),
    "h100": _gpu("H100 80GB", 80, 989),
    "a100-80": _gpu("A100 80GB", 80, 312),
    "a100-40": _gpu("A100 40GB", 40, 312),
    "l40s": _gpu("L40S", 48, 362),
    "a6000": _gpu("RTX A6000", 48, 155),
    "a10": _gpu("A10", 24, 125),
    "l4": _gpu("L4", 24, 121),
    "5090": _gpu("RTX 5090", 32, 210),
    "4090": _gpu("RTX 4090", 24, 165),
    "3090": _gpu("RTX 3090", 24, 71),
}
# What estimates are for where no GPU is there and none is named: most of this project's figures come from it.
USUAL = "h200"


def named(device_name: str) -> Gpu | None:
    """The GPU that a driver calls `device_name` ("NVIDIA A100-SXM4-80GB"), if it is known."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if words & {"ti", "super", "laptop", "d"}:  # other cards of nearly that name
        return None
    for gpu in KNOWN.values():
        if set(gpu.title.lower().split()) <= words:
            return gpu
    return None
