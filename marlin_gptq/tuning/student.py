"""The quantized model as a whole, with weights that gradients can move."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.errors import CheckpointError
from marlin_gptq.formats import marlin
from marlin_gptq.modeling.architecture import read_config, replace_linears, set_module
from marlin_gptq.modeling.linear import pack
from marlin_gptq.modeling.names import StoredNames
from marlin_gptq.quantization.tunable import TunableWeight
from marlin_gptq.quantization.weight import QuantizedWeight
from marlin_gptq.tuning.memory import Sizes


class TunableLinear(nn.Module):
    """y = x · Wᵀ + bias with a TunableWeight; `inputs` is one for all linears of a model."""

    def __init__(self, weight: TunableWeight, bias: Tensor | None, inputs: RoundedInputs) -> None:
        super().__init__()
        self.tunable = weight
        self.inputs = inputs
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inputs.of(x), self.tunable(), self.bias)


class RoundedInputs:
    """Activations in the dtype of autocast, rounded once for linears that share them.

    Left to autocast, q, k and v would each round their input, and each turn its gradient back into float32.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._rounded: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return x
        if self._rounded is None or self._source is None or self._source() is not x:
            self._source, self._rounded = weakref.ref(x), x.to(torch.get_autocast_dtype(kind))
        return self._rounded


class _Relative(nn.Module):
    """A norm's weight as start · (1 + shift), so that one learning rate fits weights of any size."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.start: Tensor
        self.register_buffer("start", start.clone())

    def forward(self, shift: Tensor) -> Tensor:
        return self.start * (1 + shift)

    def right_inverse(self, _: Tensor) -> Tensor:
        return torch.zeros_like(self.start)


class Student:
    """A quantized directory in float32 on one device, its scales, norm weights and, if asked, codes as parameters.

    model_dir  the full-precision model that `quantized_dir` was made from; read only if codes are to move.
    length     tokens of the windows it will see.
    recordable is whether a step can be recorded as a CUDA graph.

    CheckpointError for a tensor that the directory lacks.
    """

    def __init__(
        self, model_dir: Path, quantized_dir: Path, *, tune_codes: bool, length: int, device: torch.device
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AttentionInterface, AutoModelForCausalLM
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        config = read_config(quantized_dir)
        settings = QuantizationConfig.from_dict(dict(config.quantization_config))
        config.attention_dropout = 0.0
        del config.quantization_config
        store = TensorStore(quantized_dir)
        originals = TensorStore(model_dir) if tune_codes else None
        with init_empty_weights(include_buffers=False):
            # Whole windows need no mask but the causal one; transformers would write it out in a recorded step.
            AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
            self.recordable = (getattr(config, "sliding_window", None) or length) >= length
            attention = "sdpa_without_mask" if self.recordable else "sdpa"
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        names = replace_linears(self.model, config, settings, torch.float16)
        self._files = StoredNames(self.model, store.names)
        self.layers: dict[str, TunableWeight] = {}
        inputs = RoundedInputs()
        for name in names:
            shape = self.model.get_submodule(name)
            size = settings.group_size_of(name)
            base = self._stored(f"{name}.qweight").removesuffix(".qweight")
            stored = _read_quantized(store, base, shape.out_features, shape.in_features, size, device)
            original = None if originals is None else originals.get(f"{base}.weight").to(device)
            weight = TunableWeight(stored, original)
            bias = store.get(f"{base}.bias").float() if f"{base}.bias" in store else None
            set_module(self.model, name, TunableLinear(weight, bias, inputs).to(device))
            self.layers[name] = weight
        for name, module in self.model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta and (full := self._stored(f"{name}.{own}")) in store:
                    value = store.get(full).float().to(device)
                    setattr(module, own, nn.Parameter(value, requires_grad=False))
            for own, buffer in module.named_buffers(recurse=False):
                module._buffers[own] = buffer.to(device)
        self.model.tie_weights()
        missing = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if missing:
            raise CheckpointError(f"{quantized_dir}: the tensor {missing[0]} is missing")
        self.norms = [
            name for name, module in self.model.named_modules()
            if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)
        ]  # fmt: skip
        for name in self.norms:
            module = self.model.get_submodule(name)
            parametrize.register_parametrization(module, "weight", _Relative(module.weight.data), unsafe=True)
            use_one_kernel(module)
        self.model.eval()

    def sizes(self) -> Sizes:
        """For the plan of memory."""
        config = self.model.config
        weights = sum(layer.start.shape[0] * layer.in_features for layer in self.layers.values())
        others = sum(parameter.numel() for parameter in self.model.parameters() if not parameter.requires_grad)
        return Sizes(
            weights=weights,
            others=others,
            group_size=min(layer.in_features // layer.start.shape[1] for layer in self.layers.values()),
            blocks=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        )

    def keep_activations(self, keep: bool) -> None:
        """False: compute a block's activations again in the backward pass, which takes a third more time."""
        if keep:
            self.model.eval()
            return
        # The name since transformers 5.2x, and the one before.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        self.model.train()

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What can move, by kind: scales, norms, codes."""
        layers = self.layers.values()
        norms = [self.model.get_submodule(name).parametrizations.weight.original for name in self.norms]
        for parameter in norms:
            parameter.requires_grad_(True)
        return {
            "scales": [layer.shift for layer in layers],
            "norms": norms,
            "codes": [layer.position for layer in layers if layer.position is not None],
        }

    def hidden(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, T] → what the output head sees, float32 [B, T, hidden_size]."""
        return self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [vocab_size, hidden_size] and bias of the output head."""
        head = self.model.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def _stored(self, name: str) -> str:
        """What the directory calls the tensor that the model calls `name`."""
        return self._files.stored(name) or name

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that tuning may have changed, under its name and in its form on disk."""
        for name, layer in self.layers.items():
            qweight, scales = pack(layer.quantized())
            yield self._stored(f"{name}.qweight"), qweight
            yield self._stored(f"{name}.scales"), scales
        for name in self.norms:
            yield self._stored(f"{name}.weight"), self.model.get_submodule(name).weight.detach().to(dtype)


