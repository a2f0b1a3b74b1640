"""Time GPTQ's inner loops, plain torch against fused GPU kernels, on the linears of one Llama-2-7B block.

    python scripts/bench_gptq.py                    # needs an NVIDIA GPU and Triton
    python scripts/bench_gptq.py --group-size 64 --dtype bfloat16 --repeats 5

Each row: milliseconds of `gptq_quantize` (best of the repeats, after one that warms up), memory at the peak above what
stood before, the share of scales and codes that are equal, and the loss tr((W − Q)·H·(W − Q)ᵀ) of the fused result over
that of plain torch. Weights are random, Hessians those of correlated random inputs; linears that share an input are
one stacked weight, as in a run.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
from torch import Tensor

from marlin_gptq.quantization.gptq import gptq_quantize
from marlin_gptq.quantization.hessian import damp, factor
from marlin_gptq.quantization.loops import inner_loops, set_fused
from marlin_gptq.quantization.weight import QuantizedWeight

SHAPES = {"q, k, v": (12288, 4096), "o": (4096, 4096), "gate, up": (22016, 4096), "down": (4096, 11008)}


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
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), torch.device("cuda")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, group size {options.group_size}, {options.dtype}"
    )
    print(
        "| linear | rows x columns | torch, ms | fused, ms | x | peak, torch, MB | fused, MB | scales | codes | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (rows, features) in SHAPES.items():
        generator = torch.Generator(device).manual_seed(features)
        hessian = random_hessian(features, generator)
        upper, damped = factor(hessian, 0.1).upper, damp(hessian, 0.1)
        weight = torch.randn(rows, features, generator=generator, device=device) / features**0.5
        settings = {"group_size": options.group_size, "scale_dtype": dtype}
        loops = inner_loops(device, options.group_size if options.group_size > 0 else features, 128, dtype)
        if loops.name == "torch":
            raise SystemExit("the fused loops do not run here: they need an NVIDIA GPU (8.0 or newer) and Triton")
        timed = {}
        for fused in (False, True):
            set_fused(fused)
            timed[fused] = measured(weight, upper, settings, options.repeats)
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


def measured(weight: Tensor, upper: Tensor, settings: dict, repeats: int) -> Timed:
    result = gptq_quantize(weight, upper, **settings)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, best = torch.cuda.memory_allocated(), float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        gptq_quantize(weight, upper, **settings)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return Timed(result, best, torch.cuda.max_memory_allocated() - before)


def loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    difference = weight - quantized.dequantize()
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


if __name__ == "__main__":
    main()
