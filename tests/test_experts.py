"""modeling/experts.py: mixture-of-experts layers, from the files to the quantized model and back."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers import EXPERT_MODELS, random_hessian, random_samples, save_tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from marlin_gptq import (
    CheckpointError,
    MarlinLinear,
    QuantizationConfig,
    load,
    pipeline,
    quantize_model,
    split_projections,
)
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import Override
from marlin_gptq.conversion.convert import convert_checkpoint
from marlin_gptq.modeling.architecture import block_linears
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.experts import Expert, Experts, expert_lists, fused_source, projection_names
from marlin_gptq.modeling.names import usual_names
from marlin_gptq.modeling.observe import collect_hessians, stages
from marlin_gptq.quantization.hessian import Hessian

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("architecture", EXPERT_MODELS)
IDS = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(3))


def source_of(tmp_path: Path, architecture: str, **changes) -> Path:
    return save_tiny_model(tmp_path / "source", architecture, **(EXPERT_MODELS[architecture] | changes))


def run_blocks(stream: BlockStream, ids: torch.Tensor) -> torch.Tensor:
    hidden = stream.embed(ids)
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = stream.run(index, hidden)
    return stream.head(hidden)


@EVERY
def test_separate_experts_compute_what_the_fused_ones_do(tmp_path: Path, architecture: str) -> None:
    """The slow twin is transformers' own model with its fused experts."""
    source = source_of(tmp_path, architecture)
    stream = BlockStream(source, device=CPU)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(run_blocks(stream, IDS), model(IDS).logits, rtol=1e-5, atol=1e-6)
    assert stream.weights.unknown_tensors() == []


@EVERY
def test_linears_are_those_of_every_expert_and_no_router(tmp_path: Path, architecture: str) -> None:
    stream = BlockStream(source_of(tmp_path, architecture), device=CPU)
    names = list(block_linears(stream.block_module(1), "model.layers.1"))
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 12 and not any(name.endswith("gate") for name in names)
    assert len(names) == 16 + 3 * (architecture == "qwen2_moe")  # its shared expert has three more


