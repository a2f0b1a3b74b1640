"""modeling/blocks.py and architecture.py: the streamed walk equals the model's own forward, block by block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import save_tiny_model, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.errors import CheckpointError, InputError, QuantizationError
from marlin_gptq.modeling import asides
from marlin_gptq.modeling.architecture import block_linears, decoder_blocks, read_config, require_divisible
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.observe import collect_hessians, stages

CPU = torch.device("cpu")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama gqa": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama rope scaling": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 mixed windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 32}),
    "phi3": ("phi3", {}),
}


def walk(stream: BlockStream, ids: Tensor) -> Tensor:
    hidden = stream.embed(ids)
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = stream.run(index, hidden)
    return stream.head(hidden)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_walk_equals_the_models_own_forward(case: str, tmp_path: Path) -> None:
    architecture, changes = ARCHITECTURES[case]
    directory = save_tiny_model(tmp_path / "model", architecture, dtype=torch.float32, **changes)
    ids = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(walk(BlockStream(directory, device=CPU), ids), expected)


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_positions_are_asked_for_once_where_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """Positions and masks of a length serve every block and pass; beyond the memory for them they are made again."""
    monkeypatch.setattr(asides, "_REMEMBERED_BYTES", memory)
    directory = save_tiny_model(tmp_path / "model", "mistral", dtype=torch.float32, sliding_window=16)
    stream = BlockStream(directory, device=CPU)
    asked = []
    stream.model.get_decoder().register_forward_pre_hook(lambda *_: asked.append(1))
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 96, (1, length), generator=generator) for length in (40, 25, 40)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for sample in samples:
        torch.testing.assert_close(walk(stream, sample), model(sample).logits)
    outside = 2 * len(samples)  # embedding and head
    assert len(asked) == outside + (2 if memory else stream.n_blocks * len(samples))


def test_only_the_entered_block_holds_weights(tmp_path: Path) -> None:
    stream = BlockStream(save_tiny_model(tmp_path / "model"), device=CPU)
    assert stream.dtype == torch.float32 and stream.stored_dtype == torch.float16
    with stream.block(0) as block:
        assert all(not parameter.is_meta for parameter in block.parameters())
        assert all(parameter.is_meta for parameter in stream.block_module(1).parameters())
        with pytest.raises(RuntimeError, match="block 1 is not loaded"):
            stream.run(1, torch.zeros(1, 2, 128))
    assert all(parameter.is_meta for parameter in block.parameters())
    stream.embed(torch.zeros(1, 2, dtype=torch.long))
    assert not stream.model.get_input_embeddings().weight.is_meta
    stream.release()
    assert all(parameter.is_meta for parameter in stream.model.parameters())


def test_a_block_is_left_clean_after_an_error(tmp_path: Path) -> None:
    stream = BlockStream(save_tiny_model(tmp_path / "model"), device=CPU)
    ids = torch.zeros(1, 3, dtype=torch.long)
    before = walk(stream, ids)
    with pytest.raises(KeyboardInterrupt), stream.block(0):
        raise KeyboardInterrupt
    assert torch.equal(walk(stream, ids), before)


def test_linears_stand_in_order_and_skip_works(tmp_path: Path) -> None:
    stream = BlockStream(save_tiny_model(tmp_path / "model"), device=CPU)
    names = [name.split(".", 3)[3] for name in block_linears(stream.block_module(1), "model.layers.1")]
    assert [name.split(".")[1] for name in names] == (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    config = QuantizationConfig(skip=("mlp", r"layers\.1.*v_proj"))
    kept = block_linears(stream.block_module(1), "model.layers.1", config)
    assert [name.rsplit(".", 1)[1] for name in kept] == ["q_proj", "k_proj", "o_proj"]


def test_group_sizes_that_do_not_divide_name_the_layer(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model", intermediate_size=160)
    stream = BlockStream(directory, device=CPU)
    linears = block_linears(stream.block_module(0), "model.layers.0")
    with pytest.raises(
        InputError,
        match=r"model\.layers\.0\.mlp\.down_proj: group size 128 does not divide its 160 input features; "
        r"use --group-size 32",
    ):
        require_divisible(linears, 128)
    require_divisible(linears, -1)
    stream = BlockStream(save_tiny_model(tmp_path / "odd", intermediate_size=172), device=CPU)
    with pytest.raises(InputError, match="use --group-size -1, or --skip"):  # 64 would fit the others, not all
        require_divisible(block_linears(stream.block_module(0), "model.layers.0"), 128)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gpt2", {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 96}, "Conv1D .*: this model cannot be quant"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 32}, r"GptOssExperts .*; --skip '\\.experts\\.' leaves"),
    ],
)
def test_other_architectures_stop_by_name(tmp_path: Path, architecture: str, changes: dict, message: str) -> None:
    from transformers import AutoConfig

    base = tiny_config() if architecture == "gpt2" else None
    config = AutoConfig.for_model(architecture, **changes) if base is not None else tiny_config(architecture, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        stream = BlockStream(tmp_path / "model", device=CPU)
        block_linears(stream.block_module(0), stream.block_name(0))


def test_models_that_are_no_causal_language_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match="model_type 'vit' is not a causal language model"):
        read_config(tmp_path)
    for content, name in (
        ({"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]}, "LlamaForQuestionAnswering"),
        ({"model_type": "florence2", "is_encoder_decoder": True}, "florence2"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"holds a {name}; a causal language model"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": "LlamaForCausalLM"}))
    with pytest.raises(InputError, match="architectures: got 'LlamaForCausalLM', expected a list of names"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": "many"}))
    with pytest.raises(InputError, match="not understood by transformers"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="expected one list of 3 decoder blocks, found none"):
        decoder_blocks(nn.Linear(2, 2), tiny_config(num_hidden_layers=3))


def edit(directory: Path, change: dict[str, Tensor | None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def test_missing_and_misshaped_tensors_are_found_before_any_work(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = save_tiny_model(tmp_path / "missing")
    edit(directory, {name: None})
    with pytest.raises(CheckpointError, match=f"the tensor {name} is missing"):
        BlockStream(directory, device=CPU)
    directory = save_tiny_model(tmp_path / "shape")
    edit(directory, {name: torch.zeros(256, 64)})
    with pytest.raises(CheckpointError, match=r"up_proj.weight: got \[256, 64\], expected \[256, 128\]"):
        BlockStream(directory, device=CPU)
    directory = save_tiny_model(tmp_path / "head")
    edit(directory, {"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"the tensor lm_head.weight is missing"):
        BlockStream(directory, device=CPU)


def test_nan_weights_name_the_layer(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = save_tiny_model(tmp_path / "model")
    weight = load_file(directory / "model.safetensors")[name]
    weight[3, 5] = torch.nan
    weight[3, 6] = torch.inf
    edit(directory, {name: weight})
    stream = BlockStream(directory, device=CPU)
    with pytest.raises(QuantizationError, match=f"{name}: 2 of 32768 values are NaN or Inf"), stream.block(1):
        pass


def test_unknown_tensors_are_listed_and_rotary_tables_ignored(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model")
    edit(
        directory,
        {"model.extra": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)},
    )
    assert BlockStream(directory, device=CPU).weights.unknown_tensors() == ["model.extra"]


def test_calibration_stops_behind_the_inputs_it_wants(tmp_path: Path) -> None:
    stream = BlockStream(save_tiny_model(tmp_path), device=torch.device("cpu"))
    hidden = torch.randn(1, 9, stream.config.hidden_size, generator=torch.Generator().manual_seed(0))
    ran: list[str] = []
    with stream.block(0) as block:
        linears = block_linears(block, stream.block_name(0))
        groups = [group for stage in stages(stream, 0, linears, hidden) for group in stage]
        for name, linear in linears.items():
            linear.register_forward_hook(lambda *_, name=name: ran.append(name.rpartition(".")[2]))
        whole = collect_hessians(stream, 0, groups, linears, [(hidden, (9,))])
        assert ran == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]  # not the last one, behind all
        ran.clear()
        first = collect_hessians(stream, 0, groups[:1], linears, [(hidden, (9,)), (hidden, (9,))])
        assert ran == []
        assert first.tokens == {groups[0][0]: 18} and whole.tokens == {group[0]: 9 for group in groups}
        torch.testing.assert_close(first.hessians[groups[0][0]].mean(), whole.hessians[groups[0][0]].mean())
        ran.clear()
        stream.run(0, hidden)
        assert len(ran) == len(linears)  # nothing is left behind that would stop it
