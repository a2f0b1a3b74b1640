"""Our exports elsewhere: stock transformers reads them and gives our logits; the settings that engines look for."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import dense_model, save_foreign
from helpers import EXPERT_MODELS, save_tiny_model

import marlin_gptq
from marlin_gptq import QuantizationConfig, convert_checkpoint, quantize_model
from marlin_gptq.checkpoint import TensorStore

IDS = torch.arange(1, 40)[None]
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "marlin_gptq" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16, device_map="cpu")
with torch.no_grad():
    torch.save(model(torch.arange(1, 40)[None]).logits, sys.argv[2])
"""


def quantized(
    directory: Path, group_size: int, skip: tuple[str, ...] = (), architecture: str = "llama", **changes: Any
) -> Path:
    base = save_tiny_model(directory.parent / "base", architecture, **changes)
    config = QuantizationConfig(method="rtn", group_size=group_size, skip=skip)
    quantize_model(base, directory, config, [], device=torch.device("cpu"))
    return directory


def stock_logits(directory: Path) -> torch.Tensor:
    """Of a process that never heard of this project."""
    file = directory.parent / "logits.pt"
    command = [sys.executable, "-c", STOCK, str(directory), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=directory)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(file, weights_only=True)


def ours(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return marlin_gptq.load(directory, device="cpu")(IDS).logits


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Within a few roundings of float16: the one sums in float32 over packed codes, the other over rounded weights."""
    return bool((one.float() - other.float()).abs().max() <= 2**-8 * other.float().abs().max())


def test_compressed_tensors_in_stock_transformers(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    marlin = quantized(tmp_path / "marlin", 32, skip=(r"layers\.1\.mlp\.down_proj",))
    convert_checkpoint(marlin, tmp_path / "export", "compressed-tensors")
    theirs = stock_logits(tmp_path / "export")
    assert near(theirs, ours(marlin))
    scrambled = ours(marlin)[:, :, torch.randperm(theirs.shape[-1])]
    assert not near(theirs, scrambled), "the comparison can tell wrong logits"


@pytest.mark.parametrize(("group_size", "symmetric"), [(-1, True), (32, False)])
def test_compressed_tensors_decompresses_what_we_write(tmp_path: Path, group_size: int, symmetric: bool) -> None:
    """Its own package, tensor by tensor, on zero points and whole rows too."""
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationScheme

    linears = save_foreign(tmp_path / "source", "awq", group_size=group_size, symmetric=symmetric)
    convert_checkpoint(tmp_path / "source", tmp_path / "export", "compressed-tensors")
    settings = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    store = TensorStore(tmp_path / "export")
    name, linear = list(linears.items())[-1]
    own = {full.removeprefix(f"{name}."): store.get(full) for full in store.names if full.startswith(f"{name}.")}
    weight = base.PackedQuantizationCompressor.decompress(own, scheme)["weight"]
    assert torch.equal(weight, linear.dense().to(weight.dtype))


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("gptqmodel") and importlib.util.find_spec("optimum")),
    reason="needs gptqmodel and optimum (pip install gptqmodel optimum), which stock transformers reads these with",
)
@pytest.mark.parametrize(("to", "version"), [("gptq", 1), ("gptq", 2), ("awq", None)])
def test_gptq_and_awq_in_stock_transformers(tmp_path: Path, to: str, version: int | None) -> None:
    marlin = quantized(tmp_path / "marlin", 32)
    convert_checkpoint(marlin, tmp_path / "export", to, gptq_version=version)
    assert near(stock_logits(tmp_path / "export"), ours(marlin))


def test_gptq_settings_are_those_that_engines_read(tmp_path: Path) -> None:
    marlin = quantized(tmp_path / "marlin", 64)
    convert_checkpoint(marlin, tmp_path / "gptq", "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    settings = config["quantization_config"]
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True, "lm_head": False}
    assert wanted.items() <= settings.items() and settings["checkpoint_format"] == "gptq"
    assert settings["damp_percent"] == 0.1 and settings["true_sequential"] is False
    assert config["dtype"] == "float16"
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == settings

    from transformers.utils.quantization_config import GPTQConfig

    understood = GPTQConfig.from_dict(dict(settings))
    assert (understood.bits, understood.group_size, understood.sym, understood.desc_act) == (4, 64, True, False)
    assert understood.format == "gptq"


def engine_names(engine: str) -> dict[str, list[str]]:
    """{what an engine calls a linear: the linears of the files that it is made of}, of a dense model's block."""
    parent, _, own = engine.rpartition(".")
    parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    return {engine: [f"{parent}.{part}" for part in parts.get(own, [own])]}


@pytest.mark.parametrize("skip", [r"layers\.0\.", r"layers\.1\.self_attn\.", r"(gate|up)_proj", "o_proj"])
def test_blocks_left_in_16_bits_are_known_to_engines(tmp_path: Path, skip: str) -> None:
    """The rules that vLLM publishes, for the names that it gives to fused linears; the engine itself does not run."""
    marlin = quantized(tmp_path / "marlin", 128, skip=(skip,))
    settings = {}
    for to in ("gptq", "awq", "compressed-tensors"):
        convert_checkpoint(marlin, tmp_path / to, to)
        settings[to] = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
    held = set(TensorStore(tmp_path / "gptq").names)
    for block in (0, 1):
        for own in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            ((engine, parts),) = engine_names(f"model.layers.{block}.{own}").items()
            left = f"{parts[0]}.qweight" not in held
            patterns = [pattern.removeprefix("-:") for pattern in settings["gptq"].get("dynamic", {})]
            for name in (engine, *parts):
                assert any(re.match(pattern, name) for pattern in patterns) == left, name
                assert any(one in name for one in settings["awq"]["modules_to_not_convert"]) == left, name
            assert all((part in settings["compressed-tensors"]["ignore"]) == left for part in parts)


def test_routers_are_no_quantized_linears_to_engines(tmp_path: Path) -> None:
    marlin = quantized(tmp_path / "marlin", 128, architecture="qwen3_moe", **EXPERT_MODELS["qwen3_moe"])
    gates = [f"model.layers.{block}.mlp.gate" for block in (0, 1)]
    for to, named in (("gptq", [r"-:^model\.layers\.0\.mlp\.gate$"]), ("awq", gates), ("compressed-tensors", gates)):
        convert_checkpoint(marlin, tmp_path / to, to)
        settings = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
        said = settings.get("dynamic") or settings.get("modules_to_not_convert") or settings["ignore"]
        assert set(named) <= set(said)
        assert "modules_in_block_to_quantize" not in settings


def test_awq_settings_are_those_that_engines_read(tmp_path: Path) -> None:
    marlin = quantized(tmp_path / "marlin", 128)
    convert_checkpoint(marlin, tmp_path / "awq", "awq")
    settings = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip


def test_our_logits_are_those_of_the_dense_model(tmp_path: Path) -> None:
    linears = save_foreign(tmp_path / "source", "compressed-tensors", group_size=-1)
    with torch.no_grad():
        assert near(ours(tmp_path / "source"), dense_model(tmp_path / "source", linears)(IDS).logits)
