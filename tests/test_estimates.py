"""estimates.py: what a run will take, against what it took."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import EXPERT_MODELS, random_samples, save_tiny_model

from marlin_gptq import InputError, QuantizationConfig, pipeline, quantize_model
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.cli.quantize import main
from marlin_gptq.config import Override
from marlin_gptq.estimates import (
    Job,
    Plan,
    beside_bytes,
    hessian_passes,
    memory,
    memory_on_cpu,
    output_bytes,
    plan_within,
    seconds,
    side_by_side,
    staged_bytes,
    stored_tensors,
)
from marlin_gptq.modeling.outline import outline

CPU = torch.device("cpu")
SEVEN_B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
SEVENTY_B = SEVEN_B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip


def config_only(directory: Path, **shape: int) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | shape))
    return directory


# ---- size of the result


@pytest.mark.parametrize("architecture", ["llama", "qwen2", *EXPERT_MODELS])
def test_tensors_are_those_that_are_written(tmp_path: Path, architecture: str) -> None:
    changes = EXPERT_MODELS.get(architecture, {"tie_word_embeddings": True})
    source = save_tiny_model(tmp_path / "source", architecture, **changes)
    config = QuantizationConfig(method="rtn", overrides=(Override("o_proj", 16), Override("v_proj", 4, 32)))
    report = quantize_model(source, tmp_path / "out", config, [], device=CPU)
    found = outline(source, config)
    store = TensorStore(tmp_path / "out")
    sizes: dict[str, int] = {}
    for name in store.names:
        linear = name.removesuffix(".qweight").removesuffix(".scales")
        sizes[linear] = sizes.get(linear, 0) + store.size(name)
    assert {name: size for name, _, _, size in stored_tensors(found, "float16")} == sizes
    assert output_bytes(found) == report.bytes_after


def test_types_are_named(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    found = outline(source, QuantizationConfig(group_size=-1, overrides=(Override("v_proj", 4, 32),)))
    types = {name: kind for name, kind, _, _ in stored_tensors(found, "bfloat16")}
    assert types["model.layers.0.self_attn.q_proj"] == "int4, group row"
    assert types["model.layers.0.self_attn.v_proj"] == "int4, group 32"
    assert types["model.norm.weight"] == types["lm_head.weight"] == "bfloat16"


# ---- memory

MEASURED_RUN = """
import sys, torch
from pathlib import Path
from typing import Any
from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.cli.dry_run import resident_bytes
from marlin_gptq.estimates import Job, Plan, memory_on_cpu
from marlin_gptq.modeling.outline import outline
torch.set_num_threads(1)
source, count, length, method = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
techniques = dict(correct_target=0.5, signed_scales=True, act_order="groups", refine_sweeps=1)
blocks = dict(tune_block_steps=2, tune_codes=True)
sequential = {"true_sequential": True}
more = {"techniques": techniques, "blocks": blocks, "sequential": sequential, "both": sequential | techniques}
gptq, more = method != "rtn", more.get(method, {})
config = QuantizationConfig(method="gptq" if gptq else "rtn", clip=False, **more)
found = outline(source, config)
before = resident_bytes()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, here
job = Job.of(config, *((count * length, length) if gptq else (0, 0)), 4, 10**7)
samples = [torch.randint(0, 90, (length,)) for _ in range(count)]
quantize_model(source, Path(sys.argv[5]), config, samples, device=torch.device("cpu"), shard_size=10**7)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(before, peak, memory_on_cpu(found, job, Plan(staged=config.true_sequential)))
"""


def measured(source: Path, count: int, length: int, method: str, output: Path) -> tuple[int, int, int]:
    """(resident before, peak, estimate of what came on top), bytes, of a process of its own."""
    command = [sys.executable, "-c", MEASURED_RUN, source, count, length, method, output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    before, peak, estimate = map(int, done.stdout.split())
    return before, peak, estimate


def test_memory_of_a_measured_run(tmp_path: Path) -> None:
    """Within 20 % for the process, and within 35 % for what the run adds to what the libraries take."""
    source = save_tiny_model(tmp_path / "source", hidden_size=768, intermediate_size=2048, num_hidden_layers=1)
    before, peak, estimate = measured(source, 4, 200, "gptq", tmp_path / "out")
    assert peak - before > 150e6
    assert 0.8 < (before + estimate) / peak < 1.2
    assert 0.65 < estimate / (peak - before) < 1.35


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "count", "length", "method"),
    [
        ({"hidden_size": 1024, "intermediate_size": 2816}, 4, 2048, "gptq"),
        ({"hidden_size": 1024, "intermediate_size": 2816}, 16, 256, "gptq"),
        ({"hidden_size": 768, "intermediate_size": 4096}, 8, 512, "gptq"),
        ({"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 64000}, 64, 1024, "gptq"),
        ({"hidden_size": 1024, "intermediate_size": 2816}, 1, 2, "rtn"),
        ({"hidden_size": 768, "intermediate_size": 4096}, 8, 512, "techniques"),
        ({"hidden_size": 1024, "intermediate_size": 2816}, 16, 256, "techniques"),
        ({"hidden_size": 1024, "intermediate_size": 2816}, 8, 1024, "blocks"),
        ({"hidden_size": 1024, "intermediate_size": 2816}, 32, 64, "blocks"),
        ({"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 64000}, 64, 1024, "techniques"),
        ({"hidden_size": 512, "intermediate_size": 1408}, 64, 1024, "sequential"),
        ({"hidden_size": 1024, "intermediate_size": 2816}, 16, 256, "sequential"),
        ({"hidden_size": 768, "intermediate_size": 2048}, 8, 1024, "both"),
    ],
)
def test_memory_of_larger_measured_runs(tmp_path: Path, shape: dict, count: int, length: int, method: str) -> None:
    source = save_tiny_model(tmp_path / "source", max_position_embeddings=4096, **shape)
    before, peak, estimate = measured(source, count, length, method, tmp_path / "out")
    assert 0.8 < (before + estimate) / peak < 1.2
    assert 0.65 < estimate / (peak - before) < 1.35


def test_more_of_anything_takes_no_less(tmp_path: Path) -> None:
    found = outline(config_only(tmp_path / "model", **SEVEN_B), QuantizationConfig())
    job = Job(256_000, 4096, 2, 10**9)
    base = memory(found, job, Plan())
    assert memory(found, Job(512_000, 4096, 2, 10**9), Plan()).device == base.device + 256_000 * 4096 * 2
    assert memory(found, Job(256_000, 4096, 4, 10**9), Plan()).device > base.device
    host = memory(found, job, Plan("host"))
    assert host.device + 256_000 * 4096 * 2 == base.device and host.host == base.host + 256_000 * 4096 * 2
    assert memory(found, job, Plan("disk")).host == base.host
    assert memory(found, job, Plan("host", rows=2048)).device <= host.device
    assert memory_on_cpu(found, job, Plan()) >= base.device + base.host
    for technique in ({"corrected": True}, {"act_order": "groups"}, {"sweeps": 1}):
        more = replace(job, **technique)  # type: ignore[arg-type]
        assert memory(found, more, Plan()).device >= base.device + (0 if "sweeps" in technique else 4 * 4096**2), (
            technique
        )
        assert memory(found, more, Plan("host", rows=512)).device < memory(found, more, Plan()).device


def test_the_tuning_of_blocks_is_reckoned_with(tmp_path: Path) -> None:
    """Moving codes take 16 bytes a weight where fixed ones take 1; windows take less attention than documents."""
    found = outline(config_only(tmp_path / "model", **SEVEN_B), QuantizationConfig())
    weights = 4 * 4096**2 + 3 * 4096 * 11008

    def peak(**changes: Any) -> tuple[int, str]:
        config = QuantizationConfig(**({"tune_block_steps": 200, "tune_codes": True} | changes))
        used = memory(found, Job.of(config, 256_000, 4096, 2, 10**9), Plan("host"))
        return used.device, used.phase

    moving, phase = peak()
    assert phase == "tune" and 10e9 < moving < 16e9
    assert peak(tune_codes=False) == (moving - 15 * weights, "tune")
    assert peak(pack=True)[0] < moving
    assert peak(tune_block_steps=0)[1] != "tune" and peak(method="rtn")[1] != "tune"
    assert peak(tune_block_steps=1)[0] == moving


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
    assert seconds(found, job, 1e12, 1e12, staged=True) < seconds(found, job, 1e12, 1e12)
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


def test_passes_hold_what_they_may() -> None:
    groups = [("a", 10), ("b", 10), ("c", 20), ("d", 10)]
    assert hessian_passes(groups, None) == [["a", "b", "c", "d"]]
    assert hessian_passes(groups, 800) == [["a", "b"], ["c"], ["d"]]
    assert hessian_passes(groups, 1) == [["a"], ["b"], ["c"], ["d"]]
    assert hessian_passes([], 1) == []


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


def test_what_is_solved_side_by_side_keeps_within_its_limit() -> None:
    job = Job(1000, 100, 2, 10**9)
    shapes = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
    groups = [(str(shape), shape) for shape in shapes]
    names = [name for name, _ in groups]
    sizes = [beside_bytes(shape, job) for shape in shapes]
    assert side_by_side(groups, 0, job) == [[name] for name in names]
    assert side_by_side(groups, sum(sizes), job) == [names]
    assert side_by_side(groups, sum(sizes) - 1, job) == [names[:3], names[3:]]
    assert side_by_side(groups * 2, 10 * sum(sizes), job) == [names, names], "four at most"
    assert beside_bytes((1, 64), replace(job, sweeps=1)) > beside_bytes((1, 64), job)


def test_solving_side_by_side_is_reckoned_with(tmp_path: Path) -> None:
    found = outline(save_tiny_model(tmp_path), QuantizationConfig(clip=False))
    job = Job(10, 10, 2, 10**9, clip=False)
    alone = memory(found, job, Plan())
    together = memory(found, job, Plan(side_by_side=10**9))
    assert together.device > alone.device and together.phase == "solve"


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"refine_sweeps": 1, "act_order": "groups", "signed_scales": True}])
def test_solving_side_by_side_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    source, samples, found = save_tiny_model(tmp_path / "source"), random_samples(8), []
    for size in (0, 10**10):
        monkeypatch.setattr(pipeline, "_plan", lambda *_, size=size: Plan(side_by_side=size))
        config = QuantizationConfig(**changes)
        report = quantize_model(source, tmp_path / str(size), config, samples, device=torch.device("cuda"))
        found.append((tmp_path / str(size) / "model.safetensors").read_bytes())
        assert all(record.seconds > 0 for record in report.records)
        assert sum(cost["seconds"] for cost in report.costs.values()) == pytest.approx(report.seconds, rel=0.02)
    assert found[0] == found[1]


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


# ---- time


def test_time_grows_with_its_parts(tmp_path: Path) -> None:
    found = outline(config_only(tmp_path / "model", **SEVEN_B), QuantizationConfig())
    few, many = (seconds(found, Job(tokens, 4096, 2, 10**9), 1e14, 1e12) for tokens in (128_000, 256_000))
    assert few < many < 2 * few
    unclipped = seconds(found, Job(128_000, 4096, 2, 10**9, clip=False), 1e14, 1e12)
    tried = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 76
    assert few - unclipped == pytest.approx(1.25 * tried / 1e12)
    assert seconds(found, Job(0, 0, 2, 10**9), 1e14, 1e12) == 0
    plain = Job.of(QuantizationConfig(), 128_000, 4096, 2, 10**9)
    assert seconds(found, plain, 1e14, 1e12) == few
    for changes in ({"refine_sweeps": 1}, {"signed_scales": True}, {"correct_target": 0.5}, {"tune_block_steps": 9}):
        more = Job.of(QuantizationConfig(**changes), 128_000, 4096, 2, 10**9)  # type: ignore[arg-type]
        assert seconds(found, more, 1e14, 1e12) > few


# ---- the command


def dry(*arguments: object) -> str:
    recipe = () if "--preset" in arguments else ("--preset", "marlin")
    result = CliRunner().invoke(main, [str(argument) for argument in (*arguments, *recipe, "--dry-run")])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_dry_run_reads_the_config_only(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model", **SEVEN_B)
    text = dry(model)
    assert "model.layers.*.mlp.down_proj" in text and "int4, group 128" in text and "32 x 23.2 MB" in text
    assert "result       3.9 GB in 291 tensors" in text and "time         about" in text
    found = json.loads(dry(model, "--json", "--max-gpu-memory", "12GB", "--n-samples", 128, "--seq-len", 2048))
    assert found["peak_gpu_bytes"] < 12e9 and found["calibration_tokens"] == 128_000 and len(found["tensors"]) == 291
    assert found["output_bytes"] == sum(entry["bytes"] for entry in found["tensors"])
    assert found["peak_host_bytes"] > found["host_bytes_now"] > 0
    assert list(tmp_path.iterdir()) == [model] and len(list(model.iterdir())) == 1


def test_dry_run_says_what_the_tuning_adds(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model", **SEVEN_B)
    text = dry(model, "--preset", "best")
    assert "(memory, time and plan are those of the pass over the blocks, without the tuning)" in text
    assert "tuning       4000 steps of 16 windows, on a GPU with 11" in text
    found, plain = (json.loads(dry(model, "--preset", "best", "--json", *more)) for more in ((), ("--tune-steps", 0)))
    assert plain["tuning"] is None and found["peak_gpu_bytes"] == plain["peak_gpu_bytes"]
    assert 105e9 < found["tuning"]["least_gpu_bytes"] < 120e9 < found["tuning"]["most_gpu_bytes"]
    assert "tuning" not in dry(model, "--preset", "marlin")


def test_dry_run_of_a_hub_model_fetches_its_config_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = config_only(tmp_path / "model", **SEVEN_B), []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, allow_patterns))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert "291 tensors" in dry("owner/name")
    assert asked == [("owner/name", ["config.json"])]


def test_dry_run_of_experts_shares_lines(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "mixtral", **EXPERT_MODELS["mixtral"])
    text = dry(model, "--method", "rtn")
    assert "block_sparse_moe.experts.*.w1" in text and "    8 x " in text


def test_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model", **(SEVEN_B | {"intermediate_size": 11000}))
    for arguments, sentence in (
        ((), "group size 128 does not divide its 11000 input features"),
        (("--group-size", -1, "--max-gpu-memory", "1GB"), "--max-gpu-memory: got 1.00 GB, but"),
        (("--max-gpu-memory", "much"), "--max-gpu-memory: got 'much', expected a size such as"),
        (("--spill", "moon"), "Invalid value for '--spill'"),
        (("--group-size", -1, "--preset", "best", "--max-gpu-memory", "80GB"), "together with --max-gpu-memory"),
        (("--group-size", -1, "--preset", "best", "--work-dir", tmp_path / "work"), "together with a work directory"),
    ):
        result = CliRunner().invoke(
            main, [str(argument) for argument in (model, "--dry-run", "--preset", "marlin", *arguments)]
        )
        assert result.exit_code == 2 and sentence in result.stderr, result.output
