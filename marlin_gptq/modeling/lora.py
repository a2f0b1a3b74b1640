"""LoRA adapters of peft beside the MarlinLinear layers of a quantized model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from marlin_gptq.errors import InputError
from marlin_gptq.modeling.fused import FUSED, FusedLinear, Projection, fuse_projections, split_projections
from marlin_gptq.modeling.linear import MarlinLinear, prepare_for_device


def add_lora(model: nn.Module, adapter: Any, **settings: Any) -> Any:
    """The quantized model with LoRA layers: a peft.PeftModel. The model itself is changed, as peft does.

    adapter   a peft.LoraConfig: adapters to train, by peft.get_peft_model; or the directory or hub id of a saved one,
              by PeftModel.from_pretrained
    settings  further arguments of these functions

    target_modules are the names that the projections have in the full-precision model; "all-linear" is every
    quantized one outside of experts. Projections that get an adapter are no longer fused with others. InputError for
    adapters of experts, for those that start from, or change, the weight itself (DoRA, PiSSA, …), and when an adapter
    is merged: `dequantize()` first.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    saved = isinstance(adapter, str | Path)
    config: Any = PeftConfig.from_pretrained(str(adapter)) if saved else copy.copy(adapter)
    if not isinstance(config, LoraConfig):
        raise InputError(f"adapter: got a {type(config).__name__}, expected a LoraConfig")
    _require_additive(config)
    _settle_targets(config, model)
    was_fused = any(isinstance(module, FusedLinear) for module in model.modules())
    split_projections(model)
    for module in model.modules():
        if isinstance(module, MarlinLinear):
            module.restore_stored_layout()  # peft asks qweight for its device
    config._register_custom_module({MarlinLinear: _lora_layer()})
    if saved and "is_trainable" in settings:
        config.inference_mode = not settings["is_trainable"]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            if saved:
                return PeftModel.from_pretrained(model, str(adapter), config=config, **settings)
            return get_peft_model(model, config, **settings)
    finally:
        if was_fused:
            fuse_projections(model)
        prepare_for_device(model)


def _require_additive(config: Any) -> None:
    """InputError for what reads the base weight, which is no matrix here."""
    asked = {"use_dora": config.use_dora}
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
        asked[f"init_lora_weights {config.init_lora_weights!r}"] = True
    if named := [name for name, value in asked.items() if value]:
        raise InputError(
            f"{named[0]}: needs the full weight, which a 4-bit layer does not hold; take plain LoRA, or "
            "model.dequantize() first"
        )


def _settle_targets(config: Any, model: nn.Module) -> None:
    """Name what "all-linear" means; InputError where experts are meant, which peft knows in a fused form alone."""
    from peft.tuners.tuners_utils import check_target_module_exists

    layers = [name for name, module in model.named_modules() if isinstance(module, MarlinLinear | Projection)]
    inside = [name for name in layers if ".experts." in name]
    own = {name.rpartition(".")[2] for name in inside}
    if config.target_modules == "all-linear":
        config.target_modules = {name.rpartition(".")[2] for name in layers} - own - set(FUSED)
    elif config.target_modules and (hit := next((n for n in inside if check_target_module_exists(config, n)), None)):
        raise InputError(
            f"target_modules: {hit} is a projection of an expert, and adapters of quantized experts are not supported; "
            "name projections of attention"
        )


def _lora_layer() -> type:
    """peft's linear LoRA layer, around a MarlinLinear."""
    from peft.tuners.lora import Linear

    class MarlinLoraLinear(Linear):
        def merge(self, *arguments: Any, **settings: Any) -> None:
            if isinstance(self.get_base_layer(), MarlinLinear):
                raise InputError("merge: 4-bit weights cannot take up an adapter; call dequantize() on the model first")
            super().merge(*arguments, **settings)

    return MarlinLoraLinear
