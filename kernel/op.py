"""torch.ops.marlin_gptq.gemm: the schema, the CUDA path, the reference path and the fake."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from marlin_gptq.kernel import library
from marlin_gptq.kernel.checks import check_gemm, wants_gradient
from marlin_gptq.kernel.gradient import Gemm
from marlin_gptq.kernel.reference import gemm_reference

MIN_CAPABILITY = (8, 0)
_OVERLAP, _PORTABLE = 1, 2  # flags of the C function
# Bytes, of the kernels' vector loads and bulk copies.
_ALIGNMENT = {"a": 16, "blocks": 16, "qweight": 16, "scales": 16, "qzeros": 16, "bias": 8}

_overlap = 0  # or _OVERLAP

# Library.define/impl rather than torch.library.custom_op: half the time per call.
_torch_library = torch.library.Library("marlin_gptq", "DEF")
_torch_library.define(
    "gemm(Tensor a, Tensor qweight, Tensor scales, Tensor? bias, int group_size, Tensor? qzeros=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def gemm(
    a: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    group_size: int = -1,
    qzeros: Tensor | None = None,
) -> Tensor:
    """a · W (+ bias), W of 4 bits in the Marlin layout.

    a [M, K] float16 or bfloat16, rows contiguous (stride 1), their distance a multiple of 8; M may be 0
    qweight int32 [K/16, 2N], K a multiple of 16 and N of 64
    scales [groups, N] and bias [N] of the dtype of a
    group_size -1 or K (one scale per column), 32, 64 or 128
    qzeros int32 [groups, N/8]: zero points z of asymmetric weights, W = scale · (q − z), each 0 … 15, in the layout of
    formats/marlin.py; None for 8 everywhere
    → [M, N] of the dtype of a

    On CUDA the kernel runs on the current stream, sums in FP32 and gives the same bits for the same inputs.
    On other devices, and on a GPU without a kernel (said once, as a RuntimeWarning), plain torch computes in
    float32. Gradients by a and bias are those of the dequantized weight; the weight has none. Raises TypeError (dtype)
    or ValueError (shape, stride, device, group size), naming the argument.
    """
    if torch.is_grad_enabled() and wants_gradient(a, scales, bias):
        return Gemm.apply(a, qweight, scales, bias, group_size, qzeros)
    return torch.ops.marlin_gptq.gemm(a, qweight, scales, bias, group_size, qzeros)


def set_overlap(enabled: bool) -> None:
    """Let kernels read weights before the work in front of them on the stream has ended; off at first.

    A kernel then reads its qweight and scales early (programmatic dependent launch); activations, bias and output
    wait as ever. Ask for it when a model is loaded and the GPU synchronized: from then on nothing queued on the
    stream may write weights. GPUs before compute capability 9.0, and more than 32 tokens, ignore it.
    """
    global _overlap
    _overlap = _OVERLAP if enabled else 0


def _gemm_reference(
    a: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, qzeros: Tensor | None = None
) -> Tensor:
    check_gemm(a, qweight, scales, bias, group_size, qzeros)
    return gemm_reference(a, qweight, scales, bias, group_size, qzeros)


def _gemm_cuda(
    a: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    qzeros: Tensor | None = None,
    grid: int = 0,
    flags: int = 0,
) -> Tensor:
    n, k = check_gemm(a, qweight, scales, bias, group_size, qzeros)
    m = a.shape[0]
    device = a.device.index
    reason = why_not(device)
    if reason:
        _warn_once(reason)
        return gemm_reference(a, qweight, scales, bias, group_size, qzeros)
    out = a.new_empty((m, n))
    if m == 0:
        return out
    code = library.loaded().marlin_gptq_gemm(  # type: ignore[union-attr]
        a.data_ptr(),
        qweight.data_ptr(),
        scales.data_ptr(),
        None if qzeros is None else qzeros.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        m,
        n,
        k,
        a.stride(0) if m > 1 else k,
        group_size,
        a.dtype == torch.bfloat16,
        device,
        _current_stream(device),
        grid,
        flags | _overlap,
    )
    if code:
        _check_alignment(a=a, qweight=qweight, scales=scales, qzeros=qzeros, bias=bias)
        raise RuntimeError(f"marlin_gptq.gemm on cuda:{device}: {library.error_string(code)}")
    return out


def _gemm_with_grid(
    a: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    grid: int,
    portable: bool = False,
    qzeros: Tensor | None = None,
) -> Tensor:
    """The CUDA path with a forced number of blocks (0: as chosen), for tests. RuntimeError for one that does not fit.

    portable: the kernels that every GPU can run, also where there are others.
    """
    return _gemm_cuda(a, qweight, scales, bias, group_size, qzeros, grid, _PORTABLE if portable else 0)


def _gemm_fake(
    a: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, qzeros: Tensor | None = None
) -> Tensor:
    n, _ = check_gemm(a, qweight, scales, bias, group_size, qzeros)
    return a.new_empty((a.shape[0], n))


@functools.cache
def why_not(device: int) -> str:
    """Why the kernel cannot run on the GPU of this index; empty where it can."""
    status = library.status()
    if not status.available:
        return f"{status.reason} {status.hint}".strip()
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        return f"{name} has compute capability {major}.{minor}; the kernel needs 8.0 or newer."
    return ""


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"marlin_gptq: 4-bit layers run by the slow reference path on this GPU. {reason}",
        RuntimeWarning,
        stacklevel=3,
    )


def _check_alignment(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and (offset := tensor.data_ptr() % _ALIGNMENT[name]):
            raise ValueError(
                f"{name}: got an address {offset} bytes past a multiple of {_ALIGNMENT[name]}, "
                f"expected a multiple of {_ALIGNMENT[name]} (copy the slice: .clone())"
            )


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# The raw handle without a Stream object around it saves a microsecond a call, where this torch has it.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)

_torch_library.impl("gemm", _gemm_cuda, "CUDA")
_torch_library.impl("gemm", _gemm_reference, "CompositeExplicitAutograd")
torch.library.register_fake("marlin_gptq::gemm", _gemm_fake, lib=_torch_library)
