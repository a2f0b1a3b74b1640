"""The blocks of one quantization, one after the other: calibrated and solved, or taken from the work directory.

Of a block, in the order things happen:
    sum the Hessian of each distinct input of its linears over all samples    (modeling/observe.py)
    solve each group of linears that share an input, and pack them            (group_solver.py)
    if the recipe says so, tune what was solved by gradient                   (tuning/block.py)
    run the samples through the quantized block: the inputs of the next one
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from marlin_gptq.checkpoint_writer import CheckpointWriter
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs
from marlin_gptq.distributed import Team, share_out
from marlin_gptq.errors import InputError
from marlin_gptq.estimates import Job, Plan, beside_bytes, hessian_passes, side_by_side
from marlin_gptq.group_solver import GroupSolver, Solved
from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.architecture import require_finite
from marlin_gptq.modeling.blocks import BlockStream, return_free_memory
from marlin_gptq.modeling.install import install_block
from marlin_gptq.modeling.linear import pack
from marlin_gptq.modeling.observe import Calibrated, Groups, collect_cross, collect_hessians, full_precision, stages
from marlin_gptq.modeling.packed import Packed
from marlin_gptq.quantization.hessian import Cross
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group
from marlin_gptq.report import BlockRecord, LinearRecord, ProgressEvent, rescaled
from marlin_gptq.tuning.block import summary, tune_block
from marlin_gptq.work_directory import WorkDirectory

logger = logging.getLogger(__name__)
# Bytes of a batch of solves from which on torch's unused memory is given back before: it takes milliseconds.
_MUCH = 6_000_000_000


@dataclass
class BlockRun:
    """What every block of one quantization shares.

    stream, config   the model and the recipe; target is the dtype of the result.
    total            linears to quantize, for progress.
    work             where finished blocks are kept; in the first process of the team only.
    plan, disk       how the run keeps within its memory, and where activations go that wait in a file.
    full             with correct_target the samples after full-precision blocks, else None.
    """

    stream: BlockStream
    config: QuantizationConfig
    target: torch.dtype
    total: int
    progress: Callable[[ProgressEvent], None] | None
    work: WorkDirectory | None
    plan: Plan
    disk: Path
    team: Team
    costs: Costs
    records: list[LinearRecord] = field(default_factory=list)
    tuned: list[BlockRecord] = field(default_factory=list)
    quantized: list[tuple[nn.Linear, QuantizedWeight]] = field(default_factory=list)
    solved: int = 0
    full: Activations | None = None
    # Of the pass that is being solved: how its inputs differ from those of the full-precision stream.
    crosses: dict[str, Cross] = field(default_factory=dict)

    def report(self, stage: str, block: int, linear: str | None, error: float | None, note: str = "") -> None:
        if self.progress is not None:
            done = min(self.total, len(self.records) + self.solved * self.team.size)
            self.progress(ProgressEvent(stage, block, self.stream.n_blocks, linear, done, self.total, error, note))

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Floats in the dtype of the result; QuantizationError where they overflow it."""
        if not tensor.is_floating_point():
            return tensor
        require_finite(name, tensor, "the checkpoint is damaged")
        cast = tensor.to(self.target)
        if cast.dtype != tensor.dtype:
            require_finite(name, cast, f"they overflow {self.target}; use --dtype bfloat16")
        return cast

    def embed(self, samples: list[Tensor]) -> Activations:
        """Block 0's inputs, [B, T, hidden] each (B is 1 for documents), where the plan keeps them."""
        vocabulary = self.stream.config.vocab_size
        hidden = self._activations([(sample.numel() // sample.shape[-1], sample.shape[-1]) for sample in samples])
        for position, sample in enumerate(samples):
            if int(sample.max()) >= vocabulary or int(sample.min()) < 0:
                raise InputError(
                    f"token {int(sample.max())} is outside the model's vocabulary of {vocabulary}: the tokenizer "
                    "does not belong to this model"
                )
            hidden.put(position, self.stream.embed(sample.reshape(-1, sample.shape[-1])))
        self.stream.release()
        return_free_memory()
        return hidden

    def copied(self, hidden: Activations) -> Activations:
        """The same activations once more, in the same kind of place."""
        copy = self._activations(hidden.shapes)
        for position, inputs in enumerate(hidden):
            copy.put(position, inputs)
        return copy

    def _activations(self, shapes: list[tuple[int, int]]) -> Activations:
        return Activations(
            shapes,
            self.stream.config.hidden_size,
            self.stream.dtype,
            self.stream.device,
            place=self.plan.place,
            directory=self.disk,
            tracked=self.team.from_leader(self.work is not None),
        )

    def copy_outer(self, writer: CheckpointWriter) -> None:
        """Write the tensors outside the blocks as they are."""
        for name, tensor in self.stream.outer_parameters():
            writer.add(name, self.stored(name, tensor))
        return_free_memory()

    def block(self, index: int, names: list[str], hidden: Activations) -> dict[str, Tensor]:
        """Quantize block `index`, or take it from the work directory; `hidden` becomes the inputs of the next block.

        Returns the block's tensors as they are to be written, by the names the model has for them.
        """
        with ExitStack() as entered:
            with self.costs.measure("load"):
                block = entered.enter_context(self.stream.block(index))
            if index + 1 < self.stream.n_blocks:
                self.stream.read_ahead(index + 1)
            prefix = self.stream.block_name(index)
            linears = {name: _linear(block, name.removeprefix(f"{prefix}.")) for name in names}
            digest = self._digest(hidden)
            samples = Packed(hidden, self._packs(index, hidden))
            tensors = self._finished_before(index, block, linears, digest, samples.packs)
            if tensors is None:
                first = len(self.records)
                tensors = self._quantize_block(index, block, linears, samples)
                if self.work is not None and digest is not None:
                    record = {
                        "linears": [asdict(linear) for linear in self.records[first:]],
                        "tuned": [asdict(block) for block in self.tuned if block.block == index],
                    }
                    with self.costs.measure("keep"):
                        self.work.put(step_name(index), digest, tensors, record)
            if index + 1 < self.stream.n_blocks:
                with self.costs.measure("propagate"):
                    samples.advance(partial(self.stream.run, index))
            return tensors

    def _packs(self, index: int, hidden: Activations) -> list[range]:
        """The samples that pass the block together; alone where each sample's median limits its tokens' weights."""
        return self.stream.packs(index, hidden.shapes, 0 if self.config.token_cap > 0 else self.plan.pack_tokens)

    def _digest(self, hidden: Activations) -> str | None:
        """Of all that a block's result depends on beside its weights; None if no work directory asks for it."""
        if not hidden.tracked:
            return None
        return self.team.digest(hidden.digest() + ("" if self.full is None else self.full.digest()))

    def _finished_before(
        self, index: int, block: nn.Module, linears: dict[str, nn.Linear], digest: str | None, packs: list[range]
    ) -> dict[str, Tensor] | None:
        if digest is None:
            return None
        step = self.team.from_leader(None if self.work is None else self.work.get(step_name(index), digest))
        if step is None:
            return None
        self._advance_full(index, packs)
        sizes = {name: self.config.group_size_of(name) for name in linears}
        install_block(block, self.stream.block_name(index), linears, step.tensors, sizes)
        for record in step.record["linears"]:
            self.records.append(LinearRecord(**record))
            self.report("resume", index, self.records[-1].name, self.records[-1].relative_error)
        self.tuned += [BlockRecord(**record) for record in step.record["tuned"]]
        return step.tensors

    def _quantize_block(
        self, index: int, block: nn.Module, linears: dict[str, nn.Linear], samples: Packed
    ) -> dict[str, Tensor]:
        self.report("calibrate", index, None, None)
        parts: dict[str, QuantizedWeight] = {}
        needed = self.full is not None or self.config.tunes_blocks
        originals = {name: linear.weight.data for name, linear in linears.items()} if needed else {}
        if self.config.method == "rtn":
            self._quantize(index, [[name] for name in linears], linears, Calibrated({}), parts)
            self.quantized.clear()  # nothing runs through the block any more
        elif linears:
            in_order = stages(self.stream, index, linears, samples.activations[0])
            together = [[group for groups in in_order for group in groups]]
            for stage in in_order if self.config.true_sequential else together:
                for groups in self._passes(stage, linears):
                    found = self._calibrate(index, groups, linears, originals, samples)
                    self._quantize(index, groups, linears, found, parts)
                self._replace_weights()
        with full_precision({name: linears[name] for name in originals}, originals):
            self._advance_full(index, samples.packs)
        if self.config.tunes_blocks and linears:
            self._tune(index, linears, originals, parts, samples.activations)
        packed: dict[str, Tensor] = {}
        with self.costs.measure("pack"):
            for name, part in parts.items():
                packed[f"{name}.qweight"], packed[f"{name}.scales"] = pack(part)
        kept = {
            name: self.stored(name, tensor)
            for name, tensor in _named_tensors(block, self.stream.block_name(index))
            if name.removesuffix(".weight") not in linears
        }
        return kept | packed

    def _calibrate(
        self,
        index: int,
        groups: Groups,
        linears: dict[str, nn.Linear],
        originals: dict[str, Tensor],
        samples: Packed,
    ) -> Calibrated:
        weighing = self.config.token_cap, self.config.equal_samples
        with self.costs.measure("hessians"):
            found = collect_hessians(self.stream, index, groups, linears, samples, self.team.add_up, *weighing)
        self._warn_of_starved(found)
        if self.full is not None:
            with self.costs.measure("correct target"):
                full = Packed(self.full, samples.packs)
                self.crosses = collect_cross(
                    self.stream, index, groups, linears, originals, samples, full, self.team.add_up, *weighing
                )
        return found

    def _advance_full(self, index: int, packs: list[range]) -> None:
        """The full-precision stream through block `index`, which must have its own weights now."""
        if self.full is None or index + 1 == self.stream.n_blocks:
            return
        with self.costs.measure("correct target"):
            Packed(self.full, packs).advance(partial(self.stream.run, index))

    def _passes(self, stage: Groups, linears: dict[str, nn.Linear]) -> list[Groups]:
        """The groups of a stage in as many passes as their Hessians' memory asks for."""
        by_name = {group[0]: group for group in stage}
        sizes = [(name, linears[name].in_features) for name in by_name]
        return [[by_name[name] for name in names] for names in hessian_passes(sizes, self.plan.hessian_bytes)]

    def _replace_weights(self) -> None:
        """Quantized weights come into their block when its stage is done, so that every pass of one sees the same."""
        for linear, part in self.quantized:
            linear.weight = nn.Parameter(part.dequantize().to(linear.weight.dtype), requires_grad=False)
        self.quantized.clear()

    def _quantize(
        self,
        index: int,
        groups: Groups,
        linears: dict[str, nn.Linear],
        calibrated: Calibrated,
        parts: dict[str, QuantizedWeight],
    ) -> None:
        """Solve the groups, each in one process of the team, and note their codes, scales and records in all."""
        owners = share_out([_cost(group, linears) for group in groups], self.team.size)
        own = [group for group, owner in zip(groups, owners, strict=True) if owner == self.team.rank]
        solver = GroupSolver(
            index, linears, calibrated, self.crosses, self.config, self.target, self.plan.rows, self.costs,
            partial(self._told, index),
        )  # fmt: skip
        solved: dict[str, Solved] = {}
        job = Job.of(self.config, 0, 0, 2, 0)
        shapes = [(group, _shape(group, linears)) for group in own]
        for together in side_by_side(shapes, self.plan.side_by_side, job):
            self._make_room(sum(beside_bytes(_shape(group, linears), job) for group in together))
            solved |= solver.solve(together)
        self.solved = 0
        for group, owner in zip(groups, owners, strict=True):
            own_parts, records = solved.pop(group[0], ({}, []))
            self.records += self.team.object_from(owner, records)
            for name in group:
                parts[name] = self._part_from(owner, own_parts.get(name), name, linears[name])
                self.quantized.append((linears[name], parts[name]))

    def _tune(
        self,
        index: int,
        linears: dict[str, nn.Linear],
        originals: dict[str, Tensor],
        parts: dict[str, QuantizedWeight],
        inputs: Activations,
    ) -> None:
        """Tune the block by itself; if that helped, `parts`, the block's weights and its records are the tuned ones."""
        block, steps = self.stream.block_module(index), self.config.tune_block_steps
        with self.costs.measure("tune blocks"), full_precision(linears, originals):
            tuned = tune_block(
                self.stream, index, originals, parts, inputs, self.config, self.target,
                lambda step: self.report("tune block", index, None, None, f"tuning, step {step} of {steps}"),
                self.plan.tuned_tokens,
            )  # fmt: skip
        self.tuned.append(tuned.record)
        self.report("tune block", index, None, tuned.record.error_after, summary(tuned.record))
        if not tuned.record.kept:
            return
        parts |= tuned.parts
        for name, weight in tuned.norms.items():
            block.get_parameter(name).data.copy_(weight)
        self.quantized += [(linears[name], part) for name, part in parts.items()]
        self._replace_weights()
        self.records = [rescaled(one, parts[one.name]) if one.name in parts else one for one in self.records]

    def _make_room(self, size: int) -> None:
        """Before work on gigabytes: what torch keeps for the next forward would stand beside it, in other pieces."""
        if size > _MUCH and self.stream.device.type == "cuda":
            torch.cuda.empty_cache()

    def _told(self, index: int, name: str, error: float) -> None:
        self.solved += 1
        self.report("quantize", index, name, error)

    def _part_from(self, owner: int, part: QuantizedWeight | None, name: str, linear: nn.Linear) -> QuantizedWeight:
        group_size = self.config.group_size_of(name)
        if part is None:
            groups = linear.in_features // columns_per_group(linear.in_features, group_size)
            codes = torch.empty(linear.weight.shape, dtype=torch.uint8, device=linear.weight.device)
            scales = torch.empty(linear.out_features, groups, dtype=self.target, device=linear.weight.device)
            part = QuantizedWeight(codes, scales, None, group_size)
        codes, scales = (self.team.tensor_from(owner, tensor) for tensor in (part.codes, part.scales))
        return QuantizedWeight(codes, scales, None, group_size)

    def _warn_of_starved(self, found: Calibrated) -> None:
        if found.filled and self.team.leads:
            few = ", ".join(f"{name} {found.tokens[name]}" for name in sorted(found.filled)[:4])
            logger.warning(
                "%d of %d groups of linears are experts' that saw fewer tokens than they have input features (%s%s): "
                "other tokens of their layer fill their Hessians up; more calibration text helps",
                len(found.filled),
                len(found.hessians),
                few,
                ", …" if len(found.filled) > 4 else "",
            )


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _cost(group: list[str], linears: dict[str, nn.Linear]) -> float:
    """Of solving a group, in multiplications: its factor, and the search and updates of its rows."""
    rows, features = _shape(group, linears)
    return 2 * features**3 + rows * features * (features / 2 + 10_000)


def _shape(group: list[str], linears: dict[str, nn.Linear]) -> tuple[int, int]:
    """Of the weight of a group, its linears stacked: (out_features, in_features)."""
    return sum(linears[name].out_features for name in group), linears[group[0]].in_features


def step_name(index: int) -> str:
    """What the work directory calls a block."""
    return f"block-{index:05d}"


def _named_tensors(block: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    return [(f"{prefix}.{name}", tensor) for name, tensor in block.state_dict().items()]
