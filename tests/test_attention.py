"""modeling/attention.py: shared keys and values read in place are those that transformers copies."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from helpers import tiny_config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM
from transformers.integrations import sdpa_attention

from marlin_gptq.modeling import attention, decoding
from marlin_gptq.modeling.attention import REPEATABLE, attend, backward, grouped_queries, sdpa_configs, shares_keys
from marlin_gptq.modeling.decoding import Decoder, ends

MODELS = [
    ("llama", {}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("mistral", {"sliding_window": 64}),
]


def model_of(architecture: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config(architecture, initializer_range=0.2, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def written(decoder: Decoder, ids: Tensor, chosen: Tensor) -> Tensor:
    """Logits after the prompt and after each of the tokens [T, B] that are put in."""
    logits = [decoder.prefill(ids)]
    for tokens in chosen:
        decoder.tokens.copy_(tokens)
        logits.append(decoder.step().clone())
    return torch.stack(logits)


def tensors(heads: int, shared: int, tokens: int = 1, length: int = 12) -> tuple[Any, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, count, size, 16, generator=generator)
        for count, size in ((heads, tokens), (shared, length), (shared, length))
    )
    module = SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True)
    return module, query, key, value


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (8, 1), (6, 2)])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "one for all"])
def test_one_token_attends_as_transformers_does(heads: int, shared: int, kind: str) -> None:
    module, query, key, value = tensors(heads, shared)
    seen = torch.arange(12) < torch.tensor([5, 12, 1])[:, None]
    mask = {
        "none": None,
        "bool": seen[:, None, None],
        "float": torch.zeros(3, 1, 1, 12).masked_fill(~seen[:, None, None], -torch.inf),
        "one for all": seen[:1, None, None],
    }[kind]
    options: dict[str, Any] = {"scaling": 0.3, "position_ids": torch.zeros(3, 1), "sliding_window": 4}
    found, nothing = attend(module, query, key, value, mask, **options)
    expected, _ = sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, **options)
    assert nothing is None and found.shape == (3, 1, heads, 16)
    torch.testing.assert_close(found, expected)


def test_keys_and_values_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    module, query, key, value = tensors(8, 2)
    whole, seen = nn.functional.scaled_dot_product_attention, []

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((query.shape, key.data_ptr(), value.data_ptr()))
        return whole(query, key, value, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    visible = key[:, :, :8], value[:, :, :8]
    attend(module, query, *visible, torch.ones(3, 1, 1, 8, dtype=torch.bool))
    assert seen == [(torch.Size((3, 2, 4, 16)), key.data_ptr(), value.data_ptr())]


@pytest.mark.parametrize(
    ("heads", "tokens", "mask", "options"),
    [
        (4, 1, None, {}),  # nothing is shared
        (8, 2, None, {}),  # a prompt
        (8, 1, torch.ones(3, 8, 1, 12, dtype=torch.bool), {}),  # a mask for each head
        (8, 1, None, {"dropout": 0.1}),
        (8, 1, None, {"softcap": 30.0}),
        (8, 1, None, {"s_aux": torch.zeros(8)}),
        (8, 1, None, {"output_attentions": True}),
    ],
)
def test_all_else_is_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch, heads: int, tokens: int, mask: Tensor | None, options: dict
) -> None:
    module, query, key, value = tensors(heads, 4, tokens)
    asked: list[Any] = []

    def forward(*inputs: Any, **options: Any) -> tuple[int, None]:
        asked.append((inputs, options))
        return 0, None

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", forward)
    assert attend(module, query, key, value, mask, scaling=0.5, **options) == (0, None)
    ((inputs, handed),) = asked
    assert inputs == (module, query, key, value, mask)
    assert handed == {"dropout": 0.0, "scaling": 0.5} | options


@pytest.mark.parametrize(("architecture", "changes"), MODELS)
@pytest.mark.parametrize("parted", [False, True])
def test_a_cache_of_fixed_size_gives_the_logits_of_a_growing_one(
    monkeypatch: pytest.MonkeyPatch, architecture: str, changes: dict, parted: bool
) -> None:
    if parted:
        monkeypatch.setattr(decoding, "_MUCH", 1)
        monkeypatch.setattr(decoding, "_PART_OF", 4)
    model = model_of(architecture, **changes)
    ids, chosen = torch.randint(3, 90, (3, 6)), torch.randint(3, 90, (18, 3))
    decoder = Decoder(model, 3, 24, fixed=True)
    assert decoder._ends == ((8, 12, 20, 24) if parted else (24,))
    expected = written(Decoder(model, 3, 24), ids, chosen)
    for _ in range(2):  # a second batch finds no trace of the first
        torch.testing.assert_close(written(decoder, ids, chosen), expected, rtol=1e-4, atol=1e-4)
    whole = torch.cat([ids, chosen.T], dim=1)
    with torch.no_grad():
        at_once = model(whole).logits[:, 5:].transpose(0, 1)
    torch.testing.assert_close(expected, at_once, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_places_that_are_not_filled_yet_do_not_count() -> None:
    model = model_of("llama")
    ids, chosen = torch.randint(3, 90, (2, 6)), torch.randint(3, 90, (5, 2))
    decoder = Decoder(model, 2, 24, fixed=True)
    clean = written(decoder, ids, chosen)
    decoder.prefill(ids)
    for layer in decoder._cache.layers:
        layer.keys[:, :, 6:] = layer.values[:, :, 6:] = 1e4
    for position, tokens in enumerate(chosen, start=1):
        decoder.tokens.copy_(tokens)
        assert torch.equal(decoder.step(), clean[position])


def test_grouped_queries_are_what_runs_and_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(attention, "attend", lambda *inputs, **options: seen.append(1) or attend(*inputs, **options))
    model = model_of("llama")
    decoder = Decoder(model, 1, 8, fixed=True)
    decoder.prefill(torch.ones(1, 3, dtype=torch.int64))
    decoder.step()
    assert len(seen) == 4  # two layers, the prompt and a token
    with pytest.raises(ZeroDivisionError), grouped_queries(sdpa_configs(model)):
        assert model.config._attn_implementation != "sdpa"
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_another_attention_stays_what_it_is() -> None:
    model = model_of("llama", attn_implementation="eager")
    assert sdpa_configs(model) == []
    ids, chosen = torch.randint(3, 90, (2, 6)), torch.randint(3, 90, (5, 2))
    torch.testing.assert_close(
        written(Decoder(model, 2, 12, fixed=True), ids, chosen), written(Decoder(model, 2, 12), ids, chosen)
    )
    assert model.config._attn_implementation == "eager"


def test_the_shortest_record_that_holds_what_is_filled_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording as it is, on graphs that only count."""
    seen: list[int] = []
    made: list[Any] = []

    class Graph:
        def __init__(self) -> None:
            made.append(self)

        def replay(self) -> None:
            seen.append(len(made) - 1 - made.index(self))  # the longest is recorded first

    for name, stand_in in {
        "CUDAGraph": Graph,
        "Stream": lambda *_: MagicMock(),
        "current_stream": lambda *_: MagicMock(),
        "stream": lambda _: nullcontext(),
        "graph": lambda graph, pool: nullcontext(),
        "graph_pool_handle": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(decoding, "why_not", lambda *_, **__: "")
    monkeypatch.setattr(decoding, "_MUCH", 1)
    monkeypatch.setattr(decoding, "_PART_OF", 4)
    decoder = Decoder(model_of("llama"), 2, 16, graphs=True)
    assert decoder._ends == (4, 8, 12, 16) and len(made) == 4
    decoder.prefill(torch.ones(2, 3, dtype=torch.int64))
    memory = {decoder.step().data_ptr() for _ in range(13)}
    assert seen == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3] and len(memory) == 1


