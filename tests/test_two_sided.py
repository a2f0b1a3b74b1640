"""Rounding under both sides of a linear: quantization/two_sided.py, and the gradients by outputs that it wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXPERT_MODELS, random_hessian, random_samples, random_weight, save_tiny_model
from torch import Tensor, nn

from marlin_gptq import InputError, QuantizationConfig, QuantizationError, quantize_model
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.architecture import block_linears
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.output_gradients import (
    OutputGradients,
    chosen_samples,
    output_gradients,
    output_hessians,
)
from marlin_gptq.quantization.hessian import damp
from marlin_gptq.quantization.refine import refine
from marlin_gptq.quantization.solve import prepare, solve
from marlin_gptq.quantization.two_sided import COLOURS, NEARER, OUTPUT_DAMP, PIECE, SWEEPS, loss, refine_both_sides
from marlin_gptq.quantization.weight import QuantizedWeight

CPU = torch.device("cpu")
CONFIG = QuantizationConfig(group_size=64, damp_percent=0.01, act_order="groups", signed_scales=True, refine_sweeps=1)
TWO_SIDED = replace(CONFIG, two_sided=True)


def solved(weight: Tensor, hessian: Tensor, outputs: list[Tensor], config: QuantizationConfig = TWO_SIDED) -> Any:
    return solve(weight, prepare(hessian, config, 64), config, torch.float16, outputs=outputs)


def equal(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


# ---- tensors


def one_sweep(damped: Tensor) -> Callable[[Tensor, QuantizedWeight], QuantizedWeight]:
    return partial(refine, hessian=damped, sweeps=1)


def test_independent_outputs_are_refined_for_themselves() -> None:
    """With diagonal M a row's target is its own weight, whatever the others do: so many sweeps more of refinement."""
    weight, hessian = random_weight(40, 128, 1), random_hessian(128, 2)
    prepared = prepare(hessian, CONFIG, 64)
    assert prepared.damped is not None
    begun = solve(weight, prepared, CONFIG, torch.float16)
    diagonal = torch.rand(40, generator=torch.Generator().manual_seed(3)).diag()
    expected = refine(weight, begun, prepared.damped, sweeps=2)
    for outputs in ([diagonal], [diagonal[:30, :30], diagonal[30:, 30:]]):
        found = refine_both_sides(weight, begun, prepared.damped, outputs, one_sweep(prepared.damped), sweeps=2)
        assert (found.codes != expected.codes).float().mean() < 1e-3  # the target is the weight but for rounding
        torch.testing.assert_close(found.scales, expected.scales, rtol=2e-3, atol=0)


def test_rows_are_refined_towards_where_they_would_best_be() -> None:
    """The slow twin: the least-squares place of each piece given all others, from the same errors."""
    rows = 4 * PIECE + 20
    weight, hessian, output = random_weight(rows, 64, 4), random_hessian(64, 5), random_hessian(rows, 6)
    prepared = prepare(hessian, CONFIG, 64)
    assert prepared.damped is not None
    begun = solve(weight, prepared, CONFIG, torch.float16)
    errors = (begun.dequantize() - weight).double()
    damped = damp(output, OUTPUT_DAMP).double()
    seen: list[Tensor] = []

    def look(target: Tensor, quantized: QuantizedWeight) -> QuantizedWeight:
        seen.append(target)
        return quantized

    refine_both_sides(weight, begun, prepared.damped, [output], look, sweeps=2)
    pieces = [list(range(first, min(first + PIECE, rows))) for first in range(0, rows, PIECE)]
    coloured = [[row for piece in pieces[colour::COLOURS] for row in piece] for colour in range(COLOURS)]
    for colour in range(COLOURS):
        best = torch.empty(rows, 64, dtype=torch.float64)
        for piece in pieces[colour::COLOURS]:
            others = [row for row in range(rows) if row not in piece]
            made_up = torch.linalg.solve(damped[piece][:, piece], damped[piece][:, others] @ errors[others])
            best[piece] = weight[piece] - made_up
        own = coloured[colour]
        torch.testing.assert_close(seen[colour].double(), best[own], rtol=1e-3, atol=1e-4)
        # Nothing was better: the next sweep does not go as far.
        made = begun.dequantize()[own]
        torch.testing.assert_close(seen[COLOURS + colour] - made, NEARER * (seen[colour] - made), atol=1e-5, rtol=1e-4)


