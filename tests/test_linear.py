"""modeling/linear.py: a packed layer computes what its codes and scales say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import random_weight

from marlin_gptq.modeling.linear import MarlinLinear, pack, padded_features
from marlin_gptq.quantization.gptq import rtn_quantize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("in_features", "out_features", "group_size"),
    [(128, 64, 128), (128, 64, -1), (256, 192, 64), (96, 48, 32), (172, 32, -1), (64, 100, -1)],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_against_float64(
    in_features: int, out_features: int, group_size: int, with_bias: bool, dtype: torch.dtype
) -> None:
    quantized = rtn_quantize(random_weight(out_features, in_features, 0), group_size=group_size, scale_dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(out_features, generator=generator).to(dtype) if with_bias else None
    layer = MarlinLinear.from_quantized(quantized, bias)
    assert torch.equal(layer.dequantize(), quantized.dequantize())

    x = torch.randn(2, 3, in_features, generator=generator).to(dtype)
    expected = F.linear(x.double(), quantized.dequantize().double(), None if bias is None else bias.double())
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, out_features)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert float((y.double() - expected).norm() / expected.norm()) < tolerance

    by_y = torch.randn(2, 3, out_features, generator=generator).to(dtype)
    (by_x,) = torch.autograd.grad(layer(x.requires_grad_()), x, by_y)
    by_x_exact = by_y.double() @ quantized.dequantize().double()
    assert float((by_x.double() - by_x_exact).norm() / by_x_exact.norm()) < tolerance

    x = x.detach()
    exact = layer(x.float())
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, rtol=1e-4, atol=1e-5)


def test_holding_the_dense_weight_changes_no_bit() -> None:
    layer = MarlinLinear.from_quantized(
        rtn_quantize(random_weight(64, 128, 0), group_size=128, scale_dtype=torch.float16)
    )
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    before = layer(x)
    layer.hold_dense(True)
    assert torch.equal(layer(x), before)
    assert layer.state_dict().keys() == {"qweight", "scales"}
    layer.hold_dense(False)
    assert layer._dense is None


def test_gradients_come_back_in_the_order_of_the_inputs() -> None:
    weight = rtn_quantize(random_weight(64, 128, 0), group_size=32, scale_dtype=torch.float16)
    layer = MarlinLinear.from_quantized(weight, None, torch.randperm(128))
    x, by_y = torch.randn(5, 128).half().requires_grad_(), torch.randn(5, 64).half()
    (by_x,) = torch.autograd.grad(layer(x), x, by_y)
    torch.testing.assert_close(by_x.float(), by_y.float() @ layer.dequantize(), rtol=2e-3, atol=2e-3)


def test_padding_adds_nothing() -> None:
    quantized = rtn_quantize(random_weight(48, 172, 3), group_size=-1, scale_dtype=torch.float16)
    qweight, scales = pack(quantized)
    assert padded_features(172, 48) == (176, 64)
    assert qweight.shape == (11, 128) and scales.shape == (1, 64)
    layer = MarlinLinear(176, 64, -1)
    layer.qweight, layer.scales = qweight, scales
    whole = layer.dequantize()
    assert torch.equal(whole[:48, :172], quantized.dequantize())
    assert not whole[48:].any() and not whole[:, 172:].any()


def test_group_sizes_must_divide() -> None:
    with pytest.raises(ValueError, match="group_size: got 64, which does not divide in_features 96"):
        MarlinLinear(96, 64, 64)
    assert "in_features=96, out_features=64, group_size=32, bias=True" in repr(MarlinLinear(96, 64, 32, bias=True))
