"""Tiny random models of many transformers classes, and what a quantized directory of one must compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from marlin_gptq import MarlinLinear, split_projections

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# Rotary embedding of text, height and width.
THREE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
IDS = torch.randint(10, 96, (2, 24), generator=torch.Generator().manual_seed(3))


def seeing(name: str) -> tuple[str, Any]:
    """(class, config) of a model with a vision part, whose picture is token 5, by the name of its architecture."""
    text = {**SIZES, "tie_word_embeddings": False}
    if name == "llava":
        parts = {"vision_config": transformers.CLIPVisionConfig(**VISION), "image_token_index": 5}
        return "LlavaForConditionalGeneration", transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text), **parts
        )
    if name == "gemma3":
        more = {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
        return "Gemma3ForConditionalGeneration", transformers.Gemma3Config(
            text_config={**text, **more}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=5,
            boi_token_index=6, eoi_token_index=7, tie_word_embeddings=True,
        )  # fmt: skip
    if name == "qwen2.5-vl":
        sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128, "num_heads": 2}
        return "Qwen2_5_VLForConditionalGeneration", transformers.Qwen2_5_VLConfig(
            text_config={**text, **THREE}, vision_config=sight | {"fullatt_block_indexes": [0]}, image_token_id=5,
            video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
        )  # fmt: skip
    if name == "qwen3-vl-moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 32}
        sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128, "num_heads": 2}
        sight |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        return "Qwen3VLMoeForConditionalGeneration", transformers.Qwen3VLMoeConfig(
            text_config={**text, **THREE, **experts}, vision_config=sight, image_token_id=5, video_token_id=6,
            vision_start_token_id=7, vision_end_token_id=8,
        )  # fmt: skip
    if name == "idefics3":
        return "Idefics3ForConditionalGeneration", transformers.Idefics3Config(
            text_config=transformers.LlamaConfig(**text), vision_config=VISION, image_token_id=5, scale_factor=2
        )
    if name == "mistral3":
        sight = VISION | {"model_type": "pixtral", "head_dim": 16}
        return "Mistral3ForConditionalGeneration", transformers.Mistral3Config(
            text_config={**text, "model_type": "mistral", "head_dim": 32}, vision_config=sight, image_token_index=5
        )
    raise KeyError(name)


def save_of_class(directory: Path, class_name: str, config: Any, dtype: torch.dtype = torch.float16) -> Path:
    """A random model of a transformers class as a directory; nothing in it is zero or one everywhere."""
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        matters = tensor.dim() == 1 or "norm" in name
        if matters and tensor.is_floating_point() and name in model.state_dict():
            tensor.data.add_(0.05 * torch.randn(tensor.shape))
    model.to(dtype).save_pretrained(directory)
    return directory


def loaded(directory: Path, class_name: str, **settings: Any) -> Any:
    """The model of a directory in float32; AssertionError if a weight is missing, too many or of another shape."""
    logging.disable_progress_bar()
    model, info = getattr(transformers, class_name).from_pretrained(directory, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return nn.Module.float(model).eval()


def put_back(stock: nn.Module, quantized: nn.Module) -> int:
    """Give the linears (or parts of experts) of `stock` the decoded weights of `quantized`; how many these are."""
    split_projections(quantized)
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, MarlinLinear)}
    with torch.no_grad():
        for name, layer in layers.items():
            weight = layer.dequantize().float()
            head, _, expert = name.partition(".experts.")
            if not expert:
                stock.get_submodule(name).weight.copy_(weight)
                continue
            number, own = expert.split(".")
            experts: Any = stock.get_submodule(f"{head}.experts")
            position = quantized.get_submodule(f"{head}.experts.{number}").names.index(own)
            rows = slice(position * len(weight), (position + 1) * len(weight))
            if position == 2:
                experts.down_proj[int(number)].copy_(weight)
            else:
                experts.gate_up_proj[int(number), rows].copy_(weight)
    return len(layers)


def first_output(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**({"input_ids": IDS} | inputs))[0]


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to `other`."""
    return float((one - other).norm() / other.norm())
