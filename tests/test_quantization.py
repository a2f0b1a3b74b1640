"""quantization/: each fast path against a naive float64 twin."""

from __future__ import annotations

import pytest
import torch
from helpers import random_hessian, random_weight
from torch import Tensor

from marlin_gptq.quantization import grid
from marlin_gptq.quantization.gptq import gptq_quantize, rtn_quantize
from marlin_gptq.quantization.hessian import (
    Hessian,
    NotPositiveDefinite,
    damp,
    factor,
    inverse_factor,
    relative_error,
)
from marlin_gptq.quantization.weight import QuantizedWeight, round_to_codes


def loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    difference = (weight - quantized).double()
    return float(((difference @ hessian.double()) * difference).sum())


def brain_surgeon(weight: Tensor, damped: Tensor, group: int, clip: bool) -> tuple[Tensor, Tensor]:
    """Optimal brain quantization in fixed order, float64: after each column its row of the inverse is eliminated.

    Clipping: the error of a group is judged under the Schur complement of the columns after it, written out.
    """
    current = weight.double().clone()
    inverse = torch.linalg.inv(damped.double())
    rows, columns = weight.shape
    codes, scales = torch.zeros(rows, columns, dtype=torch.uint8), []
    for column in range(columns):
        if column % group == 0:
            chunk = current[:, column : column + group].float()
            full = chunk.abs().amax(1, keepdim=True) * (2 / 15)
            # Inverse of the group's block of the remaining inverse = Hessian with later columns free to move.
            conditional = torch.linalg.inv(inverse[column : column + group, column : column + group])
            best = torch.full((rows,), torch.inf, dtype=torch.float64)
            scale = full.half()
            for ratio in grid.CLIP_RATIOS if clip else (1.0,):
                tried = (full * ratio).half()
                difference = (round_to_codes(chunk, tried).double() - 8) * tried.double() - chunk.double()
                error = ((difference @ conditional) * difference).sum(1)
                better = error < best
                best = torch.where(better, error, best)
                scale = torch.where(better[:, None], tried, scale)
            scales.append(scale)
        step = scales[-1].squeeze(1)
        code = round_to_codes(current[:, column].float(), step)
        codes[:, column] = code
        error = (current[:, column] - (code.double() - 8) * step.double()) / inverse[column, column]
        current -= error[:, None] * inverse[column][None]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, torch.cat(scales, dim=1)


def test_hessian_is_two_x_xt_per_token() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 5, 8, generator=generator), torch.randn(7, 8, generator=generator).half()]
    hessian = Hessian(8, torch.device("cpu"))
    for batch in batches:
        hessian.add(batch)
    vectors = torch.cat([batch.reshape(-1, 8).double() for batch in batches])
    torch.testing.assert_close(hessian.mean().double(), 2 * vectors.t() @ vectors / len(vectors), rtol=1e-5, atol=1e-5)
    assert hessian.tokens == 22
    with pytest.raises(ValueError, match="no calibration token reached this layer"):
        Hessian(8, torch.device("cpu")).mean()


@pytest.mark.parametrize("features", [128, 129, 640, 1100])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_hessian_summed_in_panels_is_whole_and_symmetric(features: int, device: str) -> None:
    vectors = random_weight(200, features, seed=1).half().to(device)
    hessian = Hessian(features, vectors.device)
    for part in vectors.split(64):
        hessian.add(part)
    found = hessian.mean()
    exact = vectors.double()
    torch.testing.assert_close(found.double(), 2 * exact.t() @ exact / 200, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, found.t(), rtol=1e-5, atol=1e-7)
    capped = Hessian(features, vectors.device)
    capped.add(vectors, token_cap=1e9)  # limits nothing
    torch.testing.assert_close(capped.mean(), found, rtol=1e-5, atol=1e-6)


def test_damping_lifts_the_diagonal_and_revives_dead_features() -> None:
    hessian = torch.diag(torch.tensor([2.0, 4.0, 0.0]))
    torch.testing.assert_close(damp(hessian, 0.1), torch.diag(torch.tensor([2.3, 4.3, 3.3])))
    torch.testing.assert_close(damp(torch.zeros(2, 2), 0.1), 1.1 * torch.eye(2))
    assert torch.equal(hessian, torch.diag(torch.tensor([2.0, 4.0, 0.0])))


@pytest.mark.parametrize("features", [1, 16, 200])
def test_factor_is_the_upper_cholesky_factor_of_the_inverse(features: int) -> None:
    damped = damp(random_hessian(features, seed=features), 0.01)
    upper = inverse_factor(damped)
    assert upper is not None
    assert torch.equal(upper, upper.triu())
    expected = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    torch.testing.assert_close(upper.double(), expected, rtol=1e-3, atol=1e-5)


