"""correct_target: a second stream of activations, through full-precision blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_samples, save_tiny_model
from safetensors.torch import load_file

from marlin_gptq import QuantizationConfig, quantize_model
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
