#!/usr/bin/env python3
"""Time packing of a whole Llama-2-7B (6.5 G weights) into the Marlin layout, and back, on one device.

    python scripts/bench_pack.py [--device cuda] [--blocks 32] [--json]

Codes are random; every packed weight is unpacked again and compared, outside the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from marlin_gptq.formats import marlin

# (out_features, in_features) of the seven linears of a Llama-2-7B block.
LINEARS = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    generator = torch.Generator(device).manual_seed(0)

    seconds = {"pack": 0.0, "unpack": 0.0}
    weights = 0
    for block in range(arguments.blocks + 1):  # the first block warms up
        for n, k in LINEARS:
            codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device, generator=generator)
            started = clock(device)
            packed = marlin.pack_codes(codes)
            middle = clock(device)
            back = marlin.unpack_codes(packed)
            ended = clock(device)
            if not torch.equal(back, codes):
                print(f"[{n}, {k}]: unpack(pack(codes)) differs from codes", file=sys.stderr)
                return 1
            if block:
                seconds["pack"] += middle - started
                seconds["unpack"] += ended - middle
                weights += n * k
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result = {"device": name, "weights": weights} | {f"{step}_seconds": s for step, s in seconds.items()}
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{name}: {weights / 1e9:.2f} G weights, pack {seconds['pack']:.2f} s, unpack {seconds['unpack']:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