def test_damping_is_raised_until_it_factors_then_refused() -> None:
    hessian = random_hessian(32, seed=1)
    assert factor(hessian, 0.01).damp_percent == 0.01
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    mean = float(hessian.diagonal().mean())
    eigenvalues[0] = -0.05 * mean
    indefinite = vectors @ torch.diag(eigenvalues) @ vectors.t()
    assert factor(indefinite, 0.01).damp_percent == pytest.approx(0.1)
    eigenvalues[0] = -50 * mean
    hopeless = vectors @ torch.diag(eigenvalues) @ vectors.t()
    hopeless.diagonal().abs_()
    with pytest.raises(NotPositiveDefinite, match=r"not positive definite even with damping 0\.01, 0\.1, 1, 10"):
        factor(hopeless, 0.01)
    hessian[3, 4] = torch.nan
    with pytest.raises(ValueError, match="its inputs in the calibration hold NaN or Inf"):
        factor(hessian, 0.01)


def test_relative_error_is_output_error_over_output() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(500, 24, generator=generator)
    weight = random_weight(10, 24, seed=4)
    quantized = weight + 0.01 * torch.randn(10, 24, generator=generator)
    hessian = 2 * inputs.t() @ inputs / 500
    expected = ((inputs @ (weight - quantized).t()).square().sum() / (inputs @ weight.t()).square().sum()).item()
    assert relative_error(weight, quantized, hessian) == pytest.approx(expected, rel=1e-4)
    plain = ((weight - quantized).square().sum() / weight.square().sum()).item()
    assert relative_error(weight, quantized, None) == pytest.approx(plain, rel=1e-5)
    assert relative_error(torch.zeros(2, 24), torch.zeros(2, 24), hessian) == 0


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("group", [32, 64])
def test_gptq_equals_naive_optimal_brain_surgeon(group: int, clip: bool) -> None:
    weight = random_weight(24, 128, seed=group)
    damped = damp(random_hessian(128, seed=5), 0.1)
    upper = inverse_factor(damped)
    assert upper is not None
    found = gptq_quantize(weight, upper, group_size=group, scale_dtype=torch.float16, block_size=64, clip=clip)
    codes, scales = brain_surgeon(weight, damped, group, clip)
    # float32 against float64 may round a weight that lies midway between two codes the other way, and all after it.
    same_rows = (found.codes == codes).all(dim=1) & (found.scales == scales).all(dim=1)
    assert same_rows.float().mean() >= 0.75
    naive = QuantizedWeight(codes, scales, None, group).dequantize()
    assert loss(weight, found.dequantize(), damped) == pytest.approx(loss(weight, naive, damped), rel=0.02)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
def test_block_size_changes_only_rounding(block_size: int, group: int) -> None:
    weight = random_weight(16, 256, seed=6)
    hessian = random_hessian(256, seed=7)
    upper = factor(hessian, 0.1).upper
    one, other = (
        gptq_quantize(weight, upper, group_size=group, scale_dtype=torch.float16, block_size=size)
        for size in (block_size, 128)
    )
    assert (one.codes == other.codes).float().mean() > 0.97
    assert loss(weight, one.dequantize(), hessian) == pytest.approx(loss(weight, other.dequantize(), hessian), rel=0.02)


def test_rows_are_independent_so_linears_may_be_stacked() -> None:
    upper = factor(random_hessian(128, seed=8), 0.1).upper
    first, second = random_weight(16, 128, seed=9), random_weight(40, 128, seed=10)
    settings = {"group_size": 64, "scale_dtype": torch.bfloat16}
    stacked = gptq_quantize(torch.cat([first, second]), upper, **settings)
    alone = gptq_quantize(second, upper, **settings)
    assert (stacked.rows(16, 56).codes == alone.codes).float().mean() > 0.99
    assert stacked.scales.dtype == torch.bfloat16


def test_each_step_of_the_recipe_lowers_the_loss() -> None:
    weight, hessian = random_weight(64, 256, seed=11), random_hessian(256, seed=12)
    upper = factor(hessian, 0.1).upper
    settings = {"group_size": 128, "scale_dtype": torch.float16}
    rtn = loss(weight, rtn_quantize(weight, **settings).dequantize(), hessian)
    plain = loss(weight, gptq_quantize(weight, upper, clip=False, **settings).dequantize(), hessian)
    clipped = loss(weight, gptq_quantize(weight, upper, **settings).dequantize(), hessian)
    assert clipped < plain < rtn


def test_weights_on_a_known_grid_come_back_exactly() -> None:
    generator = torch.Generator().manual_seed(13)
    codes = torch.randint(0, 16, (8, 64), generator=generator)
    codes[:, 0], codes[:, 32] = 0, 0
    scales = torch.tensor([[2.0**-5, 2.0**-7]]).repeat(8, 1)
    weight = (codes - 8) * scales.repeat_interleave(32, dim=1)
    exact = round_to_codes(weight, scales.repeat_interleave(32, dim=1))
    assert torch.equal(exact, codes.to(torch.uint8))
    assert torch.equal(QuantizedWeight(exact, scales, None, 32).dequantize(), weight)


