"""conversion/: what a format cannot hold, and files that cannot be read, refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign import Plain, change_config, change_tensors, save_foreign
from helpers import save_tiny_model
from helpers_conversion import convert, logits, quantized
from transformers import AutoModelForCausalLM

import marlin_gptq
from marlin_gptq import CheckpointError, InputError, QuantizationConfig, quantize_model
from marlin_gptq.checkpoint import CheckpointWarning, TensorStore
from marlin_gptq.conversion.source import Source


def test_what_a_format_cannot_hold_is_named_before_anything_is_written(tmp_path: Path) -> None:
    save_foreign(tmp_path / "asymmetric", "awq", symmetric=False)
    zeros = torch.zeros(1, 16, dtype=torch.int32)
    change_tensors(tmp_path / "asymmetric", {"model.layers.1.mlp.down_proj.qzeros": zeros.expand(8, 16)})
    with pytest.raises(
        InputError, match=r"layers\.1\.mlp\.down_proj: gptq \(version 1\) cannot hold a zero point of 0"
    ):
        convert(tmp_path / "asymmetric", "gptq", gptq_version=1)
    assert convert(tmp_path / "asymmetric", "gptq")  # version 2 can
    marlin = quantized(tmp_path / "marlin", dtype=torch.bfloat16)
    scales = TensorStore(marlin).get("model.layers.0.mlp.up_proj.scales")
    change_tensors(marlin, {"model.layers.0.mlp.up_proj.scales": torch.full_like(scales, 1e-9)})
    with pytest.raises(
        InputError, match=r"up_proj: gptq \(version 1\) stores float16 scales, and some of its torch\.b"
    ):
        convert(marlin, "gptq", gptq_version=1)
    with pytest.raises(InputError, match="format: got 'gguf', expected one of marlin, gptq, awq"):
        convert(marlin, "gguf")
    with pytest.raises(InputError, match="is in the format marlin already"):
        convert(marlin, "marlin")
    with pytest.raises(InputError, match="GPTQ version: got 2 for the format awq"):
        convert(marlin, "awq", gptq_version=2)
    with pytest.raises(InputError, match="is not quantized; marlin-quantize makes"):
        convert(tmp_path / "marlin-base", "gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "asymmetric", "asymmetric-gptq-", "marlin", "marlin-base",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gptq", {"bits": 8}, "bits: got 8, only 4-bit codes can be held"),
        ("gptq", {"bits": True}, "bits: got True"),
        ("gptq", {"group_size": 16}, "group_size: got 16, expected one of 128, 64, 32 or -1"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format: got 'marlin'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format: got true"),
        ("gptq", {"pack_dtype": "int64"}, "pack_dtype: got 'int64', expected 'int32'"),
        ("gptq", {"dynamic": {"+:up": {"bits": 8}}}, "dynamic: '\\+:up' changes settings for single layers"),
        ("gptq", {"adapter": {"rank": 8}}, "adapter: got {'rank': 8}, expected"),
        ("gptq", {"rotation": "hadamard"}, "rotation: got 'hadamard', expected"),
        ("gptq", {"quant_method": "auto-round", "act_bits": 8}, "act_bits: got 8, activations are quantized too"),
        ("gptq", {"quant_method": "auto-round", "data_type": "mx_fp"}, "data_type: got 'mx_fp', expected 'int'"),
        (
            "gptq",
            {"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 8}}},
            "extra_config: 'lm_head' has bits 8; one bit width and group size is needed",
        ),
        ("gptq", {"sym": "no"}, "sym: got 'no', expected true or false"),
        ("gptq", {"quant_method": "hqq"}, "quant_method: got 'hqq', which is none of those that can be read"),
        ("awq", {"version": "gemv"}, "version: got 'gemv', expected 'gemm'"),
        ("compressed-tensors", {"format": "float-quantized"}, "format: got 'float-quantized', expected 'pack-quant"),
        ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: got {'format'"),
        ("compressed-tensors", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config: got .*rotated"),
        ("compressed-tensors", {"config_groups": {}}, "config_groups: got {}, expected"),
        ("compressed-tensors", {"config_groups": {"a": 3}}, "config_groups.a.weights: got None"),
        (
            "compressed-tensors",
            {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
            "a.input_activations: activations are quantized too",
        ),
    ],
)
def test_settings_that_cannot_run_are_named(tmp_path: Path, kind: str, changes: dict, message: str) -> None:
    save_foreign(tmp_path / "source", kind)
    settings = json.loads((tmp_path / "source" / "config.json").read_text())["quantization_config"]
    change_config(tmp_path / "source", quantization_config=settings | changes)
    with pytest.raises(InputError, match=message):
        marlin_gptq.load(tmp_path / "source")


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.qzeros": None}, r"q_proj\.qzeros: missing from"),
        ({f"{Q}.qweight": torch.zeros(16, 64, dtype=torch.int32)}, r"qweight: got \[16, 64\] int32, expected \[16, 1"),
        ({f"{Q}.qweight": torch.zeros(16, 128)}, r"qweight: got \[16, 128\] float32, expected \[16, 128\] int32"),
        ({f"{Q}.scales": torch.zeros(2, 128).half()}, r"scales: got \[2, 128\] float16, expected \[4, 128\]"),
        ({f"{Q}.scales": torch.full((4, 128), torch.nan).half()}, "q_proj: 512 of its scales are NaN or Inf"),
        ({f"{Q}.g_idx": torch.zeros(128, dtype=torch.int32)}, "g_idx: got groups of 0 to 128 input features"),
        ({f"{Q}.g_idx": torch.full((128,), 9, dtype=torch.int32)}, "g_idx: got groups 9 to 9, expected 0 to 3"),
        ({f"{Q}.qzeros": torch.zeros(4, 16, dtype=torch.int32)}, "say symmetric, but a zero point is 1, not 8"),
        ({f"{Q}.weight": torch.zeros(128, 128).half()}, "q_proj: quantized and in 16 bits at once"),
        ({f"{Q}.input_scale": torch.ones(1)}, r"q_proj\.input_scale: not understood: a quantized linear of gptq"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 128)}, r"q_proj\.lora_A\.weight: not understood"),
        ({"model.layers.0.mlp.act_fn.scales": torch.ones(256)}, r"act_fn\.scales: not understood"),
        ({f"{Q}.qweight": None}, r"q_proj\.weight: missing"),
        ({"model.layers.7.mlp.up_proj.qweight": torch.zeros(1)}, "LlamaConfig has no linear of this name"),
        ({"model.norm.weight": None}, r"model\.norm\.weight: missing"),
        ({"model.norm.weight": torch.ones(3)}, r"model\.norm\.weight: got \[3\], expected \[128\]"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    save_foreign(tmp_path / "source", "gptq")
    change_tensors(tmp_path / "source", changes)
    with pytest.raises((CheckpointError, InputError), match=message):
        marlin_gptq.load(tmp_path / "source")


def test_act_order_without_g_idx_is_an_error(tmp_path: Path) -> None:
    linears = save_foreign(tmp_path / "source", "gptq", act_order=True)
    change_tensors(tmp_path / "source", {f"{name}.g_idx": None for name in linears})
    with pytest.raises(CheckpointError, match=r"g_idx: missing, but the settings say act-order"):
        convert(tmp_path / "source", "marlin")


def test_a_quantized_head_is_refused_by_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    linears = save_foreign(source, "gptq")
    head = Plain(torch.full((96, 128), 8), torch.full((96, 4), 8), torch.ones(96, 4).half(), torch.arange(128) // 32)
    from foreign import tensors_of

    tensors = {f"lm_head.{own}": tensor for own, tensor in tensors_of(head, "gptq", 1, True, False).items()}
    change_tensors(source, tensors | {"lm_head.weight": None})
    assert len(linears) == 14
    with pytest.raises(InputError, match="lm_head: is quantized, but the Marlin formats quantize linears of decoder"):
        marlin_gptq.load(source)
    for to, said in (("awq", {"lm_head": True}), ("compressed-tensors", {"ignore": []})):
        there = convert(source, to)
        assert "lm_head" in Source.of_directory(there).linears
        settings = json.loads((there / "config.json").read_text())["quantization_config"]
        assert said.items() <= settings.items()
    back = convert(tmp_path / "source-awq-", "gptq")
    assert json.loads((back / "config.json").read_text())["quantization_config"]["lm_head"] is True


def test_settings_and_tensors_that_contradict_each_other(tmp_path: Path) -> None:
    linears = save_foreign(tmp_path / "source", "gptq", act_order=True, symmetric=False)
    marlin = convert(tmp_path / "source", "marlin")
    settings = json.loads((marlin / "config.json").read_text())["quantization_config"]
    change_config(marlin, quantization_config=settings | {"desc_act": False})
    with pytest.raises(CheckpointError, match=r"input_order: there, but the settings say no act-order"):
        marlin_gptq.load(marlin)
    change_config(marlin, quantization_config=settings | {"sym": True})
    with pytest.raises(CheckpointError, match="the settings say symmetric, but a zero point is"):
        marlin_gptq.load(marlin)
    change_config(marlin, quantization_config=settings)
    order = torch.zeros(128, dtype=torch.int32)
    change_tensors(marlin, {f"{Q}.input_order": order})
    with pytest.raises(CheckpointError, match=r"input_order: not a permutation of its 128 input features"):
        marlin_gptq.load(marlin)
    assert len(linears) == 14


def test_groups_of_several_sizes_load_and_are_refused_elsewhere(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    config = QuantizationConfig(method="rtn", overrides=({"match": r"down_proj$", "group_size": 64},))
    quantize_model(base, tmp_path / "mixed", config, [], device=torch.device("cpu"))
    loaded = marlin_gptq.load(tmp_path / "mixed")
    assert loaded.get_submodule("model.layers.0.mlp.down_proj").group_size == 64
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")))
    with pytest.raises(InputError, match=r"down_proj: gptq .* cannot hold groups of 64 beside groups of 128"):
        marlin_gptq.convert_checkpoint(tmp_path / "mixed", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_a_quantized_kv_cache_is_refused_or_told_of_and_other_unknown_tensors_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_foreign(source, "compressed-tensors")
    scales = {f"model.layers.{i}.self_attn.{own}_scale": torch.full((1,), 0.5) for i in (0, 1) for own in "kv"}
    change_tensors(source, scales)
    settings = json.loads((source / "config.json").read_text())["quantization_config"]
    change_config(source, quantization_config=settings | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    for to in ("marlin", "gptq", "awq"):
        with pytest.raises(InputError, match=f"kv_cache_scheme: the scales .* no place in the format {to}; set it"):
            convert(source, to)
    with pytest.warns(CheckpointWarning, match="kv_cache_scheme: the KV cache stays in 16 bits here"):
        marlin_gptq.load(source)
    change_config(source, quantization_config=settings | {"kv_cache_scheme": None})
    held = TensorStore(convert(source, "gptq"))
    assert all(torch.equal(held.get(name), tensor) for name, tensor in scales.items())


def test_last_groups_that_are_not_full_and_fit_nothing_are_named(tmp_path: Path) -> None:
    save_foreign(tmp_path / "source", "gptq", group_size=128, intermediate_size=200)
    with pytest.raises(InputError, match=r"down_proj: group size 128 does not divide its 200 inp.*--group-size 32"):
        convert(tmp_path / "source", "marlin")
