"""Random problems for the kernel's tests, their answers in float64, and what several of the tests do with them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from marlin_gptq.kernel import library, set_overlap
from marlin_gptq.kernel.blocked import to_blocks
from marlin_gptq.kernel.reference import dequantize, unpack_scales

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
DTYPES = [FLOAT16, BFLOAT16]
LIMIT = {FLOAT16: 1e-3, BFLOAT16: 4e-3}  # relative error allowed


def packed_weight(
    k: int, n: int, group_size: int, dtype: torch.dtype, seed: int = 0, device: str = "cuda"
) -> tuple[Tensor, Tensor]:
    """(qweight, scales): any words are valid codes; scales between 1/128 and 3/128."""
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (k // 16, 2 * n), generator=generator, device=device)
    groups = 1 if group_size in (-1, k) else k // group_size
    scales = (torch.rand(groups, n, generator=generator, device=device) + 0.5) / 64
    return words.int(), scales.to(dtype)


def zero_points(k: int, n: int, group_size: int, seed: int = 4, device: str = "cuda") -> Tensor:
    """qzeros: any words are valid zero points, 0 to 15."""
    generator = torch.Generator(device).manual_seed(seed)
    groups = 1 if group_size in (-1, k) else k // group_size
    return torch.randint(-(2**31), 2**31, (groups, n // 8), generator=generator, device=device).int()


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 1, device: str = "cuda") -> Tensor:
    """[m, k], standard normal."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(m, k, generator=generator, device=device).to(dtype)


def exact(
    a: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    group_size: int = 128,
    qzeros: Tensor | None = None,
) -> Tensor:
    """The product in float64."""
    product = a.double() @ dequantize(qweight, scales, group_size, qzeros).double().t()
    return product if bias is None else product + bias.double()


def in_blocks(qweight: Tensor, scales: Tensor, qzeros: Tensor | None, group_size: int) -> tuple[Tensor, Tensor | None]:
    """(blocks, scales) as the kernels for blocks take them."""
    blocks = to_blocks(qweight, scales, qzeros, group_size)
    return blocks, unpack_scales(scales)[0].contiguous() if scales.shape[0] == 1 else None


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def inside_guards(tensor: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """A copy of a tensor with 4 KB of `fill` before and behind it; and that whole buffer."""
    band = 4096 // tensor.element_size()
    whole = torch.full((tensor.numel() + 2 * band,), fill, dtype=tensor.dtype, device="cuda")
    view = whole[band : band + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view, whole


def dirty_tickets(device: int = 0) -> tuple[int, int]:
    """(reduction tickets that are not zero, workspaces)"""
    handle = library.loaded()
    assert handle is not None
    dirty, workspaces = ctypes.c_int64(-1), ctypes.c_int32(-1)
    assert handle.marlin_gptq_dirty_tickets(device, ctypes.byref(dirty), ctypes.byref(workspaces)) == 0
    return dirty.value, workspaces.value


def differing_where_kernels_overlap(chain: Callable[[Tensor], Tensor], inputs: list[Tensor], graph: bool) -> int:
    """Elements of ten rounds of chain(x), launched one by one or recorded, that are others than without overlap."""
    set_overlap(False)
    expected = [chain(x) for x in inputs]
    torch.cuda.synchronize()
    a, recorded = inputs[0].clone(), torch.cuda.CUDAGraph()
    out, differing = torch.empty_like(a), torch.zeros((), dtype=torch.int64, device="cuda")
    set_overlap(True)
    try:
        if graph:
            with torch.cuda.graph(recorded):
                out = chain(a)
        for _ in range(10):
            for x, want in zip(inputs, expected, strict=True):
                a.copy_(x)
                if graph:
                    recorded.replay()
                else:
                    out = chain(a)
                differing += (out != want).sum()
        return int(differing)
    finally:
        set_overlap(False)
