"""Whatever files call their tensors, and whichever class loads them: each weight is where it belongs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import random_samples
from helpers_architectures import IDS, SIZES, distance, first_output, loaded, put_back, save_of_class, seeing
from safetensors.torch import load_file, save_file

from marlin_gptq import CheckpointError, InputError, MarlinLinear, QuantizationConfig, load, quantize_model
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import Override
from marlin_gptq.conversion.convert import convert_checkpoint
from marlin_gptq.eval.whole_model import load_whole
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.names import usual_names
from marlin_gptq.modeling.outline import outline
from marlin_gptq.requirements import require_quantizable
from marlin_gptq.tuning.student import Student

CPU = torch.device("cpu")
RTN = QuantizationConfig(method="rtn", group_size=32)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}
LINEAR_ATTENTION = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
# Class, config, settings; how many linears are quantized.
CLASSES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "lm_head is embed_out": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"num_key_value_heads": None}, 8),
    "experts fused in the files": ("GraniteMoeForCausalLM", "GraniteMoeConfig", EXPERTS, 32),
    "router is gate": ("PhimoeForCausalLM", "PhimoeConfig", EXPERTS, 32),
    "statics of the router": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 128, "moe_layer_start_index": 1},
        7 + 4 + 12 + 3,
    ),
    "convolutions": ("Lfm2ForCausalLM", "Lfm2Config", {"layer_types": ["conv", "full_attention"]}, 12),
    "norms by head": ("CohereForCausalLM", "CohereConfig", {"use_qk_norm": True}, 14),
    "linear attention": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", LINEAR_ATTENTION, 3 * 8 + 7),
    "no head": ("LlamaModel", "LlamaConfig", {}, 14),
    "no head, another name": ("GPTNeoXModel", "GPTNeoXConfig", {"num_key_value_heads": None}, 8),
    "classes of texts": ("Qwen2ForSequenceClassification", "Qwen2Config", {}, 14),
    "classes of tokens": ("LlamaForTokenClassification", "LlamaConfig", {}, 14),
}


def source_of(directory: Path, case: str) -> tuple[Path, str]:
    class_name, config, settings, _ = CLASSES[case]
    made = {key: value for key, value in (SIZES | settings).items() if value is not None}
    return save_of_class(directory, class_name, getattr(transformers, config)(**made)), class_name


@pytest.mark.parametrize("case", CLASSES)
def test_the_result_computes_what_its_decoded_weights_do(tmp_path: Path, case: str) -> None:
    source, class_name = source_of(tmp_path / "source", case)
    require_quantizable(source, tmp_path / "out", RTN)
    quantize_model(source, tmp_path / "out", RTN, [], device=CPU)
    model, stock = loaded(tmp_path / "out", class_name), loaded(source, class_name, dtype=torch.float32)
    found = first_output(model)
    assert put_back(stock, model) == CLASSES[case][3]
    torch.testing.assert_close(found, first_output(stock), rtol=1e-4, atol=1e-5)
    torch.nn.Module.half(model).save_pretrained(tmp_path / "again")
    assert torch.equal(first_output(loaded(tmp_path / "again", class_name)), found)


def test_names_and_sizes_are_known_from_the_config(tmp_path: Path) -> None:
    for number, case in enumerate(("router is gate", "no head")):
        source, _ = source_of(tmp_path / f"source {number}", case)
        quantize_model(source, tmp_path / f"out {number}", RTN, [], device=CPU)
        held = {name.removesuffix(".qweight") for name in TensorStore(tmp_path / f"out {number}").names}
        described = {linear.name for block in outline(source, RTN).blocks for linear in block.quantized}
        assert described - held == set() or case == "no head"
        before = {name for name in TensorStore(source).names if "norm" in name or "embed" in name or "gate.w" in name}
        assert before <= held


def test_files_keep_their_names(tmp_path: Path) -> None:
    source, class_name = source_of(tmp_path / "source", "router is gate")
    model = getattr(transformers, class_name).from_pretrained(source)
    usual = usual_names(model)
    assert usual("model.layers.0.mlp.router.weight") == "model.layers.0.block_sparse_moe.gate.weight"
    names = BlockStream(source, device=CPU).weights.names
    assert names.stored("model.layers.0.mlp.router.weight") == "model.layers.0.block_sparse_moe.gate.weight"
    assert names.written("model.layers.1.mlp.experts.3.w1.qweight") == (
        "model.layers.1.block_sparse_moe.experts.3.w1.qweight"
    )
    assert names.stored("model.layers.9.mlp.router.weight") is None


def test_the_tuned_model_reads_and_names_what_files_call_otherwise(tmp_path: Path) -> None:
    source, class_name = source_of(tmp_path / "source", "lm_head is embed_out")
    assert "embed_out.weight" in TensorStore(source).names
    quantize_model(source, tmp_path / "out", RTN, [], device=CPU)
    student = Student(source, tmp_path / "out", tune_codes=True, length=24, device=CPU)
    expected = first_output(loaded(tmp_path / "out", class_name))
    assert distance(first_output(student.model), expected) < 1e-3
    after = TensorStore(tmp_path / "out")
    tuned = dict(student.tensors(torch.float16))
    assert tuned.keys() <= set(after.names) and all(tuned[name].shape == after.shape(name) for name in tuned)


# ---- other classes of one directory


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model whose settings name layers from the first letter on."""
    root = tmp_path_factory.mktemp("causal")
    source = save_of_class(root / "source", "LlamaForCausalLM", transformers.LlamaConfig(**SIZES))
    rules = (Override(r"^model\.layers\.0\.mlp\.up_proj$", 16), Override(r"^model\.layers\.1\.", 4, 64))
    quantize_model(
        source, root / "out", QuantizationConfig(method="rtn", group_size=32, overrides=rules), [], device=CPU
    )
    return root / "out"


