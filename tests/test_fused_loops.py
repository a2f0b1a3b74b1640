"""quantization/fused.py, the pass over the columns, against its plain torch twins.

Tests of the kernels run twice: marked gpu, on a GPU; and without one in Triton's interpreter, which must be asked for
before Triton is imported, hence in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tritons_interpreter
from helpers import random_hessian, random_weight
from torch import Tensor
from tritons_interpreter import INTERPRETED

from marlin_gptq.quantization import columns as plain
from marlin_gptq.quantization import fused, grid, loops
from marlin_gptq.quantization.gptq import gptq_quantize
from marlin_gptq.quantization.hessian import damp, factor
from marlin_gptq.quantization.weight import QuantizedWeight, round_to_codes


@pytest.fixture(params=tritons_interpreter.DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return tritons_interpreter.device(request.param)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    tritons_interpreter.fresh_loops(monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_kernels_in_tritons_interpreter(repository: Path) -> None:
    tritons_interpreter.run(__file__, repository)


# ---- each kernel against its twin


def a_factor(features: int, seed: int, device: torch.device) -> Tensor:
    return factor(random_hessian(features, seed), 0.1).upper.to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("width", "rows", "candidates"), [(32, 1, 228), (32, 70, 76), (64, 131, 5), (128, 65, 76)])
def test_the_search_finds_what_its_twin_finds(
    device: torch.device, width: int, rows: int, candidates: int, dtype: torch.dtype
) -> None:
    weight = (random_weight(rows, width, seed=1) * torch.linspace(0.2, 3, width)).to(device)
    whitener = torch.linalg.inv(a_factor(width, 2, device).double()).float()
    full = weight.abs().amax(dim=1, keepdim=True) * (2 / 15)
    signs = torch.where(torch.arange(candidates) % 3 == 1, -1.0, 1.0)  # scales may have any sign
    scales = (full * (torch.linspace(1, 0.25, candidates) * signs).to(device)).to(dtype)
    found, expected = fused.best_scales(weight, whitener, scales), grid.best_scales(weight, whitener, scales)
    assert found.shape == expected.shape == (rows, 1) and found.dtype == dtype
    assert float((found == expected).float().mean()) > 0.97

    def errors(of: Tensor) -> Tensor:
        tried = of.float()
        difference = (round_to_codes(weight, tried).double() - 8) * tried.double() - weight.double()
        return (difference @ whitener.double()).square().sum(dim=1)

    best = torch.stack([errors(scales[:, i : i + 1]) for i in range(candidates)]).amin(dim=0)
    torch.testing.assert_close(errors(found), best, rtol=1e-5, atol=0)


def test_the_search_keeps_the_first_of_equals_and_of_hopeless_candidates(device: torch.device) -> None:
    weight = torch.zeros(3, 32, device=device)
    weight[1] = 3e38  # its square overflows under every scale
    weight[2] = 0.5  # on the grid of both
    scales = torch.tensor([[1.0, 2.0], [6.0, 5.0], [0.5, 0.25]], device=device).half()
    found = fused.best_scales(weight, torch.eye(32, device=device), scales)
    assert found.squeeze(1).tolist() == [1.0, 6.0, 0.5]


@pytest.mark.parametrize(
    ("width", "rows", "first", "last"), [(128, 33, 0, 128), (128, 70, 32, 64), (96, 5, 64, 96), (64, 32, 0, 64)]
)
@pytest.mark.parametrize("own_steps", [False, True])
def test_columns_are_quantized_as_by_the_twin(
    device: torch.device, width: int, rows: int, first: int, last: int, own_steps: bool
) -> None:
    upper = a_factor(2 * width, 3, device)[:width, :width]  # a view of a wider one, as in GPTQ
    block = random_weight(width, rows, seed=4).to(device)
    steps = block.abs().amax(dim=0) * torch.where(torch.arange(rows) % 2 == 0, 0.13, -0.12).to(device)
    if own_steps:
        steps = steps * torch.linspace(0.5, 1, width, device=device)[:, None]
    steps = steps.half()
    blocks, codes, errors = [block.clone(), block.clone()], [], []
    for these, work in zip((plain, fused), blocks, strict=True):
        codes.append(torch.full_like(block, 77, dtype=torch.uint8))
        errors.append(torch.full_like(block, 77.0))
        these.quantize_columns(work, codes[-1], errors[-1], upper, steps, first, last)
    same = codes[0] == codes[1]
    assert float(same.float().mean()) > 0.998  # at most a few, midway between two codes
    agree = same.all(dim=0)  # a row that has rounded once the other way goes its own way from there
    assert float(agree.float().mean()) > 0.9
    torch.testing.assert_close(errors[1][:, agree], errors[0][:, agree], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(blocks[1][last:, agree], blocks[0][last:, agree], rtol=1e-4, atol=1e-5)
    outside = [column for column in range(width) if not first <= column < last]
    assert bool((codes[1][outside] == 77).all()) and bool((errors[1][outside] == 77).all())
    assert torch.equal(blocks[1][:first], block[:first])


@pytest.mark.parametrize(("rows", "later", "width"), [(130, 131, 128), (1, 32, 96), (257, 7, 32), (3, 0, 128)])
def test_errors_are_pushed_as_by_the_twin(device: torch.device, rows: int, later: int, width: int) -> None:
    whole = random_weight(rows, later + 160, seed=5).to(device)
    rest, before = whole[:, 160:], whole.clone()
    errors, upper = random_weight(width, rows, seed=6).to(device), random_weight(width, later + 9, seed=7).to(device)
    expected = rest.double() - errors.t().double() @ upper[:, 9:].double()
    fused.push_errors(rest, errors, upper[:, 9:])
    torch.testing.assert_close(rest.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole[:, :160], before[:, :160])


# ---- GPTQ with them


def problem(rows: int, features: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """(weight, damped Hessian, U), two input features dead."""
    hessian = random_hessian(features, seed=8)
    hessian[[3, features - 2]] = 0
    hessian[:, [3, features - 2]] = 0
    weight = random_weight(rows, features, seed=9)
    weight[0] = 0
    return weight.to(device, dtype), damp(hessian, 0.1).to(device), factor(hessian, 0.1).upper.to(device)


@pytest.mark.parametrize(
    ("group", "features", "rows", "block"),
    [
        (32, 160, 33, 128),
        (64, 192, 35, 128),
        (128, 256, 70, 128),
        (-1, 192, 40, 128),
        (128, 256, 9, 64),
        (-1, 64, 3, 128),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "scale_dtype", "clip"),
    [
        (torch.float32, torch.float16, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float16, False),
    ],
)
def test_gptq_with_fused_loops_agrees_with_plain_torch(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    group: int,
    features: int,
    rows: int,
    block: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    clip: bool,
) -> None:
    if INTERPRETED and dtype == torch.float16 and features > 160:
        pytest.skip("takes the interpreter long, and differs from the other cases by no kernel")
    weight, damped, upper = problem(rows, features, device, dtype)
    settings = {"group_size": group, "scale_dtype": scale_dtype, "block_size": block, "clip": clip}
    loops.set_fused(False)
    expected = gptq_quantize(weight, upper, **settings)
    loops.set_fused(True)
    tritons_interpreter.use_fused(monkeypatch, device)
    found = gptq_quantize(weight, upper, **settings)

    def loss(quantized: QuantizedWeight) -> float:
        difference = weight.double() - quantized.dequantize().double()
        return float(((difference @ damped.double()) * difference).sum())

    assert found.codes.dtype == torch.uint8 and found.scales.dtype == scale_dtype
    # A row goes its own way behind the first code or scale that fell the other way.
    assert float((found.scales == expected.scales).float().mean()) > 0.9
    assert float((found.codes == expected.codes).float().mean()) > 0.95
    assert loss(found) == pytest.approx(loss(expected), rel=0.01)
    assert float(found.scales[0, 0]) == 1 and bool((found.codes[0] == 8).all())  # a row of zeros


@pytest.mark.parametrize(("group", "clip"), [(32, True), (-1, False)])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, group: int, clip: bool
) -> None:
    tritons_interpreter.use_fused(monkeypatch, device)
    rows, features = (70, 96) if device.type == "cpu" else (4096 + 7, 1024)
    weight, _, upper = problem(rows, features, device)
    settings = {"group_size": group, "scale_dtype": torch.float16, "clip": clip}
    whole = gptq_quantize(weight, upper, **settings)
    again = gptq_quantize(weight, upper, **settings)
    assert torch.equal(whole.codes, again.codes) and torch.equal(whole.scales, again.scales)
    for size in (1, 33) if device.type == "cpu" else (1, 33, 64, 1000):
        for start in {0, size, rows // 2 // size * size, (rows - 1) // size * size}:
            piece = gptq_quantize(weight[start : start + size], upper, **settings)
            inside = slice(start, start + size)
            assert torch.equal(piece.codes, whole.codes[inside]), (size, start)
            assert torch.equal(piece.scales, whole.scales[inside]), (size, start)
