"""conversion/: every format into every other, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign import LINEARS, change_config, change_tensors, dense_model, save_foreign
from helpers import random_samples
from helpers_conversion import FORMATS, convert, logits, quantized, same
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import marlin_gptq
from marlin_gptq import CheckpointError, InputError, MarlinLinear, convert_checkpoint
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.conversion.source import Source


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_marlin_to_all_and_back(tmp_path: Path, group_size: int, dtype: torch.dtype) -> None:
    marlin = quantized(tmp_path / "marlin", group_size, dtype=dtype)
    settings = json.loads((marlin / "config.json").read_text())["quantization_config"]
    for to in FORMATS:
        there = convert(marlin, to)
        back = convert(there, "marlin")
        same(marlin, back)
        again = json.loads((back / "config.json").read_text())
        assert again["quantization_config"]["group_size"] == settings["group_size"]
        assert again["dtype"] == str(dtype).removeprefix("torch.")


def test_negative_and_subnormal_scales_keep_their_bits(tmp_path: Path) -> None:
    marlin = quantized(tmp_path / "marlin")
    tensors = load_file(marlin / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name][:, ::3] *= -1
        tensors[name][:, 1::3] *= 2.0**-12
        tensors[name][0, :2] = torch.tensor([-0.0, 0.0])
    assert 0 < abs(float(tensors[name][0, 4])) < torch.finfo(torch.float16).tiny
    save_file(tensors, marlin / "model.safetensors", metadata={"format": "pt"})
    for to in FORMATS:
        back = TensorStore(convert(convert(marlin, to), "marlin"))
        for name, tensor in tensors.items():
            assert torch.equal(back.get(name).view(torch.int16), tensor.view(torch.int16))


def test_shapes_that_need_padding_in_our_layout(tmp_path: Path) -> None:
    """N = 24 and 120, K = 120: stored as 64, 128 and 128; other formats hold the plain shape."""
    sizes = {"hidden_size": 120, "intermediate_size": 88, "num_attention_heads": 5, "num_key_value_heads": 1}
    marlin = quantized(tmp_path / "marlin", -1, **sizes)
    assert TensorStore(marlin).shape("model.layers.0.self_attn.k_proj.qweight") == (8, 128)
    for to in FORMATS:
        there = convert(marlin, to)
        same(marlin, convert(there, "marlin"))
    assert TensorStore(tmp_path / "marlin-gptq-").shape("model.layers.0.self_attn.k_proj.qweight") == (15, 24)


def test_what_stays_in_16_bits_is_named_to_every_engine(tmp_path: Path) -> None:
    marlin = quantized(tmp_path / "marlin", skip=(r"layers\.1\.mlp\.down_proj", "o_proj"))
    kept = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]

    def settings(directory: Path) -> dict:
        return json.loads((directory / "config.json").read_text())["quantization_config"]

    gptq = settings(convert(marlin, "gptq"))
    assert gptq["dynamic"] == {f"-:^{name}$".replace(".", r"\."): {} for name in kept}
    assert gptq["modules_in_block_to_quantize"] == [[name] for name in LINEARS if "o_proj" not in name]
    assert settings(convert(marlin, "awq"))["modules_to_not_convert"] == kept
    assert settings(convert(marlin, "compressed-tensors"))["ignore"] == ["lm_head", *kept]
    for to in FORMATS:
        back = convert(tmp_path / f"marlin-{to}-", "marlin")
        same(marlin, back)
        patterns = settings(back)["skip"]
        assert patterns == [r"\.self_attn\.o_proj$", r"^model\.layers\.1\.mlp\.down_proj$"]
        assert torch.equal(logits(marlin_gptq.load(back)), logits(marlin_gptq.load(marlin)))


def test_shards_stream_and_stay_whole(tmp_path: Path) -> None:
    marlin = quantized(tmp_path / "marlin")
    many = tmp_path / "many"
    steps: list[tuple[int, int]] = []
    convert_checkpoint(
        marlin, many, "gptq", shard_size=60_000, progress=lambda done, total: steps.append((done, total))
    )
    assert len(list(many.glob("*.safetensors"))) > 3 and steps == [(i + 1, 14) for i in range(14)]
    same(marlin, convert(many, "marlin"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("kind", "version"), [("gptq", 1), ("gptq", 2), ("awq", 1), ("compressed-tensors", 1)])
def test_foreign_files_keep_every_bit_on_every_road(tmp_path: Path, kind: str, version: int, symmetric: bool) -> None:
    source = tmp_path / "source"
    linears = save_foreign(source, kind, version=version, symmetric=symmetric)
    expected = logits(dense_model(source, linears))
    stored = load_file(source / "model.safetensors")
    for to in ("marlin", *FORMATS):
        if to == kind:
            continue
        there = convert(source, to)
        model = marlin_gptq.load(there)
        marlin_gptq.split_projections(model)
        for name, linear in linears.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, MarlinLinear) and (layer.qzeros is None) == symmetric
            assert torch.equal(layer.dequantize(), linear.dense())
        assert (logits(model).float() - expected).abs().max() < 0.02
        back = convert(there, kind, **({"gptq_version": version} if kind == "gptq" else {}))
        again = load_file(back / "model.safetensors")
        assert stored.keys() == again.keys()
        for name, tensor in stored.items():
            assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, name


@pytest.mark.parametrize(("kind", "symmetric"), [("gptq", True), ("gptq", False), ("compressed-tensors", True)])
def test_act_order_gathers_its_inputs(tmp_path: Path, kind: str, symmetric: bool) -> None:
    """g_idx that is no order of the columns: bits survive, logits are those of the dense model."""
    source = tmp_path / "source"
    linears = save_foreign(source, kind, act_order=True, symmetric=symmetric)
    expected = logits(dense_model(source, linears))
    loaded, marlin = marlin_gptq.load(source), convert(source, "marlin")
    settings = json.loads((marlin / "config.json").read_text())["quantization_config"]
    assert settings["desc_act"] is True and settings["sym"] is symmetric

    for model in (loaded, marlin_gptq.load(marlin), AutoModelForCausalLM.from_pretrained(marlin)):
        for name, linear in linears.items():
            assert torch.equal(model.get_submodule(name).dequantize(), linear.dense())
        assert (logits(model).float() - expected).abs().max() < 0.02
    back = load_file(convert(marlin, kind) / "model.safetensors") if symmetric else {}
    for name, tensor in back.items():
        assert torch.equal(load_file(source / "model.safetensors")[name], tensor)
    with pytest.raises(InputError, match=r"q_proj: awq cannot hold its act-order groups \(a g_idx that is not static"):
        convert(marlin, "awq")


def test_the_layer_itself_gathers(tmp_path: Path) -> None:
    """Against the product written out, in the dtype of the kernel's road, not the dense one."""
    linears = save_foreign(tmp_path / "source", "gptq", act_order=True)
    model = marlin_gptq.load(tmp_path / "source")
    name, linear = next(iter(linears.items()))
    x = torch.randn(5, linear.codes.shape[1], dtype=torch.float16)
    y = model.get_submodule(name)(x).float()
    expected = x.float() @ linear.dense().t()
    assert (y - expected).abs().max() <= 2**-10 * expected.abs().max()


