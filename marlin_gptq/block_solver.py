"""One block, quantized: its linears calibrated, solved, tuned if the recipe says so, and packed.

Of a block, in the order things happen:
    sum the Hessian of each distinct input of its linears over all samples    (modeling/observe.py)
    solve each group of linears that share an input                           (group_solver.py)
    if the recipe says so, tune what was solved by gradient                   (tuning/block.py)
    pack what came of it                                                      (modeling/linear.py)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from marlin_gptq.distributed import share_out
from marlin_gptq.errors import QuantizationError
from marlin_gptq.estimates import beside_bytes, hessian_passes, side_by_side
from marlin_gptq.group_solver import GroupSolver, Solved
from marlin_gptq.job import Job
from marlin_gptq.modeling.linear import pack
from marlin_gptq.modeling.observe import (
    Calibrated,
    Groups,
    collect_hessians,
    collect_with_cross,
    full_precision,
    stages,
)
from marlin_gptq.modeling.output_gradients import output_hessians
from marlin_gptq.modeling.packed import Packed
from marlin_gptq.modeling.staged import Staged
from marlin_gptq.modeling.staging import staging
from marlin_gptq.quantization.hessian import Cross
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group
from marlin_gptq.report import rescaled
from marlin_gptq.run_state import RunState
from marlin_gptq.tuning.block import summary, tune_block

logger = logging.getLogger(__name__)
# Bytes of a batch of solves from which on torch's unused memory is given back before: it takes milliseconds.
_MUCH = 6_000_000_000


@dataclass
class BlockSolver:
    """Quantizes one block of a run, which must have been entered.

    linears    those to quantize, by full name.
    samples    the block's inputs.
    originals  weights from before, by full name, where they are needed once more.
    parts      codes and scales of what is solved.
    arriving   the samples as they pass: in stages, or from the block's start every time; `advance` takes them on.
    exact      those after full-precision blocks, if the run has them; with correct_target they pass in the same way.
               None once they are through.
    outputs    with two_sided M of each linear.
    """

    run: RunState
    index: int
    block: nn.Module
    linears: dict[str, nn.Linear]
    samples: Packed
    originals: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, QuantizedWeight] = field(default_factory=dict)
    # Of the pass that is being solved: how its inputs differ from those of the full-precision stream.
    crosses: dict[str, Cross] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    arriving: Packed | Staged = field(init=False)
    exact: Packed | Staged | None = field(init=False)

    def __post_init__(self) -> None:
        self.arriving = self.samples
        self.exact = None if self.run.full is None else Packed(self.run.full, self.samples.packs)

    def quantize(self) -> dict[str, Tensor]:
        """The block's tensors as they are to be written, by the names the model has for them.

        The block has its quantized weights then, dequantized, but for method rtn.
        """
        run, config = self.run, self.run.config
        run.report("calibrate", self.index, None, None)
        if run.full is not None or config.tunes_blocks:
            self.originals = {name: linear.weight.data for name, linear in self.linears.items()}
        with run.within_range(self.index):
            self._calibrate_and_solve()
        if config.tunes_blocks and self.linears:
            self.arriving = self.samples  # what else was kept is of the block as it is now, and takes memory
            self._tune()
        return self._tensors()

    def _calibrate_and_solve(self) -> None:
        """Stage by stage, the block's linears; then the full-precision stream, if there is one, goes on."""
        run, config = self.run, self.run.config
        if config.method == "rtn":
            self._solve([[name] for name in self.linears], Calibrated({}))
        elif self.linears:
            in_order = stages(run.stream, self.index, self.linears, self.samples.activations[0])
            together = [[group for groups in in_order for group in groups]]
            if run.gradients is not None:
                with run.costs.measure("gradients"):
                    self.outputs = output_hessians(run.stream, self.index, self.linears, run.gradients, run.team.add_up)
                    run.gradients.drop(self.index)
                    self._require_numbers()
            if config.true_sequential:
                self._begin_stages(in_order)
            for stage in in_order if config.true_sequential else together:
                self._solve_stage(stage)
            self.outputs.clear()
        if config.tunes_blocks:
            self.arriving = self.samples  # what else was kept is of the block as it is now, and takes memory
        with full_precision({name: self.linears[name] for name in self.originals}, self.originals):
            run.advance_full(self.index, self.exact)

    def _require_numbers(self) -> None:
        usable = {name: torch.isfinite(output).all() for name, output in self.outputs.items()}
        if usable and not bool(torch.stack(list(usable.values())).all()):
            broken = ", ".join(name for name, is_usable in usable.items() if not is_usable)
            or_else = " or, where activations pass its range, --dtype bfloat16"
            hint = f"use --no-two-sided{or_else if self.run.target == torch.float16 else ''}"
            raise QuantizationError(f"{broken}: the gradients of its outputs hold NaN or Inf; {hint}")

    def _begin_stages(self, in_order: list[Groups]) -> None:
        """From here on each pass goes on from the one before, where there is memory for what that keeps.

        Where activations wait in host memory or a file there is none: to bring it from there takes as long as to
        compute it anew. The bits are the same either way.
        """
        if not self.run.plan.staged:
            return
        states = self.samples.activations
        longest = max(range(len(states)), key=lambda position: states.shapes[position][1])
        found = staging(self.run.stream, self.index, in_order, states[longest])
        if found is None:
            self.run.tell_unstaged(self.index)
            return
        self.arriving = found.of(self.run.stream, self.index, self.samples)
        if self.run.config.correct_target and isinstance(self.exact, Packed):
            self.exact = found.of(self.run.stream, self.index, self.exact)

    def _solve_stage(self, stage: Groups) -> None:
        """Calibrate and solve these groups, and put what came of it into the block."""
        solved: list[str] = []
        passes = self._passes(stage)
        for number, groups in enumerate(passes, 1):
            found = self._calibrate(groups, not self.run.config.true_sequential and number == len(passes))
            self._solve(groups, found)
            solved += [name for group in groups for name in group]
        self.replace_weights(solved)  # now, not earlier, so that every pass of a stage sees the same
        for samples in (self.arriving, self.exact):
            if isinstance(samples, Staged):
                samples.go_on()

    def _passes(self, stage: Groups) -> list[Groups]:
        """The groups of a stage in as many passes as their Hessians' memory asks for."""
        by_name = {group[0]: group for group in stage}
        sizes = [(name, self.linears[name].in_features) for name in by_name]
        return [[by_name[name] for name in names] for names in hessian_passes(sizes, self.run.plan.hessian_bytes)]

    def _calibrate(self, groups: Groups, last: bool) -> Calibrated:
        """last: no other pass of the full-precision stream through this block is to come."""
        run = self.run
        weighing = run.config.token_cap, run.config.equal_samples
        if self.exact is None or not run.config.correct_target:
            with run.costs.measure("hessians"):
                found = collect_hessians(
                    run.stream, self.index, groups, self.linears, self.arriving, run.team.add_up, *weighing
                )  # fmt: skip
            self._warn_of_starved(found)
            return found
        finish = last and isinstance(self.exact, Packed) and run.full_goes_on(self.index)
        with run.costs.measure("hessians and corrections"):
            found, self.crosses = collect_with_cross(
                run.stream, self.index, groups, self.linears, self.originals, self.arriving, self.exact,
                run.team.add_up, *weighing, finish,
            )  # fmt: skip
        if finish:
            self.exact = None
        return found

    def _solve(self, groups: Groups, calibrated: Calibrated) -> None:
        """Solve the groups, each in one process of the team, and note their codes, scales and records in all."""
        run = self.run
        owners = share_out([_cost(group, self.linears) for group in groups], run.team.size)
        own = [group for group, owner in zip(groups, owners, strict=True) if owner == run.team.rank]
        solver = GroupSolver(
            self.index, self.linears, calibrated, self.crosses, self.outputs, run.config, run.target, run.plan.rows,
            run.costs, self._told,
        )  # fmt: skip
        solved: dict[str, Solved] = {}
        job = Job.of(run.config, 0, 0, 2, 0)
        shapes = [(group, _shape(group, self.linears)) for group in own]
        for together in side_by_side(shapes, run.plan.side_by_side, job):
            self._make_room(sum(beside_bytes(_shape(group, self.linears), job) for group in together))
            solved |= solver.solve(together)
        run.solved = 0
        for group, owner in zip(groups, owners, strict=True):
            own_parts, records = solved.pop(group[0], ({}, []))
            run.records += run.team.object_from(owner, records)
            for name in group:
                self.parts[name] = self._part_from(owner, own_parts.get(name), name)

    def _part_from(self, owner: int, part: QuantizedWeight | None, name: str) -> QuantizedWeight:
        run, linear = self.run, self.linears[name]
        group_size = run.config.group_size_of(name)
        if part is None:
            groups = linear.in_features // columns_per_group(linear.in_features, group_size)
            codes = torch.empty(linear.weight.shape, dtype=torch.uint8, device=linear.weight.device)
            scales = torch.empty(linear.out_features, groups, dtype=run.target, device=linear.weight.device)
            part = QuantizedWeight(codes, scales, None, group_size)
        codes, scales = (run.team.tensor_from(owner, tensor) for tensor in (part.codes, part.scales))
        return QuantizedWeight(codes, scales, None, group_size)

    def replace_weights(self, names: Iterable[str]) -> None:
        """Give these linears, which are solved, their quantized weights, dequantized."""
        for name in names:
            linear = self.linears[name]
            weight = self.parts[name].dequantize().to(linear.weight.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def _tune(self) -> None:
        """Tune the block by itself; if that helped, `parts`, the block's weights and its records are the tuned ones."""
        run, steps = self.run, self.run.config.tune_block_steps
        assert run.full is not None
        with run.costs.measure("tune blocks"):
            tuned = tune_block(
                run.stream, self.index, self.originals, self.parts, self.samples.activations, run.full, run.config,
                run.target,
                progress=lambda step: run.report(
                    "tune block", self.index, None, None, f"tuning, step {step} of {steps}"
                ),
                together=run.plan.tuned_tokens, team=run.team,
            )  # fmt: skip
        run.tuned.append(tuned.record)
        run.report("tune block", self.index, None, tuned.record.error_after, summary(tuned.record))
        if not tuned.record.kept:
            return
        self.parts |= tuned.parts
        for name, weight in tuned.norms.items():
            self.block.get_parameter(name).data.copy_(weight)
        self.replace_weights(self.parts)
        run.records = [rescaled(one, self.parts[one.name]) if one.name in self.parts else one for one in run.records]

    def _tensors(self) -> dict[str, Tensor]:
        packed: dict[str, Tensor] = {}
        with self.run.costs.measure("pack"):
            for name, part in self.parts.items():
                packed[f"{name}.qweight"], packed[f"{name}.scales"] = pack(part)
        prefix, weights = self.run.stream.block_name(self.index), self.run.stream.weights
        buffers = {f"{prefix}.{own}" for own, _ in self.block.named_buffers()}
        kept = {
            name: weights.as_stored(name) if name in buffers else self.run.stored(name, tensor)
            for name, tensor in ((f"{prefix}.{own}", tensor) for own, tensor in self.block.state_dict().items())
            if name.removesuffix(".weight") not in self.linears
        }
        return kept | packed

    def _make_room(self, size: int) -> None:
        """Before work on gigabytes: what torch keeps for the next forward would stand beside it, in other pieces."""
        if size > _MUCH and self.run.stream.device.type == "cuda":
            torch.cuda.empty_cache()

    def _told(self, name: str, error: float) -> None:
        self.run.solved += 1
        self.run.report("quantize", self.index, name, error)

    def _warn_of_starved(self, found: Calibrated) -> None:
        if found.filled and self.run.team.leads:
            few = ", ".join(f"{name} {found.tokens[name]}" for name in sorted(found.filled)[:4])
            logger.warning(
                "%d of %d groups of linears are experts' that saw fewer tokens than they have input features (%s%s): "
                "other tokens of their layer fill their Hessians up; more calibration text helps",
                len(found.filled),
                len(found.hessians),
                few,
                ", …" if len(found.filled) > 4 else "",
            )


def _cost(group: list[str], linears: dict[str, nn.Linear]) -> float:
    """Of solving a group, in multiplications: its factor, and the search and updates of its rows."""
    rows, features = _shape(group, linears)
    return 2 * features**3 + rows * features * (features / 2 + 10_000)


def _shape(group: list[str], linears: dict[str, nn.Linear]) -> tuple[int, int]:
    """Of the weight of a group, its linears stacked: (out_features, in_features)."""
    return sum(linears[name].out_features for name in group), linears[group[0]].in_features
