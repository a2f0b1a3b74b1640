"""The 4-bit GEMM and its only Python door.

`gemm` (or `torch.ops.marlin_gptq.gemm`) multiplies FP16 or BF16 activations with a weight packed in the
Marlin layout: by the CUDA kernel on a GPU, by plain torch elsewhere. `library.status()` says which of the two
a machine has, and why. This package imports nothing else of marlin_gptq.
"""

from __future__ import annotations

from marlin_gptq.kernel import blocked, library, reference
from marlin_gptq.kernel.blocked_op import gemm_blocked, why_not_blocked
from marlin_gptq.kernel.library import KernelStatus
from marlin_gptq.kernel.op import gemm, set_overlap, why_not

__all__ = [
    "KernelStatus",
    "blocked",
    "gemm",
    "gemm_blocked",
    "library",
    "reference",
    "set_overlap",
    "why_not",
    "why_not_blocked",
]
