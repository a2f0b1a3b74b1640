"""modeling/staged.py and staging.py: a block in stages gives what passes from its start give, for one forward."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXPERT_MODELS, random_samples, save_tiny_model
from torch import Tensor, nn

from marlin_gptq import QuantizationConfig, pipeline, quantize_model
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.job import Plan
from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.architecture import block_linears
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.observe import collect_hessians, stages
from marlin_gptq.modeling.packed import Packed
from marlin_gptq.modeling.staging import Staging, staging
from marlin_gptq.work_directory import WorkDirectory

CPU = torch.device("cpu")
WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
# Queries, keys and values behind two linears each, so four stages before o; no experts.
COMPRESSED = {
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4, "first_k_dense_replace": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, window": ("mistral", {"sliding_window": 16}),
    "qwen2, mixed windows": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32}),
    "phi3": ("phi3", {}),
    "cohere": ("cohere", {}),
    "deepseek_v3": ("deepseek_v3", COMPRESSED),
    "mixtral": ("mixtral", EXPERT_MODELS["mixtral"]),
    "qwen2_moe": ("qwen2_moe", EXPERT_MODELS["qwen2_moe"]),
}


def quantize(
    source: Path, output: Path, staged: bool, monkeypatch: pytest.MonkeyPatch, work: WorkDirectory | None = None,
    pack_tokens: int = 200, hessian_bytes: int | None = None, samples: list[Tensor] | None = None,
    device: torch.device = CPU, **changes: Any,
) -> dict[str, Tensor]:  # fmt: skip
    plan = Plan(pack_tokens=pack_tokens, hessian_bytes=hessian_bytes, staged=staged)
    monkeypatch.setattr(pipeline, "_plan", lambda *_: plan)
    config = QuantizationConfig(**({"true_sequential": True, "clip": False} | changes))
    quantize_model(source, output, config, samples or random_samples(12), device=device, work=work)
    store = TensorStore(output)
    return {name: store.get(name) for name in store.names}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("case", MODELS)
def test_bits_are_those_of_passes_from_the_start(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    architecture, changes = MODELS[case]
    source = save_tiny_model(tmp_path / "source", architecture, initializer_range=0.1, **changes)
    expected = quantize(source, tmp_path / "plain", False, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert_equal(quantize(source, tmp_path / "staged", True, monkeypatch), expected)
    assert "in stages" not in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"pack_tokens": 0},
        {"correct_target": 0.5, "refine_sweeps": 1, "act_order": "groups"},
        {"correct_target": 0.5, "token_cap": 4.0},
        {"correct_target": 0.5, "equal_samples": True},
        {"tune_block_steps": 3},
        {"pack": True, "correct_target": 0.5},
        {"skip": ("q_proj", "v_proj", "o_proj")},
        {"skip": ("k_proj", "up_proj", "down_proj")},
        {"skip": (r"layers\.0",)},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_bits_are_the_same_with_every_technique(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    source = save_tiny_model(tmp_path / "source", initializer_range=0.1)
    samples = random_samples(40) if "pack" in changes else random_samples(12)
    expected = quantize(source, tmp_path / "plain", False, monkeypatch, samples=samples, **changes)
    assert_equal(quantize(source, tmp_path / "staged", True, monkeypatch, samples=samples, **changes), expected)


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_samples_of_experts_weigh_the_same_in_stages(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, changes = MODELS[case]
    source = save_tiny_model(tmp_path / "source", architecture, initializer_range=0.1, **changes)
    plain = quantize(source, tmp_path / "plain", False, monkeypatch, equal_samples=True)
    assert_equal(quantize(source, tmp_path / "staged", True, monkeypatch, equal_samples=True), plain)
    other = quantize(source, tmp_path / "other", True, monkeypatch)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_a_run_goes_on_in_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is memory for stages may differ from one day to the next: the inputs of every block do not."""
    source = save_tiny_model(tmp_path / "source")
    for number, staged in enumerate((True, False)):
        work = WorkDirectory.new(tmp_path / f"work{number}", {})
        expected = quantize(source, tmp_path / f"first{number}", staged, monkeypatch, work=work)
        work.close()
        (tmp_path / f"work{number}" / "block-00001.json").unlink()
        again = WorkDirectory.resume(tmp_path / f"work{number}")
        found = quantize(source, tmp_path / f"second{number}", not staged, monkeypatch, work=again)
        again.close()
        assert_equal(found, expected)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_experts_in_many_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, true_sequential: bool) -> None:
    """One Hessian a pass: each expert ends before the linear that is looked at, or before it begins."""
    source = save_tiny_model(tmp_path / "source", "qwen2_moe", initializer_range=0.1, **EXPERT_MODELS["qwen2_moe"])
    options: dict[str, Any] = {"true_sequential": true_sequential, "skip": ("self_attn", "shared")}
    expected = quantize(source, tmp_path / "plain", False, monkeypatch, **options)
    found = quantize(source, tmp_path / "many", True, monkeypatch, hessian_bytes=1, **options)
    assert_equal(found, expected)


