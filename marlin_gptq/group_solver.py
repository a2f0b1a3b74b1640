"""Groups of linears that share their input, from their weights and Hessian to codes, scales and records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs, StreamCosts
from marlin_gptq.errors import QuantizationError
from marlin_gptq.modeling.architecture import require_finite
from marlin_gptq.modeling.blocks import return_free_memory
from marlin_gptq.modeling.observe import Calibrated, Groups
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.grid import share_too_small
from marlin_gptq.quantization.hessian import Cross, NotPositiveDefinite, relative_error
from marlin_gptq.quantization.solve import Prepared, prepare, solve
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group
from marlin_gptq.report import LinearRecord, linear_record

logger = logging.getLogger(__name__)
# Share of a weight's squares that may lie in groups too small for their scales before a run says so.
TOO_SMALL = 0.01
Solved = tuple[dict[str, QuantizedWeight], list[LinearRecord]]


@dataclass(frozen=True)
class _Answer:
    """Linears of one group and one group size, solved and not yet judged: their stacked weight and what became of it.

    seconds  it took; of what had a stream of its own, `costs` knows them later.
    """

    names: list[str]
    hessian: Tensor | None
    weight: Tensor
    quantized: QuantizedWeight
    damp_percent: float
    seconds: float
    costs: Costs


@dataclass(frozen=True)
class GroupSolver:
    """What solving any group needs.

    linears  of the block, by full name; calibrated and crosses are what was seen of their inputs, outputs the M of
             `two_sided` of each, if the recipe asks for it.
    target   the dtype of scales; rows of a stacked weight are solved at once, None is all.
    tell     called with each linear's name and relative error when it is done.
    """

    block: int
    linears: dict[str, nn.Linear]
    calibrated: Calibrated
    crosses: dict[str, Cross]
    outputs: dict[str, Tensor]
    config: QuantizationConfig
    target: torch.dtype
    rows: int | None
    costs: Costs
    tell: Callable[[str, float], None]

    def solve(self, groups: Groups) -> dict[str, Solved]:
        """(codes and scales by name, records) of each group, by its first linear.

        Several groups, on a GPU, are solved side by side, each on a stream of its own: a column waits for the one
        before, so that a weight of few rows, or a factorisation, leaves most of a GPU idle. The bits are the same.

        QuantizationError names what cannot be solved.
        """
        if len(groups) == 1:
            return {groups[0][0]: self._judged(self._answers(groups[0], self.costs))}
        answers: dict[str, list[_Answer]] = {}
        order = sorted(groups, key=lambda group: -self.linears[group[0]].in_features)  # the longest work first
        with self.costs.streams(len(order)) as streams:
            for group, costs in zip(order, streams, strict=True):
                with torch.cuda.stream(costs.stream):
                    answers[group[0]] = self._answers(group, costs)
        return {group[0]: self._judged(answers.pop(group[0])) for group in groups}

    def _answers(self, group: list[str], costs: Costs) -> list[_Answer]:
        return_free_memory()
        hessian = self._hessian(group) if self.config.method == "gptq" else None
        cross = self.crosses[group[0]].mean() if group[0] in self.crosses else None
        answers = []
        for names in self._of_one_group_size(group):
            started = time.perf_counter()
            solved = self._solve(names, hessian, cross, costs)
            answers.append(_Answer(names, hessian, *solved, time.perf_counter() - started, costs))
        return answers

    def _judged(self, answers: list[_Answer]) -> Solved:
        parts: dict[str, QuantizedWeight] = {}
        records: list[LinearRecord] = []
        for answer in answers:
            costs, weight = answer.costs, answer.weight
            seconds = costs.seconds / len(answers) if isinstance(costs, StreamCosts) else answer.seconds
            row = 0
            for name in answer.names:
                rows = slice(row, row + self.linears[name].out_features)
                row = rows.stop
                part = answer.quantized.rows(rows.start, rows.stop)
                with self.costs.measure("judge"):
                    error = relative_error(weight[rows], part.dequantize(), answer.hessian)
                    self._warn_of_small(name, weight[rows])
                share = seconds * (rows.stop - rows.start) / len(weight)
                tokens = self.calibrated.tokens.get(answers[0].names[0], 0)
                parts[name] = part
                records.append(linear_record(name, self.block, part, error, answer.damp_percent, share, tokens))
                self.tell(name, error)
        return parts, records

    def _solve(
        self, names: list[str], hessian: Tensor | None, cross: Tensor | None, costs: Costs
    ) -> tuple[Tensor, QuantizedWeight, float]:
        """(the weight, the quantized weight, the damping it took) of linears of one group size.

        Linears of one input are solved as one tall weight under one Hessian: their rows are independent, or, where M of
        their outputs joins them, those of different linears.
        """
        group_size = self.config.group_size_of(names[0])
        # First, for a factorisation takes most when no weight has been stacked yet.
        prepared = None if hessian is None else self._prepare(names, hessian, group_size, costs)
        return_free_memory()
        weight = torch.cat([self._weight(name) for name in names])
        if prepared is None:
            return weight, rtn_quantize(weight, group_size=group_size, scale_dtype=self.target), 0.0
        outputs = [self.outputs[name] for name in names if name in self.outputs]
        quantized = solve(
            weight, prepared, self.config, self.target, cross=cross, outputs=outputs, rows=self.rows, costs=costs
        )
        return weight, quantized, prepared.damp_percent

    def _overflow_hint(self) -> str:
        """What to do about NaN and Inf among activations."""
        if self.target == torch.float16:
            return "activations before it pass the range of float16: use --dtype bfloat16"
        return "the full-precision model gives no numbers for this calibration text: use another, or another model"

    def _warn_of_small(self, name: str, weight: Tensor) -> None:
        columns = columns_per_group(weight.shape[1], self.config.group_size_of(name))
        share = share_too_small(weight, columns, self.target)
        if share > TOO_SMALL:
            dtype = str(self.target).removeprefix("torch.")
            logger.warning(
                "%s: %.0f %% of its weight lies in groups that are too small for scales of %s, which lose it in part; "
                "use --dtype bfloat16",
                name,
                100 * share,
                dtype,
            )

    def _of_one_group_size(self, group: list[str]) -> list[list[str]]:
        sizes = dict.fromkeys(map(self.config.group_size_of, group))
        return [[name for name in group if self.config.group_size_of(name) == size] for size in sizes]

    def _weight(self, name: str) -> Tensor:
        weight = self.linears[name].weight
        if weight.dtype != self.target:
            require_finite(f"{name}.weight", weight.to(self.target), f"they overflow {self.target}")
        return weight.float()

    def _hessian(self, group: list[str]) -> Tensor:
        try:
            return self.calibrated.hessians[group[0]].mean()
        except ValueError as error:
            raise QuantizationError(f"{group[0]}: {error}; use more or other calibration text") from error

    def _prepare(self, names: list[str], hessian: Tensor, group_size: int, costs: Costs) -> Prepared:
        try:
            prepared = prepare(hessian, self.config, group_size, costs)
        except NotPositiveDefinite as error:
            raise QuantizationError(f"{names[0]}: {error}; use more or other calibration text") from error
        except ValueError as error:
            raise QuantizationError(f"{names[0]}: {error}; {self._overflow_hint()}") from error
        if prepared.damp_percent != self.config.damp_percent:
            logger.warning(
                "%s: the Hessian was not positive definite, damping raised from %g to %g",
                ", ".join(names),
                self.config.damp_percent,
                prepared.damp_percent,
            )
        return prepared
