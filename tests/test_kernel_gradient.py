"""kernel/gradient.py: gradients of both products against those of the dequantized weight, on a GPU too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_problems import BFLOAT16, DTYPES, FLOAT16, LIMIT, activations, in_blocks, packed_weight, relative_error
from kernel_problems import zero_points as random_zeros
from torch import Tensor

from marlin_gptq.kernel import blocked_op, gemm, gemm_blocked, gradient, op
from marlin_gptq.kernel.reference import dequantize

Product = Callable[[Tensor, Tensor | None], Tensor]
GROUP_SIZES = [-1, 32, 64, 128]


class Problem:
    """A random weight [n, k] in both layouts, and dequantized in float64."""

    def __init__(self, k: int, n: int, group_size: int, dtype: torch.dtype, asymmetric: bool, device: str) -> None:
        qweight, scales = packed_weight(k, n, group_size, dtype, device=device)
        zeros = random_zeros(k, n, group_size, device=device) if asymmetric else None
        self.k, self.n, self.dtype, self.device = k, n, dtype, device
        self.marlin = (qweight, scales, group_size, zeros)
        self.blocks = in_blocks(qweight, scales, zeros, group_size)
        self.settings: dict[str, Any] = {"n": n, "group_size": group_size, "asymmetric": asymmetric}
        self.weight = dequantize(qweight, scales, group_size, zeros).double()

    def in_marlin(self, a: Tensor, bias: Tensor | None) -> Tensor:
        qweight, scales, group_size, zeros = self.marlin
        return gemm(a, qweight, scales, bias, group_size, zeros)

    def in_blocks(self, a: Tensor, bias: Tensor | None) -> Tensor:
        return gemm_blocked(a, *self.blocks, bias, **self.settings)

    def check(self, product: Product, m: int) -> None:
        """The gradients of a loss by activations and bias, and by the activations alone."""
        a = activations(m, self.k, self.dtype, device=self.device).requires_grad_()
        bias = activations(1, self.n, self.dtype, seed=2, device=self.device)[0].requires_grad_()
        by_result = activations(m, self.n, self.dtype, seed=3, device=self.device)
        out = product(a, bias)
        exact = a.detach().double() @ self.weight.t() + bias.detach().double()
        assert relative_error(out.detach(), exact) < LIMIT[self.dtype]
        by_a, by_bias = torch.autograd.grad(out, (a, bias), by_result)
        assert by_a.shape == a.shape and by_a.dtype == by_bias.dtype == self.dtype
        expected = by_result.double() @ self.weight
        assert relative_error(by_a, expected) < 2 * LIMIT[self.dtype]
        assert relative_error(by_bias, by_result.double().sum(0)) < LIMIT[self.dtype]
        (alone,) = torch.autograd.grad(product(a, None), a, by_result)
        assert torch.equal(alone, by_a)
        (of_bias,) = torch.autograd.grad(product(a.detach(), bias), bias, by_result)
        assert torch.equal(of_bias, by_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_gradients(group_size: int, asymmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "PIECE", 128 * 192)  # several pieces, the last not full
    problem = Problem(384 if group_size > 0 else 304, 192, group_size, dtype, asymmetric, "cpu")
    problem.check(problem.in_marlin, 5)
    problem.check(problem.in_blocks, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("k", "n"), [(1024, 320), (4096, 4160)])
def test_gradients_on_a_gpu(k: int, n: int, asymmetric: bool, group_size: int, dtype: torch.dtype) -> None:
    problem = Problem(k + (48 if group_size < 0 else 0), n, group_size, dtype, asymmetric, "cuda")
    for m in (1, 16, 40, 300):  # the kernels for few tokens and for many
        problem.check(problem.in_marlin, m)
        problem.check(problem.in_blocks, m)


@pytest.fixture(params=["in_marlin", "in_blocks"])
def product(request: pytest.FixtureRequest) -> Product:
    found: Product = getattr(Problem(256, 128, 64, FLOAT16, True, "cpu"), request.param)
    return found


def test_a_product_that_autograd_does_not_see(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for the CUDA kernel fills its output by itself."""
    a = activations(3, 256, FLOAT16, device="cpu").requires_grad_()
    (expected,) = torch.autograd.grad(product(a, None).float().square().sum(), a)
    calls = []
    for module, name in ((op, "gemm_reference"), (blocked_op, "dequantize")):
        plain = getattr(module, name)

        def opaque(*arguments: Any, plain: Callable[..., Tensor] = plain) -> Tensor:
            calls.append(1)
            return torch.from_numpy(plain(*arguments).detach().numpy().copy())

        monkeypatch.setattr(module, name, opaque)
    (found,) = torch.autograd.grad(product(a, None).float().square().sum(), a)
    assert calls and torch.equal(found, expected)


