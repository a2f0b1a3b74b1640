"""transformers' side: `from_pretrained` on a quantized directory gives a model of MarlinLinear layers.

Importing this file registers the format; `marlin_gptq` does it. The buffers of MarlinLinear have the names of the
tensors on disk, so that loading and saving need no conversion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from marlin_gptq.config import QUANT_METHOD, QuantizationConfig
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.model_directory import require_inside
from marlin_gptq.modeling.architecture import replace_linears
from marlin_gptq.modeling.dequantized import dequantize
from marlin_gptq.modeling.experts import Experts
from marlin_gptq.modeling.fused import fuse_projections
from marlin_gptq.modeling.linear import MarlinLinear, prepare_for_device
from marlin_gptq.modeling.names import StoredNames, above


@register_quantization_config(QUANT_METHOD)
class MarlinGPTQConfig(QuantizationConfigMixin):
    """The settings as transformers hands them around; QuantizationConfig holds and checks them.

    fuse  whether loading fuses q/k/v and gate/up (marlin_gptq.modeling.fused). No setting of the checkpoint: it is
          not written back. `config.quantization_config["fuse"] = False` on the config passed to `from_pretrained`
          turns it off.
    """

    def __init__(self, fuse: bool = True, **settings: Any) -> None:
        self.fuse = fuse
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.settings = QuantizationConfig.from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        return self.settings.to_dict()


@register_quantizer(QUANT_METHOD)
class MarlinGPTQQuantizer(HfQuantizer):
    """Puts MarlinLinear layers in place before the weights are read, and refuses incomplete files."""

    requires_calibration = True
    quantization_config: MarlinGPTQConfig
    _separated = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: Any = model.config
        dtype: Any = model.dtype
        names = replace_linears(model, config, self.quantization_config.settings, dtype)
        self._separated = any(isinstance(module, Experts) for module in model.modules())
        files = [Path(file) for file in kwargs.get("checkpoint_files") or [] if str(file).endswith(".safetensors")]
        if files:
            _require_tensors(model, names, files)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.quantization_config.fuse:
            fuse_projections(model)
        prepare_for_device(model)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what the separate projections took
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Without those that fuse the experts of a layer into one tensor: here each is a module of its own.

        `model` is not given by transformers 5.17, which asks after the layers have been put in place as well.
        """
        if not self._separated:
            return weight_conversions
        fused = ("experts.gate_up_proj", "experts.down_proj")
        kept = [c for c in weight_conversions if not any(str(t).endswith(fused) for t in _targets(c))]
        return kept

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32 is refused by name: the kernel computes in the dtype of the scales."""
        if dtype not in (torch.float16, torch.bfloat16):
            raise InputError(
                f"dtype: got {dtype}, but a Marlin checkpoint runs in float16 or bfloat16; pass dtype='auto'"
            )
        return dtype

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """What `model.dequantize()` does, beside taking the settings out of the config."""
        return dequantize(model, dtype)

    @property
    def is_trainable(self) -> bool:
        """With adapters (`marlin_gptq.add_lora`): gradients pass through the layers, codes stay."""
        return True

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """`save_pretrained` writes the Marlin layout back as it was read."""
        return True


def _targets(conversion: Any) -> list[str]:
    targets = getattr(conversion, "target_patterns", [])
    return [targets] if isinstance(targets, str) else list(targets)


def _require_tensors(model: nn.Module, names: list[str], files: list[Path]) -> None:
    """CheckpointError for a quantized tensor that is missing or misshaped, which transformers would initialise."""
    shapes: dict[str, tuple[list[int], Path]] = {}
    for file in files:
        if ".." in file.parts or file.parent != files[0].parent:  # an index may name any path
            raise CheckpointError(f"{file}: outside the directory of the checkpoint; its index must name files in it")
        require_inside(file.parent, file.name)
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    shapes[key] = (tensors.get_slice(key).get_shape(), file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: truncated or corrupt ({error}); fetch or copy it again") from error
    stored = StoredNames(model, shapes)
    for name in names:
        layer = model.get_submodule(name.removeprefix(above(model)))
        assert isinstance(layer, MarlinLinear)
        for own, buffer in layer.named_buffers():
            full = f"{name}.{own}"
            key = stored.stored(full)
            if key is None:
                raise CheckpointError(
                    f"{stored.written(full)}: missing from {files[0].parent}; fetch or make the checkpoint again"
                )
            if shapes[key][0] != list(buffer.shape):
                raise CheckpointError(
                    f"{key}: got {shapes[key][0]}, expected {list(buffer.shape)} from config.json and group_size "
                    f"{layer.group_size}"
                )
