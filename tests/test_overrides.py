"""overrides.py and config.py: other settings for some linears, from the YAML file to the loaded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from character_model import save_character_model
from click.testing import CliRunner
from helpers import random_samples, save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from marlin_gptq import InputError, MarlinLinear, QuantizationConfig, quantize_model, split_projections
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.cli.quantize import main
from marlin_gptq.config import Override
from marlin_gptq.eval.perplexity import stream_nll
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.overrides import read_overrides

CPU = torch.device("cpu")
TEXT = r"""
'layers\.1\.mlp': {bits: 16}     # comes first, so layer 1 keeps its mlp
'down_proj$': {group_size: 64}
'k_proj$': {group_size: 32, bits: 4, skip: false}
'o_proj$': {skip: true}
"""
RULES = (
    Override(r"layers\.1\.mlp", 16),
    Override("down_proj$", 4, 64),
    Override("k_proj$", 4, 32),
    Override("o_proj$", 16),
)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_the_file_is_read_in_its_order(tmp_path: Path) -> None:
    assert read_overrides(written(tmp_path, TEXT)) == RULES


def test_files_of_editors_that_write_a_byte_order_mark_or_another_encoding(tmp_path: Path) -> None:
    file = written(tmp_path, TEXT)
    file.write_text(TEXT, "utf-8-sig")
    assert read_overrides(file) == RULES
    for encoding, message in (("utf-16", "is no UTF-8 text but UTF-16"), ("latin-1", r"is no UTF-8 text \(byte")):
        file.write_text(f"# läßt\n{TEXT}", encoding)
        with pytest.raises(InputError, match=message):
            read_overrides(file)


def test_the_first_match_decides_and_the_config_keeps_it() -> None:
    config = QuantizationConfig(overrides=RULES)
    assert config.skips("model.layers.1.mlp.down_proj") and not config.skips("model.layers.0.mlp.down_proj")
    assert config.group_size_of("model.layers.0.mlp.down_proj") == 64
    assert config.group_size_of("model.layers.0.mlp.up_proj") == 128
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got nothing, expected a mapping from regular expressions"),
        ("{}", "got nothing in it, expected a mapping"),
        ("- a", "got a list, expected a mapping"),
        ("'a': {", "not readable as YAML"),
        ("'(': {bits: 16}", "'(' is not a regular expression: missing )"),
        ("'a': {bits: 3}", "'a': bits: got 3, expected 4 or 16"),
        ("'a': {bits: true}", "'a': bits: got True, expected 4 or 16"),
        ("'a': {group_size: 100}", "'a': group_size: got 100, expected one of 128, 64, 32 or -1"),
        ("'a': {group_size: '64'}", "'a': group_size: got '64'"),
        ("'a': {bits: 16, group_size: 64}", "'a': group_size: got 64 for linears left in full precision"),
        ("'a': {skip: true, bits: 4}", "'a': bits: got 4 together with skip: true"),
        ("'a': {skip: yes please}", "'a': skip: got 'yes please', expected true or false"),
        ("'a': {groupsize: 64}", "'a': unknown setting 'groupsize'; known are bits, group_size, skip"),
        ("'a': 64", "'a': got a int, expected settings such as {group_size: 64}"),
        ("'a':", "'a': got nothing, expected settings"),
        ("3: {bits: 16}", "3: got a int, expected a regular expression in quotes"),
        ("? [a]\n: {bits: 16}", "a list cannot be a key, line 1"),
        ("'a': {bits: 16}\n'a': {bits: 4}", "'a' stands there twice, line 2"),
        ("'a': {bits: 16, bits: 4}", "'bits' stands there twice"),
        ("'': {bits: 16}", "got '', expected a regex"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_overrides(written(tmp_path, text))
    assert message in str(caught.value) and str(tmp_path / "settings.yaml") in str(caught.value)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file; --config takes a YAML file"):
        read_overrides(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_overrides(tmp_path)


@pytest.mark.parametrize("broken", ["text", [{"bits": 16}], [{"match": "a", "width": 4}], [3]])
def test_a_broken_config_json_is_refused(broken: object) -> None:
    with pytest.raises(InputError, match="overrides: got"):
        QuantizationConfig.from_dict(QuantizationConfig().to_dict() | {"overrides": broken})


@pytest.mark.parametrize(
    "rules", [(Override("nowhere"),), (Override("mlp", 16), Override("down_proj", 4, 64))], ids=["nothing", "shadowed"]
)
def test_a_rule_that_decides_about_nothing_is_refused(tmp_path: Path, rules: tuple[Override, ...]) -> None:
    source = save_tiny_model(tmp_path / "source")
    message = r"matches no linear of the decoder blocks .* a linear of this model is called model\.layers\.0\..*q_proj"
    with pytest.raises(InputError, match=message):
        quantize_model(source, tmp_path / "out", QuantizationConfig(overrides=rules), random_samples(2), device=CPU)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("skip", [("down_porj",), ("o_proj", "down_porj"), ("down_proj.weight",)])
def test_a_skip_that_matches_nothing_is_refused(tmp_path: Path, skip: tuple[str, ...], method: str) -> None:
    source = save_tiny_model(tmp_path / "source")
    message = rf"skip: '{skip[-1]}' matches no linear of the decoder blocks; a linear of this model is called .*q_proj"
    with pytest.raises(InputError, match=message):
        quantize_model(
            source, tmp_path / "out", QuantizationConfig(method=method, skip=skip), random_samples(2), device=CPU
        )
    arguments = [argument for pattern in skip for argument in ("--skip", pattern)]
    result = CliRunner().invoke(main, [str(source), "--dry-run", "--method", method, *arguments])
    assert result.exit_code == 2 and f"skip: '{skip[-1]}' matches no linear" in result.output


@pytest.mark.parametrize("pattern", ["lm_head", "norm", "embed_tokens$"])
def test_a_skip_may_name_what_is_never_quantized(tmp_path: Path, pattern: str) -> None:
    source = save_tiny_model(tmp_path / "source", tie_word_embeddings=True)
    config = QuantizationConfig(method="rtn", group_size=64, skip=(pattern,))
    report = quantize_model(source, tmp_path / "out", config, [], device=CPU)
    assert report.quantized_share == 1 and not report.left
    assert CliRunner().invoke(main, [str(source), "--dry-run", "--group-size", "64", "--skip", pattern]).exit_code == 0


def test_from_the_file_to_the_loaded_model(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    config = QuantizationConfig(overrides=read_overrides(written(tmp_path, TEXT)))
    report = quantize_model(source, tmp_path / "out", config, random_samples(12), device=CPU)
    names = {record.name.split(".", 2)[2] for record in report.records}
    assert names == {
        "0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj", "0.mlp.gate_proj", "0.mlp.up_proj",
        "0.mlp.down_proj", "1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj",
    }  # fmt: skip
    store = TensorStore(tmp_path / "out")
    assert store.shape("model.layers.0.mlp.down_proj.scales") == (4, 128)
    assert store.shape("model.layers.0.self_attn.k_proj.scales") == (4, 64)
    assert store.shape("model.layers.0.self_attn.q_proj.scales") == (1, 128)
    kept = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(store.get(kept), TensorStore(source).get(kept))
    assert "`down_proj$` | group size 64" in (tmp_path / "out" / "README.md").read_text()

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    split_projections(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MarlinLinear)}
    assert len(layers) == 9 and layers["model.layers.0.self_attn.k_proj"].group_size == 32
    assert isinstance(model.model.layers[1].self_attn.o_proj, nn.Linear)
    model.save_pretrained(tmp_path / "again")
    again = TensorStore(tmp_path / "again")
    assert all(torch.equal(again.get(name), store.get(name)) for name in store.names)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config.to_dict()["quantization_config"] == (
        config.to_dict()
    )

    windows = [sample for sample in random_samples(6) if len(sample) > 2]
    losses = [stream_nll(BlockStream(tmp_path / name, device=CPU), windows) for name in ("source", "out")]
    assert losses[0] != losses[1] and abs(losses[1] / losses[0] - 1) < 0.1


def test_linears_of_one_input_keep_their_own_group_sizes(tmp_path: Path) -> None:
    """k_proj has other groups than q_proj and v_proj, which are solved together: neither notices the other."""
    source = save_tiny_model(tmp_path / "source")
    samples = random_samples(12)
    for name, config in {
        "mixed": QuantizationConfig(overrides=(Override("k_proj", 4, 32),)),
        "all": QuantizationConfig(group_size=32),
        "none": QuantizationConfig(),
    }.items():
        quantize_model(source, tmp_path / name, config, samples, device=CPU)
    mixed, every, none = (TensorStore(tmp_path / name) for name in ("mixed", "all", "none"))
    block = "model.layers.0.self_attn"
    for own in ("qweight", "scales"):
        assert torch.equal(mixed.get(f"{block}.k_proj.{own}"), every.get(f"{block}.k_proj.{own}"))
        assert torch.equal(mixed.get(f"{block}.v_proj.{own}"), none.get(f"{block}.v_proj.{own}"))


def test_the_command_takes_the_file(tmp_path: Path) -> None:
    source = save_character_model(tmp_path / "source")
    path = written(tmp_path, "'mlp': {bits: 16}\n'proj': {group_size: 64}\n")
    arguments = [str(source), "-o", str(tmp_path / "out"), "--method", "rtn", "--config", str(path), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["records"]) == 8 and report["config"]["overrides"][1]["group_size"] == 64
    path.write_text("'proj': {bits: 2}\n")
    result = CliRunner().invoke(main, [*arguments, "--overwrite"])
    assert result.exit_code == 2 and "error: " in result.stderr and "'proj': bits: got 2" in result.stderr
