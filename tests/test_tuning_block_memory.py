"""Tuning block by block within the free memory of a GPU: what is given up for it, what is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import SEVEN_B, config_only, random_samples, save_tiny_model
from safetensors.torch import load_file

from marlin_gptq import InputError, QuantizationConfig, QuantizationError, pipeline, quantize_model
from marlin_gptq.cli.quantize import main
from marlin_gptq.estimates import tuning_memory
from marlin_gptq.job import Job, Plan
from marlin_gptq.memory_plan import plan_within, tuning_needs, tuning_within
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.outline import Outline, outline
from marlin_gptq.requirements import require_quantizable
from marlin_gptq.tuning.block_memory import TUNED_TOKENS
from marlin_gptq.tuning.memory import SHARE
from marlin_gptq.work_directory import WorkDirectory

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TUNED = QuantizationConfig(
    group_size=64, damp_percent=1.0, clip=False, tune_block_steps=10, tune_codes=True, tune_batch=8, tune_rate=2e-3,
    tune_scale_rate=1e-3,
)  # fmt: skip
SAMPLES = random_samples(60, longest=128)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    return outline(config_only(tmp_path_factory.mktemp("model") / "7b", **SEVEN_B), QuantizationConfig())


def seven_job(**changes: Any) -> Job:
    settings = {"tune_block_steps": 100, "tune_codes": True} | changes
    return Job.of(QuantizationConfig(**settings), 256_000, 1024, 2, 10**9)


def test_what_is_given_up_for_memory_in_its_order(seven: Outline) -> None:
    job = seven_job()
    steps = [Plan(), Plan("host"), *(Plan("host", tuned_tokens=tokens) for tokens in (4096, 2048, 1024))]
    for plan, less in pairwise(steps):
        assert tuning_memory(seven, job, less) < tuning_memory(seven, job, plan)
    for plan in steps:
        assert tuning_within(seven, job, Plan(), tuning_needs(seven, job, plan)) == plan
    assert tuning_within(seven, job, Plan(), 10**12) == Plan()
    # Samples as long as a pack can only go alone, and activations stay where --spill wants them.
    alone = Plan("device", tuned_tokens=1024)
    assert tuning_within(seven, job, Plan(), tuning_needs(seven, job, alone), spill="none") == alone
    short = replace(job, tuned=replace(job.tuned, sequence=16))
    assert tuning_within(
        seven, short, Plan("disk"), tuning_needs(seven, short, Plan("disk", tuned_tokens=0)), "disk"
    ) == (Plan("disk", tuned_tokens=0))
    assert tuning_within(seven, seven_job(tune_block_steps=0), Plan(), 1) == Plan(), "nothing to fit"


def test_too_little_memory_is_one_sentence(seven: Outline) -> None:
    job = seven_job()
    needed = tuning_needs(seven, job, Plan("host", tuned_tokens=0))
    assert SHARE * needed == pytest.approx(tuning_memory(seven, job, Plan("host", tuned_tokens=0)))
    with pytest.raises(
        QuantizationError,
        match=rf"^tuning block by block needs about {needed / 1e9:.1f} GB of free memory on the device and 4\.0 GB "
        r"are free; use a shorter --seq-len, --no-tune-codes \(scales and norm weights only\) or --tune-block-steps 0$",
    ):
        tuning_within(seven, job, Plan(), 4 * 10**9)
    with pytest.raises(QuantizationError, match=r"use a shorter --seq-len, --spill host or --tune-block-steps 0$"):
        tuning_within(seven, seven_job(tune_codes=False), Plan(), 10**9, "none")
    with pytest.raises(QuantizationError, match=r"are free; use a GPU with as much free memory as it was begun with$"):
        tuning_within(seven, job, Plan(), tuning_needs(seven, job, Plan("host", tuned_tokens=1024)), begun=TUNED_TOKENS)
    fewer = Plan("host", tuned_tokens=1024)
    assert tuning_within(seven, job, Plan(), tuning_needs(seven, job, fewer), begun=1024) == fewer


def test_a_limit_leaves_fewer_samples_together(seven: Outline) -> None:
    job = Job.of(QuantizationConfig.from_preset("fast"), 256_000, 8192, 2, 10**9)
    found = [plan_within(seven, job, limit) for limit in (40 * 10**9, 12 * 10**9, 10 * 10**9, 8 * 10**9)]
    assert found[0] == Plan() and found[1].place == "host"
    together = [plan.tuned_tokens for plan in found]
    assert together == sorted(together, reverse=True) and 0 < together[-1] < TUNED_TOKENS
    assert plan_within(seven, job, 40 * 10**9, begun=2048) == Plan(tuned_tokens=2048)
    with pytest.raises(
        InputError, match=r"but the tuning of a block needs \d\.\d\d GB at least.*--tune-block-steps 0$"
    ):
        plan_within(seven, job, 5 * 10**9)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Runs on this CPU plan for a GPU with so many bytes free."""
    real = pipeline._plan

    def planned(model_dir: Path, config: QuantizationConfig, job: Job, _: torch.device, *rest: Any) -> Plan:
        return replace(real(model_dir, config, job, GPU, *rest), side_by_side=0)

    def set_free(size: int) -> None:
        for module in ("pipeline", "requirements"):
            monkeypatch.setattr(f"marlin_gptq.{module}.free_bytes", lambda _: size)

    monkeypatch.setattr(pipeline, "_plan", planned)
    return set_free


