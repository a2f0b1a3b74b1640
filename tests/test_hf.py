"""modeling/hf.py: transformers loads, runs, generates, saves and reloads a quantized directory, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import random_samples, save_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from marlin_gptq import CheckpointError, InputError, MarlinLinear, QuantizationConfig, quantize_model
from marlin_gptq.modeling.blocks import BlockStream


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    source = save_tiny_model(root / "source", attention_bias=True)
    quantize_model(
        source, root / "out", QuantizationConfig(group_size=64), random_samples(8), device=torch.device("cpu")
    )
    return root / "out"


def copy(directory: Path, target: Path) -> Path:
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_every_decoder_linear_is_a_marlin_linear(quantized: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(quantized, output_loading_info=True)
    assert not any(info.values()), info
    assert not any(isinstance(module, torch.nn.Linear) for module in model.model.layers.modules())
    # Of each block: q/k/v as one, gate/up as one, o and down.
    assert sum(isinstance(module, MarlinLinear) for module in model.modules()) == 8
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert not model.training


def test_save_and_reload_are_bit_equal(quantized: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    before, after = (
        load_file(quantized / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    settings = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((quantized / "config.json").read_text())["quantization_config"]


def test_generate_follows_the_logits(quantized: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized)
    ids = torch.tensor([[1, 5, 9]])
    text = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert text.shape == (1, 9)
    with torch.no_grad():
        for length in range(3, 9):
            logits = model(text[:, :length]).logits[0, -1].float()
            logits[2] = -torch.inf  # min_new_tokens forbids the end of the text
            # The cache changes the order of summation: the chosen token may tie with the best, no more.
            assert float(logits.max() - logits[text[0, length]]) < 0.02


def test_streamed_and_loaded_models_agree(quantized: Path) -> None:
    stream = BlockStream(quantized, device=torch.device("cpu"))
    ids = torch.arange(1, 40)[None]
    hidden = stream.embed(ids)
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = stream.run(index, hidden)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(quantized)(ids).logits.float()
    # The stream computes in float32 on a CPU, transformers in the stored float16.
    assert float((stream.head(hidden) - expected).norm() / expected.norm()) < 5e-3


def test_a_missing_tensor_is_never_initialised_at_random(quantized: Path, tmp_path: Path) -> None:
    broken = copy(quantized, tmp_path / "broken")
    name = "model.layers.1.mlp.up_proj.scales"
    tensors = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != name}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: missing from"):
        AutoModelForCausalLM.from_pretrained(broken)
    with pytest.raises(CheckpointError, match=f"the tensor {name} is missing"):
        BlockStream(broken, device=torch.device("cpu"))


def test_a_group_size_that_does_not_match_the_tensors(quantized: Path, tmp_path: Path) -> None:
    broken = copy(quantized, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["group_size"] = 32
    (broken / "config.json").write_text(json.dumps(config))
    message = r"scales: got \[2, 128\], expected \[4, 128\] from config.json and group_size 32"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(broken)
    with pytest.raises(CheckpointError, match=message):
        BlockStream(broken, device=torch.device("cpu"))


def test_truncated_files_are_named(quantized: Path, tmp_path: Path) -> None:
    broken = copy(quantized, tmp_path / "broken")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"truncated or corrupt|SafetensorError|header|incomplete"):
        AutoModelForCausalLM.from_pretrained(broken)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        BlockStream(broken, device=torch.device("cpu"))


def test_float32_is_refused_by_name(quantized: Path) -> None:
    with pytest.raises(InputError, match=r"dtype: got torch.float32, but a Marlin checkpoint runs in"):
        AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)


def test_foreign_settings_are_refused(quantized: Path, tmp_path: Path) -> None:
    broken = copy(quantized, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="bits: got 3"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    """transformers would open them; nothing outside the directory becomes part of a model."""
    source = save_tiny_model(tmp_path / "source")
    config = QuantizationConfig(method="rtn", group_size=64)
    quantize_model(source, tmp_path / "out", config, [], device=torch.device("cpu"))
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = list(load_file(tmp_path / "elsewhere.safetensors"))
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}))
    with pytest.raises(CheckpointError, match="outside the directory of the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    index.unlink()
    (tmp_path / "out" / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="outside its directory; copy the file into it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
