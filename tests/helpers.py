"""Slow, obvious references and small models that several test files share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.packed import Packed


def random_hessian(features: int, seed: int, tokens: int | None = None) -> Tensor:
    """A Hessian of correlated, heavy-tailed inputs, float32 [features, features]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * features
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    spread = torch.randn(features, generator=generator).exp()
    inputs = torch.randn(tokens, features, generator=generator) @ (torch.eye(features) + mixing) * spread
    return 2 * inputs.t() @ inputs / tokens


def random_weight(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) / columns**0.5


def tiny_config(architecture: str = "llama", **changes: Any) -> Any:
    """A transformers config of a model that fits in a blink: hidden 128, two blocks."""
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(architecture, **(settings | changes))


def save_tiny_model(
    directory: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """A random model of `tiny_config` as a Hugging Face directory (no tokenizer)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=dtype)
    for parameter in model.parameters():  # biases and norms start constant: give them something to lose
        if parameter.dim() == 1:
            parameter.data.add_(0.05 * torch.randn(parameter.shape).to(dtype))
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def random_samples(count: int, vocabulary: int = 96, seed: int = 0, longest: int = 64) -> list[Tensor]:
    """Token id samples of natural (that is, different) lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator)
    return [torch.randint(0, vocabulary, (int(length),), generator=generator) for length in lengths]


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "num_experts": 4}
# What each mixture-of-experts architecture needs beside `tiny_config`.
EXPERT_MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    "qwen3_moe": MOE | {"head_dim": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
}
# Shapes of Llama models, for what reads a config and nothing else.
SEVEN_B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
SEVENTY_B = SEVEN_B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip


def config_only(directory: Path, **shape: int | str) -> Path:
    """A model directory with a config.json alone."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | shape))
    return directory


def loud_model(directory: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A random model whose attention matters: with transformers' initial weights it adds next to nothing."""
    return save_tiny_model(directory, architecture, dtype=torch.float32, **({"initializer_range": 0.15} | changes))


def embedded(stream: BlockStream, samples: list[Tensor]) -> Activations:
    """Block 0's inputs, one sequence for each sample."""
    hidden = Activations(
        [(1, len(sample)) for sample in samples], stream.config.hidden_size, stream.dtype, torch.device("cpu")
    )
    for position, sample in enumerate(samples):
        hidden.put(position, stream.embed(sample[None]))
    return hidden


def one_by_one(hidden: Activations) -> Packed:
    """Each sample alone in its pack."""
    return Packed(hidden, [range(position, position + 1) for position in range(len(hidden))])
