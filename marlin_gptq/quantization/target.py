"""What a linear should compute when its inputs are no longer those of the full-precision model.

The blocks in front are quantized, so x̃ arrives instead of x, but W·x is wanted. With C = Σ 2·(x − x̃)·x̃ᵀ / tokens and
H of x̃, least squares gives W* = W + W·C·H⁻¹; quantizing W* under H is the whole problem (Li et al., "GPTAQ: Efficient
Finetuning-Free Quantization for Asymmetric Calibration", arXiv 2504.02692; Zhang et al., "Qronos", arXiv 2505.11695).
"""

from __future__ import annotations

import torch
from torch import Tensor


def corrected_target(weight: Tensor, cross: Tensor, damped: Tensor, alpha: float) -> Tensor:
    """W + α·W·C·(H+λI)⁻¹, float32 [out_features, in_features].

    cross   C, [in_features, in_features], rows for x − x̃ and columns for x̃.
    damped  H + λI of the inputs x̃ that really arrive.
    alpha   0 leaves the weight as it is, 1 corrects in full; between them for noise in C.
    """
    weight = weight.float()
    if alpha == 0:
        return weight
    lower = torch.linalg.cholesky(damped)
    return weight + alpha * torch.cholesky_solve((weight @ cross).t(), lower).t()