# ---- what it costs


def counted(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, staged: bool) -> Counter[tuple[str, int]]:
    """(linear, tokens) → calls, of all linears of the blocks and of attention: 12 samples of 90 tokens, 2 to a pack."""
    calls: Counter[tuple[str, int]] = Counter()
    names: dict[nn.Module, str] = {}
    block, forward, attention = BlockStream.block, nn.Linear.forward, nn.functional.scaled_dot_product_attention

    def named(stream: BlockStream, index: int) -> Any:
        names.update({linear: f"{index}.{name}" for name, linear in stream.block_module(index).named_modules()})
        return block(stream, index)

    def counting(linear: nn.Linear, x: Tensor) -> Tensor:
        calls[names[linear], x.numel() // x.shape[-1]] += 1
        return forward(linear, x)

    def attending(query: Tensor, *args: Any, **options: Any) -> Tensor:
        calls["attention", query.shape[2]] += 1
        return attention(query, *args, **options)

    monkeypatch.setattr(BlockStream, "block", named)
    monkeypatch.setattr(nn.Linear, "forward", counting)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attending)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 96, (90,), generator=generator) for _ in range(12)]
    quantize(source, output, staged, monkeypatch, samples=samples)
    return calls


@pytest.mark.parametrize("staged", [True, False])
def test_every_linear_and_attention_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staged: bool) -> None:
    """Beside few tokens that the block is tried with: 2 for what it returns, 90 for the order of its linears, 64 twice
    for its stages."""
    calls = counted(save_tiny_model(tmp_path / "source"), tmp_path / "out", monkeypatch, staged)
    linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    linears += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    passes = [1] * 7 if staged else [4, 4, 4, 3, 2, 2, 1]
    last = [1] * 6 + [0] if staged else [3, 3, 3, 2, 1, 1, 0]  # nothing comes behind it
    assert [calls[f"0.{name}", 180] for name in linears] == [6 * count for count in passes]
    assert [calls[f"1.{name}", 180] for name in linears] == [6 * count for count in last]
    assert calls["attention", 90] == 2 + 12 * (2 if staged else 7)
    assert {tokens for name, tokens in calls if name != "attention"} <= {2, 3, 7, 64, 90, 180}
    assert all(calls[f"{block}.{name}", 64] == 2 * staged for block in (0, 1) for name in linears)


@pytest.mark.parametrize("staged", [True, False])
def test_experts_run_once_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staged: bool) -> None:
    """Each of 1080 tokens passes two experts; the few more are those that a block is tried with."""
    source = save_tiny_model(tmp_path / "source", "mixtral", **EXPERT_MODELS["mixtral"])
    calls = counted(source, tmp_path / "out", monkeypatch, staged)

    def passes(block: int, ending: str) -> float:
        ends = [name for name, _ in calls if name.startswith(f"{block}.") and name.endswith(ending)]
        return sum(calls[name, tokens] * tokens for name, tokens in calls if name in ends) / (2 * 1080)

    tried = 90 + 17 + 2 + 4 * 64 * staged
    for block, behind in ((0, 1), (1, 0)):  # nothing comes behind the last one
        for ending, expected in (
            (".w1", 1 if staged else 1 + behind),
            (".w3", 1 if staged else 1 + behind),
            (".w2", behind),
        ):
            assert expected <= passes(block, ending) <= expected + tried / 1080, (block, ending)


