"""modeling/run_time.py: a layer whose weights lie in blocks computes, saves, loads and moves as one whose do not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import random_samples, random_weight, save_tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_gptq import MarlinLinear, QuantizationConfig, quantize_model
from marlin_gptq.eval.throughput import memory
from marlin_gptq.modeling import run_time
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.fused import Projection, split_projections
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.weight import QuantizedWeight

CPU = torch.device("cpu")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on the CPU too, where the reference computes them."""
    monkeypatch.setattr(run_time, "wanted", lambda device: device.type == "cpu")


def weight(rows: int, columns: int, group_size: int, asymmetric: bool) -> QuantizedWeight:
    found = rtn_quantize(random_weight(rows, columns, 0), group_size=group_size, scale_dtype=torch.float16)
    zeros = torch.randint(0, 16, found.scales.shape, dtype=torch.uint8) if asymmetric else None
    return QuantizedWeight(found.codes, found.scales, zeros, group_size)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("columns", "rows", "group_size"), [(256, 192, 64), (128, 64, -1), (384, 128, 128), (172, 48, -1)]
)
def test_a_layer_in_blocks(columns: int, rows: int, group_size: int, asymmetric: bool, everywhere: None) -> None:
    quantized = weight(rows, columns, group_size, asymmetric)
    plain, layer = (MarlinLinear.from_quantized(quantized, torch.randn(rows)) for _ in range(2))
    plain.bias = layer.bias
    layer.prepare_for_device()
    assert layer.blocks is not None and layer.qweight is None and plain.blocks is None
    before, after = plain.tensors(), layer.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(layer.dequantize(), quantized.dequantize())
    x = torch.randn(5, columns)
    assert torch.equal(layer(x), plain(x))
    if not asymmetric:  # in half precision through the reference of each kernel
        torch.testing.assert_close(layer(x.half()), plain(x.half()))
    with pytest.raises(TypeError, match=r"scales: got blocks of float16, expected scales of bfloat16"):
        layer(x.bfloat16())
    twin = copy.deepcopy(layer)
    layer.load_state_dict(dict(plain.state_dict()) | {"scales": 2 * plain.scales, "bias": 0 * plain.bias})
    assert layer.blocks is not None and torch.equal(layer.dequantize(), 2 * quantized.dequantize())
    assert torch.equal(twin.dequantize(), quantized.dequantize())
    twin.to(torch.bfloat16)
    assert twin.blocks is not None and twin.tensors()["scales"].dtype == torch.bfloat16
    twin.to("meta")
    assert twin.blocks is None and twin.qweight.is_meta


@torch.no_grad()
def test_a_model_in_blocks(tmp_path: Path, everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_model(tmp_path / "source", attention_bias=True)
    quantize_model(source, tmp_path / "out", QuantizationConfig(group_size=64, method="rtn"), [], device=CPU)
    ids = random_samples(1, longest=40)[0][None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, MarlinLinear)]
    assert len(layers) == 8 and all(layer.blocks is not None for layer in layers)
    assert memory(model)["linears"] > 0
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    def in_stream() -> Tensor:
        stream = BlockStream(tmp_path / "out", device=CPU)
        hidden = stream.embed(ids)
        for index in range(stream.n_blocks):
            with stream.block(index) as block:
                hidden = stream.run(index, hidden)
            assert all(buffer.is_meta for buffer in block.buffers())
        return stream.head(hidden)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    streamed = in_stream()
    split_projections(model)
    assert sum(isinstance(module, MarlinLinear) and module.blocks is not None for module in model.modules()) == 14
    monkeypatch.setattr(run_time, "wanted", lambda _: False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for other in (plain, model):
        torch.testing.assert_close(other(ids).logits, logits)
    assert torch.equal(in_stream(), streamed)
    monkeypatch.setattr(Projection, "together", lambda *_: True)
    torch.testing.assert_close(plain(ids).logits, logits)
