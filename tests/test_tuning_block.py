"""tuning/block.py: a block that learns what the full-precision model has behind it, judged on samples that it did not
learn from."""

from __future__ import annotations

import gc
import json
import logging
import math
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import EXPERT_MODELS, random_samples, save_tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_gptq import InputError, QuantizationConfig, quantize_model
from marlin_gptq.cli.progress import Display
from marlin_gptq.cli.quantize import main
from marlin_gptq.config import Override
from marlin_gptq.formats import marlin
from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.weight import QuantizedWeight
from marlin_gptq.report import ProgressEvent
from marlin_gptq.requirements import require_combination
from marlin_gptq.tuning.block import _Samples, relative_errors, tune_block
from marlin_gptq.tuning.replay import Replayed

CPU = torch.device("cpu")
PASS = QuantizationConfig(group_size=64, damp_percent=1.0, clip=False, signed_scales=True)
# Rates and steps that show an effect in a few seconds.
TUNED = replace(PASS, tune_block_steps=30, tune_codes=True, tune_batch=8, tune_rate=2e-3, tune_scale_rate=1e-3)
SAMPLES = random_samples(60, longest=128)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "source", attention_bias=True, initializer_range=0.1)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = tensors_of(one), tensors_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def errors_of(quantized: Path, source: Path, samples: list[Tensor]) -> list[float]:
    """What a BlockRecord calls error, of each block as it stands on disk, one token after the other."""
    ours, full = BlockStream(quantized, device=CPU), BlockStream(source, device=CPU)
    hidden = [full.embed(sample[None]) for sample in samples]
    wanted = list(hidden)
    found = []
    for index in range(full.n_blocks):
        with ours.block(index), full.block(index):
            hidden, wanted = [ours.run(index, x) for x in hidden], [full.run(index, y) for y in wanted]
        errors = []
        for x, y in zip(hidden, wanted, strict=True):
            for token, aim in zip(x[0].double(), y[0].double(), strict=True):
                errors.append(float((token - aim).square().sum() / aim.square().sum()))
        found.append(sum(errors) / len(errors))
    return found


def test_the_judged_error_falls_and_is_that_of_the_written_blocks(source: Path, tmp_path: Path) -> None:
    """Of the second block too: what was written is what the samples went through on their way there."""
    events: list[ProgressEvent] = []
    report = quantize_model(source, tmp_path / "tuned", TUNED, SAMPLES, device=CPU, progress=events.append)
    plain = quantize_model(source, tmp_path / "plain", PASS, SAMPLES, device=CPU)
    judged = SAMPLES[::16]
    for record, found in zip(report.tuned_blocks, errors_of(tmp_path / "tuned", source, judged), strict=True):
        assert record.kept and record.error_after == pytest.approx(found, rel=1e-3)
        assert record.error_after is not None and record.error_after < 0.99 * record.error_before
        assert record.samples_judged == len(judged) and 0 < record.codes_changed < 0.5
    before = errors_of(tmp_path / "plain", source, judged)[0]
    assert report.tuned_blocks[0].error_before == pytest.approx(before, rel=1e-3)

    assert {"tune blocks", "hessians", "gptq", "pack"} <= set(report.costs) and "tune blocks" not in plain.costs
    assert plain.tuned_blocks == [] and [record.block for record in report.tuned_blocks] == [0, 1]
    log = json.loads((tmp_path / "tuned" / "quantize_log.json").read_text())
    assert log["tuned_blocks"] == [asdict(record) for record in report.tuned_blocks]
    assert "| steps of tuning, block by block | 30 |" in (tmp_path / "tuned" / "README.md").read_text()
    notes = [event.note for event in events if event.stage == "tune block" and event.block == 0]
    assert notes[:3] == [f"tuning, step {step} of 30" for step in (10, 20, 30)] and notes[3].startswith("tuned: error")

    one, other = tensors_of(tmp_path / "tuned"), tensors_of(tmp_path / "plain")
    assert one.keys() == other.keys()
    changed = {name.split(".", 3)[-1] for name in one if not torch.equal(one[name], other[name])}
    assert {"mlp.up_proj.qweight", "mlp.up_proj.scales", "input_layernorm.weight"} <= changed
    assert not any(name.endswith("bias") or "embed" in name or name == "model.norm.weight" for name in changed)
    for record in report.records:
        scales = marlin.unpack_scales(one[f"{record.name}.scales"])[: record.out_features].float().abs()
        assert record.scale_mean == pytest.approx(float(scales.mean()))


