"""Time GPTQ's inner loops, plain torch against fused GPU kernels, on the linears of one block.

    python scripts/bench_gptq.py                    # needs an NVIDIA GPU and Triton
    python scripts/bench_gptq.py --group-size 64 --dtype bfloat16 --repeats 5
    python scripts/bench_gptq.py --sweeps 2 --block small-llama    # the refinement after the pass instead of the pass

Each row: milliseconds of `gptq_quantize`, or of so many sweeps of `refine` over one result of it (best of the repeats,
after one that warms up), memory at the peak above what stood before, the share of scales and codes that are equal, and
the loss tr((W − Q)·H·(W − Q)ᵀ) of the fused result over that of plain torch. Weights are random, Hessians those of
correlated random inputs; linears that share an input are one stacked weight, as in a run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from marlin_gptq.quantization.gptq import gptq_quantize
from marlin_gptq.quantization.hessian import damp, factor
from marlin_gptq.quantization.loops import inner_loops, set_fused
from marlin_gptq.quantization.refine import refine
from marlin_gptq.quantization.weight import QuantizedWeight

# (rows, columns) of a block's linears, those of one input stacked.
BLOCKS = {
    "llama-2-7b": {"q, k, v": (12288, 4096), "o": (4096, 4096), "gate, up": (22016, 4096), "down": (4096, 11008)},
    "small-llama": {"q, k, v": (1024, 512), "o": (512, 512), "gate, up": (3072, 512), "down": (512, 1536)},
}


class Timed(NamedTuple):
    """A result, its seconds, and the bytes it took at its peak."""

    result: QuantizedWeight
    seconds: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-size", type=int, default=128, choices=[128, 64, 32, -1])
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"], help="of the scales")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--block", default="llama-2-7b", choices=list(BLOCKS), help="whose shapes")
    parser.add_argument("--sweeps", type=int, default=0, help="of the refinement to time; 0 times the pass")
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), torch.device("cuda")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, group size {options.group_size}, {options.dtype}, "
        f"{options.block}, {f'{options.sweeps} sweeps of refinement' if options.sweeps else 'the pass'}"
    )
    print(
        "| linear | rows x columns | torch, ms | fused, ms | x | peak, torch, MB | fused, MB | scales | codes | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (rows, features) in BLOCKS[options.block].items():
        generator = torch.Generator(device).manual_seed(features)
        hessian = random_hessian(features, generator)
        upper, damped = factor(hessian, 0.1).upper, damp(hessian, 0.1)
        weight = torch.randn(rows, features, generator=generator, device=device) / features**0.5
        settings = {"group_size": options.group_size, "scale_dtype": dtype}
        loops = inner_loops(device, options.group_size if options.group_size > 0 else features, 128, dtype)
        if loops.name == "torch":
            raise SystemExit("the fused loops do not run here: they need an NVIDIA GPU (8.0 or newer) and Triton")
        work = partial(gptq_quantize, weight, upper, **settings)
        if options.sweeps:
            work = partial(refine, weight, work(), damped, sweeps=options.sweeps)
        timed = {}
        for fused in (False, True):
            set_fused(fused)
            timed[fused] = measured(work, options.repeats)
        plain, found = timed[False], timed[True]
        scales, codes = (
            float((getattr(plain.result, part) == getattr(found.result, part)).float().mean())
            for part in ("scales", "codes")
        )
        ratio = loss(weight, found.result, damped) / loss(weight, plain.result, damped)
        print(
            f"| {name} | {rows} x {features} | {plain.seconds * 1e3:.1f} | {found.seconds * 1e3:.1f} "
            f"| {plain.seconds / found.seconds:.1f} | {plain.peak / 1e6:.0f} | {found.peak / 1e6:.0f} "
            f"| {scales:.4%} | {codes:.4%} | {ratio:.6f} |",
            flush=True,
        )


def random_hessian(features: int, generator: torch.Generator) -> Tensor:
    """Of correlated inputs of uneven size, float32 [features, features]."""
    device = generator.device
    mixing = torch.randn(features, features, generator=generator, device=device) / features**0.5
    spread = torch.randn(features, generator=generator, device=device).exp()
    inputs = torch.randn(2 * features, features, generator=generator, device=device) * spread
    inputs = inputs + inputs @ mixing
    return 2 * inputs.t() @ inputs / len(inputs)


def measured(work: Callable[[], QuantizedWeight], repeats: int) -> Timed:
    result = work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, best = torch.cuda.memory_allocated(), float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return Timed(result, best, torch.cuda.max_memory_allocated() - before)


def loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    difference = weight - quantized.dequantize()
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


if __name__ == "__main__":
    main()
