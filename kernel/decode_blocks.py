"""Few tokens times weights in blocks (kernel/blocked.py): the decode kernels, on GPUs of compute capability 9.0."""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_gptq.kernel import library, op

MAX_TOKENS = 32


def decode_blocks(
    a: Tensor,
    blocks: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
    asymmetric: bool,
    grid: int = 0,
) -> Tensor:
    """a [M, K] · W (+ bias [N]) → [M, N], with the arguments of `gemm_blocked`, which has checked them.

    M at most MAX_TOKENS. a, blocks and scales start on 16 bytes, bias on 8. grid: 0, or a number of blocks to
    force, for tests. ValueError for a misaligned tensor, RuntimeError for what else the library refuses.
    """
    m, k = a.shape
    device = a.device.index
    out = a.new_empty((m, n))
    if m == 0:
        return out
    code = library.loaded().marlin_gptq_decode_blocks(  # type: ignore[union-attr]
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
        grid,
        op._overlap,
    )
    if code:
        op._check_alignment(a=a, blocks=blocks, scales=scales, bias=bias)
        raise RuntimeError(f"marlin_gptq.decode_blocks on cuda:{device}: {library.error_string(code)}")
    return out
