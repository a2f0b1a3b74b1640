"""quantization/tunable.py: a weight that moves is the quantized one, bit for bit, with the gradients of the product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import random_weight

from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.tunable import TunableWeight, clamp_
from marlin_gptq.quantization.tuning_steps import nearest


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("moving", [True, False])
def test_a_tunable_weight_starts_as_the_quantized_one(group_size: int, moving: bool) -> None:
    weight = random_weight(12, 64, 0)
    quantized = rtn_quantize(weight, group_size=group_size, scale_dtype=torch.float16)
    quantized = replace(quantized, scales=quantized.scales * torch.tensor([[-1.0], [1.0]]).half().repeat(6, 1))
    tunable = TunableWeight(quantized, weight if moving else None)
    assert torch.equal(tunable.quantized().codes, quantized.codes)
    assert torch.equal(tunable.quantized().scales, quantized.scales)
    assert torch.equal(tunable(), quantized.dequantize())


def test_the_forward_is_what_will_be_stored_bit_for_bit() -> None:
    weight = random_weight(12, 64, 1)
    tunable = TunableWeight(rtn_quantize(weight, group_size=32, scale_dtype=torch.float16), weight)
    with torch.no_grad():
        tunable.shift.normal_(std=0.1)
        assert tunable.position is not None
        tunable.position.add_(torch.randn(12, 64))
        clamp_([tunable])
    stored = tunable.quantized()
    assert stored.scales.dtype == torch.float16 and stored.codes.dtype == torch.uint8
    assert int(stored.codes.max()) <= 15
    assert torch.equal(tunable(), stored.dequantize())


@pytest.mark.parametrize("moving", [True, False])
def test_a_weight_in_the_dtype_of_autocast_is_the_rounded_one(moving: bool) -> None:
    """Bit for bit, and with the gradients of a product that rounds it itself."""
    weight, x = random_weight(12, 64, 2), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    quantized = rtn_quantize(weight, group_size=32, scale_dtype=torch.float16)
    found, gradients = [], []
    for at_once in (True, False):
        tunable = TunableWeight(quantized, weight if moving else None)
        moved = [tunable.shift] if tunable.position is None else [tunable.shift, tunable.position]
        with torch.no_grad():
            for parameter in moved:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        clamp_([tunable])
        value = None if at_once else tunable()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(tunable() if value is None else value.bfloat16())
            torch.nn.functional.linear(x, found[-1]).float().square().sum().backward()
        gradients.append([parameter.grad for parameter in moved])
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], found[1])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_codes_are_the_nearest_in_range() -> None:
    position = torch.cat(
        [torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 6, torch.arange(-20, 20) / 2]
    )
    assert torch.equal(nearest(position), position.round().clamp(-8, 7))


def test_gradients_are_those_of_the_product_without_the_rounding() -> None:
    weight = random_weight(6, 64, 2)
    tunable = TunableWeight(rtn_quantize(weight, group_size=32, scale_dtype=torch.float16), weight)
    outer = torch.randn(6, 64)
    (tunable() * outer).sum().backward()
    codes = (tunable.quantized().codes.float() - 8).requires_grad_()
    scales = tunable.start.clone().requires_grad_()
    (codes * scales.repeat_interleave(32, dim=1) * outer).sum().backward()
    assert tunable.position is not None and tunable.position.grad is not None and tunable.shift.grad is not None
    torch.testing.assert_close(tunable.position.grad, codes.grad)
    torch.testing.assert_close(tunable.shift.grad, scales.grad * tunable.start)  # shift is relative
    fixed = TunableWeight(tunable.quantized())
    (fixed() * outer).sum().backward()
    assert fixed.position is None
    torch.testing.assert_close(fixed.shift.grad, tunable.shift.grad)
