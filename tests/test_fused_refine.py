"""The refinement in fused kernels (quantization/fused.py) against its plain torch twins (quantization/descent.py).

Run as those of tests/test_fused_loops.py: on a GPU, and in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tritons_interpreter
from helpers import random_hessian, random_weight
from torch import Tensor
from tritons_interpreter import INTERPRETED

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.quantization import descent, fused, grid, loops, refine, solve
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.hessian import damp
from marlin_gptq.quantization.refine import descend_codes, refit_scales
from marlin_gptq.quantization.weight import QuantizedWeight

HALF, BRAIN = torch.float16, torch.bfloat16


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


def problem(rows: int, features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(weight, Hessian): two input features dead, a row of zeros."""
    hessian = damp(random_hessian(features, seed=1), 0.01)
    hessian[[3, features - 2]] = 0
    hessian[:, [3, features - 2]] = 0
    weight = random_weight(rows, features, seed=2)
    weight[0] = 0
    return weight.to(device), hessian.to(device)


def rounded(weight: Tensor, group_size: int, dtype: torch.dtype) -> QuantizedWeight:
    """Round to nearest, the scales of every other row negative."""
    found = rtn_quantize(weight, group_size=group_size, scale_dtype=dtype)
    turned = QuantizedWeight((16 - found.codes.int()).clamp(0, 15).to(torch.uint8), -found.scales, None, group_size)
    odd = (torch.arange(len(weight), device=weight.device) % 2 == 1)[:, None]
    return QuantizedWeight(
        torch.where(odd, turned.codes, found.codes), torch.where(odd, turned.scales, found.scales), None, group_size
    )


def loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    difference = (weight - quantized.dequantize()).double()
    return ((difference @ hessian.double()) * difference).sum(1)


