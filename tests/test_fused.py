"""modeling/fused.py: projections fused at load compute, save and move as if they were not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import random_weight, save_tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from marlin_gptq import MarlinLinear, QuantizationConfig, quantize_model
from marlin_gptq.modeling.fused import FUSED, FusedLinear, Projection, can_fuse, fuse_projections, split_projections
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.weight import QuantizedWeight

ARCHITECTURES = {
    "llama": {"attention_bias": True},
    "mistral": {},
    "qwen2": {},  # biases on q, k and v only
    "qwen3": {"head_dim": 32},
}


def quantized(directory: Path, architecture: str, settings: QuantizationConfig, **changes: object) -> Path:
    source = save_tiny_model(directory / "source", architecture, **changes)
    quantize_model(source, directory / "out", settings, [], device=torch.device("cpu"))
    return directory / "out"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = QuantizationConfig(group_size=64, method="rtn")
    return quantized(tmp_path_factory.mktemp("fused"), request.param, settings, **ARCHITECTURES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = QuantizationConfig(group_size=64, method="rtn")
    return quantized(tmp_path_factory.mktemp("llama"), "llama", settings, attention_bias=True)


def unfused(directory: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(directory)
    config.quantization_config["fuse"] = False
    return AutoModelForCausalLM.from_pretrained(directory, config=config)


def kinds(model: nn.Module) -> dict[str, int]:
    found = [type(module).__name__ for module in model.modules()]
    return {name: found.count(name) for name in ("FusedLinear", "Projection", "MarlinLinear")}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the fused layer on the CPU too, as on a GPU."""
    monkeypatch.setattr(Projection, "together", lambda *_: True)


IDS = torch.arange(1, 40)[None]


@torch.no_grad()
def test_every_architecture_is_fused_and_computes_the_same_bits(checkpoint: Path) -> None:
    model, plain = AutoModelForCausalLM.from_pretrained(checkpoint), unfused(checkpoint)
    assert kinds(model) == {"FusedLinear": 4, "Projection": 10, "MarlinLinear": 4}
    assert kinds(plain) == {"FusedLinear": 0, "Projection": 0, "MarlinLinear": 14}
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    one, other = (m.generate(IDS, max_new_tokens=8, do_sample=False) for m in (model, plain))
    assert one.shape[1] > IDS.shape[1] and torch.equal(one, other)


@torch.no_grad()
def test_the_fused_product_is_that_of_the_parts(checkpoint: Path, together: None) -> None:
    model, plain = AutoModelForCausalLM.from_pretrained(checkpoint), unfused(checkpoint)
    for inputs in (IDS, IDS.repeat(3, 1)):
        logits, expected = model(inputs).logits.float(), plain(inputs).logits.float()
        assert float((logits - expected).norm() / expected.norm()) < 1e-3
    assert all(module._held is None for module in model.modules() if isinstance(module, FusedLinear))