def test_a_decoder_lets_go_of_its_cache_at_once() -> None:
    """Two caches do not fit where one takes most of the memory."""
    decoder = Decoder(model_of("llama"), 1, 8, fixed=True)
    decoder.prefill(torch.ones(1, 3, dtype=torch.int64))
    decoder.step()
    keys = weakref.ref(decoder._cache.layers[0].keys)
    gc.disable()
    try:
        del decoder
        assert keys() is None
    finally:
        gc.enable()


def test_which_models_share_keys() -> None:
    assert shares_keys(tiny_config("llama")) and shares_keys(tiny_config("qwen3", num_key_value_heads=1))
    assert not shares_keys(tiny_config("llama", num_key_value_heads=4))
    assert not shares_keys(tiny_config("llama", num_key_value_heads=None))


def test_large_caches_are_read_in_parts() -> None:
    assert ends(1, 4096) == (4096,)
    assert ends(2048, 1024) == (256, 512, 768, 1024)
    assert ends(1024, 70) == (64, 70)
    assert ends(128, 640) == (192, 320, 512, 640)


def test_flash_attention_alone_is_told_to_keep_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is when the backward pass has ended, however it did."""
    events: list[Any] = []
    told = torch.set_deterministic_debug_mode

    def tell(mode: Any) -> None:
        events.append(mode)
        told(mode)

    monkeypatch.setattr(torch, "set_deterministic_debug_mode", tell)
    leaf = torch.randn(1, 2, 9, 16, requires_grad=True)

    def output() -> tuple[Tensor, Tensor]:
        query = 2 * leaf
        query.register_hook(lambda _: events.append("queries"))
        with sdpa_kernel(REPEATABLE):
            found = nn.functional.scaled_dot_product_attention(query, leaf, leaf, is_causal=True)
        scaled = 2 * found
        scaled.register_hook(lambda _: events.append("output"))
        return found, scaled

    backward(output()[1].sum())
    gradient, leaf.grad = leaf.grad, None
    assert events == ["output", "error", 0, "queries", 0] and told is not torch.set_deterministic_debug_mode
    output()[1].sum().backward()
    assert gradient is not None and leaf.grad is not None and torch.equal(gradient, leaf.grad)

    def fail(*_: Any) -> None:
        raise RuntimeError(f"mode {torch.get_deterministic_debug_mode()}")

    found, scaled = output()
    assert found.grad_fn is not None
    found.grad_fn.register_hook(fail)  # before the one that ends it
    with pytest.raises(RuntimeError, match="mode 2"):
        backward(scaled.sum())
    assert torch.get_deterministic_debug_mode() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [4, 2])
def test_gradients_through_flash_attention_are_the_same_each_time(heads: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def made(count: int) -> Tensor:
        shape = 2, count, 1000, 64
        return torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_()

    query, key, value = made(4), made(heads), made(heads)
    outer = torch.randn(2, 4, 1000, 64, generator=generator, device="cuda").bfloat16()
    found: list[tuple[Tensor, ...]] = []
    for kernels in (*5 * [REPEATABLE], [SDPBackend.MATH]):
        with sdpa_kernel(kernels):
            output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        backward(output, outer)
        found.append(tuple(each.grad for each in (query, key, value) if each.grad is not None))
        query.grad = key.grad = value.grad = None
    assert all(torch.equal(a, b) for again in found[1:5] for a, b in zip(found[0], again, strict=True))
    for flash, plain in zip(found[0], found[5], strict=True):
        assert (flash.float() - plain.float()).norm() < 0.02 * plain.float().norm()