def test_the_body_alone(causal: Path, tmp_path: Path) -> None:
    whole, body = loaded(causal, "LlamaForCausalLM"), loaded_body(causal)
    expected = first_output(whole.model)
    assert torch.equal(first_output(body), expected)
    assert isinstance(body.layers[0].mlp.up_proj, torch.nn.Linear)
    torch.nn.Module.half(body).save_pretrained(tmp_path / "body")
    assert torch.equal(first_output(loaded_body(tmp_path / "body")), expected)


def loaded_body(directory: Path) -> Any:
    body, info = transformers.AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and all(name.endswith("lm_head.weight") for name in info["unexpected_keys"])
    return torch.nn.Module.float(body).eval()


@pytest.mark.parametrize("auto", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_a_new_head_on_a_quantized_body(causal: Path, auto: str) -> None:
    model, info = getattr(transformers, auto).from_pretrained(causal, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) <= {"score.weight", "score.bias"}
    expected = first_output(loaded(causal, "LlamaForCausalLM").model)
    assert torch.equal(first_output(torch.nn.Module.float(model.model).eval()), expected)


def test_a_class_with_other_names_is_refused_and_never_random(causal: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.qweight: missing from"):
        transformers.AutoModelForQuestionAnswering.from_pretrained(causal)


def test_a_body_without_a_head_cannot_be_a_language_model(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", "no head")
    config = QuantizationConfig(two_sided=True)
    with pytest.raises(InputError, match=r"two_sided: got true for a LlamaModel, .*--no-two-sided"):
        require_quantizable(source, tmp_path / "out", config)
    tuned = QuantizationConfig(tune_steps=10)
    with pytest.raises(InputError, match=r"tune_steps: got 10 for a LlamaModel, .*--tune-steps 0"):
        quantize_model(source, tmp_path / "out", tuned, random_samples(4), device=CPU)
    report = quantize_model(source, tmp_path / "out", QuantizationConfig(), random_samples(8), device=CPU)
    assert len(report.records) == 14 and all(0 < record.relative_error < 0.1 for record in report.records)
    message = "holds a LlamaModel, which gives no logits of the next token"
    with pytest.raises(InputError, match=message):
        load_whole(tmp_path / "out", CPU)
    with pytest.raises(InputError, match=message):
        _walk(BlockStream(tmp_path / "out", device=CPU), IDS)


def _walk(stream: BlockStream, ids: torch.Tensor) -> torch.Tensor:
    hidden = stream.embed(ids)
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = stream.run(index, hidden)
    return stream.head(hidden)


# ---- what is no linear


def test_buffers_in_the_files_are_read_and_kept(tmp_path: Path) -> None:
    """DeepSeek's router adds a buffer to its scores: zeros when it is made, learnt values in the files."""
    settings = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 64, "kv_lora_rank": 64,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 4,
    }  # fmt: skip
    config = transformers.DeepseekV3Config(**(SIZES | settings))
    source = save_of_class(tmp_path / "source", "DeepseekV3ForCausalLM", config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = load_file(source / "model.safetensors")
    kept = tensors[name] = tensors[name].float() * 1.0001  # float32, as DeepSeek's files have it
    assert kept.abs().min() > 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    stream = BlockStream(source, device=CPU)
    model = loaded(source, "DeepseekV3ForCausalLM", dtype=torch.float32)
    torch.testing.assert_close(_walk(stream, IDS), first_output(model), rtol=1e-4, atol=1e-5)
    report = quantize_model(source, tmp_path / "out", RTN, [], device=CPU)
    after = TensorStore(tmp_path / "out")
    assert torch.equal(after.get(name), kept) and report.bytes_after == sum(map(after.size, after.names))


def test_what_stays_as_it_is_is_told(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", "convolutions")
    (note,) = require_quantizable(source, tmp_path / "out", RTN)
    assert note.startswith("1 tensors of the blocks that no linear holds") and "conv.conv.weight) stay as they" in note


@pytest.mark.parametrize(
    ("class_name", "config", "owner"),
    [("GptOssForCausalLM", "GptOssConfig", "experts"), ("DbrxForCausalLM", "DbrxConfig", "mlp")],
)
def test_advice_for_experts_of_another_form_works(tmp_path: Path, class_name: str, config: str, owner: str) -> None:
    made = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    if class_name.startswith("Dbrx"):
        ffn = {"hidden_size": 128, "ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2}
        made = {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 96, "ffn_config": ffn}
        made["attn_config"] = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    source = save_of_class(tmp_path / "source", class_name, getattr(transformers, config)(**made))
    with pytest.raises(InputError, match=rf"is not understood; --skip '\\.{owner}\\.' leaves what is like it"):
        require_quantizable(source, tmp_path / "out", RTN)
    skipping = QuantizationConfig(method="rtn", group_size=32, skip=(rf"\.{owner}\.",))
    quantize_model(source, tmp_path / "out", skipping, [], device=CPU)
    model, stock = loaded(tmp_path / "out", class_name), loaded(source, class_name, dtype=torch.float32)
    found = first_output(model)
    assert put_back(stock, model) > 0
    torch.testing.assert_close(found, first_output(stock), rtol=1e-4, atol=1e-5)


# ---- models that see


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2.5-vl", "mistral3", "idefics3"])
def test_the_text_part_is_quantized_and_the_rest_carried(tmp_path: Path, name: str) -> None:
    class_name, config = seeing(name)
    source = save_of_class(tmp_path / "source", class_name, config)
    (source / "preprocessor_config.json").write_text('{"size": 28}')
    report = quantize_model(source, tmp_path / "out", QuantizationConfig(group_size=64), random_samples(6), device=CPU)
    assert len(report.records) == 14 and report.unknown_tensors == []
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}'
    model = loaded(tmp_path / "out", "AutoModelForImageTextToText")
    stock = loaded(source, class_name, dtype=torch.float32)
    assert type(model) is type(stock)
    auto = "AutoModelForCausalLM" if name == "gemma3" else "AutoModelForImageTextToText"  # transformers has both for it
    assert f"model = {auto}.from_pretrained(" in (tmp_path / "out" / "README.md").read_text()
    pictures: dict[str, torch.Tensor] = {}
    if name in ("llava", "gemma3"):
        ids = IDS.clone()
        ids[:, 2:6] = 5
        pictures = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28)}
        if name == "gemma3":
            pictures["token_type_ids"] = (ids == 5).long()
    found, seen = first_output(model), first_output(model, **pictures)
    before, after = TensorStore(source), TensorStore(tmp_path / "out")
    carried = [key for key in before.names if "vision" in key or "visual" in key or "projector" in key]
    assert carried and all(torch.equal(before.get(key), after.get(key)) for key in carried)
    assert put_back(stock, model) == 14
    # Gemma rounds its table of embeddings' factor to the dtype that it is loaded in.
    assert distance(found, first_output(stock)) < 1e-3 > distance(seen, first_output(stock, **pictures))
    assert distance(_walk(BlockStream(tmp_path / "out", device=CPU), IDS), found) < 1e-3


def test_experts_turned_in_the_files(tmp_path: Path) -> None:
    """Files of Qwen3-VL hold [experts, in, out], which transformers turns."""
    class_name, config = seeing("qwen3-vl-moe")
    source = save_of_class(tmp_path / "source", class_name, config)
    tensors = load_file(source / "model.safetensors")
    experts = [name for name in tensors if ".experts." in name]
    assert len(experts) == 4
    (tmp_path / "turned").mkdir()
    turned = {name: tensors[name].transpose(1, 2).contiguous() for name in experts}
    save_file(tensors | turned, tmp_path / "turned" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "turned" / "config.json").write_text((source / "config.json").read_text())
    stock = loaded(tmp_path / "turned", class_name, dtype=torch.float32)
    assert torch.equal(first_output(stock), first_output(loaded(source, class_name, dtype=torch.float32)))
    for name in ("source", "turned"):
        quantize_model(tmp_path / name, tmp_path / f"out {name}", RTN, [], device=CPU)
    one, other = (TensorStore(tmp_path / f"out {name}") for name in ("source", "turned"))
    assert set(one.names) == set(other.names) and all(torch.equal(one.get(name), other.get(name)) for name in one.names)
    model = loaded(tmp_path / "out turned", class_name)
    found = first_output(model)
    assert put_back(stock, model) == 2 * (4 + 12)
    assert distance(found, first_output(stock)) < 1e-4


def test_blocks_that_text_does_not_pass_are_refused(tmp_path: Path) -> None:
    sight = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
    }  # fmt: skip
    config = transformers.MllamaConfig(
        text_config=SIZES | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        vision_config=sight,
        image_token_index=5,
    )
    source = save_of_class(tmp_path / "source", "MllamaForConditionalGeneration", config)
    with pytest.raises(InputError, match=r"its decoder blocks are not all passed by text \(not number 1\)"):
        quantize_model(source, tmp_path / "out", QuantizationConfig(), random_samples(4), device=CPU)
    assert not (tmp_path / "out").exists()


def test_a_model_that_sees_converts_and_loads(tmp_path: Path) -> None:
    class_name, config = seeing("llava")
    source = save_of_class(tmp_path / "source", class_name, config)
    skipping = QuantizationConfig(method="rtn", group_size=32, skip=(r"^model\.language_model\.layers\.0\.mlp",))
    quantize_model(source, tmp_path / "out", skipping, [], device=CPU)
    expected = first_output(loaded(tmp_path / "out", class_name))
    convert_checkpoint(tmp_path / "out", tmp_path / "other", "compressed-tensors")
    settings = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]
    assert any("vision_tower" in name for name in settings["ignore"])
    convert_checkpoint(tmp_path / "other", tmp_path / "back", "marlin")
    for name in ("out", "other", "back"):
        found = torch.nn.Module.float(load(tmp_path / name, device=CPU)).eval()
        assert torch.equal(first_output(found), expected), name
    assert torch.equal(first_output(loaded(tmp_path / "back", class_name)), expected)
    layers = loaded_body(tmp_path / "back").language_model.layers
    assert not isinstance(layers[0].mlp.down_proj, MarlinLinear) and isinstance(layers[1].mlp.down_proj, MarlinLinear)


def test_the_end_to_end_tuning_knows_text_alone(tmp_path: Path) -> None:
    class_name, config = seeing("llava")
    source = save_of_class(tmp_path / "source", class_name, config)
    tuned = QuantizationConfig(tune_steps=10)
    with pytest.raises(InputError, match=r"tune_steps: got 10 for a LlavaForConditionalGeneration, and .* text alone"):
        require_quantizable(source, tmp_path / "out", tuned)


def test_files_in_another_form_than_renamed(tmp_path: Path) -> None:
    """Tensors that neither the model nor a renaming of transformers knows, in the place of some that are needed."""
    source, _ = source_of(tmp_path / "source", "no head")
    tensors = load_file(source / "model.safetensors")
    tensors["layers.0.self_attn.qkv.weight"] = tensors.pop("layers.0.self_attn.q_proj.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"files hold layers\.0\.self_attn\.qkv\.weight and no model\.layers\.0\."):
        BlockStream(source, device=CPU)
