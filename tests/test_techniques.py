"""quantization/: the defining property of each technique beside the pass."""

from __future__ import annotations

import pytest
import torch
from helpers import random_hessian, random_weight
from torch import Tensor

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.quantization.gptq import gptq_quantize, rtn_quantize
from marlin_gptq.quantization.grid import clipped_scale, full_scale, signed_scale, stored_scale
from marlin_gptq.quantization.hessian import Cross, Hessian, damp, factor, token_weights
from marlin_gptq.quantization.order import column_order, group_order, inverse_order
from marlin_gptq.quantization.refine import descend_codes, refine, refit_scales
from marlin_gptq.quantization.solve import prepare, solve, static_scales
from marlin_gptq.quantization.target import corrected_target
from marlin_gptq.quantization.weight import QuantizedWeight, round_to_codes

CPU = torch.device("cpu")
HALF = torch.float16


def loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """(W−Q)·H·(W−Q)ᵀ per row, float64."""
    difference = (weight - quantized.dequantize()).double()
    return ((difference @ hessian.double()) * difference).sum(1)


def config(**changes: object) -> QuantizationConfig:
    return QuantizationConfig(**{"group_size": 32, "damp_percent": 0.01} | changes)  # type: ignore[arg-type]


def solved(weight: Tensor, hessian: Tensor, settings: QuantizationConfig, **more: object) -> QuantizedWeight:
    prepared = prepare(hessian, settings, settings.group_size)
    return solve(weight, prepared, settings, HALF, **more)  # type: ignore[arg-type]


# Signed scales


def test_signed_scale_puts_the_extremum_on_the_lowest_code() -> None:
    weight = torch.tensor([[0.5, -1.0, 0.25, 0.0], [2.0, -1.0, 0.0, 1.0]])
    scale = signed_scale(weight)
    assert scale.tolist() == [[0.125], [-0.25]]
    codes = round_to_codes(weight, scale)
    assert codes[0, 1] == 0 and codes[1, 0] == 0
    assert torch.equal((codes.float() - 8) * scale, weight)
    assert bool((stored_scale(torch.tensor([-1e-9, -1e9, 0.0]), HALF).isfinite()).all())
    assert stored_scale(torch.tensor([-0.5, 0.0]), HALF).tolist() == [-0.5, 1.0]


def test_more_candidates_never_choose_a_worse_scale() -> None:
    weight, hessian = random_weight(40, 32, 0), damp(random_hessian(32, 1), 0.01)
    upper = factor(random_hessian(32, 1), 0.01).upper

    def error(scale: Tensor) -> Tensor:
        quantized = QuantizedWeight(round_to_codes(weight, scale), scale, None, -1)
        return loss(weight, quantized, hessian)

    plain = error(clipped_scale(weight, upper, HALF))
    signed = clipped_scale(weight, upper, HALF, signed=True)
    assert bool((error(signed) <= plain * (1 + 1e-5)).all()) and float(error(signed).sum()) < 0.97 * float(plain.sum())
    assert bool((signed < 0).any()) and bool((signed > 0).any())
    assert bool((error(full_scale(weight, HALF)) >= plain * (1 - 1e-5)).all())


def test_plain_and_conditional_clipping_minimise_what_they_say() -> None:
    weight, hessian = random_weight(30, 64, 2), random_hessian(64, 3)
    found = factor(hessian, 0.01)
    damped = damp(hessian, 0.01)
    inverse = torch.linalg.inv(damped.double())
    blocks = {"plain": damped[:32, :32], "conditional": torch.linalg.inv(inverse[:32, :32]).float()}
    errors = {}
    for kind in blocks:
        scales = static_scales(weight, found.upper, damped, 32, config(clip_hessian=kind), HALF)
        assert scales.shape == (30, 2) and scales.dtype == HALF
        quantized = QuantizedWeight(round_to_codes(weight[:, :32], scales[:, :1]), scales[:, :1], None, -1)
        errors[kind] = {name: float(loss(weight[:, :32], quantized, block).sum()) for name, block in blocks.items()}
    assert errors["plain"]["plain"] < errors["conditional"]["plain"]
    assert errors["conditional"]["conditional"] < errors["plain"]["conditional"]


# Act-order


def test_orders_are_permutations_by_falling_diagonal() -> None:
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 4.0, 4.0])
    assert column_order(diagonal).tolist() == [3, 1, 4, 5, 2, 0]
    assert group_order(diagonal, 2).tolist() == [3, 2, 1, 0, 4, 5]
    order = group_order(diagonal, 3)
    assert order.tolist() == [3, 4, 5, 1, 2, 0]
    assert torch.equal(diagonal[order][inverse_order(order)], diagonal)


