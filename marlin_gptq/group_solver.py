"""One group of linears that share their input, from their weights and Hessian to codes, scales and records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs
from marlin_gptq.errors import QuantizationError
from marlin_gptq.modeling.architecture import require_finite
from marlin_gptq.modeling.blocks import return_free_memory
from marlin_gptq.modeling.observe import Calibrated
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.hessian import Cross, NotPositiveDefinite, relative_error
from marlin_gptq.quantization.solve import Prepared, prepare, solve
from marlin_gptq.quantization.weight import QuantizedWeight
from marlin_gptq.report import LinearRecord, linear_record

logger = logging.getLogger(__name__)
Solved = tuple[dict[str, QuantizedWeight], list[LinearRecord]]


@dataclass(frozen=True)
class GroupSolver:
    """What solving any group needs.

    target  the dtype of scales; rows of a stacked weight are solved at once, None is all.
    tell    called with each linear's name and relative error when it is done.
    """

    config: QuantizationConfig
    target: torch.dtype
    rows: int | None
    costs: Costs
    tell: Callable[[str, float], None]

    def solve(
        self, block: int, group: list[str], linears: dict[str, nn.Linear], calibrated: Calibrated, cross: Cross | None
    ) -> Solved:
        """(codes and scales by name, records) of a group of block `block`. QuantizationError names what cannot be."""
        return_free_memory()
        hessian = self._hessian(group, calibrated) if self.config.method == "gptq" else None
        difference = None if cross is None else cross.mean()
        parts: dict[str, QuantizedWeight] = {}
        records: list[LinearRecord] = []
        for names in self._of_one_group_size(group):
            return_free_memory()
            started = time.perf_counter()
            weight, quantized, damp_percent = self._solve(names, linears, hessian, difference)
            seconds = time.perf_counter() - started
            row = 0
            for name in names:
                rows = slice(row, row + linears[name].out_features)
                row = rows.stop
                part = quantized.rows(rows.start, rows.stop)
                with self.costs.measure("judge"):
                    error = relative_error(weight[rows], part.dequantize(), hessian)
                share = seconds * linears[name].out_features / weight.shape[0]
                tokens = calibrated.tokens.get(group[0], 0)
                parts[name] = part
                records.append(linear_record(name, block, part, error, damp_percent, share, tokens))
                self.tell(name, error)
        return parts, records

    def _solve(
        self, names: list[str], linears: dict[str, nn.Linear], hessian: Tensor | None, cross: Tensor | None
    ) -> tuple[Tensor, QuantizedWeight, float]:
        """(the weight, the quantized weight, the damping it took) of linears of one group size.

        Rows are independent: linears of one input are solved as one tall weight under one Hessian.
        """
        group_size = self.config.group_size_of(names[0])
        # First, for a factorisation takes most when no weight has been stacked yet.
        prepared = None if hessian is None else self._prepare(names, hessian, group_size)
        return_free_memory()
        weight = torch.cat([self._weight(name, linears[name]) for name in names])
        if prepared is None:
            return weight, rtn_quantize(weight, group_size=group_size, scale_dtype=self.target), 0.0
        quantized = solve(weight, prepared, self.config, self.target, cross=cross, rows=self.rows, costs=self.costs)
        return weight, quantized, prepared.damp_percent

    def _of_one_group_size(self, group: list[str]) -> list[list[str]]:
        sizes = dict.fromkeys(map(self.config.group_size_of, group))
        return [[name for name in group if self.config.group_size_of(name) == size] for size in sizes]

    def _weight(self, name: str, linear: nn.Linear) -> Tensor:
        require_finite(f"{name}.weight", linear.weight.to(self.target), f"they overflow {self.target}")
        return linear.weight.float()

    def _hessian(self, group: list[str], calibrated: Calibrated) -> Tensor:
        try:
            return calibrated.hessians[group[0]].mean()
        except ValueError as error:
            raise QuantizationError(f"{group[0]}: {error}; use more or other calibration text") from error

    def _prepare(self, names: list[str], hessian: Tensor, group_size: int) -> Prepared:
        try:
            prepared = prepare(hessian, self.config, group_size, self.costs)
        except NotPositiveDefinite as error:
            raise QuantizationError(f"{names[0]}: {error}; use more or other calibration text") from error
        except ValueError as error:
            raise QuantizationError(f"{names[0]}: {error}; try --dtype bfloat16") from error
        if prepared.damp_percent != self.config.damp_percent:
            logger.warning(
                "%s: the Hessian was not positive definite, damping raised from %g to %g",
                ", ".join(names),
                self.config.damp_percent,
                prepared.damp_percent,
            )
        return prepared