def test_second_derivatives(product: Product) -> None:
    a = activations(2, 256, FLOAT16, device="cpu").requires_grad_()
    (first,) = torch.autograd.grad(product(a, None).float().square().sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.float().sum(), a)
    weight = product(torch.eye(256, dtype=FLOAT16), None).double()  # [K, N]
    expected = 2 * (weight.sum(0) @ weight.t()).expand(2, -1)
    assert relative_error(second, expected) < 1e-2


def test_other_derivatives_are_right_or_refused(product: Product) -> None:
    a = activations(3, 256, FLOAT16, device="cpu")
    (expected,) = torch.autograd.grad(product(b := a.clone().requires_grad_(), None).float().sum(), b)
    assert torch.equal(torch.func.grad(lambda x: product(x, None).float().sum())(a), expected)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(lambda x: product(x, None), (a,), (torch.ones_like(a),))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(product: Product, backend: str) -> None:
    check_compiled(product, backend, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["in_marlin", "in_blocks"])
def test_torch_compile_on_a_gpu(layout: str) -> None:
    check_compiled(getattr(Problem(256, 128, 64, FLOAT16, True, "cuda"), layout), "inductor", "cuda")


def check_compiled(product: Product, backend: str, device: str) -> None:
    def layer(x: Tensor) -> Tensor:
        return product(x * 2, None) + 1

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    a = activations(4, 256, FLOAT16, device=device).requires_grad_()
    by_result = activations(4, 128, FLOAT16, seed=3, device=device)
    for _ in range(2):
        (found,), (expected,) = (torch.autograd.grad(f(a), a, by_result) for f in (compiled, layer))
        assert relative_error(found, expected) < LIMIT[FLOAT16]
    with torch.no_grad():
        assert relative_error(compiled(a), layer(a)) < LIMIT[FLOAT16]


def test_nothing_is_saved_where_no_gradient_is_wanted(product: Product) -> None:
    a = activations(3, 256, FLOAT16, device="cpu")
    assert product(a, None).grad_fn is None
    with torch.no_grad():
        assert product(a.requires_grad_(), None).grad_fn is None
    assert product(a, None).grad_fn is not None
    assert torch.autograd.grad(product(a[:0], None).sum(), a)[0].eq(0).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_ops_themselves_refuse(device: str) -> None:
    problem = Problem(256, 128, 128, BFLOAT16, False, device)
    a = activations(3, 256, BFLOAT16, device=device)
    qweight, scales, _, _ = problem.marlin
    blocks, _ = problem.blocks
    for tensor in (a, None):
        rows, bias = a.detach(), activations(1, 128, BFLOAT16, device=device)[0]
        (bias if tensor is None else rows).requires_grad_()
        with pytest.raises(RuntimeError, match=r"gemm has no gradient of its own: call marlin_gptq.kernel.gemm, which"):
            torch.ops.marlin_gptq.gemm(rows, qweight, scales, bias, 128)
        with pytest.raises(RuntimeError, match=r"gemm_blocked has no gradient .* call marlin_gptq.kernel.gemm_blocked"):
            torch.ops.marlin_gptq.gemm_blocked(rows, blocks, None, bias, 128, 128, False)
        with torch.no_grad():
            torch.ops.marlin_gptq.gemm(rows, qweight, scales, bias, 128)
    with pytest.raises(ValueError, match=r"scales: got a tensor that requires a gradient, but a 4-bit weight has none"):
        gemm(a, qweight, scales.requires_grad_(), None, 128)
