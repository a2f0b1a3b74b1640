"""What the op demands of its arguments: the same on every device, and of fake tensors under torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

GROUP_SIZES = (32, 64, 128)
TILE_K = 16  # K and N come in multiples of a packed block
TILE_N = 64


def check_gemm(
    a: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, qzeros: Tensor | None = None
) -> tuple[int, int]:
    """Return (N, K), or raise TypeError (dtype) or ValueError (shape, stride, device, group size)."""
    if a.dim() != 2:
        raise ValueError(f"a: got {list(a.shape)}, expected [M, K]")
    dtype = a.dtype
    if dtype != torch.float16 and dtype != torch.bfloat16:
        raise TypeError(f"a: got {dtype_name(dtype)}, expected float16 or bfloat16")
    k = a.shape[1]
    if k == 0 or k % TILE_K:
        raise ValueError(f"a: got K = {k}, expected a positive multiple of {TILE_K} (pad the layer when it is made)")

    if qweight.dtype != torch.int32:
        raise TypeError(f"qweight: got {dtype_name(qweight.dtype)}, expected int32")
    if qweight.dim() != 2 or qweight.shape[0] != k // TILE_K:
        raise ValueError(f"qweight: got {list(qweight.shape)}, expected [K/16, 2N] with K/16 = {k // TILE_K}")
    n = qweight.shape[1] // 2
    if n == 0 or qweight.shape[1] % (2 * TILE_N):
        raise ValueError(f"qweight: got {list(qweight.shape)}, expected [K/16, 2N] with N a multiple of {TILE_N}")

    groups = _groups(k, group_size)
    if scales.dtype != dtype or scales.shape != (groups, n):
        message = f"scales: got {_describe(scales)}, expected {[groups, n]} {dtype_name(dtype)}"
        if scales.dtype != dtype:
            raise TypeError(f"{message} (the dtype of a)")
        raise ValueError(f"{message} (group_size {group_size})")
    if bias is not None and (bias.dtype != dtype or bias.shape != (n,)):
        message = f"bias: got {_describe(bias)}, expected {[n]} {dtype_name(dtype)}"
        raise TypeError(f"{message} (the dtype of a)") if bias.dtype != dtype else ValueError(message)
    if qzeros is not None and (qzeros.dtype != torch.int32 or qzeros.shape != (groups, n // 8)):
        message = f"qzeros: got {_describe(qzeros)}, expected {[groups, n // 8]} int32"
        raise TypeError(message) if qzeros.dtype != torch.int32 else ValueError(f"{message} (group_size {group_size})")

    check_places(a, k, (("qweight", qweight), ("scales", scales), ("bias", bias), ("qzeros", qzeros)))
    if torch.is_grad_enabled():
        refuse_gradients("gemm", a, scales, bias)
    return n, k


def check_places(a: Tensor, k: int, others: tuple[tuple[str, Tensor | None], ...]) -> None:
    """ValueError for `others` on another device than a [M, k] or not contiguous, and for unknown strides of a."""
    device = a.device
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {device} (the device of a)")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: got strides {tuple(tensor.stride())}, expected a contiguous tensor")
    row, column = a.stride()
    # M is looked at last: it may be a symbol under torch.compile.
    if column != 1 or ((row < k or row % 8) and a.shape[0] > 1):
        raise ValueError(f"a: got strides {tuple(a.stride())}, expected (S, 1) with S >= K = {k} and S a multiple of 8")


def _groups(k: int, group_size: int) -> int:
    if group_size == -1 or group_size == k:
        return 1
    if group_size not in GROUP_SIZES or k % group_size:
        raise ValueError(f"group_size: got {group_size}, expected -1, K or one of 32, 64 and 128 that divides K = {k}")
    return k // group_size


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {dtype_name(tensor.dtype)}"


def wants_gradient(a: Tensor, scales: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a or bias requires a gradient, or forward derivatives are taken; ValueError where the scales do.

    To be asked where gradients are enabled: decoding, where they are not, is spared the call.
    """
    if scales is not None and scales.requires_grad:
        raise ValueError("scales: got a tensor that requires a gradient, but a 4-bit weight has none; detach it")
    return a.requires_grad or (bias is not None and bias.requires_grad) or forward_ad._current_level >= 0


def refuse_gradients(name: str, a: Tensor, scales: Tensor | None, bias: Tensor | None) -> None:
    """RuntimeError where gradients, which are enabled, are wanted of the op itself: torch would give wrong ones."""
    if wants_gradient(a, scales, bias):
        raise RuntimeError(
            f"torch.ops.marlin_gptq.{name} has no gradient of its own: call marlin_gptq.kernel.{name}, which has, "
            "or call it under torch.no_grad()"
        )
