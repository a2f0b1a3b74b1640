"""quantization/distillation.py: the divergence as a loss, and its gradient."""

from __future__ import annotations

import pytest
import torch

from marlin_gptq.quantization.distillation import divergence


@pytest.mark.parametrize("with_bias", [True, False])
def test_divergence_and_its_gradient_are_those_of_autograd(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlin_gptq.quantization.distillation._LOGITS_AT_ONCE", 3 * 50)  # three rows at a time
    hidden, teacher, head = torch.randn(10, 8), torch.randn(10, 8), torch.randn(50, 8)
    bias = torch.randn(50) if with_bias else None
    ours, naive = hidden.clone().requires_grad_(), hidden.clone().double().requires_grad_()
    loss = divergence(ours, teacher, head, bias)
    (2 * loss).backward()
    wide = None if bias is None else bias.double()
    p = torch.log_softmax(torch.nn.functional.linear(teacher.double(), head.double(), wide), -1)
    q = torch.log_softmax(torch.nn.functional.linear(naive, head.double(), wide), -1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    (2 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert ours.grad is not None and naive.grad is not None
    torch.testing.assert_close(ours.grad.double(), naive.grad, rtol=1e-4, atol=1e-6)
    assert float(divergence(teacher, teacher, head, bias)) == pytest.approx(0, abs=1e-6)
