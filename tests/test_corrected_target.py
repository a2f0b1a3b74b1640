"""correct_target: a second stream of activations, through full-precision blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import embedded, loud_model, one_by_one, random_samples, save_tiny_model
from safetensors.torch import load_file
from torch import nn

from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.modeling.architecture import block_linears
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.observe import collect_hessians, collect_with_cross, stages
from marlin_gptq.modeling.packed import Packed
from marlin_gptq.modeling.staged import advance
from marlin_gptq.quantization.hessian import Cross

CPU = torch.device("cpu")


def test_corrected_targets_need_the_full_precision_stream(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    samples = random_samples(12)
    for name, share in (("none", 0.0), ("half", 0.5)):
        settings = QuantizationConfig(correct_target=share, true_sequential=True)
        quantize_model(source, tmp_path / name, settings, samples, device=CPU)
    none, half = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "half"))
    first, later = "model.layers.0.self_attn.q_proj.qweight", "model.layers.1.mlp.down_proj.qweight"
    assert torch.equal(none[first], half[first])  # nothing in front of it is quantized
    assert not torch.equal(none[later], half[later])


def test_the_full_precision_stream_passes_blocks_that_stay_as_they_are(tmp_path: Path) -> None:
    """After a block that nothing is quantized in, both streams are the same still, and there is nothing to correct."""
    source = save_tiny_model(tmp_path / "source")
    for share in (0.0, 1.0):
        settings = QuantizationConfig(correct_target=share, skip=(r"layers\.0\.",))
        quantize_model(source, tmp_path / str(share), settings, random_samples(12), device=CPU)
    none, full = (load_file(tmp_path / name / "model.safetensors") for name in ("0.0", "1.0"))
    assert all(torch.equal(none[name], full[name]) for name in none)


def test_differences_from_full_precision_are_those_of_each_sample_alone(tmp_path: Path) -> None:
    stream = BlockStream(loud_model(tmp_path / "model"), device=CPU)
    hidden, full = (embedded(stream, random_samples(6)) for _ in range(2))
    for position, sample in enumerate(full):
        hidden.put(position, sample + 0.1 * torch.randn(sample.shape))
    with stream.block(0) as block:
        linears = block_linears(block, stream.block_name(0))
        originals = {name: linear.weight.data for name, linear in linears.items()}
        groups = [group for stage in stages(stream, 0, linears, hidden[0]) for group in stage]
        packs = stream.packs(0, hidden.shapes, 100)
        assert 1 < len(packs) < 6
        pairs = [(one_by_one(hidden), one_by_one(full)), (Packed(hidden, packs), Packed(full, packs))]
        (hessians, alone), (_, shared) = (
            collect_with_cross(stream, 0, groups, linears, originals, *pair) for pair in pairs
        )
        expected = collect_hessians(stream, 0, groups, linears, one_by_one(hidden))
    for name, cross in alone.items():
        assert torch.equal(hessians.hessians[name].sum, expected.hessians[name].sum)
        assert hessians.tokens == expected.tokens
        assert shared[name].tokens == cross.tokens
        torch.testing.assert_close(shared[name].sum, cross.sum, rtol=1e-4, atol=1e-3)


def test_one_pass_compares_with_full_precision_and_takes_it_on(tmp_path: Path) -> None:
    """`finish`: the same differences to the bit, and the full-precision stream is behind the block."""
    stream = BlockStream(loud_model(tmp_path / "model"), device=CPU)
    hidden, *fulls = (embedded(stream, random_samples(6)) for _ in range(4))
    for position, sample in enumerate(hidden):
        hidden.put(position, sample + 0.1 * torch.randn(sample.shape))
    found = []
    with stream.block(0) as block:
        linears = block_linears(block, stream.block_name(0))
        originals = {name: linear.weight.data for name, linear in linears.items()}
        groups = [group for stage in stages(stream, 0, linears, hidden[0]) for group in stage]
        packs = stream.packs(0, hidden.shapes, 100)
        advance(stream, 0, Packed(fulls[2], packs))
        for linear in linears.values():  # as they are once some are quantized
            linear.weight = nn.Parameter(linear.weight * 1.1, requires_grad=False)
        for finish, full in zip((False, True), fulls, strict=False):
            samples = Packed(hidden, packs), Packed(full, packs)
            found.append(collect_with_cross(stream, 0, groups, linears, originals, *samples, finish=finish))
    for (one, one_cross), (other, other_cross) in [found]:
        assert all(torch.equal(one.hessians[name].sum, other.hessians[name].sum) for name in one.hessians)
        assert all(torch.equal(one_cross[name].sum, other_cross[name].sum) for name in one_cross)
    assert all(torch.equal(a, b) for a, b in zip(fulls[1], fulls[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(fulls[0], fulls[2], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_products_in_16_bits_are_those_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    arriving = torch.randn(3000, 256, generator=generator).to(dtype)
    full = (arriving.float() + 0.05 * torch.randn(3000, 256, generator=generator)).to(dtype)
    crosses = []
    for device in ("cpu", "cuda"):
        cross = Cross(256, torch.device(device))
        for part in range(3):
            rows = slice(1000 * part, 1000 * (part + 1))
            cross.add(full[rows].to(device), arriving[rows].to(device))
        crosses.append(cross.mean().cpu())
    # The difference of two neighbours in 16 bits is exact but for its rounding to as many.
    assert (crosses[1] - crosses[0]).norm() < 5e-3 * crosses[0].norm()
