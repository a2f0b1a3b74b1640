"""modeling/packed.py: samples that share a pass come out as each does alone, and what cannot share one does not."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXPERT_MODELS, embedded, loud_model, one_by_one, random_samples, save_tiny_model
from torch import Tensor, nn

from marlin_gptq import QuantizationConfig, pipeline, quantize_model
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import PRESETS
from marlin_gptq.formats import marlin
from marlin_gptq.job import Plan
from marlin_gptq.modeling.architecture import block_linears
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.observe import collect_hessians, stages
from marlin_gptq.modeling.packed import PACK_TOKENS, Packed, joined_arguments, kind_of, packs_of, within_samples
from marlin_gptq.work_directory import WorkDirectory

CPU = torch.device("cpu")
WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
# name → (architecture, changes, whether all samples of up to 40 tokens may share a pass)
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {"attention_bias": True}, True),
    "mistral, longer window": ("mistral", {"sliding_window": 64}, True),
    "mistral, shorter window": ("mistral", {"sliding_window": 16}, False),
    "qwen2": ("qwen2", {}, True),
    "qwen2, mixed windows": ("qwen2", WINDOWS, False),
    "qwen3": ("qwen3", {"head_dim": 32}, True),
    "mixtral": ("mixtral", EXPERT_MODELS["mixtral"], True),
    "qwen2_moe": ("qwen2_moe", EXPERT_MODELS["qwen2_moe"], True),
}


# ---- packs


def test_packs_are_filled_greedily_and_in_order() -> None:
    kinds = ["a"] * 6
    assert packs_of([30, 60, 20, 20, 70, 5], kinds, 100) == [range(0, 2), range(2, 4), range(4, 6)]
    assert packs_of([30, 60, 20, 300, 70, 5], kinds, 100) == [range(0, 3), range(3, 4), range(4, 6)], (
        "the longest rules"
    )
    assert packs_of([1, 1, 1, 1], ["a", "b", "b", None], 9) == [range(0, 1), range(1, 3), range(3, 4)]
    assert packs_of([1, 1], [None, None], 9) == [range(0, 1), range(1, 2)]
    assert packs_of([], [], 9) == []


@pytest.mark.parametrize("tokens", [1, 50, 100, PACK_TOKENS])
def test_every_sample_is_in_one_pack_that_is_not_too_long(tokens: int) -> None:
    lengths = [len(sample) for sample in random_samples(60)]
    packs = packs_of(lengths, ["a"] * len(lengths), tokens)
    assert [position for pack in packs for position in pack] == list(range(len(lengths)))
    sums = [sum(lengths[position] for position in pack) for pack in packs]
    assert max(sums) <= max(tokens, *lengths)
    for (used, _), (_, after) in pairwise(zip(sums, packs, strict=True)):
        assert used + lengths[after.start] > max(tokens, *lengths), "another sample would have fitted"


def test_arguments_are_joined_or_not_understood() -> None:
    def arguments(length: int, **more: Any) -> tuple[tuple, dict]:
        tables = (torch.full((1, length, 4), float(length)), torch.zeros(1, length, 4))
        known = {"position_ids": torch.arange(length)[None], "cache_position": torch.arange(length)}
        return (None,), {"position_embeddings": tables, "use_cache": False} | known | more

    assert kind_of(arguments(3), 3) == kind_of(arguments(1), 1) is not None
    args, kwargs = joined_arguments([arguments(3), arguments(1), arguments(2)])
    assert args == (None,) and kwargs["use_cache"] is False
    assert kwargs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]] and kwargs["cache_position"].tolist() == [
        0, 1, 2, 0, 0, 1,
    ]  # fmt: skip
    assert kwargs["position_embeddings"][0][0, :, 0].tolist() == [3, 3, 3, 1, 2, 2]
    for strange in (
        {"attention_mask": torch.zeros(1, 1, 3, 3)},
        {"attention_mask": torch.ones(1, 3)},
        {"flags": torch.ones(1, 3, dtype=torch.bool)},
        {"alibi": torch.zeros(4, 1, 3)},
        {"position_ids": torch.zeros(3, 1, 3)},
        {"cache": object()},
    ):
        assert kind_of(arguments(3, **strange), 3) is None, strange
    assert kind_of(arguments(3, seq_len=3), 3) != kind_of(arguments(2, seq_len=2), 2)
    assert kind_of(arguments(3, flag=1), 3) != kind_of(arguments(3, flag=True), 3)


# ---- packed and alone


@pytest.mark.parametrize("case", MODELS)
def test_hidden_states_and_hessians_are_those_of_each_sample_alone(case: str, tmp_path: Path) -> None:
    architecture, changes, together = MODELS[case]
    stream = BlockStream(loud_model(tmp_path / "model", architecture, **changes), device=CPU)
    samples = random_samples(10, longest=40)
    if not together:
        samples = [*samples, torch.arange(5), torch.arange(6)]  # short ones side by side
    alone, shared = embedded(stream, samples), embedded(stream, samples)
    sizes = []
    for index in range(stream.n_blocks):
        with stream.block(index) as block:
            packs = stream.packs(index, shared.shapes, 100)
            sizes.append(max(map(len, packs)))
            linears = block_linears(block, stream.block_name(index))
            groups = [group for stage in stages(stream, index, linears, alone[0]) for group in stage]
            expected = collect_hessians(stream, index, groups, linears, one_by_one(alone))
            found = collect_hessians(stream, index, groups, linears, Packed(alone, packs))
            assert found.tokens == expected.tokens and found.filled == expected.filled
            for name, hessian in expected.hessians.items():
                torch.testing.assert_close(found.hessians[name].sum, hessian.sum, rtol=1e-4, atol=1e-3)
            for hidden, passes in ((alone, one_by_one(alone)), (shared, Packed(shared, packs))):
                passes.advance(lambda inputs, lengths, index=index: stream.run(index, inputs, lengths))
                assert hidden.shapes == alone.shapes
        for one, other in zip(shared, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert stream.config._attn_implementation == stream.model.config._attn_implementation == "sdpa"
    assert min(sizes) > 1, sizes
    if together:
        assert len(packs) < len(samples) / 2


def test_without_bounds_samples_would_come_out_otherwise(tmp_path: Path) -> None:
    """What the test above could not see, were attention next to nothing in these models."""
    stream = BlockStream(loud_model(tmp_path / "model"), device=CPU)
    hidden = embedded(stream, random_samples(4))
    lengths = [length for _, length in hidden.shapes]
    with stream.block(0) as block:
        together = stream.run(0, hidden.joined(range(4)), lengths)
        alone = torch.cat([stream.run(0, sample) for sample in hidden], dim=1)
        args, kwargs = joined_arguments([stream._asides.arguments(0, sample) for sample in hidden])
        with within_samples(block, [sum(lengths)]):  # one sample, as far as attention knows
            crossing = block(hidden.joined(range(4)), *args, **kwargs)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(crossing[:, : lengths[0]], together[:, : lengths[0]])
    assert (crossing - alone)[:, lengths[0] :].abs().max() > 0.5


def test_positions_that_depend_on_the_length_stay_those_of_the_sample(tmp_path: Path) -> None:
    """Dynamic scaling turns rotary tables by the length of the sequence: of the sample, not of the pack."""
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = loud_model(tmp_path / "model", rope_parameters=scaling, max_position_embeddings=16)
    stream = BlockStream(model, device=CPU)
    hidden = embedded(stream, [torch.arange(40), torch.arange(12), torch.arange(30)])
    with stream.block(0):
        assert stream.packs(0, hidden.shapes, 100) == [range(0, 3)]
        together = stream.run(0, hidden.joined(range(3)), [40, 12, 30])
        alone = torch.cat([stream.run(0, sample) for sample in hidden], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


# ---- what stays alone


class _Leaky(nn.Module):
    """A linear that also sees the token before, as a short convolution does."""

    def __init__(self, linear: nn.Module, step: int) -> None:
        super().__init__()
        self.linear, self.step = linear, step

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + x.roll(self.step, dims=1))


@pytest.mark.parametrize("step", [1, -1])
def test_blocks_whose_tokens_cross_the_bounds_are_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    stream = BlockStream(loud_model(tmp_path / "model"), device=CPU)
    shapes = [(1, 4), (1, 5), (1, 6)]
    with stream.block(0) as block, caplog.at_level(logging.WARNING):
        assert stream.packs(0, shapes, 100) == [range(0, 3)] and not caplog.text
        block.mlp.up_proj = _Leaky(block.mlp.up_proj, step)
        assert stream.packs(0, shapes, 100) == [range(0, 1), range(1, 2), range(2, 3)]
        assert stream.packs(0, shapes, 0) == stream.packs(0, shapes, 100)
    assert caplog.text.count("model.layers.0: tokens of one sample reach another; calibration samples that cannot") == 1


def test_attention_of_another_kind_leaves_samples_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = BlockStream(loud_model(tmp_path / "model"), device=CPU)
    with stream.block(0) as block, caplog.at_level(logging.WARNING):
        assert len(stream.packs(0, [(1, 2), (1, 3)], 100)) == 1
        stream.model.config._attn_implementation = "eager"  # its arguments, without masks, are remembered
        stream._mistakes.clear()
        assert len(stream.packs(0, [(1, 2), (1, 3)], 100)) == 2
        assert "its attention is not transformers' sdpa; calibration samples" in caplog.text
        stream.model.config._attn_implementation = "sdpa"
        stream._mistakes.clear()
        own = block.self_attn.forward
        block.self_attn.forward = lambda *args, **kwargs: own(*args, **kwargs, s_aux=torch.zeros(4))  # sinks
        assert len(stream.packs(0, [(1, 2), (1, 3)], 100)) == 2
    assert set(stream._mistakes.values()) == {"its attention takes s_aux"}


def test_windows_and_batches_stay_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = BlockStream(loud_model(tmp_path / "model", "mistral", sliding_window=8), device=CPU)
    shapes = [(1, 7), (1, 5), (1, 8), (1, 4), (2, 5), (1, 3), (1, 3)]
    with stream.block(0), caplog.at_level(logging.WARNING):
        expected = [range(0, 2), range(2, 3), range(3, 4), range(4, 5), range(5, 7)]
        assert stream.packs(0, shapes, 100) == expected == stream.packs(0, shapes, 100)
    assert caplog.text.count("samples of 8 tokens come with a mask or the like (a sliding window?)") == 1


# ---- whole runs


def quantize(source: Path, output: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict:
    work = changes.pop("work", None)
    monkeypatch.setattr(pipeline, "_plan", lambda *_: plan)
    config = QuantizationConfig(**changes)
    quantize_model(source, output, config, random_samples(16), device=CPU, work=work)
    store = TensorStore(output)
    return {name: store.get(name) for name in store.names}


@pytest.mark.parametrize(
    ("architecture", "changes", "share"),
    [
        ("llama", {}, 0.99),
        # What rounds otherwise once, by the order of a sum, the refinement carries on through its row.
        ("llama", {"correct_target": 0.5, "refine_sweeps": 1}, 0.95),
        ("mixtral", {"true_sequential": True}, 0.99),
        ("llama", {"equal_samples": True, "correct_target": 0.5}, 0.95),
        ("mixtral", {"equal_samples": True}, 0.98),
    ],
    ids=["llama", "techniques", "experts", "equal samples", "equal samples and experts"],
)
def test_codes_are_those_of_samples_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, changes: dict, share: float
) -> None:
    source = save_tiny_model(tmp_path / "source", architecture, **EXPERT_MODELS.get(architecture, {}))
    alone = quantize(source, tmp_path / "alone", Plan(pack_tokens=0), monkeypatch, **changes)
    shared = quantize(source, tmp_path / "shared", Plan("disk", pack_tokens=200), monkeypatch, **changes)
    again = quantize(source, tmp_path / "again", Plan("host", pack_tokens=200), monkeypatch, **changes)
    equal, total = 0, 0
    for name, tensor in alone.items():
        assert torch.equal(shared[name], again[name]), name
        if name.endswith(".qweight"):
            codes = [marlin.unpack_codes(tensors[name]) for tensors in (alone, shared)]
            equal += int((codes[0] == codes[1]).sum())
            total += codes[0].numel()
        elif not name.endswith(".scales"):
            assert torch.equal(tensor, shared[name])
    assert equal / total >= share


def test_a_resumed_run_makes_the_same_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_model(tmp_path / "source")
    plan = Plan(pack_tokens=200)
    expected = quantize(source, tmp_path / "whole", plan, monkeypatch)
    work = WorkDirectory.new(tmp_path / "work", {})
    quantize(source, tmp_path / "kept", plan, monkeypatch, work=work)
    work.close()
    (tmp_path / "work" / "block-00001.json").unlink()
    work = WorkDirectory.resume(tmp_path / "work")
    resumed = quantize(source, tmp_path / "resumed", plan, monkeypatch, work=work)
    work.close()
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


def test_a_cap_by_each_samples_median_leaves_samples_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_model(tmp_path / "source")
    alone = quantize(source, tmp_path / "alone", Plan(pack_tokens=0), monkeypatch, token_cap=1.5)
    asked = quantize(source, tmp_path / "asked", Plan(), monkeypatch, token_cap=1.5)
    assert all(torch.equal(tensor, asked[name]) for name, tensor in alone.items())
    assert not any(preset.get("token_cap") for preset in PRESETS.values()), "presets get their speed"
