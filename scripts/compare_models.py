#!/usr/bin/env python3
"""How far the next-token distributions of quantized models lie from the original's.

    python scripts/compare_models.py ORIGINAL QUANTIZED [QUANTIZED ...]

Over the first 40 windows of 1024 tokens of WikiText-2 test (--windows, --seq-len, --dataset): the mean over
tokens of KL(original ‖ quantized) in nats, and the share of tokens for which both put the same token first.
On small models these tell recipes apart where perplexity, which can fall by chance, does not.
One JSON object per quantized model on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from marlin_gptq.calibration import load_tokenizer
from marlin_gptq.eval.windows import text_windows
from marlin_gptq.modeling.blocks import BlockStream


@torch.no_grad()
def last_hidden(stream: BlockStream, windows: list[Tensor]) -> list[Tensor]:
    """What the head sees, [1, T, hidden] for each window [T]."""
    hidden = [stream.embed(window[None].to(stream.device)) for window in windows]
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = [stream.run(index, h) for h in hidden]
    return hidden


@torch.no_grad()
def divergence(reference: Tensor, other: Tensor) -> tuple[float, int]:
    """(summed KL(reference ‖ other) in nats, tokens with the same first choice) of logits [1, T, vocab]."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    same = (reference.argmax(-1) == other.argmax(-1)).sum()
    return float((p.exp() * (p - q)).sum()), int(same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="a full-precision model directory")
    parser.add_argument("quantized", type=Path, nargs="+", help="directories made from it by marlin-quantize")
    parser.add_argument("--dataset", default="wikitext2")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    tokenizer = load_tokenizer(arguments.original)
    windows, _ = text_windows(tokenizer, arguments.dataset, arguments.seq_len, n_samples=None, seed=0, offline=True)
    windows = windows[: arguments.windows]
    reference = BlockStream(arguments.original, device=device)
    wanted = last_hidden(reference, windows)
    for directory in arguments.quantized:
        stream = BlockStream(directory, device=device)
        sums = [
            divergence(reference.head(a), stream.head(b))
            for a, b in zip(wanted, last_hidden(stream, windows), strict=True)
        ]
        tokens = sum(len(window) for window in windows)
        result = {
            "model": str(directory),
            "kl_nats": sum(kl for kl, _ in sums) / tokens,
            "top1_percent": 100 * sum(same for _, same in sums) / tokens,
            "tokens": tokens,
            "kernel": stream.kernel_name(),
        }
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
