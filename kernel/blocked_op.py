"""torch.ops.marlin_gptq.gemm_blocked: the product with a weight in the run-time layout of Hopper GPUs."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from marlin_gptq.kernel import library, op
from marlin_gptq.kernel.blocked import check_blocks, from_blocks, stored_scales
from marlin_gptq.kernel.checks import TILE_K, check_places, dtype_name, refuse_gradients, wants_gradient
from marlin_gptq.kernel.decode_blocks import decode_blocks
from marlin_gptq.kernel.gradient import GemmBlocked
from marlin_gptq.kernel.reference import dequantize

CAPABILITY = (9, 0)
DECODE_TOKENS = 16  # up to here the decode family is the faster one

_torch_library = torch.library.Library("marlin_gptq", "FRAGMENT")
_torch_library.define(
    "gemm_blocked(Tensor a, Tensor blocks, Tensor? scales, Tensor? bias, int n, int group_size, bool asymmetric)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def gemm_blocked(
    a: Tensor,
    blocks: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    n: int,
    group_size: int = -1,
    asymmetric: bool = False,
) -> Tensor:
    """a · W (+ bias), W of 4 bits in the blocks of `kernel.blocked.to_blocks`.

    a [M, K] float16 or bfloat16, rows contiguous (stride 1), their distance a multiple of 8; M may be 0
    blocks int32 [⌈N/128⌉, ⌈K/128⌉, words]; scales of groups inside are of the dtype of a
    scales [N] of the dtype of a, in natural order, for group_size -1 or K; else None
    bias [N] of the dtype of a, or None
    n: N, a multiple of 64
    group_size -1 or K (one scale per column), 32, 64 or 128
    asymmetric: the blocks hold zero points
    → [M, N] of the dtype of a

    GPUs of compute capability 9.0 run a kernel on the current stream: sums in FP32, the same bits for the same
    inputs. With one scale per column, and with groups of 128 up to 32 tokens, scales multiply FP32 sums; otherwise
    each weight is rounded to the dtype of a first, as a dense weight would be. Elsewhere plain torch computes in
    float32. Gradients by a and bias are those of the dequantized weight; the weight has none. Raises TypeError (dtype)
    or ValueError (shape, stride, device, group size), naming the argument.
    """
    if torch.is_grad_enabled() and wants_gradient(a, scales, bias):
        return GemmBlocked.apply(a, blocks, scales, bias, n, group_size, asymmetric)
    return torch.ops.marlin_gptq.gemm_blocked(a, blocks, scales, bias, n, group_size, asymmetric)


def check_gemm_blocked(
    a: Tensor, blocks: Tensor, scales: Tensor | None, bias: Tensor | None, n: int, group_size: int, asymmetric: bool
) -> int:
    """Return K, or raise TypeError (dtype) or ValueError (shape, stride, device, group size)."""
    if a.dim() != 2:
        raise ValueError(f"a: got {list(a.shape)}, expected [M, K]")
    dtype = a.dtype
    if dtype != torch.float16 and dtype != torch.bfloat16:
        raise TypeError(f"a: got {dtype_name(dtype)}, expected float16 or bfloat16")
    k = a.shape[1]
    if k == 0 or k % TILE_K:
        raise ValueError(f"a: got K = {k}, expected a positive multiple of {TILE_K} (pad the layer when it is made)")
    groups = check_blocks(blocks, n, k, group_size, asymmetric)
    if groups > 1 and scales is not None:
        raise ValueError(f"scales: got {list(scales.shape)}, expected None (groups have theirs in the blocks)")
    if groups == 1 and scales is None:
        raise ValueError(f"scales: got None, expected {[n]} {dtype_name(dtype)} (one scale per column)")
    for name, tensor in (("scales", scales), ("bias", bias)):
        if tensor is None:
            continue
        message = f"{name}: got {list(tensor.shape)} {dtype_name(tensor.dtype)}, expected {[n]} {dtype_name(dtype)}"
        if tensor.dtype != dtype:
            raise TypeError(f"{message} (the dtype of a)")
        if tensor.shape != (n,):
            raise ValueError(message)
    check_places(a, k, (("blocks", blocks), ("scales", scales), ("bias", bias)))
    if torch.is_grad_enabled():
        refuse_gradients("gemm_blocked", a, scales, bias)
    return k


def gemm_blocked_reference(
    a: Tensor, blocks: Tensor, scales: Tensor | None, bias: Tensor | None, n: int, group_size: int, asymmetric: bool
) -> Tensor:
    """The slow twin: back to the Marlin layout, then in float32."""
    k = check_gemm_blocked(a, blocks, scales, bias, n, group_size, asymmetric)
    qweight, inside, qzeros = from_blocks(blocks, n, k, group_size, asymmetric, a.dtype)
    stored = inside if scales is None else stored_scales(scales)
    assert stored is not None
    product = a.float() @ dequantize(qweight, stored, group_size, qzeros).t()
    if bias is not None:
        product = product + bias.float()
    return product.to(a.dtype)


def _gemm_blocked_cuda(
    a: Tensor,
    blocks: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
    asymmetric: bool,
    choice: library.BlockedChoice | None = None,
) -> Tensor:
    k = check_gemm_blocked(a, blocks, scales, bias, n, group_size, asymmetric)
    m = a.shape[0]
    device = a.device.index
    reason = why_not_blocked(device)
    if reason:
        op._warn_once(reason)
        return gemm_blocked_reference(a, blocks, scales, bias, n, group_size, asymmetric)
    out = a.new_empty((m, n))
    if m == 0:
        return out
    if choice is None and m <= DECODE_TOKENS:
        return decode_blocks(a, blocks, scales, bias, n, group_size, asymmetric)
    code = library.loaded().marlin_gptq_gemm_blocked(  # type: ignore[union-attr]
        a.data_ptr(),
        blocks.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        m,
        n,
        k,
        a.stride(0) if m > 1 else k,
        group_size,
        asymmetric,
        a.dtype == torch.bfloat16,
        device,
        op._current_stream(device),
        op._overlap,
        None if choice is None else ctypes.byref(choice),
    )
    if code:
        op._check_alignment(a=a, blocks=blocks, scales=scales, bias=bias)
        raise RuntimeError(f"marlin_gptq.gemm_blocked on cuda:{device}: {library.error_string(code)}")
    return out


def _gemm_blocked_fake(
    a: Tensor, blocks: Tensor, scales: Tensor | None, bias: Tensor | None, n: int, group_size: int, asymmetric: bool
) -> Tensor:
    check_gemm_blocked(a, blocks, scales, bias, n, group_size, asymmetric)
    return a.new_empty((a.shape[0], n))


@functools.cache
def why_not_blocked(device: int) -> str:
    """Why the kernel for blocks cannot run on the GPU of this index; empty where it can."""
    status = library.status()
    if not status.available:
        return f"{status.reason} {status.hint}".strip()
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        return f"{name} has compute capability {major}.{minor}; blocks need 9.0 (elsewhere keep the Marlin layout)."
    if "sm_90a" not in status.architectures:
        return f"the kernel is compiled for {', '.join(status.architectures)}; blocks need sm_90a."
    return ""


_torch_library.impl("gemm_blocked", _gemm_blocked_cuda, "CUDA")
_torch_library.impl("gemm_blocked", gemm_blocked_reference, "CompositeExplicitAutograd")
torch.library.register_fake("marlin_gptq::gemm_blocked", _gemm_blocked_fake, lib=_torch_library)