@EVERY
def test_it_quantizes_loads_runs_and_saves(tmp_path: Path, architecture: str) -> None:
    source = source_of(tmp_path, architecture)
    report = quantize_model(source, tmp_path / "out", QuantizationConfig(), random_samples(12), device=CPU)
    linears = 2 * (16 + 3 * (architecture == "qwen2_moe"))
    assert len(report.records) == linears and all(0 < record.relative_error < 0.1 for record in report.records)
    before, after = TensorStore(source), TensorStore(tmp_path / "out")
    routers = [name for name in before.names if "gate.weight" in name]
    assert routers and all(torch.equal(before.get(name), after.get(name)) for name in routers)
    # Names on disk are those of the source, with qweight and scales in place of weight.
    plain = {name.removesuffix(".qweight").removesuffix(".scales").removesuffix(".weight") for name in after.names}
    assert plain == {name.removesuffix(".weight") for name in before.names}

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert sum(name.endswith(".qweight") for name in model.state_dict()) == linears
    with torch.no_grad():
        logits = model(IDS).logits.float()
        exact = AutoModelForCausalLM.from_pretrained(source)(IDS).logits.float()
        streamed = run_blocks(BlockStream(tmp_path / "out", device=CPU), IDS)
    assert 0 < float((logits - exact).norm() / exact.norm()) < 0.3
    assert float((streamed - logits).norm() / logits.norm()) < 0.01  # float32 against float16
    assert model.generate(IDS[:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 7)
    model.save_pretrained(tmp_path / "again")
    again = TensorStore(tmp_path / "again")
    assert set(again.names) == set(after.names)
    assert all(torch.equal(again.get(name), after.get(name)) for name in after.names)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_some_experts_in_full_precision(tmp_path: Path, architecture: str) -> None:
    source = source_of(tmp_path, architecture)
    rules = (Override(r"layers\.0.*experts\.1\.", 16), Override(r"layers\.1.*experts", 16))
    config = QuantizationConfig(overrides=(*rules, Override(r"experts\.3\.", 4, 32)))
    report = quantize_model(source, tmp_path / "out", config, random_samples(12), device=CPU)
    assert len(report.records) == 4 + 9 + 4
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    experts = expert_lists(model.model.layers[0])["mlp.experts"]
    first = experts[1].names[0]
    weight = TensorStore(source).get(usual_names(model)(f"model.layers.0.mlp.experts.1.{first}.weight"))
    assert torch.equal(experts[1].get_submodule(first).weight, weight)
    split_projections(model)
    layer = experts[3].get_submodule(first)
    assert isinstance(layer, MarlinLinear) and layer.group_size == 32
    model.save_pretrained(tmp_path / "again")
    after, again = TensorStore(tmp_path / "out"), TensorStore(tmp_path / "again")
    assert set(after.names) == set(again.names)
    assert all(torch.equal(again.get(name), after.get(name)) for name in after.names)


def test_experts_fused_in_the_files_are_read_by_parts(tmp_path: Path) -> None:
    source = source_of(tmp_path, "qwen3_moe")
    fused = tmp_path / "fused"
    fused.mkdir()
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        pairs = [
            torch.cat([tensors.pop(f"{prefix}.{e}.gate_proj.weight"), tensors.pop(f"{prefix}.{e}.up_proj.weight")])
            for e in range(4)
        ]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack(pairs)
        tensors[f"{prefix}.down_proj"] = torch.stack([tensors.pop(f"{prefix}.{e}.down_proj.weight") for e in range(4)])
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    (fused / "config.json").write_text((source / "config.json").read_text())
    plain, parts = (BlockStream(directory, device=CPU) for directory in (source, fused))
    assert torch.equal(run_blocks(plain, IDS), run_blocks(parts, IDS)) and parts.weights.unknown_tensors() == []
    for directory, name in ((source, "a"), (fused, "b")):
        quantize_model(directory, tmp_path / name, QuantizationConfig(method="rtn"), [], device=CPU)
    a, b = TensorStore(tmp_path / "a"), TensorStore(tmp_path / "b")
    assert set(a.names) == set(b.names) and all(torch.equal(a.get(name), b.get(name)) for name in a.names)

    tensors["model.layers.1.mlp.experts.down_proj"] = tensors["model.layers.1.mlp.experts.down_proj"][:3].clone()
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1\.mlp\.experts\.down_proj: holds 3 experts, config\.json names more"):
        BlockStream(fused, device=CPU)


def test_where_fused_files_hold_a_projection(tmp_path: Path) -> None:
    names = projection_names(BlockStream(source_of(tmp_path, "qwen3_moe"), device=CPU).model)
    prefix = "model.layers.0.mlp.experts"
    both = f"{prefix}.gate_up_proj"
    assert fused_source(f"{prefix}.2.gate_proj.weight", names, (64, 128)) == (both, (2, slice(0, 64)))
    assert fused_source(f"{prefix}.2.up_proj.weight", names, (64, 128)) == (both, (2, slice(64, 128)))
    assert fused_source(f"{prefix}.2.down_proj.weight", names, (128, 64)) == (f"{prefix}.down_proj", (2, slice(None)))
    assert fused_source("model.layers.0.mlp.gate.weight", names, (4, 128)) is None


# ---- calibration


def test_each_expert_sees_the_tokens_routed_to_it(tmp_path: Path) -> None:
    """The slow twin: route every token by hand, one Hessian at a time."""
    stream = BlockStream(source_of(tmp_path, "mixtral"), device=CPU)
    samples = [stream.embed(sample[None]) for sample in random_samples(20, longest=100)]
    with stream.block(0) as block:
        linears = block_linears(block, "model.layers.0")
        seen: list[tuple[torch.Tensor, ...]] = []
        hook = block.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
        order = stages(stream, 0, linears, samples[0])
        seen.clear()
        alone = [(sample, ()) for sample in samples]
        found = collect_hessians(stream, 0, [group for groups in order for group in groups], linears, alone)
        hook.remove()
        assert [len(groups) for groups in order] == [1, 1, 4, 4]
        assert order[2][3] == ["model.layers.0.mlp.experts.3.w1", "model.layers.0.mlp.experts.3.w3"]
        assert not found.filled
        for number in range(4):
            routed = torch.cat([x[(chosen == number).any(dim=1)] for x, chosen, _ in seen])
            gate = f"model.layers.0.mlp.experts.{number}.w1"
            assert found.tokens[gate] == len(routed) > 128
            torch.testing.assert_close(found.hessians[gate].mean(), 2 * routed.t() @ routed / len(routed))
            inner = block.mlp.experts[number].inner(routed)
            mean = found.hessians[f"model.layers.0.mlp.experts.{number}.w2"].mean()
            torch.testing.assert_close(mean, 2 * inner.t() @ inner / len(routed))


@pytest.mark.parametrize("true_sequential", [False, True])
def test_experts_with_few_tokens_are_said_and_handled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, true_sequential: bool
) -> None:
    """A router that never chooses expert 2 of the first layer: its Hessian is that of all tokens of the layer."""
    source = source_of(tmp_path, "qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1.0)
    router = tensors["model.layers.0.mlp.gate.weight"]
    tensors["model.layers.0.input_layernorm.weight"].fill_(1.0)
    router.zero_()
    router[[0, 1, 3]] = 0.01 * torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).half()
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 4 * embedding.abs().max()  # a feature all tokens share tells the router to leave expert 2 out
    router[:, 0], router[2, 0] = 1.0, -1.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    samples = random_samples(12)
    config = QuantizationConfig(true_sequential=true_sequential)
    with caplog.at_level(logging.WARNING, logger=pipeline.__name__):
        report = quantize_model(source, tmp_path / "out", config, samples, device=CPU)
    records = {record.name: record for record in report.records}
    lonely = [records[f"model.layers.0.mlp.experts.2.{name}_proj"] for name in ("gate", "up", "down")]
    assert [record.tokens for record in lonely] == [0, 0, 0]
    assert all(0 < record.relative_error < 0.1 and record.damp_percent == 0.1 for record in lonely)
    assert "model.layers.0.mlp.experts.2.gate_proj 0" in caplog.text and "more calibration text helps" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits.isfinite().all()


