"""What the linears of a block see when calibration samples pass: which share an input, and its Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from marlin_gptq.errors import InputError
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.quantization.hessian import Cross, Hessian


def shared_inputs(stream: BlockStream, index: int, linears: dict[str, nn.Linear], hidden: Tensor) -> list[list[str]]:
    """The linears in the order they run, those fed by the very same tensor together (q/k/v, gate/up).

    One forward finds out, so no architecture's names are written down. InputError for a linear that never runs.
    """
    seen: list[tuple[Tensor, list[str]]] = []  # the tensors are kept, so none is taken for another

    def note(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(_: nn.Module, args: tuple) -> None:
            for tensor, names in seen:
                if tensor is args[0]:
                    names.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    hooks = [linear.register_forward_pre_hook(note(name)) for name, linear in linears.items()]
    try:
        stream.run(index, hidden.to(stream.device))
    finally:
        for hook in hooks:
            hook.remove()
    groups = [names for _, names in seen]
    missed = set(linears) - {name for names in groups for name in names}
    if missed:
        raise InputError(f"{min(missed)}: no input reached it in the block's forward; --skip leaves it alone")
    return groups


def collect_hessians(
    stream: BlockStream,
    index: int,
    groups: list[list[str]],
    linears: dict[str, nn.Linear],
    hidden: list[Tensor],
    token_cap: float = 0.0,
) -> dict[str, Hessian]:
    """Run all samples through the block and sum one Hessian per group, keyed by its first linear."""
    hessians = {group[0]: Hessian(linears[group[0]].in_features, stream.device) for group in groups}

    def summing(hessian: Hessian) -> Callable[[nn.Module, tuple], None]:
        return lambda _, args: hessian.add(args[0], token_cap)

    hooks = [linears[name].register_forward_pre_hook(summing(hessian)) for name, hessian in hessians.items()]
    try:
        for sample in hidden:
            stream.run(index, sample.to(stream.device))
    finally:
        for hook in hooks:
            hook.remove()
    return hessians


def collect_cross(
    stream: BlockStream,
    index: int,
    groups: list[list[str]],
    linears: dict[str, nn.Linear],
    originals: dict[str, Tensor],
    hidden: list[Tensor],
    full: list[Tensor],
    token_cap: float = 0.0,
) -> dict[str, Cross]:
    """For each group, keyed by its first linear, how its inputs differ from those of the full-precision model.

    hidden, full  the block's inputs after quantized and after full-precision blocks, sample by sample.
    originals     the block's weights before any of it was quantized.
    """
    crosses = {group[0]: Cross(linears[group[0]].in_features, stream.device) for group in groups}
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda _, args: caught.__setitem__(name, args[0])

    hooks = [linears[name].register_forward_pre_hook(catch(name)) for name in crosses]
    try:
        for arriving, exact in zip(hidden, full, strict=True):
            with full_precision(linears, originals):
                stream.run(index, exact.to(stream.device))
            wanted = dict(caught)
            stream.run(index, arriving.to(stream.device))
            for name, cross in crosses.items():
                cross.add(wanted[name], caught[name], token_cap)
    finally:
        for hook in hooks:
            hook.remove()
    return crosses


@contextmanager
def full_precision(linears: dict[str, nn.Linear], originals: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the linears have their weights from before the quantization."""
    quantized = {name: linear.weight for name, linear in linears.items()}
    for name, linear in linears.items():
        linear.weight = nn.Parameter(originals[name], requires_grad=False)
    try:
        yield
    finally:
        for name, linear in linears.items():
            linear.weight = quantized[name]