def test_state_dict_and_files_are_what_they_were(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    state = model.state_dict()
    plain = unfused(checkpoint).state_dict()
    assert state.keys() == plain.keys() and all(torch.equal(state[name], plain[name]) for name in plain)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
    settings = AutoConfig.from_pretrained(tmp_path / "again").quantization_config
    assert "fuse" not in settings


def test_splitting_undoes_it(checkpoint: Path) -> None:
    model, plain = AutoModelForCausalLM.from_pretrained(checkpoint), unfused(checkpoint)
    split_projections(model)
    assert kinds(model) == kinds(plain)
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert len(fuse_projections(model)) == 4 and fuse_projections(model) == []
    assert kinds(model)["FusedLinear"] == 4


@torch.no_grad()
def test_loading_a_state_dict_fills_the_fused_tensors(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.1.self_attn.k_proj"
    state[f"{name}.qweight"].random_(-(2**31), 2**31 - 1)
    state[f"{name}.bias"].fill_(0.5)
    plain = unfused(llama)
    for other in (model, plain):
        assert not any(other.load_state_dict(state))
    assert torch.equal(model.state_dict()[f"{name}.qweight"], state[f"{name}.qweight"])
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    del state[f"{name}.scales"]
    assert model.load_state_dict(state, strict=False).missing_keys == [f"{name}.scales"]
    state[f"{name}.scales"] = torch.zeros(3, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"size mismatch for model.layers.1.self_attn.k_proj.scales"):
        model.load_state_dict(state)


@torch.no_grad()
def test_copies_casts_and_kept_weights(llama: Path, together: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    for buffer in model.buffers():
        buffer.zero_()
    assert torch.equal(twin(IDS).logits, expected)  # shares nothing with the first
    moved = twin.to("meta")
    assert all(buffer.is_meta for name, buffer in moved.named_buffers() if "fused" in name)


@torch.no_grad()
def test_float32_on_a_cpu_and_held_weights(llama: Path) -> None:
    model, plain = AutoModelForCausalLM.from_pretrained(llama), unfused(llama)
    x = torch.randn(3, 128)
    for hold in (False, True):
        for one in (model, plain):
            for layer in one.modules():
                if isinstance(layer, MarlinLinear):
                    layer.hold_dense(hold)
        for name in ("q_proj", "k_proj", "v_proj"):
            one, other = (getattr(m.model.layers[0].self_attn, name)(x) for m in (model, plain))
            assert torch.equal(one, other)


@torch.no_grad()
def test_another_input_never_gets_the_result_of_the_first(llama: Path, together: None) -> None:
    attention = AutoModelForCausalLM.from_pretrained(llama).model.layers[0].self_attn
    x, other = torch.randn(2, 1, 5, 128, dtype=torch.float16)
    expected = {name: getattr(attention, name).layer()(x) for name in FUSED["fused_qkv_proj"]}
    attention.q_proj(x)
    assert torch.equal(attention.k_proj(other), attention.k_proj.layer()(other))
    attention.q_proj(x)
    x.mul_(2)  # the same tensor, written to
    torch.testing.assert_close(attention.k_proj(x), attention.k_proj.layer()(x))
    x.div_(2)
    for name in ("v_proj", "v_proj", "q_proj", "k_proj"):  # any order, any number
        torch.testing.assert_close(getattr(attention, name)(x), expected[name])


@torch.no_grad()
def test_one_launch_for_all_projections(llama: Path, together: None, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = AutoModelForCausalLM.from_pretrained(llama).model.layers[0].self_attn
    calls = []
    whole = FusedLinear.forward
    monkeypatch.setattr(FusedLinear, "forward", lambda self, x: calls.append(x) or whole(self, x))
    for _ in range(3):
        x = torch.randn(1, 4, 128, dtype=torch.float16)
        for name in FUSED["fused_qkv_proj"]:
            getattr(attention, name)(x)
    assert len(calls) == 3


@torch.no_grad()
def test_compiled_without_a_break(llama: Path, together: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    expected = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS, use_cache=False).logits, expected)
    assert torch.equal(compiled(IDS + 1, use_cache=False).logits, model(IDS + 1, use_cache=False).logits)


def test_gradients_through_the_fused_layer(llama: Path, together: None) -> None:
    model, plain = AutoModelForCausalLM.from_pretrained(llama), unfused(llama)
    attention, parts = (m.model.layers[0].self_attn for m in (model, plain))
    x = torch.randn(1, 5, 128, dtype=torch.float16, requires_grad=True)
    expected = torch.autograd.grad(sum(getattr(parts, name)(x).float().sum() for name in FUSED["fused_qkv_proj"]), x)
    with torch.no_grad():
        attention.q_proj(x)  # what is held is without a graph
    found = torch.autograd.grad(sum(getattr(attention, name)(x).float().sum() for name in FUSED["fused_qkv_proj"]), x)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    for _ in range(2):  # the second call must not go back through a graph that the first has freed
        attention.q_proj(x).float().sum().backward()


def test_gradients_with_checkpointing(llama: Path, together: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).train()
    model.enable_input_require_grads()
    found = []
    for _ in range(2):
        model.get_input_embeddings().weight.grad = None
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(model.get_input_embeddings().weight.grad)
        model.gradient_checkpointing_enable()
    assert torch.equal(*found) and bool(found[0].any())


def test_gradients_of_the_compiled_model(llama: Path, together: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    embedded, found = model.get_input_embeddings()(IDS).detach(), []
    for one in (compiled, model):
        inputs = embedded.clone().requires_grad_()
        one(inputs_embeds=inputs, labels=IDS, use_cache=False).loss.backward()
        found.append(inputs.grad.float())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-2


def layer(rows: int, columns: int, seed: int, *, bias: bool = False, group_size: int = 64) -> MarlinLinear:
    weight = rtn_quantize(random_weight(rows, columns, seed), group_size=group_size, scale_dtype=torch.float16)
    return MarlinLinear.from_quantized(weight, torch.ones(rows) if bias else None)


@pytest.mark.parametrize(
    ("layers", "fits"),
    [
        ([layer(128, 128, 0), layer(64, 128, 1)], True),
        ([layer(128, 128, 0, group_size=-1), layer(64, 128, 1, group_size=-1)], True),
        ([layer(128, 128, 0), layer(64, 128, 1, bias=True)], False),
        ([layer(128, 128, 0), layer(64, 128, 1, group_size=32)], False),
        ([layer(128, 128, 0), layer(48, 128, 1)], False),  # padded
        ([layer(128, 128, 0), nn.Linear(128, 64)], False),  # left in full precision
        ([layer(128, 128, 0), layer(64, 192, 1)], False),
        ([layer(128, 128, 0), layer(64, 128, 1).to("meta")], False),
        ([layer(128, 128, 0), None], False),
    ],
)
def test_what_can_be_fused(layers: list, fits: bool) -> None:
    assert can_fuse(layers) is fits


@torch.no_grad()
def test_a_skipped_projection_leaves_the_others_alone(tmp_path: Path) -> None:
    settings = QuantizationConfig(group_size=64, method="rtn", skip=(r"layers\.0\.self_attn\.v_proj",))
    directory = quantized(tmp_path, "llama", settings)
    model = AutoModelForCausalLM.from_pretrained(directory)
    names = [name for name, module in model.named_modules() if isinstance(module, FusedLinear)]
    assert names == [
        "model.layers.0.mlp.fused_gate_up_proj",
        "model.layers.1.self_attn.fused_qkv_proj",
        "model.layers.1.mlp.fused_gate_up_proj",
    ]
    assert torch.equal(model(IDS).logits, unfused(directory)(IDS).logits)


def test_zero_points_are_fused_along() -> None:
    parts = []
    for seed, rows in enumerate((64, 128)):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (rows, 128), dtype=torch.uint8, generator=generator)
        zeros = torch.randint(0, 16, (rows, 2), dtype=torch.uint8, generator=generator)
        scales = torch.rand(rows, 2, generator=generator).half()
        parts.append(QuantizedWeight(codes, scales, zeros, 64))
    holder = nn.Module()
    holder.gate_proj, holder.up_proj = (MarlinLinear.from_quantized(part) for part in parts)
    assert fuse_projections(holder) == ["fused_gate_up_proj"]
    assert torch.equal(holder.fused_gate_up_proj.dequantize(), torch.cat([part.dequantize() for part in parts]))
    x = torch.randn(3, 128)
    for name, part in zip(("gate_proj", "up_proj"), parts, strict=True):
        assert torch.equal(getattr(holder, name).layer().dequantize(), part.dequantize())
        torch.testing.assert_close(getattr(holder, name)(x), x @ part.dequantize().t())
