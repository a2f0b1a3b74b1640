"""estimated_size.py: the tensors that a run will write, against what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import EXPERT_MODELS, save_tiny_model

from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import Override
from marlin_gptq.estimated_size import output_bytes, stored_tensors
from marlin_gptq.modeling.outline import outline

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", *EXPERT_MODELS])
def test_tensors_are_those_that_are_written(tmp_path: Path, architecture: str) -> None:
    changes = EXPERT_MODELS.get(architecture, {"tie_word_embeddings": True})
    source = save_tiny_model(tmp_path / "source", architecture, **changes)
    config = QuantizationConfig(method="rtn", overrides=(Override("o_proj", 16), Override("v_proj", 4, 32)))
    report = quantize_model(source, tmp_path / "out", config, [], device=CPU)
    found = outline(source, config)
    store = TensorStore(tmp_path / "out")
    sizes: dict[str, int] = {}
    for name in store.names:
        linear = name.removesuffix(".qweight").removesuffix(".scales")
        sizes[linear] = sizes.get(linear, 0) + store.size(name)
    assert {name: size for name, _, _, size in stored_tensors(found, "float16")} == sizes
    assert output_bytes(found) == report.bytes_after


def test_types_are_named(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    found = outline(source, QuantizationConfig(group_size=-1, overrides=(Override("v_proj", 4, 32),)))
    types = {name: kind for name, kind, _, _ in stored_tensors(found, "bfloat16")}
    assert types["model.layers.0.self_attn.q_proj"] == "int4, group row"
    assert types["model.layers.0.self_attn.v_proj"] == "int4, group 32"
    assert types["model.norm.weight"] == types["lm_head.weight"] == "bfloat16"