def test_a_hessian_is_filled_up_to_its_features() -> None:
    few, prior = Hessian(8, CPU), Hessian(8, CPU)
    inputs = torch.randn(3, 8)
    few.add(inputs)
    prior.sum, prior.tokens, prior.total = random_hessian(8, seed=1) * 50, 50, 50.0
    expected = (3 * few.mean() + 5 * prior.mean()) / 8
    few.fill_up(prior, 8)
    torch.testing.assert_close(few.mean(), expected)
    assert few.tokens == 8
    before = few.mean().clone()
    few.fill_up(prior, 8)  # enough already: unchanged
    assert torch.equal(few.mean(), before)
    nothing = Hessian(8, CPU)
    nothing.fill_up(prior, 8)
    torch.testing.assert_close(nothing.mean(), prior.mean())


def test_experts_without_tokens_are_not_called() -> None:
    def expert() -> Expert:
        made = Expert(("a", "b", "c"), [nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)], torch.relu)
        made.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        return made

    calls: list[int] = []
    experts = Experts([expert() for _ in range(3)])
    x, weights = torch.randn(5, 4), torch.rand(5, 2)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [2, 0]])
    found = experts(x, chosen, weights)
    assert calls == [5, 5]
    for token in range(5):
        row = x[token : token + 1]
        expected = sum(weights[token, rank] * experts[int(chosen[token, rank])](row) for rank in (0, 1))
        torch.testing.assert_close(found[token : token + 1], expected)
    assert experts(x[:0], chosen[:0], weights[:0]).shape == (0, 4)


@EVERY
@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
def test_it_converts_and_loads_from_other_formats(tmp_path: Path, architecture: str, layout: str) -> None:
    source = source_of(tmp_path, architecture)
    quantize_model(source, tmp_path / "out", QuantizationConfig(method="rtn"), [], device=CPU)
    convert_checkpoint(tmp_path / "out", tmp_path / "other", layout)
    convert_checkpoint(tmp_path / "other", tmp_path / "back", "marlin")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    for name in ("out", "other", "back"):
        assert torch.equal(load(tmp_path / name, device=CPU)(IDS).logits, expected)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