def test_clipping_search_against_brute_force() -> None:
    weight = random_weight(12, 32, seed=14) * torch.linspace(0.1, 3, 32)
    damped = damp(random_hessian(32, seed=15), 0.1)
    upper = inverse_factor(damped)
    assert upper is not None
    found = grid.clipped_scale(weight, upper, torch.float16)
    for row in range(12):
        errors = {}
        for ratio in grid.CLIP_RATIOS:
            scale = (weight[row].abs().max() * (2 / 15) * ratio).half()
            difference = (
                (torch.round(weight[row] / scale.float()).clamp(-8, 7)) * scale.float() - weight[row]
            ).double()
            errors[float(scale)] = float(difference @ damped.double() @ difference)
        # With every column in the group nothing is left to compensate: the conditional Hessian is the Hessian.
        assert errors[float(found[row])] == pytest.approx(min(errors.values()), rel=1e-4)
    assert grid.CLIP_RATIOS[0] == 1 and grid.CLIP_RATIOS[-1] == 0.25 and len(grid.CLIP_RATIOS) == 76


def test_clipping_search_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, upper = random_weight(20, 64, seed=16), factor(random_hessian(64, seed=17), 0.1).upper
    whole = grid.clipped_scale(weight, upper, torch.float16)
    monkeypatch.setattr(grid, "SCRATCH_ELEMENTS_WITHOUT_GPU", 20 * 64 * 5)
    assert (grid.clipped_scale(weight, upper, torch.float16) == whole).float().mean() >= 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_never_zero_or_infinite(dtype: torch.dtype) -> None:
    rows = torch.zeros(4, 32)
    rows[1] = 1e-38
    rows[2] = 3e38
    rows[3] = 1.0
    for scale in (grid.full_scale(rows, dtype), grid.clipped_scale(rows, torch.eye(32), dtype)):
        assert scale.dtype == dtype
        assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
        assert float(scale[0]) == 1.0
        assert float(scale[1]) == {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}[dtype]
    quantized = rtn_quantize(rows[:1], group_size=-1, scale_dtype=dtype)
    assert torch.equal(quantized.codes, torch.full((1, 32), 8, dtype=torch.uint8))


def test_small_weights_are_held_by_subnormal_scales() -> None:
    """Their errors are those of large weights, down to steps of two of the smallest scales; below, it is said."""
    weight, upper = random_weight(64, 128, seed=19), factor(random_hessian(128, seed=20), 0.01).upper
    weight /= weight.abs().amax(dim=1, keepdim=True)

    def error(size: float, dtype: torch.dtype = torch.float16) -> float:
        small = size * weight
        quantized = gptq_quantize(small, upper, group_size=128, scale_dtype=dtype)
        return relative_error(small / size, quantized.dequantize() / size, None)

    usual = error(0.1)
    for size in (2e-4, 5e-5, 5e-6, 16 * 2.0**-24):
        assert error(size) < 1.3 * usual, size
        assert grid.share_too_small(size * weight, 128, torch.float16) == 0
    assert error(3e-8) > 10 * usual
    for size in (14 * 2.0**-24, 1e-9, 1e-30):
        assert grid.share_too_small(size * weight, 128, torch.float16) == pytest.approx(1)
        assert grid.share_too_small(size * weight, 128, torch.bfloat16) == 0
    weight[0] *= 1e-9  # next to nothing of the whole
    assert grid.share_too_small(weight, 128, torch.float16) < 1e-12
    assert grid.share_too_small(torch.zeros(4, 128), 128, torch.float16) == 0


def test_rtn_is_the_nearest_point_of_the_grid() -> None:
    weight = random_weight(6, 64, seed=18)
    quantized = rtn_quantize(weight, group_size=32, scale_dtype=torch.float16)
    steps = quantized.scales.float().repeat_interleave(32, dim=1)
    points = (torch.arange(16) - 8)[:, None, None] * steps
    nearest = (points - weight).abs().amin(dim=0)
    torch.testing.assert_close((quantized.dequantize() - weight).abs(), nearest, rtol=1e-4, atol=1e-7)


def test_zeros_move_the_grid() -> None:
    codes = torch.tensor([[0, 15, 3, 3]], dtype=torch.uint8)
    quantized = QuantizedWeight(codes, torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 3]], dtype=torch.uint8), 2)
    assert quantized.dequantize().tolist() == [[-0.5, 7.0, 0.0, 0.0]]


def test_groups_must_fill_the_row() -> None:
    with pytest.raises(ValueError, match="group_size: got 64, which does not divide in_features 96"):
        rtn_quantize(torch.ones(2, 96), group_size=64, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match="block_size: got 96, which does not line up with groups of 64"):
        gptq_quantize(torch.ones(2, 128), torch.eye(128), group_size=64, scale_dtype=torch.float16, block_size=96)
