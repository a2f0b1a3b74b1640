"""Samples of equal weight: quantization/hessian.py, modeling/sample_weights.py and what passes the weights on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import EXPERT_MODELS, random_samples, save_tiny_model
from torch import Tensor

from marlin_gptq import InputError, QuantizationConfig, quantize_model
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.modeling.architecture import block_linears
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.observe import collect_hessians, collect_with_cross, stages
from marlin_gptq.modeling.sample_weights import SampleWeights
from marlin_gptq.quantization.hessian import Cross, Hessian, equal_samples, token_weights

CPU = torch.device("cpu")


def documents(*lengths: int, features: int = 12, seed: int = 0) -> list[Tensor]:
    """Inputs [T, features], each document's about a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(T, features, generator=generator) + torch.randn(features, generator=generator) for T in lengths]


def summed(parts: list[Tensor], equal: bool = True, **more: float) -> Hessian:
    """One pack of them all."""
    hessian = Hessian(parts[0].shape[1], CPU)
    weights = equal_samples([len(part) for part in parts], 1, CPU) if equal else None
    hessian.add(torch.cat(parts)[None], weights=weights, **more)
    return hessian


def mean_of_means(parts: list[Tensor]) -> Tensor:
    """The slow twin: H of each document by itself, then their mean."""
    return torch.stack([2 * x.double().t() @ x.double() / len(x) for x in parts]).mean(0)


# ---- tensors


def test_a_token_weighs_one_over_the_length_of_its_sample() -> None:
    found = equal_samples((1, 4, 2), 2, CPU)
    assert found.tolist() == [1, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5] * 2 and found.dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu_weights_are_exact_for_16_bit_inputs_too() -> None:
    parts = [part.half() for part in documents(30, 400, 70, features=256)]
    weights = equal_samples((30, 400, 70), 1, torch.device("cuda"))
    hessian = Hessian(256, weights.device)
    hessian.add(torch.cat(parts).cuda(), weights=weights)
    torch.testing.assert_close(hessian.mean().cpu().double(), mean_of_means(parts), rtol=1e-4, atol=1e-4)


def test_the_hessian_is_the_mean_of_each_samples_own() -> None:
    parts = documents(3, 40, 7, 1)
    found = summed(parts)
    torch.testing.assert_close(found.mean().double(), mean_of_means(parts), rtol=1e-5, atol=1e-5)
    assert found.tokens == 51 and found.total == pytest.approx(4)
    one_by_one = Hessian(12, CPU)
    for part in parts:
        one_by_one.add(part, weights=equal_samples((len(part),), 1, CPU))
    torch.testing.assert_close(one_by_one.mean(), found.mean())
    plain = summed(parts, equal=False).mean()
    assert float((plain - found.mean()).norm() / plain.norm()) > 0.1
    scaled = Hessian(12, CPU)
    scaled.add(torch.cat(parts), weights=1000 * equal_samples([len(part) for part in parts], 1, CPU))
    torch.testing.assert_close(scaled.mean(), found.mean())


def test_equal_lengths_change_nothing() -> None:
    parts = documents(9, 9, 9)
    torch.testing.assert_close(summed(parts).mean(), summed(parts, equal=False).mean())


def test_a_document_that_repeats_itself_keeps_its_share() -> None:
    first, second = documents(6, 11)
    found = summed([torch.cat([first] * 5), second]).mean()
    torch.testing.assert_close(found, summed([first, second]).mean())
    plain = summed([torch.cat([first] * 5), second], equal=False).mean()
    assert not torch.allclose(plain, summed([first, second], equal=False).mean(), rtol=0.05)


def test_a_token_cap_limits_equal_samples_too() -> None:
    parts = documents(5, 30)
    vectors, weights = torch.cat(parts), equal_samples((5, 30), 1, CPU)
    vectors[0] *= 50
    hessian = Hessian(12, CPU)
    hessian.add(vectors, 2.0, weights)
    both = (weights * token_weights(vectors, 2.0)).double()[:, None]
    expected = 2 * (both * vectors.double()).t() @ vectors.double() / 2  # two samples
    torch.testing.assert_close(hessian.mean().double(), expected, rtol=1e-5, atol=1e-5)


