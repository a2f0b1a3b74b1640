"""Random problems for the kernel's tests, and their answers in float64."""

from __future__ import annotations

import torch
from torch import Tensor

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
