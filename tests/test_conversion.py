"""conversion/: every format into every other, bit for bit; what cannot be held is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import LINEARS, Plain, change_config, change_tensors, dense_model, save_foreign
from helpers import random_samples, save_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import marlin_gptq
from marlin_gptq import (
    CheckpointError,
    InputError,
    MarlinLinear,
    QuantizationConfig,
    convert_checkpoint,
    quantize_model,
)
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.conversion.source import Source
from marlin_gptq.eval.original_checkpoint import load_original

FORMATS = ("gptq", "awq", "compressed-tensors")
IDS = torch.arange(1, 40)[None]


def convert(source: Path, to: str, **options: Any) -> Path:
    output = source.parent / f"{source.name}-{to}-{options.get('gptq_version', '')}"
    convert_checkpoint(source, output, to, **options)
    return output


def quantized(directory: Path, group_size: int = 32, skip: tuple[str, ...] = (), **changes: Any) -> Path:
    source = save_tiny_model(directory.parent / f"{directory.name}-base", **changes)
    config = QuantizationConfig(method="rtn", group_size=group_size, skip=skip)
    quantize_model(source, directory, config, [], device=torch.device("cpu"))
    return directory


def same(one: Path, other: Path) -> None:
    """Two directories hold the same tensors, dtype and bits, and the same settings."""
    a, b = TensorStore(one), TensorStore(other)
    assert sorted(a.names) == sorted(b.names)
    for name in a.names:
        assert a.dtype(name) == b.dtype(name), name
        assert torch.equal(a.get(name), b.get(name)), name


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---- from our format and back


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


def test_negative_scales_keep_their_bits(tmp_path: Path) -> None:
    marlin = quantized(tmp_path / "marlin")
    tensors = load_file(marlin / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name][:, ::3] *= -1
        tensors[name][0, :2] = torch.tensor([-0.0, 0.0])
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


# ---- from other tools' files, packed word by word


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
    from transformers import AutoModelForCausalLM

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


# ---- the original repository's state dicts


@pytest.mark.parametrize("group_size", [128, -1])
def test_original_state_dicts(tmp_path: Path, group_size: int) -> None:
    marlin = quantized(tmp_path / "marlin", group_size)
    file = tmp_path / "model.marlin.g128"
    convert_checkpoint(marlin, file, "original")
    content = torch.load(file, weights_only=True)
    store = TensorStore(marlin)
    for name in [name.removesuffix(".qweight") for name in store.names if name.endswith(".qweight")]:
        assert torch.equal(content.pop(f"{name}.B"), store.get(f"{name}.qweight"))
        assert torch.equal(content.pop(f"{name}.s"), store.get(f"{name}.scales"))
    assert set(content) <= set(store.names)

    base = tmp_path / "marlin-base"
    assert torch.equal(logits(load_original(base, file)), logits(marlin_gptq.load(marlin)))
    assert torch.equal(logits(marlin_gptq.load(file, base=base)), logits(marlin_gptq.load(marlin)))
    convert_checkpoint(file, tmp_path / "back", "marlin", base=base)
    same(tmp_path / "back", marlin)
    with pytest.raises(InputError, match="exists already"):
        convert_checkpoint(marlin, file, "original")
    with pytest.raises(InputError, match="give the model it was made from as base"):
        convert_checkpoint(file, tmp_path / "other", "gptq")
    with pytest.raises(InputError, match="is quantized itself"):
        marlin_gptq.load(file, base=marlin)
    assert not list(tmp_path.glob(".*partial*"))


def test_what_the_original_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="q_proj: original cannot hold groups of 32: it knows 128 and -1"):
        convert_checkpoint(quantized(tmp_path / "marlin"), tmp_path / "file", "original")
    save_foreign(tmp_path / "awq", "awq", symmetric=False, group_size=128)
    with pytest.raises(InputError, match="q_proj: original cannot hold its zero points: the symmetric form has none"):
        convert_checkpoint(tmp_path / "awq", tmp_path / "file", "original")


# ---- refusals


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
        ("gptq", {"sym": "no"}, "sym: got 'no', expected true or false"),
        ("gptq", {"quant_method": "hqq"}, "quant_method: got 'hqq', which is none of those that can be read"),
        ("awq", {"version": "gemv"}, "version: got 'gemv', expected 'gemm'"),
        ("compressed-tensors", {"format": "float-quantized"}, "format: got 'float-quantized', expected 'pack-quant"),
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
    change_tensors(tmp_path / "plain", {f"{Q}.weight_zero_point": torch.full((128, 4), 9, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"weight_zero_point: got 9 to 9, expected -8 to 7"):
        convert(tmp_path / "plain", "marlin")


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
