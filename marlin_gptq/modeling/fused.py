"""Projections of one input as one layer: q/k/v and gate/up, fused when a model is loaded.

One launch over three times the output channels reads the same weights in less time than three launches, each of
which fills the GPU only for a moment. The Marlin layout keeps 64 output channels together, so fusing is a
concatenation and splitting a slice, bit for bit; on disk and in the state dict the projections stay what they were.

transformers' own forward still calls q_proj, k_proj and v_proj one after the other. Each has a `Projection` in its
place: the first that is called runs the fused layer, the others take their columns of the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.formats.marlin import TILE_N
from marlin_gptq.modeling.linear import MarlinLinear, linear

# Beside each other in one module and fed by one tensor, in every architecture that names them so. That they are is
# not taken on trust: a projection called with another tensor gets a result of its own.
FUSED = {"fused_qkv_proj": ("q_proj", "k_proj", "v_proj"), "fused_gate_up_proj": ("gate_proj", "up_proj")}


class FusedLinear(MarlinLinear):
    """Several MarlinLinear layers of one input, their output channels one after the other.

    Its tensors stand in the state dict under the names of the projections, not under its own.
    """

    # (input, its version, output, the projections that took their columns): from the first call for an input until
    # all have come. One tuple, written at once: a thread sees one state or the other, never half of each.
    _held: tuple[Tensor, int, Tensor, frozenset[str]] | None = None

    @classmethod
    def of(cls, layers: list[MarlinLinear]) -> FusedLinear:
        """Layers that `can_fuse` accepts."""
        first = layers[0]
        fused = cls(
            first.in_features,
            sum(layer.out_features for layer in layers),
            first.group_size,
            bias=first.bias is not None,
            symmetric=first.qzeros is None,
            dtype=first.scales.dtype,
            device="meta",
        )
        parts = [layer.tensors() for layer in layers]
        for name in parts[0]:
            setattr(fused, name, torch.cat([part[name] for part in parts], dim=-1))
        return fused.train(first.training)

    def columns_of(self, x: Tensor, name: str, start: int, stop: int, names: frozenset[str]) -> Tensor:
        """Output channels start … stop − 1 for x [..., in_features], a view; `names` are all that will ask."""
        version, held = _version(x), self._held
        if held is not None and held[0] is x and held[1] == version and not _asks_anew(held[2], x, name in held[3]):
            y, taken = held[2], held[3] | {name}
        else:
            y, taken = self(x), frozenset((name,))
        self._held = None if taken == names else (x, version, y, taken)
        return y[..., start:stop]

    def slice(self, start: int, stop: int) -> dict[str, Tensor]:
        """MarlinLinear.tensors of the output channels start … stop − 1 (multiples of 64), contiguous copies."""
        found = {}
        for name, tensor in self.tensors().items():
            first, last = self.columns(tensor, start, stop)
            found[name] = tensor[..., first:last].clone(memory_format=torch.contiguous_format)
        return found

    def columns(self, tensor: Tensor, start: int, stop: int) -> tuple[int, int]:
        """Where the output channels start … stop − 1 lie in the last axis of one of `tensors`."""
        width = tensor.shape[-1]
        return start * width // self.out_features, stop * width // self.out_features

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the projections do."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing: the projections do."""


