"""Attention of one new token whose query heads share keys and values, without a copy of these for every query head.

Decoding is reading keys and values. Where g query heads share them (grouped-query attention: Ainslie et al., arXiv
2305.13245), torch's attention takes them as they are only without a mask, and a cache of fixed size needs one: it has
places that are not filled yet. transformers then writes keys and values out once for each query head, at every step
and layer (5.17; 5.23 under torch.compile alone). But with one new token there is no order among queries: the g heads of
a group are as good as g tokens of one head that see the same keys.

    query  [B, Hkv·g, 1, D]  seen as  [B, Hkv, g, D]      keys, values [B, Hkv, L, D] as they lie in the cache
    mask   [B, 1, 1, L]      for all of the g             result [B, Hkv, g, D], seen as [B, 1, Hkv·g, D]

So it is one call of scaled_dot_product_attention, in one kernel with float32 scores. (Two products and a softmax of
one's own would be four kernels, with scores rounded to 16 bits between them; `enable_gqa` with a mask leaves torch the
kernel that copies.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

# Not cuDNN's: it plans anew for every length, 30 ms each on an H200, and documents have all lengths.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# With gradients, where a resumed run is to give the same bits: what `backward` can have add up in a fixed order, and
# where that does not take the call (a mask, float32) the plain way, which writes out scores of every head, [T, T].
REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

_NAME = "marlin_gptq_decode"
# What transformers' sdpa takes and passes over: positions are in the keys, windows in the mask.
_IGNORED_BY_SDPA = {"position_ids", "cache_position", "sliding_window", "use_cache", "is_causal"}


def shares_keys(config: Any) -> bool:
    """Whether several query heads have one head of keys and values."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = text.num_attention_heads
    return (getattr(text, "num_key_value_heads", None) or heads) != heads


def sdpa_configs(model: nn.Module) -> list[Any]:
    """The configs of the model and its modules that ask for transformers' sdpa."""
    found: dict[int, Any] = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}
    return [config for config in found.values() if getattr(config, "_attn_implementation", None) == "sdpa"]


@contextmanager
def implementation(name: str, configs: Sequence[Any]) -> Iterator[None]:
    """Inside, these configs of `sdpa_configs` ask for the registered function `name` instead."""
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


@contextmanager
def grouped_queries(configs: Sequence[Any]) -> Iterator[None]:
    """Inside, forwards of a model of these configs with one new token a sequence read shared keys and values where
    they lie; all other forwards are as ever."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])  # without, a model makes no mask at all
    with implementation(_NAME, configs):
        yield


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, [B, heads, T, D] in and [B, T, heads, D] out; by groups if it is one token and nothing else
    is asked than that a mask for all heads alike is kept to."""
    groups = query.shape[1] // key.shape[1]
    known = all(not _asked(option) for name, option in options.items() if name not in _IGNORED_BY_SDPA)
    for_all_heads = attention_mask is None or (attention_mask.dim() == 4 and attention_mask.shape[1] == 1)
    if query.shape[2] != 1 or groups == 1 or dropout or not known or not for_all_heads:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, heads // groups, groups, width)
    found = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(batch, 1, heads, value.shape[-1]), None


def backward(output: Tensor, gradient: Tensor | None = None) -> None:
    """`output.backward(gradient)` of a forward pass under REPEATABLE, with the same bits every time.

    On a GPU flash attention adds gradients up in any order unless torch is told to be deterministic. It is told so for
    those steps alone: it would refuse products of matrices, which have a fixed order anyway.
    """
    before = torch.get_deterministic_debug_mode()
    for node in _flash_attentions(output):
        node.register_prehook(lambda *_: torch.set_deterministic_debug_mode("error"))
        node.register_hook(lambda *_: torch.set_deterministic_debug_mode(before))
    try:
        output.backward(gradient)
    finally:
        torch.set_deterministic_debug_mode(before)


def _flash_attentions(output: Tensor) -> list[Any]:
    """The steps of the backward pass from `output` that are flash attention's."""
    waiting, seen, found = [output.grad_fn], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "FlashAttention" in node.name():
            found.append(node)
        waiting += [behind for behind, _ in node.next_functions]
    return found


def _asked(option: Any) -> bool:
    """A tensor (sinks, a bias of positions), a number (a cap of scores) or a switch that is on."""
    return isinstance(option, Tensor) or (option is not None and option is not False)