@pytest.mark.parametrize("act_order", ["groups", "columns"])
def test_act_order_with_the_identity_order_is_plain_gptq(act_order: str) -> None:
    weight, hessian = random_weight(20, 96, 4), random_hessian(96, 5)
    order = column_order(hessian.diagonal())
    hessian = hessian[order][:, order]  # the diagonal falls already
    ordered = solved(weight, hessian, config(act_order=act_order))
    if act_order == "groups":
        plain = solved(weight, hessian, config())
    else:
        found, damped = factor(hessian, 0.01), damp(hessian, 0.01)
        scales = static_scales(weight, found.upper, damped, 32, config(), HALF)
        wide = scales.repeat_interleave(32, dim=1)
        plain = gptq_quantize(weight, found.upper, group_size=32, scale_dtype=HALF, scales_of_columns=wide)
    assert torch.equal(ordered.codes, plain.codes) and torch.equal(ordered.scales, plain.scales)


@pytest.mark.parametrize("act_order", ["groups", "columns"])
def test_act_order_keeps_groups_in_place(act_order: str) -> None:
    """Shuffled inputs, shuffled weights: the same layer, so the same loss; and codes fit the scales of their places."""
    weight, hessian = random_weight(64, 96, 6), random_hessian(96, 7)
    quantized = solved(weight, hessian, config(act_order=act_order, signed_scales=True))
    assert quantized.codes.shape == (64, 96) and quantized.scales.shape == (64, 3)
    plain = solved(weight, hessian, config(signed_scales=True))
    assert float(loss(weight, quantized, hessian).sum()) < 1.02 * float(loss(weight, plain, hessian).sum())
    moved = group_order(torch.arange(96.0), 32)  # whole groups and columns inside them elsewhere
    settings = config(act_order=act_order, signed_scales=True)
    elsewhere = solved(weight[:, moved], hessian[moved][:, moved], settings)
    same = (elsewhere.codes == quantized.codes[:, moved]).float().mean()
    assert float(same) > 0.99


# Refinement


@pytest.mark.parametrize("group_size", [32, -1])
def test_refinement_never_raises_the_loss(group_size: int) -> None:
    weight, hessian = random_weight(50, 96, 8), random_hessian(96, 9)
    quantized = rtn_quantize(weight, group_size=group_size, scale_dtype=HALF)
    before = loss(weight, quantized, hessian)
    for step in (refit_scales, descend_codes, refit_scales, descend_codes):
        quantized = step(weight, quantized, hessian)
        after = loss(weight, quantized, hessian)
        assert bool((after <= before * (1 + 1e-4)).all()), step.__name__
        before = after
    assert quantized.scales.dtype == HALF and quantized.codes.dtype == torch.uint8 and int(quantized.codes.max()) <= 15
    start = loss(weight, rtn_quantize(weight, group_size=group_size, scale_dtype=HALF), hessian)
    assert float(before.sum()) < 0.7 * float(start.sum())


def test_code_descent_is_the_naive_one_by_one() -> None:
    weight, hessian = random_weight(6, 40, 10).double(), random_hessian(40, 11)
    hessian[:, 5] = hessian[5] = 0  # a dead feature stays as it is
    quantized = rtn_quantize(weight, group_size=-1, scale_dtype=HALF)
    expected = quantized.codes.clone()
    scales = quantized.scales.double()
    for column in range(40):
        if hessian[column, column] == 0:
            continue
        residual = (weight - (expected.double() - 8) * scales) @ hessian.double()
        step = residual[:, column] / (hessian[column, column].double() * scales[:, 0])
        expected[:, column] = (expected[:, column].double() + step).round().clamp(0, 15).to(torch.uint8)
    found = descend_codes(weight.float(), quantized, hessian, 16)
    assert torch.equal(found.codes, expected)
    assert not torch.equal(found.codes, quantized.codes)


def test_scale_refit_is_least_squares() -> None:
    """One group: the best scale is the least-squares one, found in closed form."""
    weight, hessian = random_weight(9, 32, 12), random_hessian(32, 13)
    quantized = rtn_quantize(weight, group_size=-1, scale_dtype=torch.float32)
    codes = quantized.codes.double() - 8
    best = ((weight.double() @ hessian.double()) * codes).sum(1) / ((codes @ hessian.double()) * codes).sum(1)
    torch.testing.assert_close(refit_scales(weight, quantized, hessian).scales[:, 0].double(), best, rtol=1e-4, atol=0)


def test_sweeps_come_to_rest() -> None:
    weight, hessian = random_weight(8, 64, 14), random_hessian(64, 15)
    quantized = rtn_quantize(weight, group_size=32, scale_dtype=HALF)
    assert refine(weight, quantized, hessian, sweeps=0) is quantized
    rested = refine(weight, quantized, hessian, sweeps=60)
    assert torch.equal(descend_codes(weight, rested, hessian).codes, rested.codes)


# Corrected targets