def test_scales_and_norms_alone(source: Path, tmp_path: Path) -> None:
    config = replace(TUNED, tune_codes=False)
    report = quantize_model(source, tmp_path / "tuned", config, SAMPLES, device=CPU)
    quantize_model(source, tmp_path / "plain", PASS, SAMPLES, device=CPU)
    assert all(record.codes_changed == 0 for record in report.tuned_blocks)
    assert any(record.kept for record in report.tuned_blocks)
    one, other = tensors_of(tmp_path / "tuned"), tensors_of(tmp_path / "plain")
    first = "model.layers.0.mlp.up_proj"
    assert torch.equal(one[f"{first}.qweight"], other[f"{first}.qweight"])
    assert not torch.equal(one[f"{first}.scales"], other[f"{first}.scales"])


@pytest.mark.parametrize("rates", [{"tune_rate": 1.0}, {"tune_scale_rate": 1.0}], ids=["codes", "scales"])
def test_what_does_not_help_is_not_kept(source: Path, tmp_path: Path, rates: dict[str, float]) -> None:
    config = replace(TUNED, tune_block_steps=4, **rates)  # type: ignore[arg-type]
    report = quantize_model(source, tmp_path / "tuned", config, SAMPLES, device=CPU)
    quantize_model(source, tmp_path / "plain", PASS, SAMPLES, device=CPU)
    for record in report.tuned_blocks:
        assert not record.kept and (record.error_after is None or record.error_after >= record.error_before)
    assert same(tmp_path / "tuned", tmp_path / "plain")


def test_no_steps_change_no_bit(source: Path, tmp_path: Path) -> None:
    report = quantize_model(source, tmp_path / "none", replace(TUNED, tune_block_steps=0), SAMPLES, device=CPU)
    quantize_model(source, tmp_path / "plain", PASS, SAMPLES, device=CPU)
    assert report.tuned_blocks == [] and same(tmp_path / "none", tmp_path / "plain")


def test_two_runs_and_activations_on_disk_give_the_same_bits(source: Path, tmp_path: Path) -> None:
    config = replace(TUNED, tune_block_steps=6)
    for name, spill in (("one", None), ("two", None), ("disk", "disk")):
        quantize_model(source, tmp_path / name, config, SAMPLES, device=CPU, spill=spill)
    assert same(tmp_path / "one", tmp_path / "two") and same(tmp_path / "one", tmp_path / "disk")


@pytest.mark.parametrize("pack", [False, True])
def test_linears_with_settings_of_their_own_and_the_tuning_that_follows(tmp_path: Path, pack: bool) -> None:
    source = save_tiny_model(tmp_path / "source", "qwen3", head_dim=32, initializer_range=0.1)
    rules = (Override("down_proj", 4, 32), Override(r"layers\.0\..*v_proj", 16))
    config = replace(
        TUNED, tune_block_steps=10, overrides=rules, skip=(r"layers\.1\.mlp\.up",), true_sequential=True,
        token_cap=4.0, correct_target=0.5, pack=pack, tune_steps=2,
    )  # fmt: skip
    report = quantize_model(source, tmp_path / "out", config, random_samples(30, longest=256), device=CPU)
    assert report.tuning is not None and len(report.tuned_blocks) == 2
    assert all(record.error_after is not None for record in report.tuned_blocks)
    tensors, originals = tensors_of(tmp_path / "out"), tensors_of(source)
    assert tensors["model.layers.1.mlp.down_proj.scales"].shape[0] == 256 // 32
    assert tensors["model.layers.1.self_attn.o_proj.scales"].shape[0] == 128 // 64
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        assert torch.equal(tensors[name], originals[name])
    assert not any(AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1].values())


def test_a_block_that_nothing_is_quantized_in_is_left_alone(source: Path, tmp_path: Path) -> None:
    config = replace(TUNED, tune_block_steps=3, skip=(r"layers\.0\.",))
    report = quantize_model(source, tmp_path / "out", config, SAMPLES, device=CPU)
    assert [record.block for record in report.tuned_blocks] == [1]
    one, other = tensors_of(tmp_path / "out"), tensors_of(source)
    assert all(torch.equal(one[name], other[name]) for name in other if name.startswith("model.layers.0."))


