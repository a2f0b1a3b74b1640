"""torch.ops.marlin_gptq.gemm on the CPU: what it refuses, its fake, torch.compile, the fall back to the reference."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from kernel_problems import activations, packed_weight, zero_points
from torch import Tensor

from marlin_gptq.kernel import gemm, op, reference

HALF, BFLOAT = torch.float16, torch.bfloat16


def problem(m: int = 3, k: int = 256, n: int = 128, group_size: int = 128) -> dict[str, Tensor | int]:
    qweight, scales = packed_weight(k, n, group_size, HALF, device="cpu")
    bias = activations(1, n, HALF, seed=2, device="cpu")[0]
    a = activations(m, k, HALF, device="cpu")
    return {"a": a, "qweight": qweight, "scales": scales, "bias": bias, "group_size": group_size}


REFUSED = [
    ({"a": torch.zeros(2, 3, 256).half()}, ValueError, "a: got [2, 3, 256], expected [M, K]"),
    ({"a": torch.zeros(3, 256)}, TypeError, "a: got float32, expected float16 or bfloat16"),
    ({"a": torch.zeros(3, 40).half()}, ValueError, "a: got K = 40, expected a positive multiple of 16"),
    ({"a": torch.zeros(3, 0).half()}, ValueError, "a: got K = 0, expected a positive multiple of 16"),
    (
        {"a": torch.zeros(256, 3).half().t()},
        ValueError,
        "a: got strides (1, 3), expected (S, 1) with S >= K = 256 and S a multiple of 8",
    ),
    ({"a": torch.zeros(3, 260).half()[:, :256]}, ValueError, "a: got strides (260, 1), expected (S, 1)"),
    ({"a": torch.zeros(1, 256).half().expand(3, -1)}, ValueError, "a: got strides (0, 1), expected (S, 1)"),
    ({"qweight": torch.zeros(16, 256).long()}, TypeError, "qweight: got int64, expected int32"),
    (
        {"qweight": torch.zeros(8, 256).int()},
        ValueError,
        "qweight: got [8, 256], expected [K/16, 2N] with K/16 = 16",
    ),
    (
        {"qweight": torch.zeros(16, 192).int()},
        ValueError,
        "qweight: got [16, 192], expected [K/16, 2N] with N a multiple of 64",
    ),
    ({"qweight": torch.zeros(256, 16).int().t()}, ValueError, "qweight: got strides (1, 16), expected a contiguous"),
    (
        {"scales": torch.zeros(2, 128)},
        TypeError,
        "scales: got [2, 128] float32, expected [2, 128] float16 (the dtype of a)",
    ),
    (
        {"scales": torch.zeros(2, 128).bfloat16()},
        TypeError,
        "scales: got [2, 128] bfloat16, expected [2, 128] float16 (the dtype of a)",
    ),
    (
        {"a": torch.zeros(3, 256).bfloat16()},
        TypeError,
        "scales: got [2, 128] float16, expected [2, 128] bfloat16 (the dtype of a)",
    ),
    (
        {"scales": torch.zeros(4, 128).half()},
        ValueError,
        "scales: got [4, 128] float16, expected [2, 128] float16 (group_size 128)",
    ),
    ({"scales": torch.zeros(128, 2).half().t()}, ValueError, "scales: got strides (1, 2), expected a contiguous"),
    ({"bias": torch.zeros(64).half()}, ValueError, "bias: got [64] float16, expected [128] float16"),
    ({"bias": torch.zeros(128)}, TypeError, "bias: got [128] float32, expected [128] float16 (the dtype of a)"),
    (
        {"group_size": 48},
        ValueError,
        "group_size: got 48, expected -1, K or one of 32, 64 and 128 that divides K = 256",
    ),
    ({"group_size": 0}, ValueError, "group_size: got 0, expected -1, K or one of"),
    ({"qzeros": torch.zeros(2, 16).long()}, TypeError, "qzeros: got [2, 16] int64, expected [2, 16] int32"),
    (
        {"qzeros": torch.zeros(2, 128).int()},
        ValueError,
        "qzeros: got [2, 128] int32, expected [2, 16] int32 (group_size 128)",
    ),
    ({"qzeros": torch.zeros(16, 2).int().t()}, ValueError, "qzeros: got strides (1, 2), expected a contiguous"),
    ({"qzeros": torch.zeros(2, 16, device="meta").int()}, ValueError, "qzeros: got device meta, expected cpu"),
    ({"qweight": torch.zeros(16, 256, device="meta").int()}, ValueError, "qweight: got device meta, expected cpu"),
]


@pytest.mark.parametrize("change, error, message", REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_is_refused(change: dict[str, Tensor | int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        gemm(**(problem() | change))


def test_group_size_must_divide_k() -> None:
    with pytest.raises(ValueError, match=r"group_size: got 128, expected .* that divides K = 192"):
        gemm(**(problem(k=192, group_size=64) | {"group_size": 128}))


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
def test_the_product(group_size: int) -> None:
    arguments = problem(group_size=group_size)
    assert torch.equal(gemm(**arguments), reference.gemm_reference(**arguments))


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
def test_the_product_with_zero_points(group_size: int) -> None:
    arguments = problem(group_size=group_size)
    qzeros = zero_points(256, 128, group_size, device="cpu")
    out = gemm(**arguments, qzeros=qzeros)
    assert torch.equal(out, reference.gemm_reference(**arguments, qzeros=qzeros))
    weight = reference.dequantize(arguments["qweight"], arguments["scales"], group_size, qzeros)
    expected = arguments["a"].float() @ weight.t() + arguments["bias"].float()
    torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(out, gemm(**arguments))


def test_no_tokens() -> None:
    out = gemm(**problem(m=0))
    assert out.shape == (0, 128) and out.dtype == HALF


def test_one_row_may_have_any_stride() -> None:
    arguments = problem(m=3)
    whole = arguments["a"]
    assert isinstance(whole, Tensor)
    row = whole.as_strided((1, 256), (3, 1))
    assert torch.equal(gemm(**(arguments | {"a": row})), gemm(**(arguments | {"a": whole[:1]})))


def test_the_fake_has_shape_and_dtype() -> None:
    arguments = problem(m=7)
    on_meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments.items()}
    out = gemm(**on_meta)
    assert out.is_meta and out.shape == (7, 128) and out.dtype == HALF
    with pytest.raises(TypeError, match="scales: got"):
        gemm(**(on_meta | {"scales": torch.zeros(2, 128, device="meta")}))


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(m: int, with_bias: bool) -> None:
    arguments = problem(m=m)
    bias = arguments["bias"] if with_bias else None
    torch.library.opcheck(
        torch.ops.marlin_gptq.gemm.default,
        (arguments["a"], arguments["qweight"], arguments["scales"], bias, 128),
    )
    torch.library.opcheck(
        torch.ops.marlin_gptq.gemm.default,
        (
            arguments["a"],
            arguments["qweight"],
            arguments["scales"],
            bias,
            128,
            zero_points(256, 128, 128, device="cpu"),
        ),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend: str) -> None:
    arguments = problem(m=6)
    weight = [arguments["qweight"], arguments["scales"], arguments["bias"], 128]

    def layer(x: Tensor) -> Tensor:
        return gemm(x * 2, *weight) + 1

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    a = arguments["a"]
    assert isinstance(a, Tensor)
    for m in (2, 5):
        assert torch.equal(compiled(a[:m]), layer(a[:m]))


def test_a_gpu_without_a_kernel_warns_once_and_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "why_not", lambda device: "Made-up GPU has compute capability 7.5.")
    op._warn_once.cache_clear()
    arguments = problem()
    with pytest.warns(RuntimeWarning, match=r"slow reference path on this GPU\. Made-up GPU has compute"):
        out = op._gemm_cuda(**arguments)
    assert torch.equal(out, reference.gemm_reference(**arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op._gemm_cuda(**arguments)


def test_old_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op.library, "status", lambda: op.library.KernelStatus(True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    op.why_not.cache_clear()
    try:
        assert op.why_not(0) == "Tesla T4 has compute capability 7.5; the kernel needs 8.0 or newer."
    finally:
        op.why_not.cache_clear()
