"""modeling/decoding.py and sampling.py: the decoder makes the tokens that generate makes; draws follow the law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_config
from transformers import AutoModelForCausalLM

from marlin_gptq.modeling.decoding import Decoder, weight_bytes, why_not
from marlin_gptq.modeling.experts import separate_experts
from marlin_gptq.modeling.fixed_cache import FixedLayer, fixed_cache
from marlin_gptq.modeling.sampling import draw, sample


def model_of(architecture: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32).eval()


def decoded(decoder: Decoder, ids: torch.Tensor, count: int) -> torch.Tensor:
    decoder.prefill(ids)
    found = [decoder.tokens.clone()]
    for _ in range(count - 1):
        decoder.step()
        found.append(decoder.tokens.clone())
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(
    ("architecture", "changes", "fixed"),
    [
        ("llama", {}, True),
        ("mistral", {"sliding_window": 64}, True),
        ("mistral", {"sliding_window": 16}, False),
        ("qwen3", {"head_dim": 32}, True),
    ],
)
def test_tokens_are_those_of_generate(architecture: str, changes: dict, fixed: bool) -> None:
    model = model_of(architecture, **changes)
    ids = torch.randint(3, 90, (2, 20))
    expected = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)[:, 20:]
    decoders = [Decoder(model, 2, 30)]
    if fixed:
        decoders.append(Decoder(model, 2, 30, fixed=True))
    for decoder in decoders:
        for _ in range(2):  # a second batch finds no trace of the first
            assert torch.equal(decoded(decoder, ids, 10), expected)
    assert bool(why_not(model, 30, graphs=False, compiled=True)) is not fixed
    assert bool(why_not(model, 30, graphs=False, compiled=False, fixed=True)) is not fixed


LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 32}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]}
OTHER_CACHES = {
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, ""),  # an attention that takes no other's place
    "minimax": (
        {"num_local_experts": 2, **LINEAR_FIRST},
        "does not run on a cache of fixed size",
    ),  # a class of its own
    "bamba": (MAMBA, "keeps more of the text than keys and values"),  # no keys in the first layer
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        "does not run on a cache of fixed size",
    ),
    "recurrent_gemma": (
        {"lru_width": 128, "attention_window_size": 8, "block_types": ["recurrent", "attention"], "pad_token_id": 0},
        "does not run on a cache of fixed size",
    ),  # returns no cache
}


@pytest.mark.parametrize("architecture", OTHER_CACHES)
def test_tokens_are_those_of_whole_forwards(architecture: str) -> None:
    """Of models that keep something else than keys and values, or count otherwise what they keep."""
    changes, refused = OTHER_CACHES[architecture]
    model = model_of(architecture, **changes)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    prompt = ids = torch.randint(3, 90, (2, 20))
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    decoder = Decoder(model, 2, 28)
    for _ in range(2):
        assert torch.equal(decoded(decoder, prompt, 8), ids[:, 20:])
    reason = why_not(model, 28, graphs=False, compiled=False, fixed=True)
    assert refused in reason and bool(refused) == bool(reason)
    if not refused:
        assert torch.equal(decoded(Decoder(model, 2, 28, fixed=True), prompt, 8), ids[:, 20:])


def test_a_step_that_asks_the_host_for_experts_is_not_recorded() -> None:
    model = model_of("mixtral", num_local_experts=2, num_experts_per_tok=1)
    separate_experts(model)
    assert "which experts the tokens go to" in why_not(model, 8, graphs=False, compiled=True)
    assert not why_not(model, 8, graphs=False, compiled=False, fixed=True)


def test_layers_share_one_position() -> None:
    model = model_of("llama")
    cache = fixed_cache(model.config, 30, model.device)
    assert all(type(layer) is FixedLayer for layer in cache.layers)
    with torch.no_grad():
        model(torch.randint(3, 90, (2, 7)), past_key_values=cache, use_cache=True)
        model(torch.randint(3, 90, (2, 1)), past_key_values=cache, use_cache=True)
    assert len({layer.cumulative_length.data_ptr() for layer in cache.layers}) == 1
    assert int(cache.get_seq_length()) == 8
    assert all(layer.keys[:, :, :8].any(-1).all() and not layer.keys[:, :, 8:].any() for layer in cache.layers)
    cache.reset()
    assert int(cache.get_seq_length()) == 0


def test_a_compiled_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: whole(f, backend="aot_eager", **settings))
    model = model_of("llama")
    ids = torch.randint(3, 90, (2, 20))
    expected = decoded(Decoder(model, 2, 30), ids, 10)
    assert torch.equal(decoded(Decoder(model, 2, 30, compiled=True), ids, 10), expected)


def test_other_tokens_may_be_put_in() -> None:
    model = model_of("llama")
    decoder = Decoder(model, 1, 8)
    decoder.prefill(torch.tensor([[5, 6]]))
    decoder.tokens.fill_(7)
    logits = decoder.step()
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([[5, 6, 7]])).logits[:, -1])


def test_limits_are_named() -> None:
    model = model_of("llama")
    decoder = Decoder(model, 1, 4)
    with pytest.raises(ValueError, match=r"ids: got \[2, 3\], expected \[1, T\] with T from 1 to 4"):
        decoder.prefill(torch.ones(2, 3, dtype=torch.int64))
    decoder.prefill(torch.ones(1, 3, dtype=torch.int64))
    decoder.step()
    with pytest.raises(RuntimeError, match="the cache holds 4 tokens and is full"):
        decoder.step()
    with pytest.raises(ValueError, match="CUDA graphs need a GPU, the model is on cpu"):
        Decoder(model, 1, 4, graphs=True)
    scaled = model_of("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert "rotary embedding (rope_type dynamic) asks the host" in why_not(scaled, 4, graphs=False, compiled=True)
    assert why_not(scaled, 4, graphs=False, compiled=False) == why_not(model, 4, graphs=False, compiled=True) == ""
    with pytest.raises(ValueError, match="attention window is shorter than 20 tokens"):
        Decoder(model_of("mistral", sliding_window=16), 1, 20, compiled=True)


def test_shared_weights_count_once() -> None:
    tied, untied = (model_of("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert weight_bytes(untied) - weight_bytes(tied) == 96 * 128 * 4


def test_sampling_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = probabilities.log().repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(**settings: float) -> torch.Tensor:
        return torch.bincount(sample(logits, generator=generator, **settings), minlength=4) / len(logits)

    assert sample(logits[:3], 0.0, 1.0).tolist() == [0, 0, 0]
    torch.testing.assert_close(shares(temperature=1.0, top_p=1.0), probabilities, atol=0.02, rtol=0)
    squared = probabilities.square() / probabilities.square().sum()
    torch.testing.assert_close(shares(temperature=0.5, top_p=1.0), squared, atol=0.02, rtol=0)
    # 0.5 + 0.25 reach 0.7: the other two are out
    nucleus = torch.tensor([2 / 3, 1 / 3, 0, 0])
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.7), nucleus, atol=0.02, rtol=0)
    assert shares(temperature=1.0, top_p=0.01).tolist() == [1, 0, 0, 0]
    drawn = draw(logits, generator)
    torch.testing.assert_close(torch.bincount(drawn) / len(logits), probabilities, atol=0.02, rtol=0)
    assert torch.equal(*(draw(logits, torch.Generator().manual_seed(1)) for _ in range(2)))
    never = draw(torch.cat([logits, torch.full((len(logits), 1), -torch.inf)], dim=1), generator)
    assert not (never == 4).any()
    with pytest.raises(ValueError, match=r"top_p: got 0, expected more than 0 and at most 1"):
        sample(logits, 1.0, 0)
    with pytest.raises(ValueError, match=r"temperature: got -1, expected 0 or more"):
        sample(logits, -1, 1.0)
