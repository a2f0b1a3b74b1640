#!/usr/bin/env python3
"""Time the 4-bit kernel on the linear layers of Llama models, beside torch's own matrix product.

Every row is a replayed CUDA graph of calls on weights that have left the L2 cache (several copies take
turns, at least 180 MB of them): microseconds a call (median), GB/s of the bytes a call must move (codes,
scales, activations, output), TFLOP/s, and the speed against torch's dense product (cuBLAS) on the same shape,
timed likewise, by turns.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from marlin_gptq.kernel import gemm, library

# (in_features, out_features): fused qkv, attention output, fused gate and up, and down, of 7B to 70B models.
LAYERS = [
    (4096, 12288),
    (4096, 4096),
    (4096, 22016),
    (11008, 4096),
    (4096, 6144),
    (4096, 28672),
    (14336, 4096),
    (8192, 10240),
    (8192, 8192),
    (8192, 57344),
    (28672, 8192),
]
COLD_BYTES = 180 * 2**20  # three times the largest L2 cache


def main() -> int:
    options = parse_options()
    if not torch.cuda.is_available():
        print("bench_kernel: needs an NVIDIA GPU; torch sees none", file=sys.stderr)
        return 2
    status = library.status()
    if not status.available:
        print(f"bench_kernel: needs the compiled kernel. {status.reason} {status.hint}", file=sys.stderr)
        return 2
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "group_size": options.group_size,
        "rows": [],
    }
    print(f"{report['device']}, torch {torch.__version__}, {options.dtype}, groups of {options.group_size}")
    print("|    K |     N |    M |      µs |  GB/s | TFLOP/s | x torch | torch µs | relative error |")
    print("|-----:|------:|-----:|--------:|------:|--------:|--------:|---------:|---------------:|")
    for k, n in options.layer or LAYERS:
        for row in bench_layer(k, n, options):
            report["rows"].append(row)
            print(
                f"| {k:5d} | {n:5d} | {row['m']:4d} | {row['microseconds']:7.1f} "
                f"| {row['gigabytes_per_second']:5.0f} "
                f"| {row['teraflops']:7.1f} | {row['times_torch']:7.2f} | {row['torch_microseconds']:8.1f} "
                f"| {row['relative_error']:14.1e} |",
                flush=True,
            )
    for m in options.m:
        ratios = [row["times_torch"] for row in report["rows"] if row["m"] == m]
        mean = statistics.geometric_mean(ratios)
        print(f"geometric mean over {len(ratios)} layers, M = {m}: x torch {mean:.2f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, report["rows"][0])
            writer.writeheader()
            writer.writerows(report["rows"])
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--m", type=numbers, default=[1, 16, 64, 256, 1024], help="tokens, e.g. 1,16,64")
    parser.add_argument("--layer", type=lambda text: tuple(numbers(text)), action="append", metavar="K,N")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def bench_layer(k: int, n: int, options: argparse.Namespace) -> list[dict[str, float]]:
    dtype, group_size = getattr(torch, options.dtype), options.group_size
    groups = 1 if group_size in (-1, k) else k // group_size
    packed_bytes = k * n // 2 + groups * n * 2
    packed_sets = -(-COLD_BYTES // packed_bytes) + 1
    dense_sets = -(-COLD_BYTES // (2 * k * n)) + 1
    packed = [
        (
            torch.randint(-(2**31), 2**31, (k // 16, 2 * n), device="cuda").int(),
            ((torch.rand(groups, n, device="cuda") + 0.5) / 64).to(dtype),
        )
        for _ in range(packed_sets)
    ]
    dense = [(torch.randn(n, k, device="cuda") / 16).to(dtype) for _ in range(dense_sets)]

    rows: list[dict[str, float]] = []
    for m in options.m:
        inputs = [torch.randn(m, k, device="cuda").to(dtype) for _ in range(max(packed_sets, dense_sets))]

        def run_kernel(i: int, inputs: list[Tensor] = inputs) -> Tensor:
            return gemm(inputs[i % len(inputs)], *packed[i % packed_sets], None, group_size)

        def run_torch(i: int, inputs: list[Tensor] = inputs) -> Tensor:
            return inputs[i % len(inputs)] @ dense[i % dense_sets].t()

        ours, theirs = time_by_turns([(run_kernel, packed_sets), (run_torch, dense_sets)], options.replays)
        moved = packed_bytes + 2 * m * (k + n)
        rows.append(
            {
                "k": k,
                "n": n,
                "m": m,
                "microseconds": ours,
                "gigabytes_per_second": moved / ours / 1e3,
                "teraflops": 2 * m * n * k / ours / 1e6,
                "times_torch": theirs / ours,
                "torch_microseconds": theirs,
                "relative_error": relative_error(inputs[0], *packed[0], group_size),
            }
        )
    return rows


def time_by_turns(candidates: list[tuple[Callable[[int], Tensor], int]], replays: int) -> list[float]:
    """Median microseconds of one call of each candidate; `sets` calls in turn use different memory."""
    graphs: list[tuple[torch.cuda.CUDAGraph, int, list[float]]] = []
    for run, sets in candidates:
        calls = sets * max(1, 12 // sets)
        for i in range(sets):
            run(i)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                run(i)
        graph.replay()
        graphs.append((graph, calls, []))
    torch.cuda.synchronize()
    for _ in range(replays):
        for graph, calls, times in graphs:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / calls)
    return [statistics.median(times) for _, _, times in graphs]


def relative_error(a: Tensor, qweight: Tensor, scales: Tensor, group_size: int) -> float:
    """Against float64 on the dequantized weights, over the first 16 rows."""
    from marlin_gptq.kernel.reference import dequantize

    expected = a[:16].double() @ dequantize(qweight, scales, group_size).double().t()
    out = gemm(a, qweight, scales, None, group_size)[:16].double()
    return float((out - expected).norm() / expected.norm())


if __name__ == "__main__":
    sys.exit(main())
