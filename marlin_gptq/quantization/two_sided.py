"""Rounding under both sides of a linear: what it gets, and what the loss makes of what it gives.

GPTQ takes every output for as dear as any other, and so each row of a weight for itself. But the layers behind a linear
see some directions of its outputs and hardly others. With H of the inputs x and M = Σ g·gᵀ / tokens of the loss's
gradients g by the outputs, what an error E = Q − W costs is about

    tr(M·E·H·Eᵀ)      (the loss's Fisher matrix as a Kronecker product: Martens and Grosse, "Optimizing Neural Networks
                       with Kronecker-factored Approximate Curvature", arXiv 1503.05671; for rounding Tseng et al.,
                       "Model-Preserving Adaptive Rounding", arXiv 2505.22988)

Under it rows are no longer independent: each can make up for the errors of the others. To let them do so one after the
other would take the time of as many passes, and all at once they go too far together. Here rows lie in PIECEs, and
every COLOURS-th piece is refined at once, towards where it would best be if all other pieces stayed. What the loss sees
alike mostly lies side by side (in one head of attention), so in one piece or in pieces of different colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from marlin_gptq.quantization.hessian import damp
from marlin_gptq.quantization.weight import QuantizedWeight

# Of the mean diagonal, added to M's: the Kronecker product is a rough likeness, and must not be believed to the last.
OUTPUT_DAMP = 1.0
PIECE, COLOURS, SWEEPS = 32, 2, 3
# How much nearer the targets of the next sweep are after one that went too far.
NEARER = 0.8

# Better codes and scales of all rows for this target in the place of the weight.
Refine = Callable[[Tensor, QuantizedWeight], QuantizedWeight]
# (left, right) → leftᵀ·right, float32.
Product = Callable[[Tensor, Tensor], Tensor]


class Outputs(NamedTuple):
    """Of one linear M + λI [out_features, out_features], and of each colour its rows and the inverses of its blocks.

    inverses [pieces, PIECE, PIECE]; a last piece is filled up with rows of the identity.
    """

    damped: Tensor
    rows: list[Tensor]
    inverses: list[Tensor]

    @classmethod
    def of(cls, output: Tensor) -> Outputs:
        """From M."""
        damped = damp(output, OUTPUT_DAMP)
        missing = -len(damped) % PIECE
        filled = pad(damped, (0, missing, 0, missing))
        filled.diagonal()[len(damped) :] = 1
        firsts = range(0, len(filled), PIECE)
        blocks = torch.stack([filled[first : first + PIECE, first : first + PIECE] for first in firsts])
        lower = torch.linalg.cholesky_ex(blocks).L
        one = torch.eye(PIECE, device=lower.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, one, upper=False)
        inverses = inverse.mT @ inverse
        rows = torch.arange(len(filled), device=damped.device).unflatten(0, (-1, PIECE))
        colours = [rows[colour::COLOURS].flatten() for colour in range(COLOURS)]
        last = (len(firsts) - 1) % COLOURS
        colours[last] = colours[last][: len(colours[last]) - missing]
        return cls(damped, colours, [inverses[colour::COLOURS] for colour in range(COLOURS)])

    def moves(self, colour: int, errors: Tensor, product: Product) -> Tensor:
        """B⁻¹·S of a colour's rows, for all errors E of the linear: Q less these is where they would best be."""
        slopes = product(self.damped[:, self.rows[colour]], errors)
        inverses = self.inverses[colour]
        pieces = pad(slopes, (0, 0, 0, len(inverses) * PIECE - len(slopes))).unflatten(0, (-1, PIECE))
        return (inverses @ pieces).flatten(0, 1)[: len(slopes)]


def refine_both_sides(
    weight: Tensor,
    quantized: QuantizedWeight,
    hessian: Tensor,
    outputs: Sequence[Tensor],
    refine: Refine,
    product: Product = lambda left, right: left.t() @ right,
    sweeps: int = SWEEPS,
) -> QuantizedWeight:
    """Sweeps over all rows of linears stacked one below the other, [ΣO, in_features]; none gets dearer than it began.

    hessian  damped, [in_features, in_features]; outputs M of each linear.

    With S = (M + λI)·E, and B its diagonal block of a piece, the piece's rows would best be at Q − B⁻¹·S, given those
    of all others: that is refined towards. For a linear whose loss is not lower after a sweep it is taken back, and the
    next does not go as far. Nothing here waits for the device.
    """
    stack = [Outputs.of(output) for output in outputs]
    sizes = [len(output) for output in outputs]
    weight = weight.float()
    colours = [_rows_of(stack, colour) for colour in range(COLOURS)]

    def losses(one: QuantizedWeight) -> Tensor:
        """tr((M + λI)·E·H·Eᵀ) of each linear."""
        errors = one.dequantize().sub_(weight)
        images = product(errors.t(), hessian)
        for own, error, image in zip(stack, errors.split(sizes), images.split(sizes), strict=True):
            image.mul_(product(own.damped, error))
        return torch.stack([part.sum(dtype=torch.float64) for part in images.split(sizes)])

    least = losses(quantized)
    share = torch.ones(len(stack), device=weight.device)
    for _ in range(sweeps):
        found = QuantizedWeight(quantized.codes.clone(), quantized.scales.clone(), None, quantized.group_size)
        for colour, rows in enumerate(colours):
            if not len(rows):
                continue
            made = found.dequantize()
            each = zip(stack, (made - weight).split(sizes), share, strict=True)
            moves = torch.cat([own.moves(colour, errors, product).mul_(far) for own, errors, far in each])
            part = QuantizedWeight(found.codes[rows], found.scales[rows], None, found.group_size)
            part = refine(made[rows].sub_(moves), part)
            found.codes[rows], found.scales[rows] = part.codes, part.scales
        costs = losses(found)
        lower = costs < least
        least, share = torch.where(lower, costs, least), torch.where(lower, share, NEARER * share)
        kept = torch.cat([part.expand(size) for part, size in zip(lower, sizes, strict=True)]).unsqueeze(1)
        codes = torch.where(kept, found.codes, quantized.codes)
        quantized = replace(found, codes=codes, scales=torch.where(kept, found.scales, quantized.scales))
    return quantized


def _rows_of(stack: Sequence[Outputs], colour: int) -> Tensor:
    """The rows of a colour of all linears, as they are stacked."""
    first, found = 0, []
    for own in stack:
        found.append(own.rows[colour] + first)
        first += len(own.damped)
    return torch.cat(found)


def loss(weight: Tensor, quantized: Tensor, hessian: Tensor, output: Tensor) -> float:
    """tr(M·E·H·Eᵀ) with E = Q − W, float64: what all this makes small."""
    error = quantized.double() - weight.double()
    return float(((output.double() @ error) * (error @ hessian.double())).sum())
