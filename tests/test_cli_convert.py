"""marlin-convert, marlin-inspect and marlin-quantize --format: output, progress, sentences, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from character_model import save_character_model, save_texts
from click.testing import CliRunner, Result
from foreign import change_tensors, save_foreign
from helpers import save_tiny_model
from safetensors.torch import load_file

import marlin_gptq
from marlin_gptq.cli import convert, inspect, quantize
from marlin_gptq.conversion import export
from marlin_gptq.errors import CheckpointError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full-precision model, its Marlin form, and an asymmetric AWQ model."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "base")
    arguments = (folder / "base", "-o", folder / "marlin", "--method", "rtn", "--group-size", 128)
    assert run(quantize.main, *arguments).exit_code == 0
    save_foreign(folder / "awq", "awq", symmetric=False)
    return {name: folder / name for name in ("base", "marlin", "awq")}


def run(command: click.Command, *arguments: Any) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def refused(command: click.Command, *arguments: Any) -> str:
    result = run(command, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr.strip().split("\n")[-1]


# ---- marlin-convert


def test_a_conversion_and_its_words(models: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "deep" / "gptq"
    result = run(convert.main, models["marlin"], "--to", "gptq", "-o", output)
    assert result.exit_code == 0, result.output
    assert f"written    {output}" in result.stdout
    assert "format     marlin -> gptq (version 1), 14 linears, bit for bit" in result.stdout
    assert "convert: 100%" in result.stderr
    assert "warning: tensor parallel 2: model.layers.{0-1}.self_attn.o_proj: K = 128 / 2 = 64 is no" in result.stderr
    card = (output / "README.md").read_text()
    assert "| converted from | marlin (marlin), codes and scales unchanged |" in card
    assert "| method | rtn" in card, "the recipe is carried along"
    assert (output / "quantize_log.json").is_file()
    (output / "notes.txt").touch()
    again = ("--to", "gptq", "-o", output, "--overwrite")
    assert "holds notes.txt beside a model" in refused(convert.main, models["marlin"], *again)
    (output / "notes.txt").unlink()
    assert run(convert.main, models["marlin"], *again).exit_code == 0


def test_json_is_one_object(models: dict[str, Path], tmp_path: Path) -> None:
    result = run(
        convert.main, models["awq"], "--to", "marlin", "-o", tmp_path / "out", "--json", "--shard-size", "100KB"
    )
    report = json.loads(result.stdout)
    assert (report["source_format"], report["format"], report["linears"]) == ("awq", "marlin", 14)
    assert report["symmetric"] is False and report["bytes_after"] > 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_the_original_and_back(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.marlin.g128"
    assert run(convert.main, models["marlin"], "--to", "original", "-o", file).exit_code == 0
    arguments = (file, "--base", models["base"], "--to", "marlin", "-o", tmp_path / "back")
    assert run(convert.main, *arguments).exit_code == 0
    one, other = (load_file(path / "model.safetensors") for path in (models["marlin"], tmp_path / "back"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "a state dict has no config; give the model" in refused(
        convert.main, file, "--to", "gptq", "-o", tmp_path / "other"
    )
    assert "exists already" in refused(convert.main, models["marlin"], "--to", "original", "-o", file)


def test_refusals(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "is in the format marlin already" in refused(convert.main, models["marlin"], "--to", "marlin", "-o", out)
    assert "is not quantized" in refused(convert.main, models["base"], "--to", "gptq", "-o", out)
    assert "Invalid value for '--to'" in refused(convert.main, models["base"], "--to", "gguf", "-o", out)
    assert "cannot hold its zero points" in refused(convert.main, models["awq"], "--to", "original", "-o", out)
    assert "is the model itself" in refused(
        convert.main, models["awq"], "--to", "marlin", "-o", models["awq"], "--overwrite"
    )
    assert "exists already" in refused(convert.main, models["awq"], "--to", "marlin", "-o", models["marlin"])
    around = models["awq"].parent
    assert "holds the model" in refused(convert.main, models["awq"], "--to", "marlin", "-o", around, "--overwrite")
    file = models["base"] / "model.safetensors"
    arguments = (models["marlin"], "--to", "original", "-o", file, "--overwrite")
    assert "is no torch state dict; --overwrite replaces nothing else" in refused(convert.main, *arguments)
    assert "no such directory" in refused(convert.main, "./nowhere", "--to", "marlin", "-o", out)
    assert not list(tmp_path.iterdir())


# ---- marlin-quantize --format


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_quantizing_into_another_format_is_quantizing_and_converting(
    models: dict[str, Path], tmp_path: Path, to: str
) -> None:
    arguments = ("--method", "rtn", "--group-size", 128)
    result = run(quantize.main, models["base"], "-o", tmp_path / "out", "--format", to, *arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["format"] == to and report["output"] == str(tmp_path / "out")
    assert "warning: tensor parallel 2" in result.stderr
    assert run(convert.main, models["marlin"], "--to", to, "-o", tmp_path / "other").exit_code == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"], "nothing is left beside it"


def test_a_tuned_recipe_in_another_format(tmp_path: Path) -> None:
    """Blocks in one staging directory, the tuned model in another; what comes out is the latter, converted."""
    model, texts = save_character_model(tmp_path / "model"), tmp_path / "texts.jsonl"
    save_texts(texts)
    arguments = (model, "--dataset", texts, "--n-samples", 8, "--device", "cpu", "--preset", "best", "--tune-steps", 4,
                 "--tune-batch", 2, "--tune-written", 0, "--no-clip", "--tune-rate", 1e-2)  # fmt: skip
    result = run(quantize.main, *arguments, "-o", tmp_path / "out", "--format", "gptq", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tuning"]["codes_changed"] > 0 and report["output"] == str(tmp_path / "out")
    assert run(quantize.main, *arguments, "-o", tmp_path / "marlin").exit_code == 0
    assert run(convert.main, tmp_path / "marlin", "--to", "gptq", "-o", tmp_path / "other").exit_code == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(bool((tensor < 0).any()) for name, tensor in one.items() if name.endswith(".scales"))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["marlin", "model", "other", "out", "texts.jsonl"], "nothing is left beside it"


def test_bfloat16_models_in_formats_of_float16(tmp_path: Path) -> None:
    base = save_character_model(tmp_path / "base")
    other = save_tiny_model(tmp_path / "bf16", dtype=torch.bfloat16)
    arguments = ("--method", "rtn", "--group-size", 32)
    sentence = refused(
        quantize.main, other, "-o", tmp_path / "out", "--format", "gptq", *arguments, "--dtype", "bfloat16"
    )
    assert "--format gptq: it stores float16 scales, and the result would be bfloat16; use --dtype float16" in sentence
    assert run(quantize.main, other, "-o", tmp_path / "out", "--format", "awq", *arguments).exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert (tmp_path / "out" / "quantize_log.json").is_file() and base.is_dir()


def test_shapes_are_refused_before_the_work(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", hidden_size=120, intermediate_size=100, num_attention_heads=5,
                           num_key_value_heads=1)  # fmt: skip
    sentence = refused(quantize.main, base, "-o", tmp_path / "out", "--format", "awq", "--group-size", "-1")
    assert "gate_proj: awq cannot hold its shape [100, 120]: words hold 8 values" in sentence


def test_a_failed_conversion_keeps_the_work(models: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(export, "convert_checkpoint", fail)
    sentence = refused(quantize.main, models["base"], "-o", tmp_path / "out", "--format", "gptq", "--method", "rtn")
    assert sentence.endswith(f"the quantized model itself is safe in the Marlin directory {tmp_path}/out.marlin")
    assert marlin_gptq.load(tmp_path / "out.marlin") is not None


# ---- marlin-inspect


def test_inspect_says_what_it_is(models: dict[str, Path], tmp_path: Path) -> None:
    result = run(inspect.main, models["awq"])
    assert result.exit_code == 0, result.output
    assert "format     awq, 4 bits, group size 32, asymmetric (zero points), act-order no" in result.stdout
    assert "linears    14 quantized, 0 of the decoder blocks left in 16 bits" in result.stdout
    assert "model.layers.1.mlp.down_proj" in result.stdout and "128 × 256" in result.stdout
    assert "1 … 15" in result.stdout and "sha256" in result.stdout


def test_checksums_are_those_of_other_programs_and_of_all_formats(models: dict[str, Path], tmp_path: Path) -> None:
    import hashlib

    one = json.loads(run(inspect.main, models["awq"], "--json").stdout)
    content = (models["awq"] / "model.safetensors").read_bytes()
    assert one["checksums"]["model.safetensors"] == hashlib.sha256(content).hexdigest()
    digests = [linear["digest"] for linear in one["linears"]]
    assert len(set(digests)) == 14
    for to in ("marlin", "gptq", "compressed-tensors"):
        assert run(convert.main, models["awq"], "--to", to, "-o", tmp_path / to).exit_code == 0
        other = json.loads(run(inspect.main, tmp_path / to, "--json").stdout)
        assert [linear["digest"] for linear in other["linears"]] == digests
        assert [linear["scale_max"] for linear in other["linears"]] == [x["scale_max"] for x in one["linears"]]
        assert other["symmetric"] is False and other["group_size"] == 32
    assert any(linear["negative_scales"] for linear in one["linears"])
    shutil.copytree(tmp_path / "gptq", tmp_path / "changed")
    name = "model.layers.0.mlp.up_proj"
    flipped = load_file(content_of(tmp_path / "gptq"))[f"{name}.qweight"] ^ 1
    change_tensors(tmp_path / "changed", {f"{name}.qweight": flipped})
    changed = json.loads(run(inspect.main, tmp_path / "changed", "--json").stdout)
    assert [x["name"] for x, old in zip(changed["linears"], digests, strict=True) if x["digest"] != old] == [name]


def content_of(directory: Path) -> Path:
    return directory / "model.safetensors"


def test_verify_against_the_original(models: dict[str, Path], tmp_path: Path) -> None:
    for to in ("gptq", "awq", "compressed-tensors"):
        assert run(convert.main, models["marlin"], "--to", to, "-o", tmp_path / to).exit_code == 0
        found = json.loads(run(inspect.main, tmp_path / to, "--verify", models["base"], "--json").stdout)
        assert len(found["verified"]) == 14 and found["differing"] == []
        for one in found["verified"]:
            assert 0 < one["relative_error"] < 0.03
            assert 0.45 < one["largest"] < 0.504 and one["beyond"] == 0, "rounding to nearest: half a step"
        same = json.loads(run(inspect.main, tmp_path / to, "--verify", models["marlin"], "--json").stdout)
        assert {one["relative_error"] for one in same["verified"]} == {0.0}
    result = run(inspect.main, models["marlin"], "--verify", models["base"])
    assert "verified   relative error mean 0.0" in result.stdout and "is the original's" in result.stdout


def test_verify_finds_what_is_wrong(models: dict[str, Path], tmp_path: Path) -> None:
    stranger = save_tiny_model(tmp_path / "stranger", seed=5)
    sentence = refused(inspect.main, models["marlin"], "--verify", stranger)
    assert "q_proj: its relative error against" in sentence and "this is no quantization of that weight" in sentence
    wide = save_tiny_model(tmp_path / "wide", intermediate_size=512)
    change_tensors(wide, {k: v for k, v in load_file(content_of(models["base"])).items() if "attn" in k})
    assert "give the model this was made from" in refused(inspect.main, models["marlin"], "--verify", wide)
    shutil.copytree(models["marlin"], tmp_path / "changed")
    name = "model.layers.1.self_attn.v_proj.qweight"
    change_tensors(tmp_path / "changed", {name: load_file(content_of(models["marlin"]))[name] ^ 1})
    sentence = refused(inspect.main, tmp_path / "changed", "--verify", models["marlin"])
    assert "v_proj: " in sentence and "this is no conversion of it" in sentence
    norm = {"model.norm.weight": torch.full((128,), 3.0).half()}
    change_tensors(tmp_path / "changed", norm | {name: load_file(content_of(models["marlin"]))[name]})
    result = run(inspect.main, tmp_path / "changed", "--verify", models["base"])
    assert "differing  1 other tensors, first model.norm.weight" in result.stdout


def test_verify_knows_moved_groups(tmp_path: Path) -> None:
    """Steps follow their columns: the dense weight of an act-order file is the original here."""
    linears = save_foreign(tmp_path / "gptq", "gptq", act_order=True)
    base = save_tiny_model(tmp_path / "base")
    change_tensors(base, {f"{name}.weight": linear.dense().float() for name, linear in linears.items()})
    found = json.loads(run(inspect.main, tmp_path / "gptq", "--verify", base, "--json").stdout)
    assert found["act_order"] is True
    assert {(one["relative_error"], one["largest"], one["beyond"]) for one in found["verified"]} == {(0.0, 0.0, 0.0)}


def test_inspect_reads_state_dicts(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.marlin.g128"
    assert run(convert.main, models["marlin"], "--to", "original", "-o", file).exit_code == 0
    result = run(inspect.main, file, "--base", models["base"])
    assert result.exit_code == 0 and "format     original, 4 bits, group size 128" in result.stdout
    assert "model.marlin.g128" in result.stdout.split("sha256")[-1]
    assert "is not quantized" in refused(inspect.main, models["base"])
