"""What the linears of a block see when calibration samples pass: which share an input, and its Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from marlin_gptq.errors import InputError
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.experts import Enough, Experts, expert_lists
from marlin_gptq.modeling.packed import Packed
from marlin_gptq.modeling.sample_weights import SampleWeights
from marlin_gptq.modeling.staged import Staged, enough
from marlin_gptq.quantization.hessian import Cross, Hessian

Groups = list[list[str]]
# Full name of an expert's linear → its list, its number, whether it is the down projection.
ExpertLinears = dict[str, tuple[Experts, int, bool]]
# Hidden states [B, T, hidden_size] and, of a pack, the lengths of its samples: as `BlockStream.run` takes them. Or the
# samples on their way through the block.
Samples = Iterable[tuple[Tensor, tuple[int, ...]]] | Staged
AddUp = Callable[[Iterable[Hessian | Cross]], None]


@dataclass
class Calibrated:
    """Hessians of one pass, keyed by the first linear of each group.

    tokens  how many reached each group.
    filled  the experts' groups that saw fewer tokens than they have input features, and whose Hessian was filled up.
    """

    hessians: dict[str, Hessian]
    tokens: dict[str, int] = field(default_factory=dict)
    filled: set[str] = field(default_factory=set)


def stages(stream: BlockStream, index: int, linears: dict[str, nn.Linear], hidden: Tensor) -> list[Groups]:
    """The linears in the order they run, as stages of groups: a group shares its input, a stage needs the ones before.

    One forward finds out, so no architecture's names are written down. Which experts run depends on the sample:
    theirs are grouped by what they are, all gate and up projections in one stage, all down projections in the next.
    """
    experts = _expert_groups(stream.block_module(index), stream.block_name(index), linears)
    routed = {name for groups in experts for group in groups for name in group}
    dense = {name: linear for name, linear in linears.items() if name not in routed}
    shared = shared_inputs(stream, index, dense, hidden) if dense else []
    return [[group] for group in shared] + [groups for groups in experts if groups]


def shared_inputs(stream: BlockStream, index: int, linears: dict[str, nn.Linear], hidden: Tensor) -> Groups:
    """The linears in the order they run, those fed by the very same tensor together (q/k/v, gate/up).

    InputError for a linear that never runs.
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
    groups: Groups,
    linears: dict[str, nn.Linear],
    hidden: Samples,
    add_up: AddUp = lambda _: None,
    token_cap: float = 0.0,
    equal_samples: bool = False,
) -> Calibrated:
    """Run all samples through the block and sum one Hessian per group; `groups` in the order they run.

    What comes behind the inputs of the last one is left out; if all groups are experts', in every expert by itself.

    add_up     sums Hessians over the processes of a run, each of which has samples of its own.
    token_cap  limits the weight of a token by the median over its sample, see `Hessian.add`: not for packs.
    equal_samples  every sample weighs the same, instead of every token; packs or not.

    An expert that fewer tokens reached than it has input features has a singular Hessian, or none. A second pass then
    takes all tokens of its layer through it, and they fill the Hessian up to as many tokens as there are features.
    """
    hessians = {group[0]: Hessian(linears[group[0]].in_features, stream.device) for group in groups}
    experts = _experts_of(stream.block_module(index), stream.block_name(index))
    weights = SampleWeights(stream.block_module(index), experts) if equal_samples else None
    hooks = [
        linears[name].register_forward_pre_hook(_summing(h, token_cap, weights, name)) for name, h in hessians.items()
    ]
    hooks += weights.hooks if weights is not None else []
    if not experts.keys() & hessians.keys():  # which experts run, and in what order, depends on the tokens
        hooks.append(linears[groups[-1][0]].register_forward_pre_hook(enough))
    elif experts.keys() >= hessians.keys():
        hooks += _ends_of_experts(hessians, linears, experts)
    _pass(stream, index, hidden, hooks)
    add_up(hessians.values())
    found = Calibrated(hessians, {name: hessian.tokens for name, hessian in hessians.items()})
    starved = [name for name, h in hessians.items() if name in experts and h.tokens < linears[name].in_features]
    if starved:
        _fill_up(
            stream, index, {name: experts[name] for name in starved}, found, hidden, add_up, token_cap, equal_samples
        )
    return found


def _fill_up(
    stream: BlockStream,
    index: int,
    starved: ExpertLinears,
    found: Calibrated,
    hidden: Samples,
    add_up: AddUp,
    token_cap: float,
    equal_samples: bool,
) -> None:
    """Hessians of the whole layer's tokens, for the gate and up projections one for all, for each down its own."""
    layer: dict[int, Hessian] = {}
    own: dict[str, Hessian] = {}
    weights = SampleWeights(stream.block_module(index), {}) if equal_samples else None  # of all tokens, as they come
    hooks = list(weights.hooks) if weights is not None else []
    for name, (experts, number, down) in starved.items():
        features = found.hessians[name].sum.shape[0]
        if down:
            own[name] = Hessian(features, stream.device)
            summing = _summing(own[name], token_cap, weights, image=experts[number].inner)
            hooks.append(experts.register_forward_pre_hook(summing))
        else:
            if id(experts) not in layer:
                layer[id(experts)] = Hessian(features, stream.device)
                hooks.append(experts.register_forward_pre_hook(_summing(layer[id(experts)], token_cap, weights)))
            own[name] = layer[id(experts)]
    if len(lists := {id(experts): experts for experts, _, _ in starved.values()}) == 1:
        hooks += [experts.register_forward_pre_hook(enough) for experts in lists.values()]
    _pass(stream, index, hidden, hooks)
    add_up({id(prior): prior for prior in own.values()}.values())
    for name, prior in own.items():
        found.hessians[name].fill_up(prior, len(prior.sum))
        found.filled.add(name)


