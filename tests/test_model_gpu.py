"""The whole road on a GPU: quantize there, load there, run the kernel inside the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_samples, save_tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_gptq import InputError, QuantizationConfig, quantize_model
from marlin_gptq.eval.perplexity import evaluate_perplexity
from marlin_gptq.formats import marlin
from marlin_gptq.modeling.blocks import BlockStream

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.cpu().double()).norm() / expected.cpu().double().norm())


def quantized(tmp_path: Path, device: torch.device, **changes) -> Path:
    source = save_tiny_model(tmp_path / "source", dtype=changes.pop("dtype", torch.float16), **changes)
    output = tmp_path / f"on-{device.type}"
    quantize_model(source, output, QuantizationConfig(group_size=64), random_samples(12), device=device)
    return output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantizing_on_the_gpu_gives_what_the_cpu_gives(tmp_path: Path, dtype: torch.dtype) -> None:
    # Computed in float16 or bfloat16 there and float32 here: weights midway between two codes may differ.
    on_gpu, on_cpu = (
        load_file(quantized(tmp_path / device.type, device, dtype=dtype) / "model.safetensors") for device in (GPU, CPU)
    )
    assert on_gpu.keys() == on_cpu.keys()
    first = "model.layers.0.self_attn.q_proj.qweight"
    same = marlin.unpack_codes(on_gpu[first]) == marlin.unpack_codes(on_cpu[first])
    assert float(same.float().mean()) > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}])
def test_loaded_model_runs_the_kernel_and_agrees_with_the_reference(
    tmp_path: Path, dtype: torch.dtype, changes: dict
) -> None:
    output = quantized(tmp_path, CPU, dtype=dtype, **changes)
    ids = random_samples(1, longest=60, seed=3)[0][None]
    stream = BlockStream(output, device=CPU)
    hidden = stream.embed(ids)
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = stream.run(index, hidden)
    expected = stream.head(hidden)

    model = AutoModelForCausalLM.from_pretrained(output, device_map="cuda")
    with torch.no_grad():
        logits = model(ids.cuda()).logits
    assert logits.dtype == dtype
    assert relative(logits, expected) < {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cuda")
    with torch.no_grad():
        assert torch.equal(again(ids.cuda()).logits, logits)
    one, other = (m.generate(ids.cuda(), max_new_tokens=12, do_sample=False) for m in (model, again))
    assert one.shape[1] > ids.shape[1] and torch.equal(one, other)


def test_streamed_model_runs_the_kernel(tmp_path: Path) -> None:
    output = quantized(tmp_path, CPU)
    stream = BlockStream(output, device=GPU)
    assert stream.kernel_name().startswith("CUDA kernel (sm_")
    ids = random_samples(1, longest=60, seed=3)[0][None].cuda()
    hidden = stream.embed(ids)
    for index in range(stream.n_blocks):
        with stream.block(index) as block:
            assert all(buffer.is_cuda for buffer in block.buffers())
            hidden = stream.run(index, hidden)
    model = AutoModelForCausalLM.from_pretrained(output, device_map="cuda")
    with torch.no_grad():
        assert relative(stream.head(hidden), model(ids).logits) < 2e-3


def test_the_kernel_refuses_another_dtype_by_name(tmp_path: Path) -> None:
    output = quantized(tmp_path, CPU)
    with pytest.raises(InputError, match=r"its scales are torch.float16, which the kernel cannot run in"):
        BlockStream(output, device=GPU, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(output, device_map="cuda")
    with pytest.raises(TypeError, match=r"scales: got .* float16, expected .* bfloat16 \(the dtype of a\)"):
        model.model.layers[0].mlp.up_proj(torch.zeros(1, 128, dtype=torch.bfloat16, device=GPU))


def test_compiled_model_equals_the_eager_one(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized(tmp_path, CPU), device_map="cuda")
    ids = random_samples(1, longest=60, seed=4)[0][None].cuda()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 5e-3


@pytest.mark.slow
def test_perplexity_of_kernel_and_reference_agree(tmp_path: Path, tiny_llama: Path) -> None:
    quantize_model(tiny_llama, tmp_path / "out", QuantizationConfig(method="rtn"), [], device=GPU)
    kernel, reference = (
        evaluate_perplexity(tmp_path / "out", "wikitext2", 1024, device=device, limit=40) for device in (GPU, CPU)
    )
    assert kernel.kernel.startswith("CUDA kernel") and reference.kernel.startswith("reference path")
    assert kernel.tokens == reference.tokens == 40 * 1023
    assert abs(kernel.perplexity / reference.perplexity - 1) < 1e-3