# ---- each kernel against its twin


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize(("width", "rows"), [(32, 1), (32, 70), (64, 131), (128, 65)])
def test_scales_are_refitted_as_by_the_twin(device: torch.device, width: int, rows: int, dtype: torch.dtype) -> None:
    weight, whole = problem(rows + 1, 2 * width, device)
    start = rounded(weight, width, dtype)
    gradient = ((weight - start.dequantize()) @ whole)[1:, :width].t().contiguous()
    gradient[:, -1] *= 1e4  # a scale far away, or none at all in a row whose gradient overflows
    if rows > 2:
        gradient[:, 0] = torch.inf
    codes, scales = start.codes[1:, :width].t().contiguous(), start.scales[1:, 0].contiguous()
    square = whole[:width, :width]
    found, moves = [], []
    for these in (descent, fused):
        found.append(torch.full_like(scales, 77))
        moves.append(torch.full_like(gradient, 77.0))
        these.refit_group(gradient, codes, scales, found[-1], moves[-1], square)
    assert bool((found[0] != scales).any()) and bool(found[1].isfinite().all())
    same = found[0] == found[1]
    assert float(same.float().mean()) > 0.96  # at most one, midway between two stored values
    torch.testing.assert_close(found[1].float(), found[0].float(), rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(moves[1][:, same], moves[0][:, same], rtol=1e-6, atol=0)


def test_small_weights_get_the_scales_and_codes_of_the_twin(device: torch.device) -> None:
    """Subnormal scales, which a GPU must neither flush nor round otherwise."""
    weight, hessian = random_weight(64, 64, seed=2).to(device) * 1e-4, damp(random_hessian(64, seed=1), 0.01).to(device)
    start = rounded(weight, 64, HALF)
    assert bool((start.scales.abs() < torch.finfo(HALF).tiny).all())
    gradient = ((weight - start.dequantize()) @ hessian).t().contiguous()
    codes, scales = start.codes.t().contiguous(), start.scales[:, 0].contiguous()
    found = [torch.zeros_like(scales) for _ in range(2)]
    for these, into in zip((descent, fused), found, strict=True):
        these.refit_group(gradient, codes, scales, into, torch.empty_like(gradient), hessian)
    assert bool((found[0] != scales).any()) and float((found[0] == found[1]).float().mean()) > 0.95
    candidates = torch.stack([scales, 2 * scales, scales / 2], dim=1)
    best = [these.best_scales(weight, torch.eye(64, device=device), candidates) for these in (grid, fused)]
    assert bool((best[0].float() != 0).all()) and float((best[0] == best[1]).float().mean()) > 0.95


def test_a_scale_without_curvature_stays(device: torch.device) -> None:
    codes = torch.full((32, 3), 8, dtype=torch.uint8, device=device)  # zeros alone
    codes[:, 2] = 9
    scales = torch.tensor([1.0, -0.5, 0.25], device=device).half()
    gradient = torch.ones(32, 3, device=device)
    for square in (torch.eye(32, device=device), torch.zeros(32, 32, device=device)):
        found, moves = torch.zeros_like(scales), torch.full_like(gradient, 77.0)
        fused.refit_group(gradient, codes, scales, found, moves, square)
        assert found.tolist() == [1.0, -0.5, 0.25 + float(square[0, 0])]
        assert not bool(moves[:, :2].any()) and bool((moves[:, 2] == square[0, 0]).all())


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize(
    ("width", "rows", "start", "columns"), [(128, 33, 0, 32), (128, 5, 128, 256), (96, 70, 64, 32), (40, 1, 0, 40)]
)
def test_codes_descend_as_by_the_twin(
    device: torch.device, width: int, rows: int, start: int, columns: int, dtype: torch.dtype
) -> None:
    features = (start + width + columns - 1) // columns * columns
    weight, whole = problem(rows, features, device)
    weight[:, -1] += 1  # beyond the grid after the rounding below
    coarse = rounded(weight.clamp(-0.1, 0.1), -1 if columns == features else columns, dtype)
    gradient = (weight - coarse.dequantize()) @ whole
    inside = slice(start, start + width)
    codes, scales = coarse.codes.t().contiguous(), coarse.scales.t().contiguous()
    diagonal = whole.diagonal()
    reach = torch.where(diagonal > 0, 1 / diagonal, 0)
    found, moves = [], []
    for these in (descent, fused):
        block = gradient[:, inside].t().clone(memory_format=torch.contiguous_format)
        found.append(torch.full_like(block, 77, dtype=torch.uint8))
        moves.append(torch.full_like(block, 77.0))
        these.descend_columns(
            block, codes[inside], found[-1], moves[-1], whole[inside, inside], reach[inside], scales, start, columns
        )
    assert bool((found[0] != codes[inside]).any()) and int(found[1].max()) <= 15
    agree = (found[0] == found[1]).all(dim=0)  # a row that has rounded once the other way goes its own way from there
    assert float(agree.float().mean()) > 0.9
    torch.testing.assert_close(moves[1][:, agree], moves[0][:, agree], rtol=1e-6, atol=0)


# ---- the refinement with them

CASES = [(32, 160, 33, 128), (64, 192, 35, 64), (128, 256, 40, 128), (-1, 136, 9, 128)]


@pytest.mark.parametrize(("group", "features", "rows", "block"), CASES)
def test_no_step_raises_the_loss(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, group: int, features: int, rows: int, block: int
) -> None:
    tritons_interpreter.use_fused(monkeypatch, device)
    weight, hessian = problem(rows, features, device)
    found = rounded(weight, group, HALF)
    before = first = loss(weight, found, hessian)
    for step in (refit_scales, descend_codes, refit_scales, descend_codes):
        found = step(weight, found, hessian, block)
        after = loss(weight, found, hessian)
        assert bool((after <= before * (1 + 1e-4)).all()), step.__name__
        before = after
    assert found.scales.dtype == HALF and found.codes.dtype == torch.uint8 and int(found.codes.max()) <= 15
    assert float(before.sum()) < 0.8 * float(first.sum())


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize(("group", "features", "rows", "block"), CASES)
def test_the_refinement_agrees_with_plain_torch(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    group: int,
    features: int,
    rows: int,
    block: int,
    dtype: torch.dtype,
) -> None:
    weight, hessian = problem(rows, features, device)
    start = rounded(weight, group, dtype)
    loops.set_fused(False)
    expected = refine.refine(weight, start, hessian, sweeps=2, block_size=block)
    loops.set_fused(True)
    tritons_interpreter.use_fused(monkeypatch, device)
    found = refine.refine(weight, start, hessian, sweeps=2, block_size=block)
    assert found.codes.shape == expected.codes.shape and found.scales.dtype == dtype
    # A row goes its own way behind the first code or scale that fell the other way.
    assert float((found.scales == expected.scales).float().mean()) > 0.9
    assert float((found.codes == expected.codes).float().mean()) > 0.95
    assert float(loss(weight, found, hessian).sum()) == pytest.approx(
        float(loss(weight, expected, hessian).sum()), rel=0.01
    )
    dead = [3, features - 2]
    assert torch.equal(found.codes[:, dead], start.codes[:, dead])


@pytest.mark.parametrize("act_order", ["groups", "columns"])
@pytest.mark.parametrize(
    ("rows", "features", "sizes"),
    [(70, 96, (33,)), pytest.param(4096 + 7, 1024, (64, 1000), marks=pytest.mark.gpu), (7, 128, (1,))],
)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    rows: int,
    features: int,
    sizes: tuple[int, ...],
    act_order: str,
) -> None:
    """Through `solve`: the pass in its order, scales of any sign, and the refinement."""
    if INTERPRETED and rows > 4096:
        pytest.skip("takes the interpreter hours")
    tritons_interpreter.use_fused(monkeypatch, device)
    weight, hessian = random_weight(rows, features, 3).to(device), random_hessian(features, 4).to(device)
    config = QuantizationConfig(
        group_size=32, damp_percent=0.01, signed_scales=True, act_order=act_order, refine_sweeps=2
    )
    prepared = solve.prepare(hessian, config, 32)
    whole = solve.solve(weight, prepared, config, HALF)
    for size in sizes:
        pieces = solve.solve(weight, prepared, config, HALF, rows=size)
        assert torch.equal(pieces.codes, whole.codes) and torch.equal(pieces.scales, whole.scales), size
    assert bool((whole.scales < 0).any())
