#!/usr/bin/env python3
"""The kernels of one decode step of a model on a GPU, and what each of them costs.

    python scripts/profile_decode.py MODEL [--batch 1] [--prompt 512] [--mode compile+graphs] [--top 20]

MODEL is a directory, full-precision or quantized. Times are those of the kernels alone, a mean over five steps after a
prompt of random tokens; the profiler slows a step down, so take how long one lasts from `marlin-eval throughput`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from marlin_gptq.errors import MarlinGPTQError
from marlin_gptq.eval.throughput import MODES
from marlin_gptq.eval.whole_model import load_whole
from marlin_gptq.modeling.decoding import Decoder

STEPS = 5
# The first whose words occur in a kernel's name.
KINDS = {
    "linears, 4 bits": ("marlin_gptq",),
    "attention": ("sdpa", "fmha", "flash", "attention_kernel", "lean_reduction"),
    "linears, full precision": ("nvjet", "cublas", "gemv", "cutlass_80_tensorop", "sm90_xmma_gemm", "ampere_"),
    "everything between": ("",),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--mode", choices=MODES, default="compile+graphs")
    parser.add_argument("--top", type=int, default=20, help="kernels to list")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: a GPU is needed, torch finds none", file=sys.stderr)
        return 2
    try:
        model = load_whole(arguments.model, torch.device("cuda"))
    except MarlinGPTQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    decoder = Decoder(model, arguments.batch, arguments.prompt + 2 * STEPS, **MODES[arguments.mode])
    decoder.prefill(torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.prompt), device="cuda"))
    for _ in range(STEPS):
        decoder.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(STEPS):
            decoder.step()
        torch.cuda.synchronize()
    rows = sorted(
        ((event.device_time_total / STEPS, event.count / STEPS, event.key) for event in recorded.key_averages()),
        reverse=True,
    )
    print(f"{arguments.model}, batch {arguments.batch}, {arguments.mode}: kernels of one step")
    print_kinds(rows)
    print(f"\n{'µs a step':>10} {'launches':>9} {'µs each':>8}  kernel")
    for time, count, name in rows[: arguments.top]:
        print(f"{time:10.1f} {count:9.1f} {time / count:8.2f}  {name[:100]}")
    return 0


def print_kinds(rows: list[tuple[float, float, str]]) -> None:
    """Sums of (µs, launches, name) by what kernels are for."""
    sums = {kind: [0.0, 0.0] for kind in KINDS}
    for time, count, name in rows:
        kind = kind_of(name)
        sums[kind][0] += time
        sums[kind][1] += count
    total = sum(time for time, _ in sums.values())
    for kind, (time, count) in sums.items():
        if count:
            print(f"{time:10.1f} µs {100 * time / total:5.1f} %  {count:7.0f} launches  {kind}")
    print(f"{total:10.1f} µs in all")


def kind_of(kernel: str) -> str:
    """Which of KINDS a kernel is. Triton names a fused kernel after all it holds: those are what lies between."""
    if kernel.startswith("triton_"):
        return "everything between"
    return next(kind for kind, words in KINDS.items() if any(word in kernel for word in words))


if __name__ == "__main__":
    sys.exit(main())
