#!/usr/bin/env python3
"""Time the 4-bit kernel on linear layers, beside torch's own matrix product.

Every row is a replayed CUDA graph of calls on weights that have left the L2 cache (several copies take
turns, at least 180 MB of them): microseconds a call (median), GB/s of the bytes a call must move (codes,
scales, activations, output) and their fraction of what a kernel that only reads (torch's sum over 4 GB) reached in the
same process, TFLOP/s, and the speed against torch's dense product (cuBLAS) on the same shape, timed likewise, by turns.
"x int4": against torch's own 4-bit product, _weight_int4pack_mm, where it applies (bfloat16, groups of 32 to 256).
"chain": the same calls, each allowed to read its weights before the one in front of it has ended
(marlin_gptq.kernel.set_overlap).

Suites:
    layers     the linear layers of Llama models of 7B to 70B (the default)
    peak       one matrix whose tiles share out evenly over the multiprocessors, M = 1 to 128
    models     M = 16 on the fused layers of Llama 7B, 13B, 33B and 65B and of Falcon 180B
    sustained  each case for two seconds (--seconds), clocks and power beside the time. The clocks are left as they
               are; to lock them first, as root: nvidia-smi --lock-gpu-clocks=MHZ, afterwards --reset-gpu-clocks
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from marlin_gptq.kernel import gemm, library, set_overlap
from marlin_gptq.kernel.blocked import to_blocks
from marlin_gptq.kernel.decode_blocks import MAX_TOKENS, decode_blocks
from marlin_gptq.kernel.reference import dequantize, unpack_scales

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
MODELS = [
    *((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)),  # Llama 7B
    *((5120, 15360), (5120, 5120), (5120, 27648), (13824, 5120)),  # 13B
    *((6656, 19968), (6656, 6656), (6656, 35840), (17920, 6656)),  # 33B
    *((8192, 24576), (8192, 8192), (8192, 44032), (22016, 8192)),  # 65B
    *((14848, 15872), (14848, 14848), (14848, 59392), (59392, 14848)),  # Falcon 180B
]
SUITE_M = {
    "layers": [1, 16, 64, 256, 1024],
    "peak": [1, 2, 4, 8, 16, 32, 64, 128],
    "models": [16],
    "sustained": [1, 16, 64],
}
HEADER = """\
|    K |     N |    M |      µs | GB/s | of stream | TFLOP/s | torch µs | x torch | chain µs | x torch | x int4 | err |
|-----:|------:|-----:|--------:|-----:|----------:|--------:|---------:|--------:|---------:|--------:|-------:|----:|"""
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
        "suite": options.suite,
        "layout": options.layout,
        "stream_gigabytes_per_second": stream_speed(),
        "rows": [],
    }
    stream = report["stream_gigabytes_per_second"]
    print(f"{report['device']}, torch {torch.__version__}, {options.dtype}, groups of {options.group_size}")
    print(f"torch reads {stream:.0f} GB/s")
    print(HEADER)
    for k, n in options.layer or suite_layers(options.suite):
        for row in bench_layer(k, n, options):
            row["of_stream"] = row["gigabytes_per_second"] / stream
            report["rows"].append(row)
            print(
                f"| {k:5d} | {n:5d} | {row['m']:4d} | {row['microseconds']:7.2f} "
                f"| {row['gigabytes_per_second']:4.0f} | {row['of_stream']:9.2f} "
                f"| {row['teraflops']:7.1f} | {row['torch_microseconds']:8.2f} | {row['times_torch']:7.2f} "
                f"| {row['chain_microseconds']:8.2f} | {row['chain_times_torch']:7.2f} | {row['times_int4']:6.2f} "
                f"| {row['relative_error']:5.0e} |" + (f" {row['state']}" if "state" in row else ""),
                flush=True,
            )
    for m in options.m:
        rows = [row for row in report["rows"] if row["m"] == m]
        alone = statistics.geometric_mean(row["times_torch"] for row in rows)
        chain = statistics.geometric_mean(row["chain_times_torch"] for row in rows)
        print(f"geometric mean over {len(rows)} layers, M = {m}: x torch {alone:.2f}, in a chain {chain:.2f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, report["rows"][0])
            writer.writeheader()
            writer.writerows(report["rows"])
    if options.plot:
        from bench_plot import draw

        draw(report, options.plot)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--suite", choices=list(SUITE_M), default="layers")
    parser.add_argument("--m", type=numbers, help="tokens, e.g. 1,16,64; else those of the suite")
    parser.add_argument("--layer", type=lambda text: tuple(numbers(text)), action="append", metavar="K,N")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument(
        "--layout",
        choices=["marlin", "blocks"],
        default="marlin",
        help=f"of the weights; blocks: what layers hold on compute capability 9.0, here up to M = {MAX_TOKENS}",
    )
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture of the speed against cuBLAS (needs matplotlib)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case of the suite sustained")
    options = parser.parse_args()
    options.m = options.m or SUITE_M[options.suite]
    if options.layout == "blocks":
        options.m = [m for m in options.m if m <= MAX_TOKENS]
    if not options.m:
        parser.error(f"--layout blocks takes at most {MAX_TOKENS} tokens")
    return options


def suite_layers(suite: str) -> list[tuple[int, int]]:
    if suite == "peak":
        return [(8192, 128 * torch.cuda.get_device_properties().multi_processor_count)]
    return MODELS if suite == "models" else LAYERS


def stream_speed() -> float:
    """GB/s at which torch reads 4 GB once: the best of several."""
    x = torch.ones(2**30, device="cuda")
    best = 0.0
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        x.sum()
        end.record()
        end.synchronize()
        best = max(best, 4 * 2**30 / begin.elapsed_time(end) / 1e6)
    return best


def bench_layer(k: int, n: int, options: argparse.Namespace) -> list[dict[str, float | str]]:
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
    multiply = in_layout(options.layout, packed, group_size)
    dense = [(torch.randn(n, k, device="cuda") / 16).to(dtype) for _ in range(dense_sets)]
    int4 = torch_int4(k, n, group_size, dtype, packed_sets)

    rows: list[dict[str, float | str]] = []
    for m in options.m:
        inputs = [torch.randn(m, k, device="cuda").to(dtype) for _ in range(max(packed_sets, dense_sets))]

        def run_kernel(i: int, inputs: list[Tensor] = inputs) -> Tensor:
            return multiply(inputs[i % len(inputs)], i % packed_sets)

        def run_torch(i: int, inputs: list[Tensor] = inputs) -> Tensor:
            return inputs[i % len(inputs)] @ dense[i % dense_sets].t()

        candidates = [(run_kernel, packed_sets, False), (run_kernel, packed_sets, True), (run_torch, dense_sets, False)]
        if int4 is not None:

            def run_int4(i: int, inputs: list[Tensor] = inputs) -> Tensor:
                return int4(inputs[i % len(inputs)], i % packed_sets)

            candidates.append((run_int4, packed_sets, False))
        seconds = options.seconds if options.suite == "sustained" else 0.0
        ours, chain, theirs, *others = time_by_turns(candidates, options.replays, seconds)
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
                "chain_microseconds": chain,
                "chain_times_torch": theirs / chain,
                "times_int4": others[0] / ours if others else math.nan,
                "relative_error": relative_error(inputs[0], *packed[0], group_size, multiply),
            }
        )
        if options.suite == "sustained":
            rows[-1]["state"] = gpu_state()
    return rows


def in_layout(layout: str, packed: list[tuple[Tensor, Tensor]], group_size: int) -> Callable[[Tensor, int], Tensor]:
    """(activations, which copy of the weight) → the product by the kernel."""
    if layout == "marlin":
        return lambda a, i: gemm(a, *packed[i], None, group_size)
    n = packed[0][0].shape[1] // 2
    blocks = [to_blocks(qweight, scales, None, group_size) for qweight, scales in packed]
    columns = [unpack_scales(scales)[0].contiguous() if scales.shape[0] == 1 else None for _, scales in packed]
    return lambda a, i: decode_blocks(a, blocks[i], columns[i], None, n, group_size, False)


def torch_int4(
    k: int, n: int, group_size: int, dtype: torch.dtype, sets: int
) -> Callable[[Tensor, int], Tensor] | None:
    """The same for torch's _weight_int4pack_mm on random codes; None where it does not apply."""
    inner = 8  # k16 tiles it packs together: the fastest of 2, 4 and 8 for few tokens
    if dtype != torch.bfloat16 or group_size not in (32, 64, 128, 256) or k % (16 * inner) or n % 8:
        return None
    weights = [
        (
            torch._convert_weight_to_int4pack(
                torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), inner
            ),
            (torch.rand(k // group_size, n, 2, device="cuda") / 64).to(dtype),
        )
        for _ in range(sets)
    ]
    return lambda a, i: torch._weight_int4pack_mm(a, weights[i][0], group_size, weights[i][1])


def time_by_turns(
    candidates: list[tuple[Callable[[int], Tensor], int, bool]], replays: int, seconds: float
) -> list[float]:
    """Median microseconds of one call of each candidate (run, number of weights that take turns, overlap).

    seconds: how long to go on at least, in all.
    """
    graphs: list[tuple[torch.cuda.CUDAGraph, int, list[float]]] = []
    for run, sets, overlap in candidates:
        calls = sets * max(1, 12 // sets)
        torch.cuda.synchronize()  # the weights are written
        set_overlap(overlap)
        for i in range(sets):
            run(i)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                run(i)
        set_overlap(False)
        graph.replay()
        graphs.append((graph, calls, []))
    torch.cuda.synchronize()
    until = time.monotonic() + seconds
    while replays > 0 or time.monotonic() < until:
        replays -= 1
        for graph, calls, times in graphs:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / calls)
    return [statistics.median(times) for _, _, times in graphs]


def gpu_state() -> str:
    """Clocks and power as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def relative_error(
    a: Tensor, qweight: Tensor, scales: Tensor, group_size: int, multiply: Callable[[Tensor, int], Tensor]
) -> float:
    """Against float64 on the dequantized weights, over the first 16 rows."""
    expected = a[:16].double() @ dequantize(qweight, scales, group_size).double().t()
    out = multiply(a, 0)[:16].double()
    return float((out - expected).norm() / expected.norm())


if __name__ == "__main__":
    sys.exit(main())