def test_it_costs_less_under_both_sides_and_sweeps_never_raise_that() -> None:
    weight, hessian = random_weight(300, 128, 7), random_hessian(128, 8)
    outputs = [random_hessian(200, 9), random_hessian(100, 10)]
    joined = torch.block_diag(*(damp(output, OUTPUT_DAMP) for output in outputs))
    prepared = prepare(hessian, TWO_SIDED, 64)
    damped = prepared.damped
    assert damped is not None
    begun = solve(weight, prepared, CONFIG, torch.float16)

    def cost(quantized: QuantizedWeight) -> float:
        return loss(weight, quantized.dequantize(), damped, joined)

    found = [refine_both_sides(weight, begun, damped, outputs, one_sweep(damped), sweeps=n) for n in range(6)]
    costs = [cost(quantized) for quantized in found]
    assert equal(found[0], begun)
    assert costs == sorted(costs, reverse=True)
    assert costs[SWEEPS] < 0.95 * costs[0]
    assert cost(solved(weight, hessian, outputs)) == costs[SWEEPS], "the recipe's"


def test_outputs_that_all_say_the_same_do_not_run_away() -> None:
    """M of rank one: each of five pieces would make up for all others, and all of them together fivefold."""
    weight, hessian = random_weight(5 * PIECE, 128, 21), random_hessian(128, 22)
    output = torch.ones(5 * PIECE, 5 * PIECE)
    prepared = prepare(hessian, CONFIG, 64)
    damped = prepared.damped
    assert damped is not None
    begun = solve(weight, prepared, CONFIG, torch.float16)
    found = refine_both_sides(weight, begun, damped, [output], one_sweep(damped), sweeps=8)
    costs = [loss(weight, x.dequantize(), damped, damp(output, OUTPUT_DAMP)) for x in (begun, found)]
    assert costs[1] < 0.9 * costs[0]


def test_linears_of_a_stack_do_not_feel_one_another() -> None:
    weights, hessian = [random_weight(rows, 128, rows) for rows in (100, 130, 3)], random_hessian(128, 11)
    outputs = [random_hessian(len(weight), 12 + len(weight)) for weight in weights]
    stacked = solved(torch.cat(weights), hessian, outputs)
    first = 0
    for weight, output in zip(weights, outputs, strict=True):
        assert equal(stacked.rows(first, first + len(weight)), solved(weight, hessian, [output]))
        first += len(weight)


def test_rows_at_once_change_nothing_but_memory() -> None:
    weight, hessian, output = random_weight(40, 128, 13), random_hessian(128, 14), random_hessian(40, 15)
    prepared = prepare(hessian, TWO_SIDED, 64)
    one, other = (solve(weight, prepared, TWO_SIDED, torch.float16, outputs=[output], rows=rows) for rows in (None, 2))
    assert equal(one, other)


# ---- gradients


def place(stream: BlockStream, where: str = "device") -> Callable[[list[tuple[int, int]], torch.dtype], Activations]:
    return lambda shapes, dtype: Activations(shapes, stream.config.hidden_size, dtype, stream.device, place=where)


