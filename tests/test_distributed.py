"""distributed.py: several processes give what one does, but for the order of sums, and the same each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from character_model import save_character_model, save_texts
from helpers import EXPERT_MODELS, random_samples, save_tiny_model

from marlin_gptq import InputError, QuantizationConfig, quantize_model
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.cli.processes import threads_beside_gpu
from marlin_gptq.distributed import Team, share_out

CPU = torch.device("cpu")
# Quantizes several models in one set of processes (starting them is what takes time). Arguments: folder, source names.
WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch, torch.distributed as dist
torch.set_num_threads(1)
from helpers import random_samples
from dataclasses import replace
from marlin_gptq import QuantizationConfig, pipeline, quantize_model
from marlin_gptq.distributed import Team
from marlin_gptq.work_directory import WorkDirectory
planned = pipeline._plan
dist.init_process_group("gloo")
team, folder = Team(dist.get_rank(), dist.get_world_size()), Path(sys.argv[1])
for name in sys.argv[3:]:
    source, output = name.split(":")
    config = QuantizationConfig(true_sequential="sequential" in output)
    if output == "techniques":
        config = QuantizationConfig(correct_target=0.5, signed_scales=True, act_order="groups", refine_sweeps=1)
    if "two-sided" in output:
        config = QuantizationConfig(two_sided=True)
    if "equal" in output:
        config = QuantizationConfig(equal_samples=True, beam_width=2)
    in_stages = not output.endswith("from-start")
    pipeline._plan = lambda *asked: replace(planned(*asked), staged=in_stages)
    work = WorkDirectory.new(folder / "work", {}) if team.leads and output == "kept" else None
    if output == "resumed" and team.leads:
        (folder / "work" / "block-00001.json").unlink()
        work = WorkDirectory.resume(folder / "work")
    if "tuned" in output:
        config = QuantizationConfig(damp_percent=1.0, clip=False, tune_block_steps=20, tune_codes=True, tune_batch=4,
                                    tune_rate=2e-3, tune_scale_rate=1e-3)
    report = quantize_model(folder / source, folder / output, config, random_samples(12), device=torch.device("cpu"),
                            work=work, team=team)
    same = report.tuned_blocks, [(linear.scale_min, linear.scale_mean) for linear in report.records]
    assert team.from_leader(same) == same
    if work is not None:
        work.close()
dist.destroy_process_group()
"""


def start(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    store = TensorStore(directory)
    return {name: store.get(name) for name in store.names}


def equal(one: Path, other: Path) -> bool:
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    save_tiny_model(tmp_path / "llama")
    save_tiny_model(tmp_path / "experts", "qwen3_moe", **EXPERT_MODELS["qwen3_moe"])
    jobs = ["llama:two", "llama:sequential", "llama:kept", "llama:resumed", "experts:experts-two", "llama:techniques"]
    jobs += ["experts:experts-equal", "llama:two-sided", "llama:tuned", "llama:tuned-again"]
    jobs += ["llama:sequential-from-start", "experts:experts-sequential", "experts:experts-sequential-from-start"]
    done = start(2, tmp_path / "worker.py", tmp_path, Path(__file__).parent, *jobs)
    assert done.returncode == 0, done.stderr
    assert equal(tmp_path / "two", tmp_path / "kept"), "the same each time"
    assert equal(tmp_path / "two", tmp_path / "resumed")
    assert equal(tmp_path / "tuned", tmp_path / "tuned-again") and not equal(tmp_path / "tuned", tmp_path / "two")
    blocks = json.loads((tmp_path / "tuned" / "quantize_log.json").read_text())["tuned_blocks"]
    assert blocks[0]["kept"] and [block["samples_judged"] for block in blocks] == 2 * [2], "one of each process"
    for name in ("sequential", "experts-sequential"):
        assert equal(tmp_path / name, tmp_path / f"{name}-from-start"), "whether passes go on from the last one or not"
    techniques = QuantizationConfig(correct_target=0.5, signed_scales=True, act_order="groups", refine_sweeps=1)
    for source, output in (
        ("llama", "two"),
        ("llama", "sequential"),
        ("experts", "experts-two"),
        ("llama", "techniques"),
        ("experts", "experts-equal"),
        ("llama", "two-sided"),
    ):
        config = techniques if output == "techniques" else QuantizationConfig(true_sequential=output == "sequential")
        if output == "experts-equal":
            config = QuantizationConfig(equal_samples=True, beam_width=2)
        if output == "two-sided":
            config = QuantizationConfig(two_sided=True)
        report = quantize_model(tmp_path / source, tmp_path / f"{output}-one", config, random_samples(12), device=CPU)
        one, two = tensors_of(tmp_path / f"{output}-one"), tensors_of(tmp_path / output)
        assert list(one) == list(two)
        for name in one:
            if output == "two-sided" and name.endswith("scales"):
                # One code that rounds otherwise moves the targets of all rows behind it, and their scales with them.
                assert (one[name].float() - two[name].float()).norm() < 0.1 * one[name].float().norm(), name
            if output == "two-sided" and name.endswith(("scales", "qweight")):
                continue
            same = (one[name] == two[name]).float().mean()
            assert same > (0.9 if name.endswith(("qweight", "scales")) else 0.9999), name
        log = json.loads((tmp_path / output / "quantize_log.json").read_text())
        for record, expected in zip(log["records"], report.records, strict=True):
            assert record["name"] == expected.name and record["tokens"] == expected.tokens
            assert record["relative_error"] == pytest.approx(
                expected.relative_error, rel=0.02 if output != "two-sided" else 0.1
            )
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    source = save_character_model(tmp_path / "source")
    texts = tmp_path / "texts.jsonl"
    save_texts(texts)
    arguments = (
        source,
        "-o",
        tmp_path / "out",
        "--dataset",
        texts,
        "--n-samples",
        5,
        "--json",
        "--no-clip",
        "--preset",
        "marlin",
    )
    done = start(2, "-m", "marlin_gptq.cli.quantize", *arguments, "--work-dir", tmp_path / "work", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["records"]) == 14 and report["calibration"]["n_samples"] == 5
    assert done.stderr.count("reading calibration text") == 1, "one process tells"
    assert len(list((tmp_path / "work").glob("block-*.json"))) == 2
    assert TensorStore(tmp_path / "out").names


def test_samples_for_every_process(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    with pytest.raises(InputError, match="samples: got 2 for 3 processes; give at least one for each"):
        quantize_model(source, tmp_path / "out", QuantizationConfig(), random_samples(2), device=CPU, team=Team(0, 3))


def test_sharing_out() -> None:
    assert share_out([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]
    assert share_out([1, 9, 1], 1) == [0, 0, 0]
    assert share_out([], 3) == []
    costs = [float(len(sample)) for sample in random_samples(40)]
    owners = share_out(costs, 4)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= max(costs)
    shares = [Team(rank, 4).mine(list(range(40)), costs) for rank in range(4)]
    assert sorted(item for share in shares for item in share) == list(range(40))
    assert Team().mine(list(range(40)), costs) == list(range(40)), "alone, in the order given"


def test_processes_with_a_gpu_each_share_the_cores() -> None:
    assert threads_beside_gpu(1, cores=32, processes=2) == 8
    assert threads_beside_gpu(1, cores=8, processes=4) == 2
    assert threads_beside_gpu(1, cores=2, processes=4) == 1
    assert threads_beside_gpu(3, cores=32, processes=2) == 3, "what somebody asked for stays"
