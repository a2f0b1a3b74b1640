"""pipeline.py: from a checkpoint to a quantized directory, and what stops it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_samples, save_tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import marlin_gptq.pipeline as pipeline
import marlin_gptq.requirements as requirements
from marlin_gptq import (
    CheckpointError,
    InputError,
    MarlinLinear,
    QuantizationConfig,
    QuantizationError,
    quantize_model,
)
from marlin_gptq.formats import marlin
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.observe import shared_inputs
from marlin_gptq.quantization.gptq import gptq_quantize
from marlin_gptq.quantization.hessian import Hessian, factor
from marlin_gptq.report import ProgressEvent, QuantizeReport

CPU = torch.device("cpu")


def quantize(source: Path, output: Path, config: QuantizationConfig | None = None, **options) -> QuantizeReport:
    samples = options.pop("samples", random_samples(12))
    return quantize_model(source, output, config or QuantizationConfig(), samples, device=CPU, **options)


def test_output_is_a_complete_directory(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    (source / "tokenizer.model").write_text("pieces")
    (source / "README.md").write_text("the old card")
    events: list[ProgressEvent] = []
    report = quantize(source, tmp_path / "out", calibration={"dataset": "random"}, progress=events.append)
    out = tmp_path / "out"

    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "quantize_log.json",
        "tokenizer.model",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == QuantizationConfig().to_dict() and config["dtype"] == "float16"
    log = json.loads((out / "quantize_log.json").read_text())
    assert log == json.loads(json.dumps(report.to_dict()))
    assert len(log["records"]) == 14 and log["calibration"] == {"dataset": "random"}
    for record in log["records"]:
        assert 0 < record["relative_error"] < 0.1
        assert record["damp_percent"] == 0.1
        assert 0 < record["scale_min"] <= record["scale_mean"] <= record["scale_max"]
        assert record["seconds"] > 0
    card = (out / "README.md").read_text()
    assert "base_model: source\n" in card and "# source, 4 bits" in card
    assert "import marlin_gptq" in card and "| calibration: dataset | random |" in card and "old card" not in card
    assert report.bytes_after < report.bytes_before

    stages = {"open", "embed", "load", "hessians", "factor", "gptq", "judge", "pack", "propagate", "write", "other"}
    assert stages <= set(report.costs)
    assert sum(cost["seconds"] for cost in report.costs.values()) == pytest.approx(report.seconds)
    assert [event.linear for event in events if event.stage == "quantize"] == [r["name"] for r in log["records"]]
    assert events[-1].stage == "write" and events[-1].done == events[-1].total == 14
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_tensors_are_those_of_the_algorithm_run_by_hand(tmp_path: Path) -> None:
    """The slow twin: the whole model in memory, one linear at a time, its own Hessian."""
    source = save_tiny_model(tmp_path / "source", attention_bias=True)
    samples = random_samples(12)
    quantize(source, tmp_path / "out", samples=samples)
    written = load_file(tmp_path / "out" / "model.safetensors")

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for index, block in enumerate(model.model.layers):
        hessians = {name: Hessian(linear.in_features, CPU) for name, linear in linears(block).items()}
        hooks = [
            linear.register_forward_hook(lambda _, args, __, h=hessians[name]: h.add(args[0]))
            for name, linear in linears(block).items()
        ]
        with torch.no_grad():
            for sample in samples:
                model(sample[None])
        for hook in hooks:
            hook.remove()
        for name, linear in linears(block).items():
            upper = factor(hessians[name].mean(), 0.1).upper
            expected = gptq_quantize(linear.weight.data, upper, group_size=128, scale_dtype=torch.float16)
            full = f"model.layers.{index}.{name}"
            codes = marlin.unpack_codes(written[f"{full}.qweight"])
            assert (codes == expected.codes).float().mean() > 0.98, full
            scales = marlin.unpack_scales(written[f"{full}.scales"])
            assert (scales == expected.scales).float().mean() > 0.97, full
            assert f"{full}.weight" not in written
            if linear.bias is not None:
                assert torch.equal(written[f"{full}.bias"], linear.bias.half())
            linear.weight.data = marlin_weight(codes, scales)
    assert torch.equal(written["model.norm.weight"], model.model.norm.weight.half())
    assert torch.equal(written["lm_head.weight"], model.lm_head.weight.half())


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def marlin_weight(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (codes.float() - 8) * scales.float().repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
@pytest.mark.parametrize("group_size", [-1, 64])
def test_every_family_quantizes_and_loads(tmp_path: Path, architecture: str, changes: dict, group_size: int) -> None:
    source = save_tiny_model(tmp_path / "source", architecture, **changes)
    config = QuantizationConfig(group_size=group_size)
    quantize(source, tmp_path / "out", config)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    layers = [module for module in model.modules() if isinstance(module, MarlinLinear)]
    assert len(layers) == 8 and all(layer.group_size == group_size for layer in layers)
    ids = random_samples(1, longest=40)[0][None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(source)(ids).logits.float()
        after = model(ids).logits.float()
    assert 0 < float((after - before).norm() / before.norm()) < 0.25


def test_widths_that_do_not_fit_are_padded(tmp_path: Path) -> None:
    # 172 is neither a multiple of 16 nor of 64, 2 heads of 24 give 48 outputs.
    source = save_tiny_model(
        tmp_path / "source", hidden_size=96, intermediate_size=172, head_dim=24, num_key_value_heads=2
    )
    quantize(source, tmp_path / "out", QuantizationConfig(group_size=-1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].mlp.down_proj.qweight.shape == (11, 256)
    assert model.model.layers[0].self_attn.k_proj.qweight.shape == (6, 128)
    ids = random_samples(1, longest=40)[0][None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(source)(ids).logits.float()
        after = model(ids).logits.float()
    assert float((after - before).norm() / before.norm()) < 0.25


def test_true_sequential_sees_the_quantized_linears_before(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    quantize(source, tmp_path / "plain")
    quantize(source, tmp_path / "sequential", QuantizationConfig(true_sequential=True))
    plain, sequential = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "sequential"))
    same, other = "model.layers.0.self_attn.v_proj.qweight", "model.layers.0.mlp.down_proj.qweight"
    assert torch.equal(plain[same], sequential[same])
    assert not torch.equal(plain[other], sequential[other])


def test_rtn_needs_no_samples(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    report = quantize(source, tmp_path / "out", QuantizationConfig(method="rtn"), samples=[])
    assert len(report.records) == 14 and all(0 < r.relative_error < 0.02 for r in report.records)
    with pytest.raises(InputError, match="samples: got none"):
        quantize(source, tmp_path / "gptq", samples=[])


def test_skipped_linears_stay_as_they_are(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    quantize(source, tmp_path / "out", QuantizationConfig(skip=("down_proj",)))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[name], load_file(source / "model.safetensors")[name]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.Linear)
    with pytest.raises(InputError, match="leaves no linear to quantize"):
        quantize(source, tmp_path / "none", QuantizationConfig(skip=("proj",)))


@pytest.mark.parametrize(
    ("stored", "asked", "result"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_of_the_result(
    tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None, result: torch.dtype
) -> None:
    source = save_tiny_model(tmp_path / "source", dtype=stored)
    quantize(source, tmp_path / "out", dtype=asked)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {result, torch.int32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == result


def test_shards_and_determinism(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", shard_size="200KB")
    quantize(source, tmp_path / "one")
    quantize(source, tmp_path / "many", shard_size=100_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    one = load_file(tmp_path / "one" / "model.safetensors")
    many: dict = {}
    for file in (tmp_path / "many").glob("*.safetensors"):
        many |= load_file(file)
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_quantizing_twice_and_existing_outputs_are_refused(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    quantize(source, tmp_path / "out")
    with pytest.raises(InputError, match=r"out: is quantized already \(by marlin-gptq\)"):
        quantize(tmp_path / "out", tmp_path / "again")
    with pytest.raises(InputError, match="out: exists already"):
        quantize(source, tmp_path / "out")
    quantize(source, tmp_path / "out", overwrite=True)


def test_infinite_activations_name_the_layer(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", dtype=torch.float32)
    from safetensors.torch import save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1e30)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\..*NaN or Inf"):
        quantize(source, tmp_path / "out", dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_weights_that_overflow_float16_ask_for_bfloat16(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = save_tiny_model(tmp_path / "source", dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"model\.norm\.weight: 1 of 128 values .* use --dtype bfloat16"):
        quantize(source, tmp_path / "out")
    quantize(source, tmp_path / "out", dtype=torch.bfloat16)


def test_raised_damping_is_said_and_hopeless_hessians_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = save_tiny_model(tmp_path / "source")
    mean = Hessian.mean

    def indefinite(self: Hessian, depth: float = 0.5) -> torch.Tensor:
        hessian = mean(self)
        ones = torch.ones(len(hessian), 1) / len(hessian) ** 0.5
        return hessian - (float(ones.t() @ hessian @ ones) + depth * float(hessian.diagonal().mean())) * ones @ ones.t()

    monkeypatch.setattr(Hessian, "mean", indefinite)
    with caplog.at_level(logging.WARNING, logger=pipeline.__name__):
        report = quantize(source, tmp_path / "out")
    assert report.records[0].damp_percent > 0.1
    assert "q_proj" in caplog.text and "damping raised from 0.1 to 1" in caplog.text

    monkeypatch.setattr(
        Hessian, "mean", lambda self: -1e6 * torch.ones_like(mean(self)) + torch.eye(len(mean(self))) * 2e6
    )
    with pytest.raises(QuantizationError, match=r"q_proj: the Hessian is not positive definite even with damping"):
        quantize(source, tmp_path / "hopeless")


def test_interrupting_leaves_nothing(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")

    def interrupt(event: ProgressEvent) -> None:
        if event.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", progress=interrupt, shard_size=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert not background_threads()


def test_threads_end_with_the_run(tmp_path: Path) -> None:
    seen: set[str] = set()
    source = save_tiny_model(tmp_path / "source")
    quantize(source, tmp_path / "out", progress=lambda _: seen.update(background_threads()), shard_size=10_000)
    assert seen == {"read-ahead", "write-shard"} and not background_threads()


def background_threads() -> set[str]:
    names = {thread.name.rpartition("_")[0] for thread in threading.enumerate()}
    return names & {"read-ahead", "write-shard"}


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    with pytest.raises(InputError, match="token 96 is outside the model's vocabulary of 96"):
        quantize(source, tmp_path / "out", samples=[torch.tensor([1, 96])])


def test_shared_inputs_are_found_by_running(tmp_path: Path) -> None:
    stream = BlockStream(save_tiny_model(tmp_path / "source"), device=CPU)
    hidden = stream.embed(torch.zeros(1, 3, dtype=torch.long))
    with stream.block(0) as block:
        named = linears(block)
        groups = shared_inputs(stream, 0, named, hidden)
        short = [[name.rsplit(".", 1)[1] for name in group] for group in groups]
        assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
        unused = named | {"never": nn.Linear(2, 2)}
        with pytest.raises(InputError, match="never: no input reached it"):
            shared_inputs(stream, 0, unused, hidden)


def test_broken_source_leaves_nothing(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-1000])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        quantize(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
def test_the_size_of_the_result_is_known_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    source = save_tiny_model(tmp_path / "source", hidden_size=96, intermediate_size=172, head_dim=24, **changes)
    config = QuantizationConfig(group_size=-1, skip=("up_proj",))
    size = quantize(source, tmp_path / "first", config).bytes_after

    free = size - 1
    monkeypatch.setattr("marlin_gptq.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    message = rf"the disk is full: {size / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free; make room"
    with pytest.raises(CheckpointError, match=message):
        requirements.require_quantizable(source, tmp_path / "out", config)
    with pytest.raises(CheckpointError, match=message):
        quantize(source, tmp_path / "out", config)
    free = size
    requirements.require_quantizable(source, tmp_path / "out", config)


def test_the_card_carries_the_name_of_a_hub_model(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "0123456789abcdef")
    report = quantize(source, tmp_path / "out", QuantizationConfig(method="rtn"), base_model="owner/name")
    assert report.to_dict()["base_model"] == "owner/name"
    assert "base_model: owner/name\n" in (tmp_path / "out" / "README.md").read_text()


MEASURED_RUN = """
import sys, torch
from pathlib import Path
from marlin_gptq import QuantizationConfig, quantize_model
torch.set_num_threads(1)
quantize_model(
    Path(sys.argv[1]), Path(sys.argv[2]), QuantizationConfig(method="rtn"), [], device=torch.device("cpu"),
    shard_size=10**7, overwrite=True,
)
# The peak of this program alone; ru_maxrss would begin with that of the process it was forked from.
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_memory_follows_the_block_not_the_model(tmp_path: Path) -> None:
    sizes, peaks = [], []
    for blocks in (4, 24):
        source = save_tiny_model(
            tmp_path / f"source-{blocks}",
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=blocks,
            shard_size="20MB",
        )
        sizes.append(sum(file.stat().st_size for file in source.glob("*.safetensors")))
        command = [sys.executable, "-c", MEASURED_RUN, source, tmp_path / f"out-{blocks}"]
        # Peaks scatter upward by tens of MB; what stays with every block stands in each of them.
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
        peaks.append(min(map(int, runs)))
    assert sizes[1] - sizes[0] > 150e6
    # A leak of every block would add 1.0 or more; measured: 0.2, and 1.4 without
    # giving freed memory back.
    assert peaks[1] - peaks[0] < 0.4 * (sizes[1] - sizes[0])