def test_no_correction_for_alpha_zero() -> None:
    weight = random_weight(5, 16, 16)
    cross, damped = random_hessian(16, 17), damp(random_hessian(16, 18), 0.01)
    assert torch.equal(corrected_target(weight, cross, damped, 0.0), weight)
    assert not torch.equal(corrected_target(weight, cross, damped, 0.5), weight)


def test_full_correction_is_the_least_squares_weight() -> None:
    generator = torch.Generator().manual_seed(19)
    exact = torch.randn(400, 16, generator=generator)
    arriving = exact + 0.3 * torch.randn(400, 16, generator=generator) @ torch.randn(16, 16, generator=generator) / 4
    weight = random_weight(5, 16, 20)
    hessian, cross = Hessian(16, CPU), Cross(16, CPU)
    hessian.add(arriving)
    cross.add(exact[:100], arriving[:100])
    cross.add(exact[100:].view(3, 100, 16), arriving[100:].view(3, 100, 16))
    found = corrected_target(weight, cross.mean(), hessian.mean(), 1.0)
    expected = torch.linalg.lstsq(arriving.double(), (exact @ weight.t()).double()).solution.t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


# Token weights


def test_token_weights_limit_the_energy_of_a_token() -> None:
    vectors = torch.ones(5, 4)
    vectors[0] *= 100
    weights = token_weights(vectors, 2.0)
    assert weights[1:].tolist() == [1, 1, 1, 1] and float(weights[0]) == pytest.approx(2e-4)
    capped, plain, loose = Hessian(4, CPU), Hessian(4, CPU), Hessian(4, CPU)
    capped.add(vectors, 2.0)
    plain.add(vectors)
    loose.add(vectors, 1e6)
    assert torch.equal(plain.sum, loose.sum)
    torch.testing.assert_close(capped.sum, torch.full((4, 4), 2 * (4 + 2.0)))


# All of them together


def test_each_switch_lowers_the_loss_of_heavy_tailed_layers() -> None:
    """What docs/accuracy.md claims in the small, over a few random layers."""
    totals: dict[str, float] = {}
    variants = {
        "seed": config(damp_percent=0.1),
        "signed": config(signed_scales=True),
        "all": config(signed_scales=True, act_order="groups", refine_sweeps=2),
    }
    for seed in range(3):
        weight, hessian = random_weight(48, 128, 30 + seed), random_hessian(128, 40 + seed)
        for name, settings in variants.items():
            quantized = solved(weight, hessian, settings)
            totals[name] = totals.get(name, 0) + float(loss(weight, quantized, hessian).sum())
    assert totals["all"] < 0.95 * totals["signed"] < 0.95 * totals["seed"]


@pytest.mark.parametrize(
    "changes",
    [
        {"refine_sweeps": 1, "signed_scales": True, "act_order": "groups"},
        {"act_order": "columns", "clip_hessian": "plain"},
        {"act_order": "groups", "clip_hessian": "plain", "correct_target": 0.5},
    ],
)
@pytest.mark.parametrize("group_size", [32, -1])
def test_rows_in_pieces_are_the_same(changes: dict, group_size: int) -> None:
    weight, hessian, cross = random_weight(40, 96, 50), random_hessian(96, 51), random_hessian(96, 52) / 10
    settings = config(group_size=group_size, **changes)
    whole = solved(weight, hessian, settings, cross=cross)
    pieces = solved(weight, hessian, settings, cross=cross, rows=7)
    assert whole.group_size == pieces.group_size == group_size and whole.scales.shape == pieces.scales.shape
    assert float((whole.codes == pieces.codes).float().mean()) > 0.99  # sums of other widths differ by a bit


def test_costs_are_counted_by_technique() -> None:
    from marlin_gptq.costs import Costs

    costs = Costs(CPU)
    settings = config(refine_sweeps=1)
    prepared = prepare(random_hessian(64, 2), settings, 32, costs)
    solve(random_weight(8, 64, 1), prepared, settings, HALF, costs=costs)
    assert set(costs.by_name) == {"factor", "gptq", "refine"}
    assert all(cost["seconds"] > 0 and cost["peak_gpu_bytes"] is None for cost in costs.by_name.values())


def test_what_no_stage_measured_is_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from marlin_gptq import costs as module

    clock = iter([1.0, 4.0, 10.0, 10.0, 16.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    costs = module.Costs(CPU)
    with costs.measure("load"):  # 1 to 4
        pass
    assert costs.rest("open", 0.0) == 10.0  # 0 to 10, less 3
    assert costs.rest("open", 0.0) == 10.0  # and nothing once more
    assert costs.rest("other", 0.0) == 16.0
    seconds = {name: cost["seconds"] for name, cost in costs.by_name.items()}
    assert seconds == {"load": 3.0, "open": 7.0, "other": 6.0}
