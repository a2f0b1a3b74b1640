#!/usr/bin/env python3
"""Write a Llama with random weights as a Hugging Face directory: something of the right shape to time.

    python scripts/make_random_checkpoint.py build/random-7b --shape 7b
    python scripts/make_random_checkpoint.py build/random-7b-marlin --shape 7b --quantized
    marlin-eval throughput build/random-7b-marlin --baseline build/random-7b
    python scripts/make_random_checkpoint.py build/random-7b --tokenizer examples/tiny-llama    to time marlin-quantize

Every tensor is drawn, written and forgotten before the next, so that host memory stays near one shard whatever the
shape. --quantized writes random codes in the Marlin layout, without quantizing anything: the same format as
marlin-quantize's, another model than the one without --quantized. Activations stay finite; the text is noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.checkpoint_writer import CheckpointWriter
from marlin_gptq.config import GROUP_SIZES, QuantizationConfig
from marlin_gptq.errors import MarlinGPTQError
from marlin_gptq.modeling.architecture import replace_linears

# hidden, intermediate, layers, heads, key/value heads, vocabulary, context: from the models' published configs.
SHAPES = {
    "tiny": (256, 768, 4, 4, 4, 8192, 2048),
    "7b": (4096, 11008, 32, 32, 32, 32000, 4096),
    "13b": (5120, 13824, 40, 40, 40, 32000, 4096),
    "70b": (8192, 28672, 80, 64, 8, 32000, 4096),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256, 8192),
}
# Codes 0 … 15, each as likely, less 8: their root mean square. It turns a wanted weight into a scale.
CODES_RMS = (sum((code - 8) ** 2 for code in range(16)) / 16) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="number of decoder blocks, if not that of the shape")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--quantized", action="store_true", help="4-bit codes in the Marlin layout")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to draw")
    parser.add_argument("--tokenizer", type=Path, help="directory to copy a tokenizer from")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        size = write(arguments)
    except MarlinGPTQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s")
    return 0


def write(arguments: argparse.Namespace) -> int:
    """The directory, whole or not at all; returns the bytes of its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, arguments.dtype)
    config = model_config(arguments.shape, arguments.layers, arguments.dtype)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    content = config.to_dict() | {"architectures": [type(model).__name__], "dtype": arguments.dtype}
    if arguments.quantized:
        settings = QuantizationConfig(group_size=arguments.group_size, method="rtn")
        replace_linears(model, config, settings, dtype)
        content["quantization_config"] = settings.to_dict()
    generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
    with CheckpointWriter(arguments.output, shard_size=10**9, overwrite=arguments.overwrite) as writer:
        tensors = model.state_dict()
        for name, like in tensors.items():
            packed = tensors.get(name.removesuffix("scales") + "qweight")
            writer.add(name, drawn(name, like, generator, 16 * len(packed) if packed is not None else like.shape[-1]))
        if arguments.tokenizer:
            for file in sorted(arguments.tokenizer.glob("*token*")):
                shutil.copyfile(file, writer.directory / file.name)
        writer.write_text("config.json", json.dumps(content, indent=2) + "\n")
        writer.write_text("README.md", "Random weights, to measure speed and memory with. It has learned nothing.\n")
        writer.finish()
    return writer.total_bytes


def model_config(shape: str, layers: int | None, dtype: str) -> Any:
    """The transformers config of a shape."""
    from transformers import LlamaConfig

    hidden, intermediate, blocks, heads, kv_heads, vocabulary, context = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        dtype=dtype,
    )


def drawn(name: str, like: Tensor, generator: torch.Generator, in_features: int) -> Tensor:
    """A random tensor of the shape and dtype of `like`, on the generator's device.

    Weights have the size 1/√in_features, so that activations keep theirs; norms are 1, biases small.
    """
    device = generator.device
    if like.dtype == torch.int32:  # eight random codes a word
        return torch.randint(-(2**31), 2**31, like.shape, dtype=torch.int32, device=device, generator=generator)
    values = torch.empty(like.shape, dtype=torch.float32, device=device)
    if name.endswith(".scales"):
        spread = values.uniform_(0.8, 1.2, generator=generator)
        return (spread / (CODES_RMS * in_features**0.5)).to(like.dtype)
    if like.dim() == 1:
        if name.endswith(".bias"):
            return (0.01 * values.normal_(generator=generator)).to(like.dtype)
        return torch.ones(like.shape, dtype=like.dtype, device=device)
    return (values.normal_(generator=generator) / in_features**0.5).to(like.dtype)


if __name__ == "__main__":
    sys.exit(main())
