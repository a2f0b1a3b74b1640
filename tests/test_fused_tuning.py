"""The tuning's steps in fused kernels (quantization/fused_tuning.py) against plain torch (tuning_steps.py).

Run as those of tests/test_fused_loops.py: on a GPU, and in Triton's interpreter.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import tritons_interpreter
from helpers import random_weight
from torch import Tensor
from tritons_interpreter import INTERPRETED

from marlin_gptq.quantization import distillation, fused_tuning, loops, tunable, tuning_loops, tuning_steps
from marlin_gptq.quantization.distillation import divergence
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.tunable import TunableWeight

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(params=tritons_interpreter.DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return tritons_interpreter.device(request.param)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_loops, "_works", {})
    if INTERPRETED:
        tritons_interpreter.repair(monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_kernels_in_tritons_interpreter(repository: Path) -> None:
    tritons_interpreter.run(__file__, repository)


def moved(rows: int, groups: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(position, shift, start) with positions outside the codes and on their edges, scales of 0 and below, and tiny."""
    generator = torch.Generator().manual_seed(rows + columns)
    position = 5 * torch.randn(rows, groups * columns, generator=generator)
    position.view(-1)[:40] = torch.arange(-20, 20) / 2
    shift = 0.3 * torch.randn(rows, groups, generator=generator)
    start = 0.02 * torch.randn(rows, groups, generator=generator)
    start[0, 0], shift[-1, -1] = 0, -1
    start[rows // 2, 0] = 1e-9
    return position.to(device), shift.to(device), start.to(device)


SHAPES = [(3, 2, 32), (70, 3, 64), (5, 4, 128), (2, 1, 300), (9, 1, 96)]  # the last two are whole rows


@pytest.mark.parametrize(("rows", "groups", "columns"), SHAPES)
@pytest.mark.parametrize("dtypes", [(HALF, BRAIN), (BRAIN, FLOAT), (HALF, HALF)])
def test_weights_are_those_of_plain_torch_bit_for_bit(
    device: torch.device, rows: int, groups: int, columns: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    problem = moved(rows, groups, columns, device)
    found = fused_tuning.moved_weight(*problem, *dtypes)
    expected = tuning_steps.moved_weight(*problem, *dtypes)
    assert found.dtype == expected.dtype == dtypes[1] and torch.equal(found, expected)


@pytest.mark.parametrize(("rows", "groups", "columns"), SHAPES)
@pytest.mark.parametrize("dtypes", [(HALF, BRAIN), (BRAIN, FLOAT)])
def test_gradients_are_those_of_plain_torch(
    device: torch.device, rows: int, groups: int, columns: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    problem = moved(rows, groups, columns, device)
    outer = torch.randn(rows, groups * columns, generator=torch.Generator().manual_seed(1)).to(device, dtypes[1])
    # As a product's gradient may come: not contiguous.
    for gradient in (outer, outer.t().contiguous().t()):
        of_position, of_shift = fused_tuning.moved_gradients(gradient, *problem, dtypes[0])
        expected = tuning_steps.moved_gradients(gradient, *problem, dtypes[0])
        assert torch.equal(of_position, expected[0])
        torch.testing.assert_close(of_shift, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [5, 4096, 5003, 9000])
def test_differences_are_those_of_plain_torch(device: torch.device, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    p, q = (6 * torch.randn(4, vocabulary, generator=generator) for _ in range(2))
    p[1] = q[1] + 3  # one distribution
    p[2, 0], q[2, 1] = 300, -300  # nearly certain, nearly impossible
    losses, gradient = fused_tuning.differences(p.to(device), q.to(device, copy=True))
    expected, slopes = tuning_steps.differences(p.double(), q.double())
    torch.testing.assert_close(losses.cpu().double(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(gradient.cpu().double(), slopes, rtol=1e-4, atol=1e-7)


def test_nothing_finite_comes_of_nan(device: torch.device) -> None:
    p, q = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(device)
    q[1, 7] = float("nan")
    losses, gradient = fused_tuning.differences(p, q)
    assert losses.isnan().tolist() == [False, True, False] and bool(gradient[1].isnan().all())
    position, shift, start = moved(4, 2, 32, device)
    shift[1, 1] = float("nan")
    weight = fused_tuning.moved_weight(position, shift, start, HALF, FLOAT)
    assert weight.isnan().sum() == 32 and bool(weight[1, 32:].isnan().all())


def test_a_tunable_weight_and_the_loss_use_them(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through autograd; in the interpreter the choice is made for them."""
    weight = random_weight(12, 64, 2)
    x, teacher = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(3)).to(device)
    head = random_weight(40, 12, 4).to(device)
    results = []
    for chosen in (tuning_loops.FUSED, tuning_loops.PLAIN):
        if chosen is tuning_loops.PLAIN or device.type == "cpu":
            for user in (tunable, distillation):
                monkeypatch.setattr(user, "tuning_loops", lambda _, chosen=chosen: chosen)
        quantized = rtn_quantize(weight, group_size=32, scale_dtype=HALF)
        layer = TunableWeight(quantized, weight).to(device)
        loss = divergence(x @ layer()[:, :12], teacher, head)
        loss.backward()
        assert layer.position is not None and layer.position.grad is not None and layer.shift.grad is not None
        results.append((loss.detach(), layer.position.grad, layer.shift.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_runs_them_unless_they_are_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    with torch.autocast("cuda", torch.bfloat16):  # as where the tuning asks first
        assert tuning_loops.tuning_loops(gpu) is tuning_loops.FUSED
    monkeypatch.setattr(loops, "_enabled", False)
    assert tuning_loops.tuning_loops(gpu) is tuning_loops.PLAIN


@pytest.mark.skipif(INTERPRETED, reason="is about a process without a GPU")
def test_kernels_that_fail_or_disagree_cost_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    assert tuning_loops.tuning_loops(cpu) is tuning_loops.PLAIN
    monkeypatch.setattr(tuning_loops, "may_be_fused", lambda _: True)
    plain = tuning_loops.PLAIN

    def broken(*_: object) -> Tensor:
        raise RuntimeError("ptxas died\nof nothing much")

    def other(*arguments: Tensor) -> Tensor:
        return 2 * plain.moved_weight(*arguments)

    for wrong, sentence in (
        (broken, "the fused ones failed (RuntimeError: of nothing much)"),
        (other, "the fused ones disagree with it on this GPU (relative difference 1.0e+00)"),
    ):
        monkeypatch.setattr(tuning_loops, "_works", {})
        monkeypatch.setattr(tuning_loops, "FUSED", plain._replace(moved_weight=wrong))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert tuning_loops.tuning_loops(cpu) is tuning_loops.PLAIN
            assert tuning_loops.tuning_loops(cpu) is tuning_loops.PLAIN
        assert [record.getMessage() for record in caplog.records] == [
            f"tuning's steps run in plain torch, which is slower: {sentence}"
        ]