def test_cross_products_weigh_like_the_hessian() -> None:
    exact, arriving = documents(4, 25), documents(4, 25, seed=1)
    cross = Cross(12, CPU)
    cross.add(torch.cat(exact), torch.cat(arriving), weights=equal_samples((4, 25), 1, CPU))
    each = [2 * (x - y).double().t() @ y.double() / len(x) for x, y in zip(exact, arriving, strict=True)]
    torch.testing.assert_close(cross.mean().double(), torch.stack(each).mean(0), rtol=1e-5, atol=1e-5)


def test_missing_tokens_weigh_what_the_others_do() -> None:
    few, prior = summed(documents(3, 2)), summed(documents(40, 50, seed=1))
    expected = (5 * few.mean() + 7 * prior.mean()) / 12
    few.fill_up(prior, 12)
    torch.testing.assert_close(few.mean(), expected)
    assert few.tokens == 12


# ---- a block's linears


def by_hand(parts: list[Tensor]) -> Tensor:
    """H of tokens of each sample that reached a linear, each sample's tokens weighing one over its whole length."""
    total = sum(len(part) / whole for part, whole in parts)
    return sum(2 * part.t() @ part / whole for part, whole in parts) / total


@pytest.mark.parametrize("together", [False, True], ids=["alone", "packs"])
def test_a_blocks_hessians_and_crosses(tmp_path: Path, together: bool) -> None:
    stream = BlockStream(save_tiny_model(tmp_path / "model"), device=CPU)
    lengths = [5, 60, 21]
    samples = [stream.embed(torch.arange(length)[None] % 96) for length in lengths]
    other = [sample + 0.1 * torch.randn(sample.shape) for sample in samples]
    with stream.block(0) as block:
        linears = block_linears(block, "model.layers.0")
        groups = [group for stage in stages(stream, 0, linears, samples[0]) for group in stage]
        seen: dict[str, list[Tensor]] = {group[0]: [] for group in groups}
        hooks = [
            linears[name].register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
            for name in seen
        ]
        for hidden in (*samples, *other):
            stream.run(0, hidden)
        for hook in hooks:
            hook.remove()

        def passed(tensors: list[Tensor]) -> list[tuple[Tensor, tuple[int, ...]]]:
            if together:
                return [(torch.cat(tensors, dim=1), tuple(lengths))]
            return [(one, (one.shape[1],)) for one in tensors]

        if together:
            assert stream.packs(0, [(1, length) for length in lengths], 1000) == [range(3)]
        found = collect_hessians(stream, 0, groups, linears, passed(samples), equal_samples=True)
        originals = {name: linear.weight.data for name, linear in linears.items()}
        both, crosses = collect_with_cross(
            stream, 0, groups, linears, originals, passed(samples), passed(other), equal_samples=True
        )
    for name, inputs in seen.items():
        torch.testing.assert_close(
            found.hessians[name].mean(), by_hand(list(zip(inputs[:3], lengths, strict=True))), rtol=1e-3, atol=1e-5
        )
        assert found.tokens[name] == 86
        assert torch.equal(both.hessians[name].mean(), found.hessians[name].mean())
        each = [2 * (x - y).t() @ y / len(y) for y, x in zip(inputs[:3], inputs[3:], strict=True)]
        torch.testing.assert_close(crosses[name].mean(), torch.stack(each).mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", sorted(EXPERT_MODELS))
@pytest.mark.parametrize("count", [20, 3], ids=["enough tokens", "filled up"])
def test_experts_weigh_the_tokens_routed_to_them(tmp_path: Path, architecture: str, count: int) -> None:
    """The slow twin: every token routed by hand; an expert with too few is filled up with all tokens of its layer."""
    source = save_tiny_model(tmp_path / "model", architecture, **EXPERT_MODELS[architecture])
    stream = BlockStream(source, device=CPU)
    samples = [stream.embed(sample[None]) for sample in random_samples(count, longest=100)]
    lengths = tuple(sample.shape[1] for sample in samples)
    with stream.block(0) as block:
        linears = block_linears(block, "model.layers.0")
        (experts,) = (module for module in block.modules() if type(module).__name__ == "Experts")
        names = experts[0].names
        seen: list[tuple[Tensor, ...]] = []
        hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
        order = stages(stream, 0, linears, samples[0])
        seen.clear()
        for sample in samples:
            stream.run(0, sample)
        hook.remove()
        pack = [(torch.cat(samples, dim=1), lengths)]
        groups = [group for stage in order for group in stage]
        found = collect_hessians(stream, 0, groups, linears, pack, equal_samples=True)
        prefix = next(name for name in linears if f".0.{names[0]}" in name).rpartition(".0.")[0]
        everything = [(x, length) for (x, *_), length in zip(seen, lengths, strict=True)]
        for number in range(len(experts)):
            reached = [
                (x[(chosen == number).any(dim=1)], length) for (x, chosen, _), length in zip(seen, lengths, strict=True)
            ]
            for projection, image in ((names[0], lambda x: x), (names[2], experts[number].inner)):
                name = f"{prefix}.{number}.{projection}"
                expected = by_hand([(image(x), length) for x, length in reached])
                tokens = sum(len(x) for x, _ in reached)
                assert found.tokens[name] == tokens
                if name in found.filled:
                    missing = 128 - tokens
                    prior = by_hand([(image(x), length) for x, length in everything])
                    expected = (tokens * expected + missing * prior) / 128
                close = {"rtol": 2e-3, "atol": 2e-4}
                torch.testing.assert_close(found.hessians[name].mean(), expected, **close)
        assert bool(found.filled) == (count == 3)
        (shared,) = [group[0] for group in groups if group[0].endswith(".o_proj")]
        assert found.tokens[shared] == sum(lengths)


def test_vectors_that_are_not_tokens_are_refused(tmp_path: Path) -> None:
    stream = BlockStream(save_tiny_model(tmp_path / "model"), device=CPU)
    with stream.block(0) as block:
        weights = SampleWeights(block, {})
        stream.run(0, torch.zeros(1, 7, 128), (3, 4))
        assert weights.of("o_proj", torch.zeros(1, 7, 9)).sum() == pytest.approx(2)
        with pytest.raises(InputError, match="equal_samples: q_proj got 14 vectors for 7 tokens"):
            weights.of("q_proj", torch.zeros(14, 9))
        stream.run(0, torch.zeros(3, 5, 128))
        assert weights.of("o_proj", torch.zeros(15, 9)).tolist() == [pytest.approx(0.2)] * 15


# ---- whole runs


def test_windows_of_one_length_weigh_the_same_anyway(tmp_path: Path) -> None:
    source, samples = save_tiny_model(tmp_path / "model"), random_samples(30)
    found = []
    for equal in (False, True):
        config = QuantizationConfig(pack=True, equal_samples=equal)
        quantize_model(source, tmp_path / str(equal), config, samples, device=CPU)
        store = TensorStore(tmp_path / str(equal))
        found.append({name: store.get(name) for name in store.names})
    same = [(found[0][name] == found[1][name]).float().mean() for name in found[0]]
    assert min(map(float, same)) > 0.98


def test_samples_of_many_lengths_give_another_result_and_say_so(tmp_path: Path) -> None:
    source, samples = save_tiny_model(tmp_path / "model"), random_samples(8)
    reports = [
        quantize_model(source, tmp_path / str(equal), QuantizationConfig(equal_samples=equal), samples, device=CPU)
        for equal in (False, True)
    ]
    assert [record.tokens for record in reports[0].records] == [record.tokens for record in reports[1].records]
    stores = [TensorStore(tmp_path / str(equal)) for equal in (False, True)]
    name = "model.layers.0.mlp.down_proj.qweight"
    assert not torch.equal(stores[0].get(name), stores[1].get(name))
    assert "| samples of equal weight | yes |" in (tmp_path / "True" / "README.md").read_text()
    assert QuantizationConfig.from_dict(reports[1].to_dict()["config"]).equal_samples
