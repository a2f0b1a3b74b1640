"""Rounding under both sides of a linear: what it gets, and what the loss makes of what it gives.

GPTQ takes every output for as dear as any other, and so each row of a weight for itself. But the layers behind a linear
see some directions of its outputs and hardly others. With H of the inputs x and M = Σ g·gᵀ / tokens of the loss's
gradients g by the outputs, what an error E = Q − W costs is about

    tr(M·E·H·Eᵀ)      (the loss's Fisher matrix as a Kronecker product: Martens and Grosse, "Optimizing Neural Networks
                       with Kronecker-factored Approximate Curvature", arXiv 1503.05671)

Under it rows are no longer independent: as a column's error is pushed onto the columns still to come, a row's is pushed
onto the rows still to come (Tseng et al., "Model-Preserving Adaptive Rounding", arXiv 2505.22988). Rows are taken in
a few pieces, those of the dearest outputs first. In each piece GPTQ runs as ever, towards a target that makes up for
the errors of the pieces before; then, sweep by sweep, each piece is refined once more for the errors of all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_gptq.quantization.hessian import damp, inverse_factor
from marlin_gptq.quantization.weight import QuantizedWeight

# Of the mean diagonal, added to M's: the Kronecker product is a rough likeness, and must not be believed to the last.
OUTPUT_DAMP = 1.0
# Into so many pieces the rows are cut: each is solved after the other.
PIECES = 8
# Over all pieces, behind the first time.
SWEEPS = 1

Solve = Callable[[Tensor], QuantizedWeight]
Refine = Callable[[Tensor, QuantizedWeight], QuantizedWeight]


class UnusableGradients(ValueError):
    """M holds what is no number."""


@dataclass(frozen=True)
class Rows:
    """The rows of one linear inside a stacked weight, as they are taken.

    order   their numbers in the stacked weight, the dearest first.
    damped  M + λI in that order; upper is U of it, (M + λI)⁻¹ = Uᵀ·U.
    bounds  of the pieces, in `order`.
    """

    order: Tensor
    damped: Tensor
    upper: Tensor
    bounds: list[int]

    def piece(self, number: int) -> slice:
        return slice(self.bounds[number], self.bounds[number + 1])


def rows_of(outputs: Sequence[Tensor], pieces: int = PIECES) -> list[Rows]:
    """Of linears stacked one below the other, from M [out_features, out_features] of each."""
    found, first = [], 0
    for output in outputs:
        count = len(output)
        order = torch.argsort(output.diagonal(), descending=True, stable=True)
        damped = damp(output[order][:, order], OUTPUT_DAMP)
        upper = inverse_factor(damped)
        if upper is None:  # not with such a damping, unless M is not finite
            raise UnusableGradients("the gradients of its outputs hold NaN or Inf")
        size = -(-count // pieces)
        bounds = [min(count, number * size) for number in range(pieces + 1)]
        found.append(Rows(order + first, damped, upper, bounds))
        first += count
    return found


def push_rows(target: Tensor, errors: Tensor, rows: Rows, number: int) -> None:
    """What the rows still to come must make up for once piece `number` has these errors Q − target, in place.

    target  [out_features, in_features] of the linear, rows in order; errors [rows of the piece, in_features]. With the
    rows still to come free, the least loss given E of the piece has them at (M⁻¹)[rest, piece]·(M⁻¹)[piece, piece]⁻¹·E,
    in the inverse of M without the pieces before: Uᵀ[rest, piece]·U[piece, piece]⁻ᵀ·E.
    """
    piece = rows.piece(number)
    if piece.stop == len(target):
        return
    corner = rows.upper[piece, piece].t().contiguous()
    solved = torch.linalg.solve_triangular(corner, errors, upper=False)
    target[piece.stop :].addmm_(rows.upper[piece, piece.stop :].t(), solved)


def best_target(weight: Tensor, errors: Tensor, rows: Rows, number: int) -> Tensor:
    """Where the rows of piece `number` would best be, given the errors E = Q − W of all others, were they not rounded.

    weight, errors  [out_features, in_features], rows in order → W − M[piece, piece]⁻¹·M[piece, others]·E[others].
    """
    piece = rows.piece(number)
    square = rows.damped[piece, piece]
    pull = rows.damped[piece] @ errors - square @ errors[piece]
    lower = torch.linalg.cholesky(square)
    return weight[piece] - torch.cholesky_solve(pull, lower)


def solve_rows(
    weight: Tensor,
    outputs: Sequence[Tensor],
    solve: Solve,
    refine: Refine,
    sweeps: int = SWEEPS,
    pieces: int = PIECES,
) -> QuantizedWeight:
    """Quantize linears stacked one below the other, float32 [ΣO, in_features], with `outputs` M of each.

    solve   quantizes some rows for themselves, as if there were no others; refine betters the codes and scales of some
            for another target. Pieces of all linears of the stack are handed over together: these do not feel one
            another.
    sweeps  over all pieces, each refined once more.

    With diagonal M this is `solve` of each row, and refine has no new target. UnusableGradients for NaN or Inf in M.
    """
    stack = rows_of(outputs, pieces)
    original = [weight[rows.order] for rows in stack]
    target = [rows.clone() for rows in original]
    errors = [torch.zeros_like(rows) for rows in original]
    parts: list[QuantizedWeight] = []

    def note(number: int) -> None:
        """E = Q − W of the rows of this piece."""
        sizes = [len(first[rows.piece(number)]) for first, rows in zip(original, stack, strict=True)]
        made = parts[number].dequantize().split(sizes)
        for error, first, own, rows in zip(errors, original, made, stack, strict=True):
            error[rows.piece(number)] = own - first[rows.piece(number)]

    for number in range(pieces):
        parts.append(solve(torch.cat([aims[rows.piece(number)] for aims, rows in zip(target, stack, strict=True)])))
        note(number)
        for aims, first, error, rows in zip(target, original, errors, stack, strict=True):
            piece = rows.piece(number)
            push_rows(aims, first[piece] + error[piece] - aims[piece], rows, number)
    for _ in range(sweeps):
        for number in range(pieces):
            wanted = [best_target(*each, number) for each in zip(original, errors, stack, strict=True)]
            parts[number] = refine(torch.cat(wanted), parts[number])
            note(number)
    return _back_in_place(stack, parts)


def loss(weight: Tensor, quantized: Tensor, hessian: Tensor, output: Tensor) -> float:
    """tr(M·E·H·Eᵀ) with E = Q − W, float64: what all this makes small."""
    error = quantized.double() - weight.double()
    return float(((output.double() @ error) * (error @ hessian.double())).sum())


def _back_in_place(stack: Sequence[Rows], parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    taken = torch.cat([one.order[one.piece(number)] for number in range(len(parts)) for one in stack])
    place = torch.argsort(taken)
    codes = torch.cat([part.codes for part in parts])[place]
    scales = torch.cat([part.scales for part in parts])[place]
    return QuantizedWeight(codes, scales, None, parts[0].group_size)