def job_of(source: Path, config: QuantizationConfig = TUNED) -> tuple[Outline, Job]:
    return outline(source, config), pipeline.job_of(SAMPLES, config, torch.float32, 10**9)


def test_a_run_that_does_not_fit_stops_before_any_work(tmp_path: Path, free: Callable[[int], None]) -> None:
    source = save_tiny_model(tmp_path / "source")
    found, job = job_of(source)
    events: list[object] = []
    free(tuning_needs(found, job, Plan("host", tuned_tokens=0)) - 1)
    with pytest.raises(QuantizationError, match="tuning block by block needs about"):
        quantize_model(source, tmp_path / "out", TUNED, SAMPLES, device=CPU, progress=events.append)
    assert not events and [path.name for path in tmp_path.iterdir()] == ["source"]
    free(tuning_needs(found, job, Plan("host", tuned_tokens=0)))
    quantize_model(source, tmp_path / "out", TUNED, SAMPLES, device=CPU)


def test_samples_that_pass_alone_teach_a_block_the_same(
    tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny_model(tmp_path / "source", initializer_range=0.1)
    found, job = job_of(source)
    packs, packed, reports = BlockStream.packs, [], []

    def counted(stream: BlockStream, index: int, shapes: Any, tokens: int) -> list[range]:
        packed.append((len(shapes), len(packs(stream, index, shapes, tokens))))
        return packs(stream, index, shapes, tokens)

    monkeypatch.setattr(BlockStream, "packs", counted)
    for name, size in (("packs", 10**12), ("alone", tuning_needs(found, job, Plan("host", tuned_tokens=0)))):
        free(size)
        reports.append(quantize_model(source, tmp_path / name, TUNED, SAMPLES, device=CPU))
    for one, other in zip(*(report.tuned_blocks for report in reports), strict=True):
        assert one.kept and one.error_after is not None and one.error_after < one.error_before
        assert one.error_after == pytest.approx(other.error_after, rel=0.01)
        assert one.error_before == pytest.approx(other.error_before, rel=0.01)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("packs", "alone"))
    name = "model.layers.0.mlp.up_proj.scales"
    torch.testing.assert_close(one[name], other[name], rtol=0.01, atol=0)
    half = len(packed) // 2  # 2 blocks, each with all samples once, 10 batches to learn from, 2 times those kept aside
    assert packed[:half] == 2 * [(60, 1), (4, 1), *10 * [(8, 1)], (4, 1)]
    assert packed[half:] == 2 * [(60, 1), (4, 4), *10 * [(8, 8)], (4, 4)]


def test_a_run_goes_on_with_as_many_together_as_it_was_begun_with(tmp_path: Path, free: Callable[[int], None]) -> None:
    source = save_tiny_model(tmp_path / "source")
    config = replace(TUNED, tune_batch=32)  # more samples than pass together
    found, job = job_of(source, config)

    def run(work: WorkDirectory, output: str) -> None:
        with work:
            quantize_model(source, tmp_path / output, config, SAMPLES, device=CPU, work=work)

    free(tuning_needs(found, job, Plan("host", tuned_tokens=1024)))
    run(WorkDirectory.new(tmp_path / "work", {}), "out")
    with WorkDirectory.resume(tmp_path / "work") as work:
        assert work.fact(pipeline.TOGETHER) == 1024 and work.fact("nothing") is None
    free(10**12)
    run(WorkDirectory.resume(tmp_path / "work"), "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    free(tuning_needs(found, job, Plan("host", tuned_tokens=0)))
    with pytest.raises(QuantizationError, match="use a GPU with as much free memory as it was begun with"):
        run(WorkDirectory.resume(tmp_path / "work"), "less")


def test_the_command_refuses_before_the_text_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no text is short enough for is known from the config."""
    source = save_tiny_model(tmp_path / "source")
    monkeypatch.setattr("marlin_gptq.cli.options.torch_device", lambda _: GPU)
    monkeypatch.setattr("marlin_gptq.cli.processes.own_device", lambda device: device)
    monkeypatch.setattr("marlin_gptq.requirements.free_bytes", lambda _: 10**6)
    (tmp_path / "text.txt").write_text("too short")
    command = [str(source), "-o", str(tmp_path / "out"), "--preset", "marlin", "--tune-block-steps", "7"]
    result = CliRunner().invoke(main, [*command, "--dataset", str(tmp_path / "text.txt")])
    assert result.exit_code == 2, result.output
    assert "error: tuning block by block needs about 0.0 GB of free memory on the device and 0.0 GB" in result.stderr
    assert "--seq-len" not in result.stderr and not (tmp_path / "out").exists()
    require_quantizable(source, tmp_path / "out", replace(TUNED, tune_block_steps=0), device=GPU)
    require_quantizable(source, tmp_path / "out", TUNED, device=CPU)


def test_dry_run_says_what_the_tuning_makes_do_with(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model", **SEVEN_B)
    command = [str(model), "--dry-run", "--preset", "marlin", "--tune-codes", "--tune-block-steps"]
    found, plain = (json.loads(CliRunner().invoke(main, [*command, steps, "--json"]).stdout) for steps in ("9", "0"))
    assert 3e9 < found["tuned_blocks_least_gpu_bytes"] < found["peak_gpu_bytes"]
    assert plain["tuned_blocks_least_gpu_bytes"] is None
    assert "of free GPU memory at least, with one sample at a time" in CliRunner().invoke(main, [*command, "9"]).stdout