def taken(stream: BlockStream, samples: list[Tensor], seeds: dict[int, int]) -> OutputGradients:
    hidden = place(stream)([(1, len(sample)) for sample in samples], stream.dtype)
    for position, sample in enumerate(samples):
        hidden.put(position, stream.embed(sample[None]))
    return output_gradients(stream, hidden, seeds, place(stream))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_whole_model(tmp_path: Path, tied: bool) -> None:
    """The slow twin: transformers' model, its own loss, one document after the other."""
    from transformers import AutoModelForCausalLM

    source = save_tiny_model(tmp_path / "model", num_hidden_layers=3, tie_word_embeddings=tied, initializer_range=0.1)
    samples, seeds = random_samples(5, longest=20), {0: 3, 3: 8, 4: 1}
    stream = BlockStream(source, device=CPU, dtype=torch.float32)
    kept = taken(stream, samples, seeds)

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    linears = {name: module for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            output.register_hook(lambda gradient: seen[name].append(gradient.flatten(0, 1)))

        return hook

    for name, linear in linears.items():
        linear.register_forward_hook(watch(name))
    for position, seed in seeds.items():
        logits = model(samples[position][None]).logits[0]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator)
        nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()
    for index in range(3):
        with stream.block(index) as block:
            found = output_hessians(stream, index, block_linears(block, stream.block_name(index)), kept)
        for name, output in found.items():
            vectors = torch.cat(seen[name.removeprefix("model.layers.")]).double()
            wanted = 2 * vectors.t() @ vectors / len(vectors)
            torch.testing.assert_close(output.double(), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_as_many_samples_as_have_the_tokens() -> None:
    assert chosen_samples([5, 3, 4], 8) == [0, 1]
    assert chosen_samples([5, 3, 4], 9) == [0, 1, 2]
    assert chosen_samples([5, 3, 4], 100) == [0, 1, 2] and chosen_samples([50], 1) == [0] and chosen_samples([]) == []


# ---- whole runs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("two-sided") / "source", initializer_range=0.1)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    store = TensorStore(directory)
    return {name: store.get(name) for name in store.names}


def divergence(one: Path, other: Path) -> float:
    """KL of the next-token distributions on text that nobody has seen, nats."""
    logs = []
    for directory in (one, other):
        stream = BlockStream(directory, device=CPU, dtype=torch.float32)
        found = []
        for sample in random_samples(20, seed=99):
            hidden = stream.embed(sample[None])
            for index in range(stream.n_blocks):
                with stream.block(index):
                    hidden = stream.run(index, hidden)
            found.append(torch.log_softmax(stream.head(hidden)[0].double(), -1))
        logs.append(torch.cat(found))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def test_the_model_says_more_nearly_what_it_said(source: Path, tmp_path: Path) -> None:
    samples = random_samples(60)
    found = []
    for config in (CONFIG, TWO_SIDED):
        report = quantize_model(source, tmp_path / str(config.two_sided), config, samples, device=CPU)
        found.append(divergence(source, report.output))
        assert ("gradients" in report.costs) == config.two_sided
    assert found[1] < 0.95 * found[0], found


def test_where_gradients_wait_changes_no_bit(source: Path, tmp_path: Path) -> None:
    config = replace(TWO_SIDED, correct_target=0.5, true_sequential=True)
    for name, spill in {"plain": None, "spilled": "disk"}.items():
        quantize_model(source, tmp_path / name, config, random_samples(10), device=CPU, spill=spill)
    one, other = (tensors_of(tmp_path / name) for name in ("plain", "spilled"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_models_with_experts_are_refused_before_any_work(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "experts", "mixtral", **EXPERT_MODELS["mixtral"])
    with pytest.raises(
        InputError, match=r"^two_sided: got true for a model with experts, .*; use --no-two-sided .or --preset marlin.$"
    ):
        quantize_model(source, tmp_path / "out", TWO_SIDED, random_samples(4), device=CPU)
    quantize_model(source, tmp_path / "rounded", replace(TWO_SIDED, method="rtn"), [], device=CPU)


def test_a_loss_without_gradients_is_one_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> dict[str, Tensor]:
        return {f"model.layers.0.self_attn.{name}_proj": torch.full((64, 64), torch.nan) for name in "qkv"}

    monkeypatch.setattr("marlin_gptq.block_solver.output_hessians", broken)
    with pytest.raises(
        QuantizationError, match=r"q_proj, .*: the gradients of its outputs hold NaN or Inf; use --no-tw"
    ):
        quantize_model(source, tmp_path / "out", TWO_SIDED, random_samples(4), device=CPU)
    assert not (tmp_path / "out").exists()


# ---- on a GPU


@pytest.mark.gpu
def test_on_a_gpu_outputs_weigh_what_they_do_on_a_cpu(source: Path) -> None:
    """In bfloat16, from the gradients that the CPU has found: a GPU would draw other tokens."""
    samples, gpu = random_samples(12, longest=60), torch.device("cuda")
    stream = BlockStream(source, device=CPU)
    kept = taken(stream, samples, {number: number for number in range(12)})

    def moved(activations: Activations) -> Activations:
        copy = Activations(activations.shapes, stream.config.hidden_size, torch.bfloat16, gpu)
        for position, states in enumerate(activations):
            copy.put(position, states.to(gpu, torch.bfloat16))
        return copy

    there = OutputGradients({1: moved(kept.inputs[1])}, {1: moved(kept.gradients[1])})
    found = []
    for device, gradients in ((CPU, kept), (gpu, there)):
        stream = BlockStream(source, device=device)
        with stream.block(1) as block:
            found.append(output_hessians(stream, 1, block_linears(block, stream.block_name(1)), gradients))
    for name, output in found[0].items():
        other = found[1][name].cpu()
        assert (output - other).norm() < 0.05 * output.norm(), name


@pytest.mark.gpu
def test_on_a_gpu_a_run_can_be_repeated_to_the_bit(source: Path, tmp_path: Path) -> None:
    config, samples = replace(TWO_SIDED, correct_target=0.5), random_samples(60)
    for name in ("one", "other"):
        quantize_model(source, tmp_path / name, config, samples, device=torch.device("cuda"))
    one, other = (tensors_of(tmp_path / name) for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    quantize_model(source, tmp_path / "plain", replace(config, two_sided=False), samples, device=torch.device("cuda"))
    assert divergence(source, tmp_path / "one") < 0.95 * divergence(source, tmp_path / "plain")