def test_a_loaded_model_saves_as_marlin(tmp_path: Path) -> None:
    save_foreign(tmp_path / "source", "awq", symmetric=False)
    model = marlin_gptq.load(tmp_path / "source")
    model.save_pretrained(tmp_path / "saved")
    same(tmp_path / "saved", convert(tmp_path / "source", "marlin"))
    assert torch.equal(logits(marlin_gptq.load(tmp_path / "saved")), logits(model))


def test_bfloat16_comes_back_and_float16_stays(tmp_path: Path) -> None:
    """A bfloat16 model with float16 scales runs in float16, unless all of them are bfloat16 values."""
    linears = save_foreign(tmp_path / "source", "gptq", dtype=torch.bfloat16)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "marlin", "marlin")
    assert report.dtype == "float16"
    assert "dtype: config.json said bfloat16, the scales are float16; the result runs in float16" in report.warnings
    rounded = {f"{name}.scales": linear.scales.bfloat16().half().t().contiguous() for name, linear in linears.items()}
    change_tensors(tmp_path / "source", rounded)
    assert convert_checkpoint(tmp_path / "source", tmp_path / "other", "marlin").dtype == "bfloat16"
    model = marlin_gptq.load(tmp_path / "other")
    assert model.dtype == torch.bfloat16
    halved = marlin_gptq.load(tmp_path / "source", dtype=torch.float16)
    assert halved.dtype == torch.float16 and logits(halved).dtype == torch.float16


