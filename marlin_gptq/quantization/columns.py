"""The columns of one block, in plain torch: quantized one after the other, their errors pushed onto those behind.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323,
Algorithm 1). Slow and obvious; `fused.py` has the same functions as GPU kernels, `loops.py` decides between them.
"""

from __future__ import annotations

from torch import Tensor

from marlin_gptq.quantization.weight import round_to_codes


def quantize_columns(
    block: Tensor, codes: Tensor, errors: Tensor, upper: Tensor, steps: Tensor, first: int, last: int
) -> None:
    """Quantize the columns first … last − 1 of a block and compensate all columns of the block behind each.

    block   float32 [width, rows], a column of the weight contiguous; changed in place.
    codes   uint8 [width, rows] and errors float32 [width, rows]: written for the columns first … last − 1. An error is
            (w − Q(w)) / U[c, c], what the columns behind have to make up for.
    upper   float32 [width, width], the block of U on the diagonal.
    steps   scales of any sign and float dtype: [rows], or [width, rows] where every column has its own.
    """
    steps = steps.float()
    for column in range(first, last):
        step = steps if steps.dim() == 1 else steps[column]
        original = block[column]
        code = round_to_codes(original, step)
        codes[column] = code
        error = (original - (code.float() - 8) * step) / upper[column, column]
        errors[column] = error
        block[column + 1 :].addr_(upper[column, column + 1 :], error, alpha=-1.0)


def push_errors(rest: Tensor, errors: Tensor, upper: Tensor) -> None:
    """rest −= errorsᵀ·U: a finished block's errors onto all columns behind it.

    rest float32 [rows, later], changed in place; errors float32 [width, rows]; upper float32 [width, later].
    """
    rest.addmm_(errors.t(), upper, alpha=-1.0)
