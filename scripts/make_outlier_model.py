#!/usr/bin/env python3
"""A model that computes the same and is harder to quantize: random scalings moved from weights into norms and back.

    python scripts/make_outlier_model.py examples/tiny-llama build/tiny-outliers --spread 0.5 --seed 0

Every norm in front of linears is divided by a random vector, channel by channel, and the columns of those linears are
multiplied by it; rows of up_proj and v_proj likewise against the columns of down_proj and o_proj. Log-normal factors of
standard deviation SPREAD, powers of two so that nothing is rounded: the function stays as it is (but for the range of
float16), while some channels become large, as in large models. For Llama-shaped models.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.model_directory import read_json


def factors(count: int, spread: float, generator: torch.Generator) -> Tensor:
    """Powers of two, log-normal [count]."""
    return torch.exp2(torch.round(torch.randn(count, generator=generator) * spread / 0.6931))


def outliers(tensors: dict[str, Tensor], config: dict, spread: float, seed: int) -> dict[str, Tensor]:
    """The tensors of a Llama checkpoint with the scalings folded in, in their dtypes."""
    generator = torch.Generator().manual_seed(seed)
    result = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    heads = config["num_attention_heads"]
    shared = heads // config.get("num_key_value_heads", heads)
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}"
        for norm, linears in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            scale = factors(len(result[f"{block}.{norm}.weight"]), spread, generator)
            result[f"{block}.{norm}.weight"] /= scale
            for linear in linears:
                result[f"{block}.{linear}.weight"] *= scale
        scale = factors(len(result[f"{block}.mlp.up_proj.weight"]), spread, generator)
        result[f"{block}.mlp.up_proj.weight"] /= scale[:, None]
        result[f"{block}.mlp.down_proj.weight"] *= scale
        value = result[f"{block}.self_attn.v_proj.weight"]
        scale = factors(len(value), spread, generator)
        value /= scale[:, None]
        # A value head feeds `shared` query heads, whose outputs lie one after the other in o_proj's columns.
        width = result[f"{block}.self_attn.o_proj.weight"].shape[1] // heads
        result[f"{block}.self_attn.o_proj.weight"] *= scale.view(-1, width).repeat_interleave(shared, dim=0).reshape(-1)
    return {name: result[name].to(tensor.dtype) for name, tensor in tensors.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    store = TensorStore(arguments.model)
    tensors = {name: store.get(name) for name in store.names}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in arguments.model.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, arguments.out / file.name)
    changed = outliers(tensors, read_json(arguments.model / "config.json"), arguments.spread, arguments.seed)
    save_file(changed, arguments.out / "model.safetensors", metadata={"format": "pt"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
