"""The interface of the original Marlin package: `import marlin_gptq.compat as marlin`, and code written for it runs.

    mul(A, B, C, s, workspace, thread_k, thread_n, sms, max_par)    FP16 × INT4 product
    Layer(infeatures, outfeatures, groupsize)                       a linear layer of such a weight, without bias
    replace_linear(module, name_filter, groupsize)                  nn.Linear → Layer, by name

Shapes, argument names and error conditions are the original's; the work is done by this project's kernel, on a GPU by
CUDA and elsewhere by the reference path. So it has no race over the workspace, the same inputs give the same bits, and
bfloat16, of which the original made NaN, is an error. Source: Frantar et al., "MARLIN" (arXiv 2408.11743) and the
interface its repository documents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from marlin_gptq.formats import marlin
from marlin_gptq.kernel import gemm
from marlin_gptq.quantization.weight import round_to_codes

# Shapes of a thread block's tile (k, n); the first serves up to 16 rows, the second more, when none is asked for.
TILES = ((128, 128), (64, 256))
SMALL_BATCH = 16
GROUP_SIZES = (-1, 128)


def mul(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    s: Tensor,
    workspace: Tensor,
    thread_k: int = -1,
    thread_n: int = -1,
    sms: int = -1,
    max_par: int = 16,
) -> None:
    """C = A · W, written in place.

    A [m, k] float16; B int32 [k/16, 2n], the packed weight; C [m, n] float16; s float16 [groups, n], the scales in
    stored order, groups 1 or k/128; workspace int32 with at least n/128 · max_par entries. thread_k, thread_n: one of
    TILES, or -1. The kernel chooses its own tiles and needs no workspace: these arguments are checked as the original
    checks them and not used further, and so is sms.

    RuntimeError for shapes that the tile does not divide, for a tile that there is none of and for a workspace that is
    too small; TypeError for another dtype than float16, bfloat16 above all; ValueError for tensors that do not fit.
    """
    for name, tensor in (("A", A), ("C", C), ("s", s)):
        if tensor.dtype != torch.float16:
            raise TypeError(f"{name}: got {tensor.dtype}, expected torch.float16: this interface knows no other dtype")
    if A.dim() != 2 or C.dim() != 2 or B.dim() != 2 or s.dim() != 2:
        raise ValueError("A, B, C and s: expected two dimensions each")
    m, k, n = A.shape[0], A.shape[1], C.shape[1]
    if C.shape[0] != m or C.device != A.device:
        raise ValueError(f"C: got {list(C.shape)} on {C.device}, expected {[m, n]} on {A.device}")
    if tuple(B.shape) != (k // 16, 2 * n):
        raise ValueError(f"B: got {list(B.shape)}, expected {[k // 16, 2 * n]} for A {[m, k]} and C {[m, n]}")
    groupsize = -1 if s.shape[0] == 1 else k // max(1, s.shape[0])
    tile = (thread_k, thread_n)
    if -1 in tile:
        tile = TILES[0] if m <= SMALL_BATCH else TILES[1]
    elif tile not in TILES:
        raise RuntimeError(
            f"No kernel implementation for thread_k={thread_k}, thread_n={thread_n}, groupsize={groupsize}."
        )
    if k % tile[0] or n % tile[1] or k == 0 or n == 0 or (groupsize != -1 and k % groupsize):
        raise RuntimeError(f"Problem (m={m}, n={n}, k={k}) not compatible with thread_k={tile[0]}, thread_n={tile[1]}.")
    if groupsize not in GROUP_SIZES:
        raise RuntimeError(
            f"No kernel implementation for thread_k={tile[0]}, thread_n={tile[1]}, groupsize={groupsize}."
        )
    if max_par < 1 or workspace.numel() < n // 128 * max_par:
        raise RuntimeError(f"workspace must be of size at least {n // 128 * max(1, max_par)}.")
    C.copy_(gemm(A.contiguous(), B.contiguous(), s.contiguous(), None, groupsize))


class Layer(nn.Module):
    """A linear layer y = x · W without bias, W of 4 bits and float16 scales.

    Buffers: B int32 [infeatures/16, 2·outfeatures], s float16 [infeatures/groupsize, outfeatures], and a workspace that
    is not saved. groupsize -1 is one scale per output. ValueError for another groupsize than -1 and 128, and for
    infeatures or outfeatures that are no multiple of 128 and 256.
    """

    B: Tensor
    s: Tensor
    workspace: Tensor

    def __init__(self, infeatures: int, outfeatures: int, groupsize: int = -1) -> None:
        super().__init__()
        if groupsize not in GROUP_SIZES:
            raise ValueError(f"groupsize: got {groupsize}, only -1 and 128 are supported")
        if infeatures <= 0 or outfeatures <= 0 or infeatures % 128 or outfeatures % 256:
            raise ValueError(
                f"got infeatures {infeatures} and outfeatures {outfeatures}: `infeatures` must be divisible by 128 and "
                "`outfeatures` by 256"
            )
        self.k, self.n = infeatures, outfeatures
        self.groupsize = infeatures if groupsize == -1 else groupsize
        groups = infeatures // self.groupsize
        self.register_buffer("B", torch.zeros(infeatures // 16, 2 * outfeatures, dtype=torch.int32))
        self.register_buffer("s", torch.zeros(groups, outfeatures, dtype=torch.float16))
        workspace = torch.zeros(outfeatures // 128 * 16, dtype=torch.int32)
        self.register_buffer("workspace", workspace, persistent=False)

    def forward(self, A: Tensor) -> Tensor:
        """A [..., infeatures] float16 → [..., outfeatures]."""
        rows = A.reshape(A.numel() // max(1, A.shape[-1]), A.shape[-1])
        C = torch.empty(rows.shape[0], self.n, dtype=A.dtype, device=A.device)
        mul(rows, self.B, C, self.s, self.workspace)
        return C.view(*A.shape[:-1], self.n)

    def pack(self, linear: nn.Linear, scales: Tensor) -> None:
        """Take over the weight of `linear`: values that are already on the 4-bit grid of `scales`.

        linear  weight float16 [outfeatures, infeatures]; a bias is left behind, with a warning.
        scales  float16 [outfeatures, groups]: a weight is scale · (code − 8), so the largest code is 7 scales.
        """
        if linear.weight.dtype != torch.float16:
            raise ValueError(f"linear: got a weight of {linear.weight.dtype}, only torch.half weights are supported")
        if tuple(linear.weight.shape) != (self.n, self.k):
            raise ValueError(f"linear: got a weight {list(linear.weight.shape)}, expected {[self.n, self.k]}")
        if tuple(scales.shape) != (self.n, self.s.shape[0]):
            raise ValueError(f"scales: got {list(scales.shape)}, expected {[self.n, self.s.shape[0]]}")
        if linear.bias is not None:
            warnings.warn("pack: this layer has no bias, that of the linear is left behind", stacklevel=2)
        scales = scales.to(torch.float16)
        steps = scales.repeat_interleave(self.groupsize, dim=1)
        steps = torch.where(steps == 0, torch.ones_like(steps), steps)  # a group of zeros: code 8
        codes = round_to_codes(linear.weight.detach().float(), steps)
        self.B = marlin.pack_codes(codes).to(self.B.device)
        self.s = marlin.pack_scales(scales).to(self.s.device)


def replace_linear(
    module: nn.Module, name_filter: Callable[[str], bool] = lambda name: True, groupsize: int = -1, name: str = ""
) -> None:
    """Put an empty Layer in place of every nn.Linear inside `module` whose full name the filter takes.

    Its B and s are then loaded from a state dict, or packed. `name` is put in front of all names. A linear with a bias
    is replaced as well, with a warning that names it: its bias is lost.
    """
    if isinstance(module, Layer):
        return
    found = [(full, child) for full, child in module.named_modules() if isinstance(child, nn.Linear) and full]
    for full, linear in found:
        if not name_filter(f"{name}.{full}" if name else full):
            continue
        if linear.bias is not None:
            warnings.warn(f"replace_linear: {full} has a bias, which the layer has no place for", stacklevel=2)
        parent, _, own = full.rpartition(".")
        setattr(module.get_submodule(parent), own, Layer(linear.in_features, linear.out_features, groupsize))