def test_what_waits_is_attentions_output_and_the_inputs_of_down(tmp_path: Path) -> None:
    stream, samples, found, in_order, linears = begun(tmp_path)
    with stream.block(0):
        staged = found.of(stream, 0, samples)
        kept = []
        for stage in in_order:
            collect_hessians(stream, 0, stage, linears, staged)
            kept.append(staged.kept_bytes())
            collect_hessians(stream, 0, stage, linears, staged)
            assert staged.kept_bytes() == kept[-1], "a pass may be repeated"
            staged.go_on()
        staged.advance()
    tokens = sum(length for _, length in samples.activations.shapes)
    assert kept == [0, 4 * 128 * tokens, 4 * 128 * tokens, 4 * (128 + 256) * tokens]
    assert staged.kept_bytes() == 0


# ---- what cannot be run in stages


def begun(tmp_path: Path) -> tuple[BlockStream, Packed, Staging, list[list[list[str]]], dict[str, nn.Linear]]:
    """A model's stream, inputs of its first block in packs, and how that is run in stages."""
    stream = BlockStream(save_tiny_model(tmp_path / "model", dtype=torch.float32), device=CPU)
    samples = random_samples(5)
    hidden = Activations([(1, len(sample)) for sample in samples], 128, torch.float32, CPU)
    for position, sample in enumerate(samples):
        hidden.put(position, stream.embed(sample[None]))
    with stream.block(0) as block:
        linears = block_linears(block, stream.block_name(0))
        in_order = stages(stream, 0, linears, hidden[0])
        found = staging(stream, 0, in_order, hidden[0])
        assert found is not None
        return stream, Packed(hidden, [range(2), range(2, 5)]), found, in_order, linears


def test_a_block_that_remembers_its_runs_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stages must come to the bits of one run: else passes begin at the start, and the log says so once."""
    stream, samples, _, in_order, _ = begun(tmp_path)
    runs = []

    def restless(x: Tensor) -> Tensor:
        runs.append(1)
        return nn.functional.silu(x) * len(runs)

    with stream.block(0) as block:
        monkeypatch.setattr(block.mlp.act_fn, "forward", restless)
        assert staging(stream, 0, in_order, samples.activations[0]) is None

    source = save_tiny_model(tmp_path / "source")
    expected = quantize(source, tmp_path / "plain", False, monkeypatch)
    monkeypatch.setattr("marlin_gptq.block_solver.staging", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        assert_equal(quantize(source, tmp_path / "out", True, monkeypatch), expected)
    assert caplog.text.count("model.layers.0: its linears cannot be calibrated in stages of one forward") == 1
    assert caplog.text.count("in stages") == 1


def test_an_output_that_is_written_into_is_not_kept(tmp_path: Path) -> None:
    stream, samples, plain, in_order, _ = begun(tmp_path)
    assert [sorted(step.finished) for step in plain.steps] == [[], [], ["self_attn"], ["self_attn"]]
    tails = [{}, {"self_attn": "self_attn.o_proj"}, {}, {"mlp": "mlp.down_proj"}]
    assert [dict(step.tails) for step in plain.steps] == tails
    with stream.block(0) as block:
        own = block.post_attention_layernorm.forward
        block.self_attn.register_forward_hook(lambda _, args, output: setattr(block, "last", output[0]))
        block.post_attention_layernorm.forward = lambda x: (block.last.mul_(2), own(x))[1]
        found = staging(stream, 0, in_order, samples.activations[0])
        assert found is not None
        assert not any({"self_attn", "self_attn.o_proj"} & step.finished for step in found.steps)
        assert not any("self_attn" in step.tails for step in found.steps)
        assert found.steps[3].tails == {"mlp": "mlp.down_proj"}


def test_an_error_leaves_the_block_as_it_was(tmp_path: Path) -> None:
    stream, samples, found, in_order, linears = begun(tmp_path)
    with stream.block(0) as block:
        staged = found.of(stream, 0, samples)
        collect_hessians(stream, 0, in_order[0], linears, staged)
        staged.go_on()
        hook = linears[in_order[1][0][0]].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            for run in staged:
                run()
        hook.remove()
        for module in block.modules():
            assert "forward" not in vars(module) and not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["llama", "qwen3", "mixtral"])
def test_bits_are_the_same_on_a_gpu(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, changes = MODELS[case]
    source = save_tiny_model(tmp_path / "source", architecture, initializer_range=0.1, **changes)
    device = torch.device("cuda")
    expected = quantize(source, tmp_path / "plain", False, monkeypatch, device=device)
    assert_equal(quantize(source, tmp_path / "staged", True, monkeypatch, device=device), expected)
