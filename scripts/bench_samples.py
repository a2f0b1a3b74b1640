#!/usr/bin/env python3
"""Time the two passes of calibration samples through one decoder block, in packs and one at a time.

The first pass sums the Hessians of the block's linears, the second makes the inputs of the next block. The block has
random weights (the shape of Llama-2-7B by default), the samples random lengths and values. The two ways are checked
against each other. Needs a GPU for figures that mean anything; --hidden 256 --inner 704 --count 8 tries it on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.architecture import block_linears
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.observe import collect_hessians, stages
from marlin_gptq.modeling.packed import PACK_TOKENS, Packed


def lengths_of(count: int, longest: int, mean: int) -> list[int]:
    """Lengths of documents: exponential, so that most are short, cut at 50 and `longest`."""
    generator = torch.Generator().manual_seed(0)
    drawn = -mean * torch.rand(count, generator=generator).clamp_min(1e-6).log()
    return [int(length) for length in drawn.clamp(50, longest)]


def save_model(directory: Path, hidden: int, inner: int, heads: int, dtype: torch.dtype) -> None:
    """A Llama of one block with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads, vocab_size=128,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=0, help="default: one for each 128 channels")
    parser.add_argument("--count", type=int, default=256, help="samples")
    parser.add_argument("--mean", type=int, default=1200, help="tokens of a sample, before it is cut")
    parser.add_argument("--longest", type=int, default=4004)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, PACK_TOKENS, 2 * PACK_TOKENS, 4 * PACK_TOKENS])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.float16 if cuda else torch.float32
    lengths = lengths_of(asked.count, asked.longest, asked.mean)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{name}, torch {torch.__version__}: {len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens,")
    print(f"{sum(lengths)} in all, hidden {asked.hidden}, inner {asked.inner}, {dtype}; best of {asked.repeats}")
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), asked.hidden, asked.inner, asked.heads or max(1, asked.hidden // 128), dtype)
        stream = BlockStream(Path(folder), device=device, dtype=dtype)
        hidden = Activations([(1, length) for length in lengths], asked.hidden, dtype, device)
        generator = torch.Generator(device).manual_seed(0)
        for position, length in enumerate(lengths):
            hidden.put(position, torch.randn(1, length, asked.hidden, generator=generator, device=device, dtype=dtype))
        with torch.no_grad(), stream.block(0) as block:
            linears = block_linears(block, stream.block_name(0))
            groups = [group for stage in stages(stream, 0, linears, hidden[0]) for group in stage]
            compare(stream, groups, linears, hidden, asked.tokens, asked.repeats)


def compare(
    stream: BlockStream,
    groups: list[list[str]],
    linears: dict[str, torch.nn.Linear],
    hidden: Activations,
    sizes: list[int],
    repeats: int,
) -> None:
    """Print a row for each number of tokens of a pack: seconds of each pass, memory, difference from the first row."""
    cuda = stream.device.type == "cuda"
    first: tuple[dict[str, torch.Tensor], torch.Tensor] | None = None
    print("tokens of a pack | passes | Hessians s | forward s | peak GB | Hessians differ by | states differ by")
    for tokens in sizes:
        seconds: list[tuple[float, float]] = []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats + 1):  # the first warms up
            samples = Packed(hidden, stream.packs(0, hidden.shapes, tokens))
            started = now(cuda)
            found = collect_hessians(stream, 0, groups, linears, samples)
            between = now(cuda)
            for inputs, lengths in samples:
                states = stream.run(0, inputs, lengths)
            seconds.append((between - started, now(cuda) - between))
        sums = {name: hessian.sum for name, hessian in found.hessians.items()}
        last = states[:, -hidden.shapes[-1][1] :].float()
        first = first or (sums, last)
        hessians = max(float((sums[name] - h).norm() / h.norm()) for name, h in first[0].items())
        difference = float((last - first[1]).norm() / first[1].norm())
        one, other = (min(column) for column in zip(*seconds[1:], strict=True))
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
        print(
            f"{tokens:16} | {len(samples.packs):6} | {one:10.3f} | {other:9.3f} | {peak:7.2f} | {hessians:18.1e} | "
            f"{difference:.1e}",
            flush=True,
        )


def now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