def test_zero_biases_of_old_tools_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    linears = save_foreign(source, "gptq")
    change_tensors(source, {f"{name}.bias": torch.zeros(one.codes.shape[0]).half() for name, one in linears.items()})
    marlin = convert(source, "marlin")
    assert not any(name.endswith(".bias") for name in TensorStore(marlin).names)
    change_tensors(source, {"model.layers.0.mlp.up_proj.bias": torch.ones(256).half()})
    with pytest.raises(CheckpointError, match=r"up_proj\.bias: holds values, but LlamaConfig has no bias there"):
        marlin_gptq.load(source)


def test_biases_of_the_architecture_survive(tmp_path: Path) -> None:
    source = tmp_path / "source"
    linears = save_foreign(source, "gptq", architecture="qwen2")
    model = marlin_gptq.load(source)
    assert "model.layers.1.self_attn.q_proj.bias" in model.state_dict()
    assert (logits(model).float() - logits(dense_model(source, linears))).abs().max() < 0.02
    same(convert(source, "marlin"), convert(convert(source, "awq"), "marlin"))


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    for kind, file in (("gptq", "quantize_config.json"), ("awq", "quant_config.json")):
        source = tmp_path / kind
        linears = save_foreign(source, kind)
        settings = json.loads((source / "config.json").read_text())["quantization_config"]
        settings.pop("quant_method")
        if kind == "awq":
            settings = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
        (source / file).write_text(json.dumps(settings))
        change_config(source, quantization_config=None)
        (source / "model.safetensors").rename(source / f"{kind}_model-4bit-32g.safetensors")
        name, linear = next(iter(linears.items()))
        assert torch.equal(Source.of_directory(source).linear(name).dequantize(), linear.dense())
        assert not (convert(source, "marlin") / file).exists()


def test_an_imported_model_runs_block_by_block_too(tmp_path: Path) -> None:
    """The road of marlin-eval: a directory with zero points and moved groups, streamed."""
    from marlin_gptq.modeling.blocks import BlockStream

    save_foreign(tmp_path / "source", "gptq", symmetric=False, act_order=True)
    marlin = convert(tmp_path / "source", "marlin")
    stream = BlockStream(marlin, device=torch.device("cpu"))
    (sample,) = random_samples(1)
    hidden = stream.embed(sample[None])
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = stream.run(index, hidden)
    expected = marlin_gptq.load(marlin)(sample[None]).logits
    assert (stream.head(hidden) - expected.float()).abs().max() < 0.02


def test_zero_points_of_old_compressed_tensors(tmp_path: Path) -> None:
    """Signed and unpacked; zeros of a symmetric file, which some tools write, change nothing."""
    linears = save_foreign(tmp_path / "source", "compressed-tensors", symmetric=False)
    signed = {f"{name}.weight_zero_point": (one.zeros - 8).to(torch.int8) for name, one in linears.items()}
    change_tensors(tmp_path / "source", signed)
    opened = Source.of_directory(tmp_path / "source")
    assert all(torch.equal(opened.linear(name).dequantize(), one.dense()) for name, one in linears.items())
    plain = save_foreign(tmp_path / "plain", "compressed-tensors")
    change_tensors(tmp_path / "plain", {name: torch.zeros_like(tensor) for name, tensor in signed.items()})
    opened = Source.of_directory(tmp_path / "plain")
    assert all(torch.equal(opened.linear(name).dequantize(), one.dense()) for name, one in plain.items())
    nine = torch.full((128, 4), 9, dtype=torch.int8)
    change_tensors(tmp_path / "plain", {"model.layers.0.self_attn.q_proj.weight_zero_point": nine})
    with pytest.raises(CheckpointError, match=r"weight_zero_point: got 9 to 9, expected -8 to 7"):
        convert(tmp_path / "plain", "marlin")


