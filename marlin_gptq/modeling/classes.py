"""Which transformers class a model directory is of, and its models without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from marlin_gptq.modeling.experts import separate_experts

_OF_CAUSAL = ("ForCausalLM", "LMHeadModel")
# Decoders that end in something else than a language model's head, or in none.
_WITHOUT_HEAD = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModel")


def auto_class(model_type: Any, declared: str | None) -> str | None:
    """The name of transformers' Auto class for a directory's model_type and the class that it declares.

    Causal language models, those with a vision or audio part beside it, and decoders with another head or none; None
    for anything else. A class of somebody's own counts as what its name says.
    """
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    several = {
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    without_head: tuple[Mapping[str, Any], ...] = (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    )
    found: dict[str, Mapping[str, Any]] = {"AutoModelForCausalLM": causal, **several}
    if model_type in causal or any(model_type in mapping for mapping in several.values()):
        found |= dict(zip(_WITHOUT_HEAD, without_head, strict=True))
    for name, mapping in found.items():
        classes = mapping.get(model_type, ())
        if declared in ((classes,) if isinstance(classes, str) else classes) or (classes and declared is None):
            return name
    return "AutoModelForCausalLM" if model_type in causal and str(declared).endswith(_OF_CAUSAL) else None


def auto_class_of(config: Any) -> Any:
    """The Auto class of a config that `read_config` has read."""
    import transformers

    name = auto_class(config.model_type, next(iter(config.architectures or []), None))
    assert name is not None, "read_config refuses what has none"
    return getattr(transformers, name)


def has_language_head(config: Any) -> bool:
    """Whether the model of a config gives logits of the next token."""
    return auto_class_of(config).__name__ not in _WITHOUT_HEAD


def text_config(config: Any) -> Any:
    """The part of a config that describes the decoder; the config itself where there is nothing else."""
    return config.get_text_config(decoder=True)


def empty_model(config: Any, dtype: torch.dtype, **settings: Any) -> Any:
    """The model of a config: parameters on the meta device, buffers made, experts as one linear each."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class_of(config).from_config(config, dtype=dtype, **settings)
        separate_experts(model)
    return model
