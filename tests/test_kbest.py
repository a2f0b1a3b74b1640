"""quantization/kbest.py: several beginnings of every row kept, against greedy GPTQ, brute force and a naive search."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import random_hessian, random_weight
from torch import Tensor

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs
from marlin_gptq.quantization.gptq import gptq_quantize
from marlin_gptq.quantization.grid import full_scale
from marlin_gptq.quantization.hessian import damp, factor
from marlin_gptq.quantization.kbest import best_children, kbest_quantize
from marlin_gptq.quantization.order import column_order
from marlin_gptq.quantization.solve import prepare, solve
from marlin_gptq.quantization.weight import QuantizedWeight

HALF = torch.float16


def loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """(W−Q)·H·(W−Q)ᵀ per row, float64."""
    difference = (weight - quantized.dequantize()).double()
    return ((difference @ hessian.double()) * difference).sum(1)


def problem(rows: int, features: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, U, damped H) with columns by falling diagonal, as act-order has them."""
    weight, hessian = random_weight(rows, features, seed), random_hessian(features, seed + 100)
    order = column_order(hessian.diagonal())
    hessian = hessian[order][:, order]
    return weight, factor(hessian, 0.01).upper, damp(hessian, 0.01)


def roomy(weight: Tensor, columns: int) -> Tensor:
    """One scale a row, with room for what compensation adds: [rows, columns]."""
    return (1.2 * full_scale(weight, HALF).float()).to(HALF).expand(-1, columns)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(
    "changes",
    [{}, {"signed": True}, {"clip": False}, {"clip": False, "signed": True}, {"hessian": True}, {"given": True}],
    ids=str,
)
def test_one_beginning_is_gptq_bit_for_bit(group_size: int, changes: dict) -> None:
    weight, upper, damped = problem(50, 256, 0)
    more = dict(changes, group_size=group_size, scale_dtype=HALF)
    if more.pop("given", False):
        steps = torch.rand(50, 256, generator=torch.Generator().manual_seed(1)) * 0.05 + 0.01
        more["scales_of_columns"] = steps.to(HALF)
    if "hessian" in more:
        more["hessian"] = damped
    expected, found = gptq_quantize(weight, upper, **more), kbest_quantize(weight, upper, width=1, **more)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
    assert found.group_size == group_size
    several = kbest_quantize(weight, upper, width=4, **more)
    assert not torch.equal(several.codes, expected.codes)
    assert several.codes.dtype == torch.uint8 and int(several.codes.max()) <= 15
    assert several.scales.dtype == HALF and several.scales.shape == expected.scales.shape


def test_all_beginnings_find_the_optimum() -> None:
    """Brute force over all 16⁴ rows of codes, with narrow scales, so that some weights lie beyond the last code."""
    weight, upper, damped = problem(40, 4, 2)
    scales = (full_scale(weight, HALF).float() * torch.linspace(0.4, 3, 40)[:, None]).to(HALF)
    every = torch.tensor(list(itertools.product(range(16), repeat=4)), dtype=torch.uint8)
    given = {"group_size": -1, "scale_dtype": HALF, "scales_of_columns": scales.expand(-1, 4)}
    found = kbest_quantize(weight, upper, width=16**3, proposals=16, **given)
    greedy = loss(weight, gptq_quantize(weight, upper, **given), damped)
    worse = 0
    for row in range(40):
        tried = QuantizedWeight(every, scales[row].expand(len(every), 1), None, -1)
        best = loss(weight[row], tried, damped).min()
        own = QuantizedWeight(found.codes[row : row + 1], scales[row : row + 1], None, -1)
        torch.testing.assert_close(loss(weight[row], own, damped)[0], best, rtol=1e-4, atol=1e-9)
        worse += float(greedy[row]) > 1.01 * float(best)
    assert worse > 2, "greedy GPTQ must not find all of them"


def naive(row: Tensor, upper: Tensor, scale: float, width: int, proposals: int) -> list[int]:
    """K-best of one row in plain Python: (loss, weights as compensated, codes) of each beginning, double precision."""
    kept: list[tuple[float, Tensor, list[int]]] = [(0.0, row.double(), [])]
    for column in range(len(row)):
        children = []
        for total, weights, codes in kept:
            nearest = sorted(range(16), key=lambda code: abs(float(weights[column]) - (code - 8) * scale))
            for code in nearest[:proposals]:
                error = (weights[column] - (code - 8) * scale) / upper[column, column].double()
                behind = weights.clone()
                behind[column + 1 :] -= error * upper[column, column + 1 :].double()
                children.append((total + float(error) ** 2, behind, [*codes, code]))
        kept = sorted(children, key=lambda child: child[0])[:width]
    return kept[0][2]


@pytest.mark.parametrize(("width", "proposals"), [(2, 2), (3, 2), (5, 4), (8, 16)])
def test_it_is_the_naive_search_across_blocks(width: int, proposals: int) -> None:
    weight, upper, _ = problem(12, 40, 3)
    steps = roomy(weight, 40)
    given = {"group_size": -1, "scale_dtype": HALF, "scales_of_columns": steps}
    found = kbest_quantize(weight, upper, width=width, proposals=proposals, block_size=8, **given)
    for row in range(12):
        expected = naive(weight[row], upper, float(steps[row, 0]), width, proposals)
        assert found.codes[row].tolist() == expected
    assert not torch.equal(found.codes, gptq_quantize(weight, upper, block_size=8, **given).codes)