def test_a_single_sample_is_learnt_from_and_judged_by(source: Path, tmp_path: Path) -> None:
    one = random_samples(1, longest=200, seed=3)
    report = quantize_model(source, tmp_path / "out", replace(TUNED, tune_block_steps=3), one, device=CPU)
    assert [record.samples_judged for record in report.tuned_blocks] == [1, 1]


# The function itself


def block_inputs(stream: BlockStream) -> Activations:
    shapes = [(1, len(sample)) for sample in SAMPLES]
    inputs = Activations(shapes, stream.config.hidden_size, stream.dtype, CPU)
    for position, sample in enumerate(SAMPLES):
        inputs.put(position, stream.embed(sample[None]))
    return inputs


def outputs(stream: BlockStream, index: int, inputs: Activations) -> Activations:
    """What the entered block makes of them."""
    found = Activations(inputs.shapes, inputs.width, inputs.dtype, CPU)
    for position, x in enumerate(inputs):
        found.put(position, stream.run(index, x))
    return found


def rounded(block: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """(weights, the same rounded to nearest) of block 0's linears by full name."""
    originals = {
        f"model.layers.0.{name}": module.weight.data
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return originals, {
        name: rtn_quantize(weight.float(), group_size=64, scale_dtype=torch.float16)
        for name, weight in originals.items()
    }


def test_the_error_of_a_token_is_that_of_a_plain_loop() -> None:
    """In float64; sizes that differ by thousands count alike, and what is to be nothing does not count."""
    found, wanted = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    found[:, 0], wanted[:, 0] = 3000 * found[:, 0], 3000 * wanted[:, 0]
    wanted[1, 3] = 0
    errors = relative_errors(found, wanted)
    for row in range(2):
        for token in range(5):
            difference = (found[row, token].double() - wanted[row, token].double()).square().sum()
            size = wanted[row, token].double().square().sum()
            expected = 0.0 if size == 0 else float(difference / size)
            assert float(errors[row, token]) == pytest.approx(expected, rel=1e-5)
    moved = found.clone().requires_grad_()
    relative_errors(moved, wanted).sum().backward()
    assert moved.grad is not None and bool(moved.grad.isfinite().all()) and not moved.grad[1, 3].any()
    torch.testing.assert_close(relative_errors(found, wanted.half())[0], errors[0], rtol=0.01, atol=0)


def test_a_block_makes_up_for_disturbed_inputs(source: Path) -> None:
    """From what arrives it learns to give what it should have given, and comes nearer than its own weights do."""
    stream, generator = BlockStream(source, device=CPU), torch.Generator().manual_seed(0)
    clean = block_inputs(stream)
    disturbed = Activations(clean.shapes, clean.width, clean.dtype, CPU)
    for position, x in enumerate(clean):
        disturbed.put(position, x + 0.3 * torch.randn(x.shape, generator=generator) * (torch.arange(128) < 8))
    with stream.block(0) as block:
        wanted, apart = outputs(stream, 0, clean), outputs(stream, 0, disturbed)
        originals, parts = rounded(block)
        config = replace(TUNED, tune_rate=1e-2, tune_scale_rate=1e-2)
        found = tune_block(stream, 0, originals, parts, disturbed, wanted, config, torch.float16)
    own = torch.cat([relative_errors(apart[place], wanted[place])[0] for place in range(0, 60, 16)]).mean()
    assert found.record.kept and found.record.error_after is not None
    assert found.record.error_after < 0.8 * float(own) < found.record.error_before


def test_equal_samples_pass_as_a_batch_and_others_one_behind_the_other(source: Path) -> None:
    stream = BlockStream(source, device=CPU)
    inputs = Activations([(3, 8), (1, 8), (1, 5)], 128, torch.float32, CPU)
    wanted = Activations(inputs.shapes, 128, torch.float32, CPU)
    for position, (rows, length) in enumerate(inputs.shapes):
        inputs.put(position, torch.randn(rows, length, 128))
        wanted.put(position, torch.randn(rows, length, 128))
    with stream.block(0):
        for together, shapes in ((8192, [(4, 8)]), (16, [(2, 8), (2, 8)]), (0, 4 * [(1, 8)])):
            packs = list(_Samples(stream, 0, inputs, wanted, together).packs([0, 1, 2, 3]))
            assert [tuple(x.shape[:2]) for x, _, _ in packs] == shapes and not any(lengths for *_, lengths in packs)
            for pairs in ((0, inputs), (1, wanted)):
                rows = torch.cat([pack[pairs[0]] for pack in packs])
                assert torch.equal(rows, torch.cat([pairs[1][0], pairs[1][1]]))
        ((x, y, lengths),) = _Samples(stream, 0, inputs, wanted, 8192).packs([4, 2])
        assert x.shape[:2] == y.shape[:2] == (1, 13) and lengths == (5, 8)
        assert torch.equal(y[0, 5:], wanted[0][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_in_16_bits_learns_in_bfloat16(source: Path, dtype: torch.dtype) -> None:
    """On a GPU streams compute in 16 bits, and the block that learns in autocast; and the block stays as it is."""
    stream = BlockStream(source, device=CPU, dtype=dtype)
    inputs = block_inputs(stream)
    with stream.block(0) as block:
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        originals, parts = rounded(block)
        wanted = outputs(stream, 0, inputs)
        found = tune_block(stream, 0, originals, parts, inputs, wanted, TUNED, torch.float16)
        assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
    assert found.record.kept and found.record.error_after is not None
    assert found.record.error_after < 0.9 * found.record.error_before
    for name, part in found.parts.items():
        assert part.codes.dtype == torch.uint8 and int(part.codes.max()) <= 15
        assert part.scales.dtype == torch.float16 and part.scales.shape == parts[name].scales.shape
    assert set(found.norms) == {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_nothing_of_a_tuning_is_left_behind(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cycle keeps what moved and its moments, 12 bytes a weight, until somebody collects garbage."""
    stream, made = BlockStream(source, device=CPU), []
    inputs, adam = block_inputs(stream), torch.optim.Adam

    def noted(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Adam:
        made.extend(weakref.ref(moving) for group in groups for moving in group["params"])
        optimizer = adam(groups, **settings)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(torch.optim, "Adam", noted)
    gc.collect()
    gc.disable()
    try:
        with stream.block(0) as block:
            wanted = outputs(stream, 0, inputs)
            tune_block(stream, 0, *rounded(block), inputs, wanted, replace(TUNED, tune_block_steps=2), torch.float16)
        assert len(made) == 17 and not any(one() is not None for one in made)
    finally:
        gc.enable()


def test_gradients_of_a_pack_are_those_of_its_samples(source: Path) -> None:
    stream = BlockStream(source, device=CPU)
    name, lengths = "mlp.down_proj.weight", (5, 9, 3)
    with stream.block(0) as block:
        samples = [torch.randn(1, length, 128) for length in lengths]
        outer = [torch.randn(1, length, 128) for length in lengths]
        moved = [block.get_parameter(name).detach().clone().requires_grad_() for _ in range(3)]
        packed = stream.run_with(0, {name: moved[0]}, torch.cat(samples, dim=1), lengths)
        (packed * torch.cat(outer, dim=1)).sum().backward()
        for x, weight in zip(samples, outer, strict=True):
            (stream.run_with(0, {name: moved[1]}, x) * weight).sum().backward()
        # And of torch's own module, with the weight in its place.
        reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        layer, rotary = reference.model.layers[0], reference.model.rotary_emb
        layer.mlp.down_proj.weight = torch.nn.Parameter(moved[2])
        for x, weight in zip(samples, outer, strict=True):
            positions = rotary(x, torch.arange(x.shape[1])[None])
            (layer(x, position_embeddings=positions, attention_mask=None) * weight).sum().backward()
        assert moved[0].grad is not None and moved[1].grad is not None
        torch.testing.assert_close(moved[0].grad, moved[1].grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moved[1].grad, layer.mlp.down_proj.weight.grad, rtol=1e-4, atol=1e-5)
        assert not stream.run(0, samples[0]).requires_grad


# What it does not go with


@pytest.mark.parametrize(
    ("config", "way", "sentence"),
    [
        (replace(TUNED, method="rtn"), {}, "tune_block_steps: got 30 with method rtn, which runs no calibration text"),
        (TUNED, {"experts": True}, "tune_block_steps: got 30 for a model with experts"),
    ],
)
def test_what_cannot_have_it_is_refused(config: QuantizationConfig, way: dict[str, Any], sentence: str) -> None:
    plain: dict[str, Any] = {"kept": False, "processes": 1, "limited": False, "experts": False}
    with pytest.raises(InputError, match=sentence):
        require_combination(config, **(plain | way))
    require_combination(replace(config, tune_block_steps=0), **(plain | way))
    require_combination(TUNED, **(plain | {"kept": True, "processes": 2, "limited": True}))


@pytest.mark.parametrize("dry", [False, True])
def test_the_command_refuses_before_any_work(tmp_path: Path, dry: bool) -> None:
    model = save_tiny_model(tmp_path / "model", "mixtral", **EXPERT_MODELS["mixtral"])
    out = tmp_path / "out"
    command = [str(model), "-o", str(out), "--preset", "marlin", "--tune-block-steps", "7", "--device", "cpu"]
    result = CliRunner().invoke(main, command + ["--dry-run"] * dry)
    assert result.exit_code == 2 and "tune_block_steps: got 7 for a model with experts" in result.stderr
    rounding = CliRunner().invoke(main, [*command, "--method", "rtn", *(["--dry-run"] * dry)])
    assert rounding.exit_code == 2 and "tune_block_steps: got 7 with method rtn" in rounding.stderr
    assert not out.exists()


@pytest.mark.parametrize("named", [["--preset", "fast"], []])
def test_fast_leaves_out_what_a_model_cannot_have(tmp_path: Path, named: list[str]) -> None:
    model = save_tiny_model(tmp_path / "model", "mixtral", **EXPERT_MODELS["mixtral"])
    result = CliRunner().invoke(main, [str(model), "--dry-run", "--json", "--device", "cpu", *named])
    assert result.exit_code == 0, result.stderr
    assert "note: preset fast runs without its block tuning: it does not know experts" in result.stderr
    assert json.loads(result.stdout)["tuned_blocks_least_gpu_bytes"] is None


def test_progress_tells_a_tuned_block_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Display().quantizing() as progress:
        progress(ProgressEvent("tune block", 0, 2, None, 7, 14, None, "tuning, step 10 of 30"))
        progress(ProgressEvent("tune block", 0, 2, None, 7, 14, 0.1, "tuned: error 0.20000 -> 0.10000"))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("[7/14] block 1/2  tuned: error 0.20000 -> 0.10000  elapsed 0:00")


@pytest.mark.gpu
@pytest.mark.parametrize("pack", [True, False])
def test_a_whole_run_on_a_gpu(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, pack: bool) -> None:
    """Better blocks, the same bits twice, and a model that runs on the kernel."""
    gpu = torch.device("cuda")
    config = QuantizationConfig.from_preset(
        "fast", group_size=64, damp_percent=1.0, tune_block_steps=40, tune_batch=4, pack=pack
    )
    with caplog.at_level(logging.WARNING):
        report = quantize_model(source, tmp_path / "one", config, SAMPLES, device=gpu)
    quantize_model(source, tmp_path / "two", config, SAMPLES, device=gpu)
    assert not caplog.records and same(tmp_path / "one", tmp_path / "two")
    assert any(record.kept for record in report.tuned_blocks)
    assert all(record.error_after is not None for record in report.tuned_blocks)
    peak = report.costs["tune blocks"]["peak_gpu_bytes"]
    assert peak is not None and peak > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", device_map="cuda")
    with torch.no_grad():
        assert math.isfinite(float(model(SAMPLES[0][None].cuda()).logits.float().mean()))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["direct", "not recordable"])
def test_a_recorded_step_is_the_step(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Windows of one length: one CUDA graph a block, or direct steps where a block waits for the device."""
    config = QuantizationConfig.from_preset("fast", group_size=64, damp_percent=1.0, tune_block_steps=20, tune_batch=4)
    recorded: list[Any] = []
    record, run_with = Replayed._record, BlockStream.run_with

    def counted(self: Replayed, *inputs: Tensor) -> Any:
        graph = record(self, *inputs)
        recorded.append(graph)
        return graph

    def waiting(self: BlockStream, *arguments: Any) -> Tensor:
        torch.cuda.synchronize()
        return run_with(self, *arguments)

    monkeypatch.setattr(Replayed, "_record", counted)
    quick = quantize_model(source, tmp_path / "quick", config, SAMPLES, device=torch.device("cuda"))
    assert len(recorded) == 2
    if way == "direct":
        monkeypatch.setattr(_Samples, "alike", lambda *_: False)
    else:
        monkeypatch.setattr(BlockStream, "run_with", waiting)
    plain = quantize_model(source, tmp_path / "plain", config, SAMPLES, device=torch.device("cuda"))
    assert len(recorded) == 2
    for one, other in zip(quick.tuned_blocks, plain.tuned_blocks, strict=True):
        assert one.error_after == pytest.approx(other.error_after, rel=0.02)
        assert one.codes_changed == pytest.approx(other.codes_changed, rel=0.1)