def _summing(
    hessian: Hessian,
    token_cap: float,
    weights: SampleWeights | None,
    name: str = "",
    image: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[nn.Module, tuple], None]:
    def hook(_: nn.Module, args: tuple) -> None:
        inputs = args[0] if image is None else image(args[0])
        hessian.add(inputs, token_cap, None if weights is None else weights.of(name, inputs))

    return hook


def _ends_of_experts(names: Iterable[str], linears: dict[str, nn.Linear], experts: ExpertLinears) -> list:
    """Hooks that end each expert before the last one of these linears, and the block behind its experts."""
    lists = {id(owner): owner for owner, _, _ in experts.values()}
    if len(lists) > 1:
        return []
    (owner,) = lists.values()
    last: dict[int, nn.Module] = {number: owner[number] for number in range(len(owner))}
    for name in sorted(names, key=lambda name: experts[name][2]):  # an expert's down projection behind the others
        last[experts[name][1]] = linears[name]
    return [module.register_forward_pre_hook(enough) for module in last.values()] + [
        owner.register_forward_hook(enough)
    ]


def _runs(stream: BlockStream, index: int, hidden: Samples) -> Iterable[Callable[[], Tensor]]:
    """What runs the block on the samples, one pack after the other."""
    if isinstance(hidden, Staged):
        return hidden
    return (partial(stream.run, index, sample.to(stream.device), lengths) for sample, lengths in hidden)


def _pass(stream: BlockStream, index: int, hidden: Samples, hooks: list) -> None:
    try:
        for run in _runs(stream, index, hidden):
            with suppress(Enough):
                run()
    finally:
        for hook in hooks:
            hook.remove()


def _experts_of(block: nn.Module, prefix: str) -> ExpertLinears:
    return {
        f"{prefix}.{name}.{number}.{own}": (experts, number, own == experts[number].names[2])
        for name, experts in expert_lists(block).items()
        for number in range(len(experts))
        for own in experts[number].names
    }


def _expert_groups(block: nn.Module, prefix: str, linears: dict[str, nn.Linear]) -> tuple[Groups, Groups]:
    """(gate and up of each expert, down of each expert), as far as they are among `linears`."""
    pairs: dict[tuple[int, int], list[str]] = {}
    downs: Groups = []
    for name, (experts, number, down) in _experts_of(block, prefix).items():
        if name in linears:
            if down:
                downs.append([name])
            else:
                pairs.setdefault((id(experts), number), []).append(name)
    return list(pairs.values()), downs


def collect_with_cross(
    stream: BlockStream,
    index: int,
    groups: Groups,
    linears: dict[str, nn.Linear],
    originals: dict[str, Tensor],
    hidden: Samples,
    full: Samples,
    add_up: AddUp = lambda _: None,
    token_cap: float = 0.0,
    equal_samples: bool = False,
    finish: bool = False,
) -> tuple[Calibrated, dict[str, Cross]]:
    """As `collect_hessians`, and for each group how its inputs differ from those of the full-precision model.

    groups        in the order they run, none of them experts'.
    hidden, full  the block's inputs after quantized and after full-precision blocks, the same samples at a time.
    originals     the block's weights before any of it was quantized.
    finish        `full` then becomes what the full-precision block makes of it, which saves a pass; not for what is on
                  its way in stages.
    """
    hessians = {group[0]: Hessian(linears[group[0]].in_features, stream.device) for group in groups}
    crosses = {group[0]: Cross(linears[group[0]].in_features, stream.device) for group in groups}
    last = linears[groups[-1][0]]
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda _, args: caught.__setitem__(name, args[0])

    def stopped(run: Callable[[], Tensor]) -> None:
        hook = last.register_forward_pre_hook(enough)
        try:
            with suppress(Enough):
                run()
        finally:
            hook.remove()

    def compare(wanted: dict[str, Tensor], arriving: Callable[[], Tensor]) -> None:
        stopped(arriving)
        for name, cross in crosses.items():
            inputs = caught.pop(name)
            of_tokens = None if weights is None else weights.of(name, inputs)
            hessians[name].add(inputs, token_cap, of_tokens)
            cross.add(wanted.pop(name), inputs, token_cap, of_tokens)

    hooks = [linears[name].register_forward_pre_hook(catch(name)) for name in crosses]
    weights = SampleWeights(stream.block_module(index), {}) if equal_samples else None
    hooks += weights.hooks if weights is not None else []
    runs = iter(_runs(stream, index, hidden))

    def whole(sample: Tensor, lengths: tuple[int, ...]) -> Tensor:
        with full_precision(linears, originals):
            output = stream.run(index, sample.to(stream.device), lengths)
        compare(dict(caught), next(runs))
        return output

    try:
        if finish and isinstance(full, Packed):
            full.advance(whole)
        else:
            for exact, arriving in zip(_runs(stream, index, full), runs, strict=True):
                with full_precision(linears, originals):
                    stopped(exact)
                compare(dict(caught), arriving)
    finally:
        for hook in hooks:
            hook.remove()
    add_up([*hessians.values(), *crosses.values()])
    return Calibrated(hessians, {name: hessian.tokens for name, hessian in hessians.items()}), crosses


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
