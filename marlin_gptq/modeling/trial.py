"""A packed block, run once before hours are spent on the others: does it run, and does each linear compute its weight?

A model may read a linear's weight by itself, which a packed one does not have; no architecture is known here, so it is
tried. Nothing is left behind in the block, and no random state is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marlin_gptq.errors import MarlinGPTQError, QuantizationError
from marlin_gptq.modeling.architecture import set_module
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.linear import MarlinLinear

# Of a sample, for the trial.
TOKENS = 16
# Relative distance between outputs of a packed linear and those of its dequantized weight; bfloat16's rounding: 0.005.
_ALLOWED = 0.1
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


@torch.no_grad()
def require_running(
    stream: BlockStream,
    index: int,
    linears: Mapping[str, nn.Linear],
    tensors: Mapping[str, Tensor],
    group_sizes: Mapping[str, int],
    hidden: Tensor | None,
) -> None:
    """QuantizationError naming a linear with which block `index`, entered, does not run or goes wrong when packed.

    linears  those that were quantized, by full name, which must have their quantized weights, dequantized.
    tensors  the block's, as they are to be written; group_sizes of the linears.
    hidden   [B, T, hidden_size] to try it with, of which few tokens are taken; None takes random ones.
    """
    if hidden is None:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, TOKENS, stream.config.hidden_size, generator=generator)
    sample = hidden[:1, :TOKENS].to(stream.device, stream.dtype)
    layers = {name: _layer(name, linear, tensors, group_sizes[name]) for name, linear in linears.items()}
    failure = _failure(stream, index, linears, layers, sample)
    if failure is None:
        return
    alone = {name: _failure(stream, index, linears, {name: layer}, sample) for name, layer in layers.items()}
    name = next((name for name, found in alone.items() if found), stream.block_name(index))
    own = re.escape(name.removeprefix(f"{stream.block_name(index)}.")).replace("\\-", "-")
    raise QuantizationError(
        f"{name}: {alone.get(name) or failure} once it is packed, so that the result would not work; --skip '{own}' "
        "leaves it in full precision"
    )


def _failure(
    stream: BlockStream,
    index: int,
    linears: Mapping[str, nn.Linear],
    layers: Mapping[str, MarlinLinear],
    sample: Tensor,
) -> str | None:
    """What goes wrong with these layers in the place of their linears."""
    apart: dict[str, Tensor] = {}
    with _in_place(stream, index, layers), ExitStack() as entered:
        for name, layer in layers.items():
            entered.callback(layer.register_forward_hook(_comparing(linears[name], name, apart)).remove)
        try:
            stream.run(index, sample)
        except (MarlinGPTQError, torch.OutOfMemoryError):
            raise
        except _FAILURES as error:
            return f"the model does not run ({' '.join(str(error).split()) or type(error).__name__})"
    distances = torch.stack(list(apart.values())).tolist() if apart else []
    wrong = [distance for distance in distances if not distance <= _ALLOWED]
    return f"its outputs are {max(wrong):.2g} (relative) away from those of its dequantized weight" if wrong else None


def _comparing(
    linear: nn.Linear, name: str, apart: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        wanted = F.linear(args[0], linear.weight, linear.bias).float()
        far = (output.float() - wanted).norm()
        usable = torch.isfinite(wanted).all() & (far > 0)  # what overflows without the packed layer is not its fault
        apart[name] = torch.where(usable, far / wanted.norm(), 0.0)

    return hook


def _layer(name: str, linear: nn.Linear, tensors: Mapping[str, Tensor], group_size: int) -> MarlinLinear:
    scales = tensors[f"{name}.scales"]
    layer = MarlinLinear(
        linear.in_features,
        linear.out_features,
        group_size,
        bias=linear.bias is not None,
        dtype=scales.dtype,
        device="meta",
    )
    held = ("qweight", "scales", "bias") if linear.bias is not None else ("qweight", "scales")
    for own in held:
        setattr(layer, own, tensors[f"{name}.{own}"].to(linear.weight.device))
    layer.prepare_for_device()
    return layer.eval()


@contextmanager
def _in_place(stream: BlockStream, index: int, layers: Mapping[str, MarlinLinear]) -> Iterator[None]:
    """Inside, the layers stand where their linears stood."""
    block, prefix = stream.block_module(index), f"{stream.block_name(index)}."
    own = {name: name.removeprefix(prefix) for name in layers}
    linears = {name: block.get_submodule(own[name]) for name in layers}
    try:
        for name, layer in layers.items():
            set_module(block, own[name], layer)
        yield
    finally:
        for name, linear in linears.items():
            set_module(block, own[name], linear)