def test_children_are_the_best_of_all_and_stay_in_range() -> None:
    column = torch.tensor([[0.0, 9.0, -9.0], [0.4, 7.2, 0.0]])
    losses = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, torch.inf]])
    found = best_children(column, losses, torch.ones(3), torch.tensor(1.0), proposals=2)
    assert found.codes.tolist() == [[8, 15, 0], [8, 14, 1]]
    assert found.parent.tolist() == [[0, 1, 0], [1, 1, 0]]
    torch.testing.assert_close(found.errors, torch.tensor([[0.0, 0.2, -1.0], [0.4, 1.2, -2.0]]))
    torch.testing.assert_close(found.losses, torch.tensor([[0.0, 0.04, 1.0], [0.26, 1.44, 4.0]]))


def test_more_beginnings_find_less_loss() -> None:
    """Fixed scales, columns by falling diagonal: less loss in all, and in nearly every row no more than greedy GPTQ."""
    totals, no_worse = dict.fromkeys((1, 2, 4, 16), 0.0), []
    for seed in range(3):
        weight, upper, damped = problem(60, 96, 10 + seed)
        given = {"group_size": -1, "scale_dtype": HALF, "scales_of_columns": roomy(weight, 96)}
        greedy = loss(weight, gptq_quantize(weight, upper, block_size=32, **given), damped)
        for width in totals:
            found = loss(weight, kbest_quantize(weight, upper, width=width, block_size=32, **given), damped)
            totals[width] += float(found.sum())
        no_worse.append((found <= greedy * (1 + 1e-5)).float().mean())
    assert totals[16] < totals[4] < totals[2] < totals[1] and totals[4] < 0.97 * totals[1]
    assert float(torch.stack(no_worse).mean()) > 0.98


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("act_order", ["none", "groups", "columns"])
def test_whole_layers_with_all_techniques(group_size: int, act_order: str) -> None:
    weight, hessian = random_weight(64, 256, 20), random_hessian(256, 21)
    cross, damped = random_hessian(256, 22) / 10, damp(hessian, 0.01)
    losses = {}
    for width, sweeps in ((1, 0), (8, 0), (8, 1)):
        settings = QuantizationConfig(
            group_size=group_size, damp_percent=0.01, act_order=act_order, signed_scales=True,
            beam_width=width, refine_sweeps=sweeps,
        )  # fmt: skip
        costs = Costs(torch.device("cpu"))
        prepared = prepare(hessian, settings, group_size)
        quantized = solve(weight, prepared, settings, HALF, costs=costs)
        assert quantized.scales.shape == (64, 256 // (256 if group_size == -1 else group_size))
        assert ("k-best search" in costs.by_name) == (width > 1) and ("gptq" in costs.by_name) == (width == 1)
        losses[width, sweeps] = float(loss(weight, quantized, damped).sum())
    assert losses[8, 1] <= losses[8, 0] * (1 + 1e-4)
    assert losses[8, 0] < 0.995 * losses[1, 0]
    settings = QuantizationConfig(
        group_size=group_size, act_order=act_order, beam_width=3, correct_target=0.5, clip_hessian="plain"
    )
    prepared = prepare(hessian, settings, group_size)
    whole = solve(weight, prepared, settings, HALF, cross=cross)
    pieces = solve(weight, prepared, settings, HALF, cross=cross, rows=7)
    assert float((whole.codes == pieces.codes).float().mean()) > 0.99  # sums of other widths differ by a bit


def test_rows_are_independent() -> None:
    weight, upper, _ = problem(30, 64, 30)
    given = {"group_size": 32, "scale_dtype": HALF, "width": 4}
    together = kbest_quantize(weight, upper, **given)
    other = weight.clone()
    other[::2] *= -3
    beside = kbest_quantize(other, upper, **given)
    assert torch.equal(beside.codes[1::2], together.codes[1::2])
    assert torch.equal(beside.scales[1::2], together.scales[1::2])
    assert not torch.equal(beside.codes[::2], together.codes[::2])


def test_groups_must_fill_rows_and_line_up_with_blocks() -> None:
    weight, upper, _ = problem(4, 96, 31)
    with pytest.raises(ValueError, match="group_size: got 64, which does not divide in_features 96"):
        kbest_quantize(weight, upper, width=2, group_size=64, scale_dtype=HALF)
    with pytest.raises(ValueError, match="block_size: got 64, which does not line up with groups of 48"):
        kbest_quantize(weight, upper, width=2, group_size=48, scale_dtype=HALF, block_size=64)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_on_a_gpu_it_finds_as_much_and_pieces_have_the_same_bits(group_size: int) -> None:
    weight, hessian = random_weight(300, 512, 40), random_hessian(512, 41)
    settings = QuantizationConfig(
        group_size=group_size, damp_percent=0.01, act_order="groups", signed_scales=True, beam_width=4
    )
    there = {}
    for device in ("cpu", "cuda"):
        prepared = prepare(hessian.to(device), settings, group_size)
        there[device] = solve(weight.to(device), prepared, settings, HALF)
    pieces = solve(weight.cuda(), prepared, settings, HALF, rows=77)
    assert torch.equal(pieces.codes, there["cuda"].codes) and torch.equal(pieces.scales, there["cuda"].scales)
    damped = damp(hessian, 0.01)
    found = there["cuda"]
    own = QuantizedWeight(found.codes.cpu(), found.scales.cpu(), None, group_size)
    one, other = (float(loss(weight, quantized, damped).sum()) for quantized in (there["cpu"], own))
    assert abs(one / other - 1) < 0.01
