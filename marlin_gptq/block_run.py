"""The blocks of one quantization, one after the other: quantized (block_solver.py), or taken from the work directory.

Then the samples pass the quantized block, and are the inputs of the next one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from marlin_gptq.block_solver import BlockSolver
from marlin_gptq.checkpoint_writer import CheckpointWriter
from marlin_gptq.errors import InputError
from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.blocks import return_free_memory
from marlin_gptq.modeling.install import install_block
from marlin_gptq.modeling.output_gradients import output_gradients
from marlin_gptq.modeling.packed import Packed, make_of
from marlin_gptq.modeling.staged import advance
from marlin_gptq.modeling.trial import require_running
from marlin_gptq.report import BlockRecord, LinearRecord, ProgressEvent
from marlin_gptq.run_state import RunState
from marlin_gptq.work_directory import WorkDirectory


@dataclass(kw_only=True)
class BlockRun(RunState):
    """A quantization on its way through the blocks.

    work  where finished blocks are kept; in the first process of the team only.
    """

    work: WorkDirectory | None
    _makes: set[Hashable] = field(default_factory=set)

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

    def take_gradients(self, hidden: Activations, chosen: Mapping[int, int]) -> None:
        """Those of the loss by all blocks' outputs, from block 0's inputs, for the samples `chosen` (position → seed).

        They wait where the plan keeps activations, but never on a GPU, for there are two sets for every block."""
        place = "host" if self.plan.place == "device" and self.stream.device.type == "cuda" else self.plan.place
        tracked = self.team.from_leader(self.work is not None)

        def make(shapes: list[tuple[int, int]], dtype: torch.dtype) -> Activations:
            return self._activations(shapes, dtype, place, tracked)

        def tell(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(ProgressEvent("gradients", 0, self.stream.n_blocks, None, done, total, None))

        self.gradients = output_gradients(self.stream, hidden, chosen, make, tell)

    def _activations(
        self,
        shapes: list[tuple[int, int]],
        dtype: torch.dtype | None = None,
        place: str | None = None,
        tracked: bool | None = None,
    ) -> Activations:
        return Activations(
            shapes,
            self.stream.config.hidden_size,
            dtype or self.stream.dtype,
            self.stream.device,
            place=place or self.plan.place,
            directory=self.disk,
            tracked=self.team.from_leader(self.work is not None) if tracked is None else tracked,
        )

    def copy_outer(self, writer: CheckpointWriter) -> None:
        """Write the tensors outside the blocks as they are."""
        for name, tensor in self.stream.weights.outer_tensors():
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
            solver: BlockSolver | None = None
            first_of_make = self._first_of_make(index, linears)
            tensors = self._finished_before(index, block, linears, digest, samples.packs)
            if tensors is None:
                first = len(self.records)
                solver = BlockSolver(self, index, block, linears, samples)
                tensors = solver.quantize()
                if first_of_make:
                    self._try(index, solver, tensors, hidden)
                if self.work is not None and digest is not None:
                    record = {
                        "linears": [asdict(linear) for linear in self.records[first:]],
                        "tuned": [asdict(block) for block in self.tuned if block.block == index],
                    }
                    with self.costs.measure("keep"):
                        self.work.put(step_name(index), digest, tensors, record)
            if index + 1 < self.stream.n_blocks:
                with self.costs.measure("propagate"), self.within_range(index):
                    advance(self.stream, index, samples if solver is None else solver.arriving)
            return tensors

    def _first_of_make(self, index: int, linears: dict[str, nn.Linear]) -> bool:
        """Whether no block like this one, with the same linears to quantize, came before."""
        prefix = f"{self.stream.block_name(index)}."
        sizes = tuple((name.removeprefix(prefix), self.config.group_size_of(name)) for name in linears)
        make = make_of(self.stream.block_module(index)), sizes
        known = make in self._makes
        self._makes.add(make)
        return not known

    def _try(self, index: int, solver: BlockSolver, tensors: dict[str, Tensor], hidden: Activations) -> None:
        """Run the block as it was packed, on a few tokens, before hours go into others like it."""
        if self.config.method == "rtn":
            solver.replace_weights(solver.linears)
        sizes = {name: self.config.group_size_of(name) for name in solver.linears}
        with self.costs.measure("try packed blocks"):
            sample = hidden[0] if len(hidden) else None
            require_running(self.stream, index, solver.linears, tensors, sizes, sample)

    def _packs(self, index: int, hidden: Activations) -> list[range]:
        """The samples that pass the block together; alone where each sample's median limits its tokens' weights."""
        return self.stream.packs(index, hidden.shapes, 0 if self.config.token_cap > 0 else self.plan.pack_tokens)

    def _digest(self, hidden: Activations) -> str | None:
        """Of all that a block's result depends on beside its weights; None if no work directory asks for it."""
        if not hidden.tracked:
            return None
        beside = [kept.digest() for kept in (self.full, self.gradients) if kept is not None]
        return self.team.digest("".join([hidden.digest(), *beside]))

    def _finished_before(
        self, index: int, block: nn.Module, linears: dict[str, nn.Linear], digest: str | None, packs: list[range]
    ) -> dict[str, Tensor] | None:
        if digest is None:
            return None
        step = self.team.from_leader(None if self.work is None else self.work.get(step_name(index), digest))
        if step is None:
            return None
        if self.full is not None and index + 1 < self.stream.n_blocks:
            self.advance_full(index, Packed(self.full, packs))
        sizes = {name: self.config.group_size_of(name) for name in linears}
        install_block(block, self.stream.block_name(index), linears, step.tensors, sizes)
        for record in step.record["linears"]:
            self.records.append(LinearRecord(**record))
            self.report("resume", index, self.records[-1].name, self.records[-1].relative_error)
        self.tuned += [BlockRecord(**record) for record in step.record["tuned"]]
        return step.tensors


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def step_name(index: int) -> str:
    """What the work directory calls a block."""
    return f"block-{index:05d}"
