"""torch.ops.marlin_gptq.gemm_blocked on the CPU: the product, what it refuses, its fake, torch.compile."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from kernel_problems import activations, packed_weight
from torch import Tensor

from marlin_gptq.kernel import blocked, blocked_op, gemm_blocked, op, reference

HALF = torch.float16


def problem(m: int = 3, k: int = 256, n: int = 192, group_size: int = 64, asymmetric: bool = False) -> dict[str, Any]:
    qweight, scales = packed_weight(k, n, group_size, HALF, device="cpu")
    zeros = torch.randint(-(2**31), 2**31, (scales.shape[0], n // 8)).int() if asymmetric else None
    return {
        "a": activations(m, k, HALF, device="cpu"),
        "blocks": blocked.to_blocks(qweight, scales, zeros, group_size),
        "scales": blocked.natural_scales(scales) if scales.shape[0] == 1 else None,
        "bias": activations(1, n, HALF, seed=2, device="cpu")[0],
        "n": n,
        "group_size": group_size,
        "asymmetric": asymmetric,
    }


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("k, group_size", [(256, -1), (256, 32), (256, 64), (256, 128), (256, 256), (48, -1), (96, 32)])
def test_the_product_is_that_of_the_marlin_layout(k: int, group_size: int, asymmetric: bool) -> None:
    torch.manual_seed(1)
    arguments = problem(k=k, group_size=group_size, asymmetric=asymmetric)
    qweight, scales = packed_weight(k, 192, group_size, HALF, device="cpu")
    torch.manual_seed(1)
    zeros = torch.randint(-(2**31), 2**31, (scales.shape[0], 24)).int() if asymmetric else None
    weight = reference.dequantize(qweight, scales, group_size, zeros)
    expected = (arguments["a"].float() @ weight.t() + arguments["bias"].float()).to(HALF)
    assert torch.equal(gemm_blocked(**arguments), expected)


GOOD = problem()
REFUSED = [
    ({"a": torch.zeros(2, 3, 256).half()}, ValueError, "a: got [2, 3, 256], expected [M, K]"),
    ({"a": torch.zeros(3, 256)}, TypeError, "a: got float32, expected float16 or bfloat16"),
    ({"a": torch.zeros(3, 40).half()}, ValueError, "a: got K = 40, expected a positive multiple of 16"),
    ({"a": torch.zeros(256, 3).half().t()}, ValueError, "a: got strides (1, 3), expected (S, 1) with S >= K = 256"),
    ({"n": 100}, ValueError, "n: got 100, expected a positive multiple of 64"),
    ({"n": 320}, ValueError, "blocks: got [2, 2, 2176], expected [3, 2, 2176] (N = 320, K = 256, group_size 64"),
    ({"group_size": 48}, ValueError, "group_size: got 48, expected -1, K or one of 32, 64 and 128"),
    ({"asymmetric": True}, ValueError, "expected [2, 2, 2240] (N = 192, K = 256, group_size 64, with zero points)"),
    ({"blocks": GOOD["blocks"].long()}, TypeError, "blocks: got int64, expected int32"),
    ({"blocks": GOOD["blocks"].to("meta")}, ValueError, "blocks: got device meta, expected cpu (the device of a)"),
    ({"scales": torch.zeros(192).half()}, ValueError, "scales: got [192], expected None (groups have theirs in the"),
    ({"bias": torch.zeros(192)}, TypeError, "bias: got [192] float32, expected [192] float16 (the dtype of a)"),
    ({"bias": torch.zeros(64).half()}, ValueError, "bias: got [64] float16, expected [192] float16"),
]


@pytest.mark.parametrize("change, error, message", REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        gemm_blocked(**(GOOD | change))


def test_one_scale_per_column_must_come() -> None:
    with pytest.raises(ValueError, match=r"scales: got None, expected \[192\] float16 \(one scale per column\)"):
        gemm_blocked(**(problem(group_size=-1) | {"scales": None}))


def test_no_tokens() -> None:
    out = gemm_blocked(**problem(m=0))
    assert out.shape == (0, 192) and out.dtype == HALF


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_opcheck(m: int, group_size: int) -> None:
    arguments = tuple(problem(m=m, group_size=group_size).values())
    torch.library.opcheck(torch.ops.marlin_gptq.gemm_blocked.default, arguments)


def test_torch_compile() -> None:
    arguments = problem(m=6)

    def layer(x: Tensor) -> Tensor:
        return gemm_blocked(**(arguments | {"a": x * 2})) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (2, 5):
        assert torch.equal(compiled(arguments["a"][:m]), layer(arguments["a"][:m]))


def test_a_gpu_without_a_kernel_warns_once_and_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_op, "why_not_blocked", lambda device: "Made-up GPU has compute capability 8.0.")
    op._warn_once.cache_clear()
    arguments = problem()
    with pytest.warns(RuntimeWarning, match=r"slow reference path on this GPU\. Made-up GPU has compute"):
        out = blocked_op._gemm_blocked_cuda(**arguments)
    assert torch.equal(out, gemm_blocked(**arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocked_op._gemm_blocked_cuda(**arguments)


@pytest.mark.parametrize(
    "capability, architectures, reason",
    [
        (
            (8, 0),
            ["sm_90a"],
            "Some GPU has compute capability 8.0; blocks need 9.0 (elsewhere keep the Marlin layout).",
        ),
        ((9, 0), ["sm_80", "sm_90"], "the kernel is compiled for sm_80, sm_90; blocks need sm_90a."),
        ((9, 0), ["sm_80", "sm_90a"], ""),
    ],
)
def test_which_gpus_can(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: list[str], reason: str
) -> None:
    status = blocked_op.library.KernelStatus(True, architectures=architectures)
    monkeypatch.setattr(blocked_op.library, "status", lambda: status)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    blocked_op.why_not_blocked.cache_clear()
    try:
        assert blocked_op.why_not_blocked(0) == reason
    finally:
        blocked_op.why_not_blocked.cache_clear()