class Projection(nn.Module):
    """Stands where a MarlinLinear stood whose channels a FusedLinear now computes."""

    def __init__(self, fused: FusedLinear, name: str, start: int, stop: int, names: frozenset[str]) -> None:
        super().__init__()
        self.__dict__["fused"] = fused  # a child of the parent module, not of this one
        self.name, self.start, self.stop, self.names = name, start, stop, names
        self.in_features, self.out_features, self.group_size = fused.in_features, stop - start, fused.group_size
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        """As MarlinLinear.forward; on CUDA a view of the fused result."""
        fused: FusedLinear = self.__dict__["fused"]
        if self.together(x):
            return fused.columns_of(x, self.name, self.start, self.stop, self.names)
        # Off the GPU there is nothing to gain, and alone every sum is the one of the layer that was: bit for bit.
        dense = None if fused._dense is None else fused._dense[self.start : self.stop]
        tensors = self.tensors()
        return linear(x, tensors, tensors.get("bias"), self.group_size, self.in_features, self.out_features, dense)

    def together(self, x: Tensor) -> bool:
        """Whether the fused layer runs for this input."""
        return x.is_cuda

    def tensors(self) -> dict[str, Tensor]:
        """As MarlinLinear.tensors, copies."""
        return self.__dict__["fused"].slice(self.start, self.stop)

    def layer(self) -> MarlinLinear:
        """The MarlinLinear that stood here, with tensors of its own in the layout of the file."""
        tensors = self.tensors()
        layer = MarlinLinear(
            self.in_features,
            self.out_features,
            self.group_size,
            bias="bias" in tensors,
            symmetric="qzeros" not in tensors,
            device="meta",
        )
        for name, tensor in tensors.items():
            setattr(layer, name, tensor)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, channels {self.start} … of the fused"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({f"{prefix}{name}": tensor for name, tensor in self.tensors().items()})

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        layer = self.layer()
        own = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        layer._load_from_state_dict(state_dict, prefix, *own)
        fused: FusedLinear = self.__dict__["fused"]
        fused.restore_stored_layout()
        whole = fused.tensors()
        for name, tensor in layer.tensors().items():
            first, last = fused.columns(whole[name], self.start, self.stop)
            whole[name][..., first:last] = tensor
        fused.hold_dense(fused._dense is not None)
        fused.prepare_for_device()


def fuse_projections(model: nn.Module) -> list[str]:
    """Fuse q/k/v and gate/up wherever they are quantized alike; returns the names of the fused layers.

    Projections that differ (one left in full precision, another group size, a bias on some, a number of output
    channels that is no multiple of 64), and those of a model that accelerate spreads over devices, stay as they are.
    Fusing again changes nothing.
    """
    fused_names = []
    for parent_name, parent in list(model.named_modules()):
        for fused_name, names in FUSED.items():
            layers = [getattr(parent, name, None) for name in names]
            if not can_fuse(layers):
                continue
            fused = FusedLinear.of(layers)  # type: ignore[arg-type]  # can_fuse has looked
            parent.add_module(fused_name, fused)
            start = 0
            for name, layer in zip(names, layers, strict=True):
                stop = start + layer.out_features  # type: ignore[union-attr]
                setattr(parent, name, Projection(fused, name, start, stop, frozenset(names)))
                start = stop
            fused_names.append(f"{parent_name}.{fused_name}" if parent_name else fused_name)
    return fused_names


def split_projections(model: nn.Module) -> None:
    """Undo `fuse_projections`: every projection is a MarlinLinear of its own again, bit for bit."""
    for parent in list(model.modules()):
        for fused_name, names in FUSED.items():
            if not isinstance(getattr(parent, fused_name, None), FusedLinear):
                continue
            for name in names:
                setattr(parent, name, getattr(parent, name).layer())
            delattr(parent, fused_name)
            for name in names:
                getattr(parent, name).prepare_for_device()


def can_fuse(layers: list[Any]) -> bool:
    """Whether these are MarlinLinear layers that differ in nothing but their output channels.

    Layers with act-order groups that moved stay apart: each gathers its input for itself.
    """
    if not all(type(layer) is MarlinLinear and layer.input_order is None for layer in layers):
        return False
    kinds = {
        (
            layer.in_features,
            layer.group_size,
            layer.training,
            *((name, tensor.dtype, tensor.device, tensor.shape[:-1]) for name, tensor in layer.tensors().items()),
        )
        for layer in layers
    }
    whole = all(layer.out_features % TILE_N == 0 for layer in layers)
    spread = any(getattr(layer, "_hf_hook", None) is not None for layer in layers)
    return len(kinds) == 1 and whole and not spread and next(layers[0].buffers()).device.type != "meta"


def _asks_anew(y: Tensor, x: Tensor, again: bool) -> bool:
    """Whether gradients forbid to take y, the result for x: computed without them, or its graph may be freed by now."""
    return (torch.is_grad_enabled() and x.requires_grad) != y.requires_grad or (y.requires_grad and again)


def _version(x: Tensor) -> int:
    """Changes when x is written to, where torch counts that."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
