#!/usr/bin/env python3
"""Time gemm_blocked, the kernel for the run-time layout of Hopper GPUs, beside torch's own matrix product.

As scripts/bench_kernel.py does: replayed CUDA graphs of calls whose weights have left the L2 cache, medians, by turns
with torch's dense product (cuBLAS) of the same shape; "chain" lets each call read its weights early.

    python scripts/bench_blocked.py --m 32,64,128,256,512,1024,2048,4096 --csv blocked.csv     the 11 layers
    python scripts/bench_blocked.py --sweep --csv sweep.csv                                  M = 1 to 4096, four layers
    python scripts/bench_blocked.py --equal-runs 60      every layer and M again and again: does any bit change?
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch
from bench_kernel import COLD_BYTES, LAYERS, time_by_turns
from torch import Tensor

from marlin_gptq.kernel import blocked, gemm_blocked, library, why_not_blocked
from marlin_gptq.kernel.reference import dequantize

SWEEP_LAYERS = [(4096, 4096), (4096, 22016), (11008, 4096), (8192, 57344)]
SWEEP_M = [1, 2, 4, 8, 16, 17, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
PRINTED = [
    "k",
    "n",
    "m",
    "microseconds",
    "teraflops",
    "torch_microseconds",
    "times_torch",
    "chain_times_torch",
    "error",
]


def main() -> int:
    options = parse_options()
    reason = why_not_blocked(0) if torch.cuda.is_available() else "torch sees no GPU."
    if reason:
        print(f"bench_blocked: {reason}", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}, groups of {options.group_size}")
    if options.equal_runs:
        return equal_runs(options)
    print(" ".join(f"{name:>18}" for name in PRINTED), "tile")
    rows = []
    for k, n in options.layer or (SWEEP_LAYERS if options.sweep else LAYERS):
        for row in bench_layer(k, n, options):
            rows.append(row)
            print(" ".join(f"{row[name]:18.4g}" for name in PRINTED), row["tile"], flush=True)
    for m in options.m:
        of_m = [row for row in rows if row["m"] == m]
        alone, chain = ([float(row[name]) for row in of_m] for name in ("times_torch", "chain_times_torch"))
        means = f"{statistics.geometric_mean(alone):.3f}, in a chain {statistics.geometric_mean(chain):.3f}"
        print(f"geometric mean over {len(of_m)} layers, M = {m}: x torch {means}; smallest {min(alone):.2f}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--m", type=numbers, help="tokens, e.g. 32,256")
    parser.add_argument("--layer", type=lambda text: tuple(numbers(text)), action="append", metavar="K,N")
    parser.add_argument("--sweep", action="store_true", help="many M on four layers")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--replays", type=int, default=12)
    parser.add_argument("--equal-runs", type=int, metavar="RUNS", help="compare the bits of so many runs; no timing")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    options.m = options.m or (SWEEP_M if options.sweep else [32, 64, 128, 256, 512, 1024, 2048, 4096])
    return options


class Weight:
    """One random weight in blocks."""

    def __init__(self, k: int, n: int, options: argparse.Namespace) -> None:
        dtype, self.group_size = getattr(torch, options.dtype), options.group_size
        groups = 1 if self.group_size in (-1, k) else k // self.group_size
        self.n, self.asymmetric = n, options.asymmetric
        self.qweight = torch.randint(-(2**31), 2**31, (k // 16, 2 * n), device="cuda").int()
        self.stored = ((torch.rand(groups, n, device="cuda") + 0.5) / 64).to(dtype)
        shape = (groups, n // 8)
        self.zeros = torch.randint(-(2**31), 2**31, shape, device="cuda").int() if options.asymmetric else None
        self.blocks = blocked.to_blocks(self.qweight, self.stored, self.zeros, self.group_size)
        self.scales = blocked.natural_scales(self.stored) if groups == 1 else None

    def multiply(self, a: Tensor) -> Tensor:
        settings = {"n": self.n, "group_size": self.group_size, "asymmetric": self.asymmetric}
        return gemm_blocked(a, self.blocks, self.scales, None, **settings)

    def error(self, a: Tensor) -> float:
        """Relative, against float64 of the dequantized weight, over 16 rows."""
        dense = dequantize(self.qweight, self.stored, self.group_size, self.zeros).double()
        expected = a[:16].double() @ dense.t()
        return float((self.multiply(a)[:16].double() - expected).norm() / expected.norm())


def bench_layer(k: int, n: int, options: argparse.Namespace) -> list[dict[str, float | str]]:
    dtype = getattr(torch, options.dtype)
    packed_sets = -(-COLD_BYTES // (k * n // 2)) + 1
    dense_sets = -(-COLD_BYTES // (2 * k * n)) + 1
    weights = [Weight(k, n, options) for _ in range(packed_sets)]
    dense = [(torch.randn(n, k, device="cuda") / 16).to(dtype) for _ in range(dense_sets)]
    rows: list[dict[str, float | str]] = []
    for m in options.m:
        sets = min(max(packed_sets, dense_sets), max(2, 2**28 // (2 * m * k)))
        inputs = [torch.randn(m, k, device="cuda").to(dtype) for _ in range(sets)]

        def run_kernel(i: int, inputs: list[Tensor] = inputs) -> Tensor:
            return weights[i % packed_sets].multiply(inputs[i % len(inputs)])

        def run_torch(i: int, inputs: list[Tensor] = inputs) -> Tensor:
            return inputs[i % len(inputs)] @ dense[i % dense_sets].t()

        candidates = [(run_kernel, packed_sets, False), (run_kernel, packed_sets, True), (run_torch, dense_sets, False)]
        replays = options.replays if m <= 512 else max(5, options.replays // 2)
        ours, chain, theirs = time_by_turns(candidates, replays, 0.0)
        sms = torch.cuda.get_device_properties().multi_processor_count
        plan = library.plan_blocked(m, n, k, options.group_size, asymmetric=options.asymmetric, sms=sms)
        rows.append(
            {
                "k": k,
                "n": n,
                "m": m,
                "microseconds": ours,
                "teraflops": 2 * m * n * k / ours / 1e6,
                "torch_microseconds": theirs,
                "times_torch": theirs / ours,
                "chain_microseconds": chain,
                "chain_times_torch": theirs / chain,
                "error": weights[0].error(inputs[0]) if k * n < 10**8 or m == options.m[0] else float("nan"),
                "tile": f"{plan['tile_m']}x{plan['tile_n']} split {plan['split_tiles']}/{plan['split_blocks']}",
            }
        )
    return rows


def equal_runs(options: argparse.Namespace) -> int:
    """Exit code 1 if any of the runs differs from the first in any bit."""
    dtype, different = getattr(torch, options.dtype), 0
    for k, n in options.layer or LAYERS:
        weight = Weight(k, n, options)
        for m in options.m:
            a = torch.randn(m, k, device="cuda").to(dtype)
            first = weight.multiply(a)
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(options.equal_runs):
                wrong += (weight.multiply(a) != first).sum()
            different += int(wrong)
            if wrong:
                print(f"K = {k}, N = {n}, M = {m}: {int(wrong)} outputs differ in {options.equal_runs} runs")
    cases = len(options.layer or LAYERS) * len(options.m)
    print(f"{cases} cases, {options.equal_runs} runs each: {different} outputs differ from the first run")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