def test_group_indices_of_minus_one_are_no_order(tmp_path: Path) -> None:
    linears = save_foreign(tmp_path / "plain", "compressed-tensors")
    save_foreign(tmp_path / "marked", "compressed-tensors")
    marks = {f"{name}.weight_g_idx": torch.full((one.codes.shape[1],), -1) for name, one in linears.items()}
    change_tensors(tmp_path / "marked", marks)  # the package wrote such until September 2024
    same(convert(tmp_path / "plain", "marlin"), convert(tmp_path / "marked", "marlin"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_last_groups_that_are_not_full_become_smaller_whole_ones(tmp_path: Path, kind: str, symmetric: bool) -> None:
    linears = save_foreign(tmp_path / "source", kind, group_size=128, intermediate_size=288, symmetric=symmetric)
    assert linears["model.layers.0.mlp.down_proj"].scales.shape[1] == 3  # 128, 128 and 32 features
    marlin = convert(tmp_path / "source", "marlin")
    source = Source.of_directory(marlin)
    for name, linear in linears.items():
        assert torch.equal(source.linear(name).dequantize(), linear.dense())
    dense = logits(dense_model(tmp_path / "source", linears))
    assert torch.allclose(logits(marlin_gptq.load(tmp_path / "source").float()), dense, atol=0.02)
    with pytest.raises(InputError, match="down_proj: awq cannot hold groups of 32 beside groups of 128"):
        convert(marlin, "awq")


@pytest.mark.parametrize(
    ("kind", "packing"),
    [("gptq", "auto_round:auto_gptq"), ("gptq", None), ("awq", "auto_round:auto_awq")],
)
def test_the_label_of_auto_round(tmp_path: Path, kind: str, packing: str | None) -> None:
    save_foreign(tmp_path / "plain", kind)
    save_foreign(tmp_path / "labelled", kind)
    label = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int", "iters": 200}
    label |= {"packing_format": packing, "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}}}
    change_config(tmp_path / "labelled", quantization_config=label)
    marlin = convert(tmp_path / "labelled", "marlin")
    same(convert(tmp_path / "plain", "marlin"), marlin)
    assert '"iters": 200' in (marlin / "README.md").read_text()  # what the result has no place for


def test_another_gptq_version_keeps_the_other_settings(tmp_path: Path) -> None:
    save_foreign(tmp_path / "source", "gptq")
    settings = json.loads((tmp_path / "source" / "config.json").read_text())["quantization_config"]
    more = {"model_name_or_path": "somebody/model", "static_groups": True, "desc_act": False}
    change_config(tmp_path / "source", quantization_config=settings | more)
    config = json.loads((convert(tmp_path / "source", "gptq", gptq_version=2) / "config.json").read_text())
    written = config["quantization_config"]
    assert written["model_name_or_path"] == "somebody/model" and written["static_groups"] is True
    assert written["checkpoint_format"] == "gptq_v2"


def test_old_pickles_of_autogptq(tmp_path: Path) -> None:
    save_foreign(tmp_path / "source", "gptq")
    weights = tmp_path / "source" / "model.safetensors"
    want = convert(tmp_path / "source", "marlin").rename(tmp_path / "want")
    old = tmp_path / "source" / "gptq_model-4bit-128g.bin"
    torch.save(load_file(weights), old, _use_new_zipfile_serialization=False)
    weights.unlink()
    settings = json.loads((tmp_path / "source" / "config.json").read_text())["quantization_config"]
    (tmp_path / "source" / "quantize_config.json").write_text(json.dumps(settings))
    change_config(tmp_path / "source", quantization_config=None)
    same(want, convert(tmp_path / "source", "marlin"))
