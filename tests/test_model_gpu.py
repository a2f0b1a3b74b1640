"""The whole road on a GPU: quantize there, load there, run the kernel inside the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import EXPERT_MODELS, random_samples, save_tiny_model, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_gptq import InputError, MarlinLinear, QuantizationConfig, quantize_model
from marlin_gptq.device_memory import give_back
from marlin_gptq.eval.perplexity import evaluate_perplexity
from marlin_gptq.eval.throughput import Request, measure
from marlin_gptq.formats import marlin
from marlin_gptq.modeling import decoding, run_time
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.decoding import Decoder
from marlin_gptq.modeling.fused import split_projections

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"architecture": "mixtral"} | EXPERT_MODELS["mixtral"]])
def test_gradients_by_the_inputs(tmp_path: Path, dtype: torch.dtype, changes: dict) -> None:
    """Through fused projections, experts and the kernel, against float32 with the decoded weights."""
    output = quantized(tmp_path, CPU, dtype=dtype, **changes)
    model = AutoModelForCausalLM.from_pretrained(output, device_map="cuda")
    plain = AutoModelForCausalLM.from_pretrained(output, device_map="cuda").dequantize(torch.float32)
    ids = torch.randint(3, 96, (1, 40), device=GPU)
    exact = plain.get_input_embeddings()(ids).detach()
    found = []
    for one in (model, plain):
        inputs = exact.clone().requires_grad_()
        one(inputs_embeds=inputs.to(one.dtype), labels=ids).loss.backward()
        found.append(inputs.grad.flatten())
    assert (
        float(torch.nn.functional.cosine_similarity(*found, dim=0))
        > {torch.float16: 0.999, torch.bfloat16: 0.99}[dtype]
    )
    assert abs(float(found[0].norm() / found[1].norm()) - 1) < 0.02


def test_compiled_model_equals_the_eager_one(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized(tmp_path, CPU), device_map="cuda")
    ids = random_samples(1, longest=60, seed=4)[0][None].cuda()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 5e-3


@torch.no_grad()
def test_fused_projections_agree_with_separate_ones(tmp_path: Path) -> None:
    output = quantized(tmp_path, CPU, attention_bias=True)
    fused, plain = (AutoModelForCausalLM.from_pretrained(output, device_map="cuda") for _ in range(2))
    split_projections(plain)
    assert sum(isinstance(module, MarlinLinear) for module in fused.modules()) == 8
    assert sum(isinstance(module, MarlinLinear) for module in plain.modules()) == 14
    for length in (1, 7, 60):
        ids = torch.randint(3, 96, (2, length), device=GPU)
        assert relative(fused(ids).logits, plain(ids).logits) < 3e-3
    state, other = fused.state_dict(), plain.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    late = AutoModelForCausalLM.from_pretrained(output).to("cuda")  # moved once loaded
    ids = torch.randint(3, 96, (2, 9), device=GPU)
    assert torch.equal(late(ids).logits, fused(ids).logits)


def test_weights_lie_as_this_gpu_reads_them(tmp_path: Path) -> None:
    output = quantized(tmp_path, CPU, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(output, device_map="cuda")
    layers = [module for module in model.modules() if isinstance(module, MarlinLinear)]
    in_blocks = run_time.wanted(torch.device("cuda", 0))
    assert len(layers) == 8 and all((layer.blocks is not None) is in_blocks for layer in layers)
    stored, state = load_file(output / "model.safetensors"), model.state_dict()
    assert all(torch.equal(state[name].cpu(), tensor) for name, tensor in stored.items())
    back = model.to("cpu")
    assert all(layer.blocks is None for layer in layers)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("quantize", [True, False])
def test_a_recorded_step_makes_the_tokens_of_an_eager_one(tmp_path: Path, quantize: bool) -> None:
    output = quantized(tmp_path, CPU) if quantize else save_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(output, device_map="cuda")
    ids = torch.randint(3, 96, (3, 20), device=GPU)
    found = []
    for graphs in (False, True):
        decoder = Decoder(model, 3, 40, graphs=graphs)
        for _ in range(2):
            logits = [decoder.prefill(ids)]
            chosen = torch.randint(3, 96, (19, 3), generator=torch.Generator().manual_seed(0)).cuda()
            for tokens in chosen:  # the same text for both, so that a tie cannot part them
                decoder.tokens.copy_(tokens)
                logits.append(decoder.step().clone())
            found.append(torch.stack(logits))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])  # nothing stays of the batch before
    assert relative(found[2], found[0]) < 3e-3


@pytest.mark.parametrize("parted", [True, False])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen3", {"head_dim": 64}),
        ("mistral", {"sliding_window": 64}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recorded_steps_of_shared_heads_give_the_logits_of_a_growing_cache(
    monkeypatch: pytest.MonkeyPatch, architecture: str, changes: dict, dtype: torch.dtype, parted: bool
) -> None:
    if parted:
        monkeypatch.setattr(decoding, "_MUCH", 1)
        monkeypatch.setattr(decoding, "_PART_OF", 8)
    torch.manual_seed(0)
    config = tiny_config(architecture, initializer_range=0.1, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to("cuda")
    ids = torch.randint(3, 96, (3, 20), device=GPU)
    chosen = torch.randint(3, 96, (40, 3), device=GPU)
    found = []
    for graphs in (False, True):
        decoder = Decoder(model, 3, 60, graphs=graphs)
        assert len(decoder._ends) == (4 if graphs and parted else 1)
        for _ in range(2):
            logits = [decoder.prefill(ids).clone()]
            for tokens in chosen:
                decoder.tokens.copy_(tokens)
                logits.append(decoder.step().clone())
            found.append(torch.stack(logits).float())
    assert torch.equal(found[2], found[3])  # nothing stays of the batch before
    assert relative(found[2], found[0]) < (5e-3 if dtype == torch.float16 else 4e-2)


@pytest.mark.slow
def test_a_compiled_and_recorded_step(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized(tmp_path, CPU), device_map="cuda")
    ids = torch.randint(3, 96, (1, 20), device=GPU)
    logits = []
    for mode in ({}, {"graphs": True, "compiled": True}):
        decoder = Decoder(model, 1, 40, **mode)
        decoder.prefill(ids)
        logits.append([])
        for token in range(10):
            decoder.tokens.fill_(token + 5)
            logits[-1].append(decoder.step().clone())
    assert relative(torch.stack(logits[1]), torch.stack(logits[0])) < 5e-3


def test_throughput_on_a_gpu(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized(tmp_path, CPU), device_map="cuda")
    large = 2**14
    # 1 GiB on top of what tests before left in this process: workspaces of libraries, recorded steps.
    total = torch.cuda.get_device_properties(GPU).total_memory
    give_back(GPU)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + 2**30) / total)
    try:
        speeds = list(measure(model, [Request(2, 16, 8), Request(large, 200, 56)], ["eager", "graphs"], repeats=1))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [(speed.mode, speed.batch) for speed in speeds] == [(m, b) for m in ("eager", "graphs") for b in (2, large)]
    for fits, too_large in (speeds[:2], speeds[2:]):
        assert fits.error == "" and fits.decode_tokens_per_second > 0 and fits.peak_memory > 0
        assert too_large.error == f"out of memory at batch {large}" and too_large.decode_tokens_per_second == 0


@pytest.mark.slow
def test_perplexity_of_kernel_and_reference_agree(tmp_path: Path, tiny_llama: Path) -> None:
    quantize_model(tiny_llama, tmp_path / "out", QuantizationConfig(method="rtn"), [], device=GPU)
    kernel, reference = (
        evaluate_perplexity(tmp_path / "out", "wikitext2", 1024, device=device, limit=40) for device in (GPU, CPU)
    )
    assert kernel.kernel.startswith("CUDA kernel") and reference.kernel.startswith("reference path")
    assert kernel.tokens == reference.tokens == 40 * 1023
    assert abs(kernel.perplexity / reference.perplexity - 1) < 1e-3