@torch.no_grad()
def use_one_kernel(norm: nn.Module) -> bool:
    """Let `norm` take float32 through torch's root-mean-square norm, if that is what it computes; whether it does.

    On a GPU that is one kernel and two for the gradients, where transformers' operations are six and some fifteen,
    each of which reads and writes all activations. (Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019.)
    """
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    own, weight = norm.forward, norm.weight
    if not isinstance(epsilon, float) or not isinstance(weight, Tensor):
        return False

    def forward(hidden: Tensor) -> Tensor:
        if hidden.dtype != torch.float32:
            return own(hidden)  # rounds to this dtype between its operations
        moved: Any = norm.weight  # as the tuning has moved it
        return nn.functional.rms_norm(hidden, (hidden.shape[-1],), moved.float(), epsilon)

    probe = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    probe *= torch.tensor([[1e-3], [1.0], [1e3]], device=probe.device)  # the first tells where epsilon goes
    if not torch.allclose(forward(probe), own(probe), rtol=1e-5, atol=1e-6):
        return False
    norm.forward = forward
    return True


@contextmanager
def one_kernel_norms(block: nn.Module) -> Iterator[None]:
    """Inside, the norms of `block` that can `use_one_kernel` do."""
    norms = [module for module in block.modules() if "norm" in type(module).__name__.lower()]
    changed = [norm for norm in norms if isinstance(getattr(norm, "weight", None), Tensor) and use_one_kernel(norm)]
    try:
        yield
    finally:
        for norm in changed:
            del norm.forward  # what hides the class's own


def _read_quantized(
    store: TensorStore, name: str, out_features: int, in_features: int, group_size: int, device: torch.device
) -> QuantizedWeight:
    # Unpacked where they are needed: on a GPU that takes no time, on the host minutes for a large model.
    codes = marlin.unpack_codes(store.get(f"{name}.qweight").to(device))[:out_features, :in_features]
    scales = marlin.unpack_scales(store.get(f"{name}.scales").to(device))[:out_features]
    return QuantizedWeight(codes, scales, None, group_size)
