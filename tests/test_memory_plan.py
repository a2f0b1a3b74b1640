"""memory_plan.py: what a run gives up for memory, and that its result stays the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import EXPERT_MODELS, SEVEN_B, SEVENTY_B, config_only, random_samples, save_tiny_model

from marlin_gptq import InputError, QuantizationConfig, pipeline, quantize_model
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.estimated_time import seconds
from marlin_gptq.estimates import memory, staged_bytes
from marlin_gptq.job import Job, Plan
from marlin_gptq.memory_plan import plan_within
from marlin_gptq.modeling.outline import outline

CPU = torch.device("cpu")


def test_plans_give_up_speed_in_their_order(tmp_path: Path) -> None:
    found = outline(config_only(tmp_path / "model", **SEVENTY_B), QuantizationConfig())
    job = Job(128 * 2048, 2048, 2, 10**9)
    limits = (40, 32, 30.8)
    plans = [plan_within(found, job, int(limit * 1e9)) for limit in limits]
    assert plans[0] == Plan() and plans[1] == Plan("host") and plans[2].hessian_bytes is not None
    for limit, plan in zip(limits, plans, strict=True):
        assert memory(found, job, plan).device <= limit * 1e9
    assert plan_within(found, job, int(80e9), "disk").place == "disk"
    with pytest.raises(
        InputError, match=r"--max-gpu-memory: got 1\.00 GB, but the factor phase of block 0 needs [\d.]+ GB"
    ):
        plan_within(found, job, 10**9)
    with pytest.raises(InputError, match="or --spill host"):
        plan_within(found, job, 10**9, "none")


def test_what_stages_keep_is_given_up_first(tmp_path: Path) -> None:
    """Attention's output and the inputs of down, of every token; of experts the inputs of all that a token chooses."""
    found = outline(config_only(tmp_path / "model", **SEVEN_B), QuantizationConfig())
    job = Job(256_000, 4096, 2, 10**9, true_sequential=True)
    kept = 256_000 * (4096 + 11008) * 2
    assert staged_bytes(found, job) == kept and staged_bytes(found, replace(job, corrected=True)) == 2 * kept
    staged, plain = (memory(found, job, Plan(staged=staged)).device for staged in (True, False))
    assert staged == plain + kept
    assert plain < memory(found, replace(job, true_sequential=False), Plan()).device, "one Hessian at a time"
    assert plan_within(found, job, staged) == Plan(staged=True)
    assert plan_within(found, job, plain) == Plan()
    assert plan_within(found, job, staged, "host") == Plan("host")
    assert seconds(found, job, 1e12, staged=True) < seconds(found, job, 1e12)
    experts = save_tiny_model(tmp_path / "experts", "mixtral", **EXPERT_MODELS["mixtral"])
    assert staged_bytes(outline(experts, QuantizationConfig()), job) == 256_000 * (128 + 128 + 2 * 128) * 2


def test_stages_are_run_where_half_of_what_is_free_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = config_only(tmp_path / "model", **SEVEN_B)
    config = QuantizationConfig(true_sequential=True)
    job = Job.of(config, 256_000, 4096, 2, 10**9)
    both = 256_000 * (4096 + 4096 + 11008) * 2

    def plan(free: int, spill: str | None = None, job: Job = job, device: str = "cuda") -> Plan:
        monkeypatch.setattr(pipeline, "free_bytes", lambda _: free)
        return replace(pipeline._plan(model, config, job, torch.device(device), spill, None), side_by_side=0)

    assert plan(2 * both + 2) == plan(2 * both + 2, "none") == Plan(staged=True)
    assert plan(2 * both) == plan(2 * both, "none") == Plan()
    assert plan(10**9) == plan(10**12, "host") == Plan("host") and plan(10**12, "disk") == Plan("disk")
    assert not plan(10**12, job=replace(job, true_sequential=False)).staged
    assert plan(0, device="cpu") == Plan(staged=True) and plan(0, "disk", device="cpu") == Plan("disk")


def test_samples_pass_alone_where_a_pack_would_not_fit(tmp_path: Path) -> None:
    """In a flat model with short samples the forward is the peak: packs of 4096 tokens are given up before rows."""
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = outline(config_only(tmp_path / "model", **shape, vocab_size=96), QuantizationConfig(clip=False))
    job = Job(64 * 128, 128, 4, 10**7, clip=False)
    packed, alone = (memory(found, job, Plan("host", pack_tokens=tokens)) for tokens in (4096, 0))
    assert packed.phase == "forward" and packed.device > alone.device
    assert memory(found, replace(job, tokens=256), Plan("host")).device < packed.device, "no more than there is"
    assert memory(found, replace(job, longest=4096), Plan("host", pack_tokens=0)).device == packed.device
    assert plan_within(found, job, packed.device - 1, "host") == Plan("host", pack_tokens=0)


@pytest.mark.parametrize(
    "config",
    [QuantizationConfig(), QuantizationConfig(correct_target=0.5, act_order="groups", refine_sweeps=1, pack=True)],
    ids=["marlin", "techniques"],
)
def test_a_frugal_run_gives_the_same_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: QuantizationConfig
) -> None:
    """Hessians in passes change nothing at all; pieces of rows and activations on disk neither, on this CPU."""
    source = save_tiny_model(tmp_path / "source")
    samples = random_samples(8)
    quantize_model(source, tmp_path / "whole", config, samples, device=CPU)
    for name, plan in {
        "passes": Plan(hessian_bytes=1),
        "disk": Plan("disk"),
        "rows": Plan(rows=48),
    }.items():
        monkeypatch.setattr(pipeline, "_plan", lambda *_, plan=plan: plan)
        quantize_model(source, tmp_path / name, config, samples, device=CPU)
        one, other = TensorStore(tmp_path / "whole"), TensorStore(tmp_path / name)
        for tensor in one.names:
            if name == "rows" and tensor.endswith(("qweight", "scales")):
                assert (one.get(tensor) == other.get(tensor)).float().mean() > 0.98, tensor
            else:
                assert torch.equal(one.get(tensor), other.get(tensor)), (name, tensor)


def test_a_gpu_limit_needs_a_gpu(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    with pytest.raises(InputError, match="--max-gpu-memory: this run computes on the CPU; leave it out"):
        quantize_model(source, tmp_path / "out", QuantizationConfig(), random_samples(2), device=CPU, max_gpu_memory=1)


@pytest.mark.gpu
def test_a_limit_on_the_gpu_changes_no_bit(tmp_path: Path) -> None:
    source, samples = save_tiny_model(tmp_path / "source"), random_samples(8)
    found = []
    for limit in (None, 2_000_000_000):
        output = tmp_path / str(limit)
        device = torch.device("cuda")
        try:
            quantize_model(source, output, QuantizationConfig(), samples, device=device, max_gpu_memory=limit)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, 0)
        found.append((output / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert not (tmp_path / "out").exists()
