"""compat.py: the original package's interface, its shapes, tolerances and errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import marlin_gptq.compat as marlin

K, N = 256, 512


def problem(m: int, groupsize: int, k: int = K, n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations [m, k], a float16 weight [k, n] on its grid, scales [n, groups]."""
    groups = 1 if groupsize == -1 else k // groupsize
    codes = torch.randint(0, 16, (k, n))
    scales = (torch.rand(groups, n) / 20 + 0.01).half()
    weight = (codes - 8) * scales.repeat_interleave(k // groups, dim=0)
    return torch.randn(m, k).half(), weight.half(), scales.t().contiguous()


def layer_of(weight: torch.Tensor, scales: torch.Tensor, groupsize: int) -> marlin.Layer:
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    linear.weight.data = weight.t().contiguous()
    layer = marlin.Layer(weight.shape[0], weight.shape[1], groupsize)
    layer.pack(linear, scales)
    return layer


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().mean() / other.float().abs().mean())


@pytest.mark.parametrize("groupsize", [-1, 128])
@pytest.mark.parametrize("m", [1, 16, 17, 65])
def test_mul_and_layer(m: int, groupsize: int) -> None:
    A, weight, scales = problem(m, groupsize)
    layer = layer_of(weight, scales, groupsize)
    C = torch.full((m, N), torch.nan).half()
    workspace = torch.zeros(N // 128 * 16, dtype=torch.int32)
    assert marlin.mul(A, layer.B, C, layer.s, workspace) is None
    expected = A.float() @ weight.float()
    assert relative(C, expected) < 1e-3
    assert torch.equal(layer(A), C)
    assert torch.equal(layer(A.view(1, m, K)), C.view(1, m, N))
    for thread_k, thread_n in ((128, 128), (64, 256)):
        other = torch.empty_like(C)
        marlin.mul(A, layer.B, other, layer.s, workspace, thread_k, thread_n, -1, 16)
        assert torch.equal(other, C)
    assert layer(A[:0]).shape == (0, N)


def test_gradients_pass_through_a_layer() -> None:
    A, weight, scales = problem(3, 128)
    (found,) = torch.autograd.grad(layer_of(weight, scales, 128)(A.requires_grad_()).float().sum(), A)
    assert relative(found, torch.ones(3, N) @ weight.float().t()) < 1e-3


def test_one_group_of_128_is_the_whole_row() -> None:
    A, weight, scales = problem(3, 128, k=128, n=256)
    assert relative(layer_of(weight, scales, 128)(A), A.float() @ weight.float()) < 1e-3


def test_buffers_are_those_of_the_original() -> None:
    layer = marlin.Layer(K, N, groupsize=128)
    assert (layer.k, layer.n, layer.groupsize) == (K, N, 128)
    assert {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()} == {
        "B": ((K // 16, 2 * N), torch.int32),
        "s": ((2, N), torch.float16),
    }
    assert layer.workspace.shape == (N // 128 * 16,) and layer.workspace.dtype == torch.int32
    assert marlin.Layer(K, N).groupsize == K and marlin.Layer(K, N).s.shape == (1, N)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((K, N, 64), "groupsize: got 64, only -1 and 128 are supported"),
        ((100, N), "`infeatures` must be divisible by 128"),
        ((K, 128), "`outfeatures` by 256"),
        ((0, N), "infeatures 0"),
    ],
)
def test_layers_that_there_are_none_of(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        marlin.Layer(*arguments)


def call(**changes: Any) -> None:
    A, weight, scales = problem(2, 128)
    layer = layer_of(weight, scales, 128)
    arguments: dict[str, Any] = {
        "A": A, "B": layer.B, "C": torch.empty(2, N).half(), "s": layer.s, "workspace": layer.workspace,
    }  # fmt: skip
    marlin.mul(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"thread_k": 64, "thread_n": 128}, RuntimeError, "No kernel implementation for thread_k=64, thread_n=128"),
        ({"workspace": torch.zeros(63, dtype=torch.int32)}, RuntimeError, "workspace must be of size at least 64"),
        ({"max_par": 17}, RuntimeError, "workspace must be of size at least 68"),
        ({"A": torch.zeros(2, K).bfloat16()}, TypeError, r"A: got torch\.bfloat16, expected torch\.float16"),
        ({"C": torch.zeros(2, N).bfloat16()}, TypeError, r"C: got torch\.bfloat16"),
        ({"s": torch.zeros(2, N)}, TypeError, r"s: got torch\.float32"),
        ({"C": torch.zeros(3, N).half()}, ValueError, r"C: got \[3, 512\]"),
        ({"B": torch.zeros(8, 8, dtype=torch.int32)}, ValueError, r"B: got \[8, 8\], expected \[16, 1024\]"),
        ({"s": torch.zeros(4, N).half()}, RuntimeError, "No kernel implementation .* groupsize=64"),
        ({"A": torch.zeros(K).half()}, ValueError, "expected two dimensions"),
    ],
)
def test_calls_that_fail(changes: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(**changes)


def test_tiles_that_do_not_divide_the_problem() -> None:
    """128 outputs: fine up to 16 rows, not compatible above, as in the original."""
    from marlin_gptq.formats.marlin import pack_codes

    B, s = pack_codes(torch.randint(0, 16, (128, 128), dtype=torch.uint8)), torch.ones(1, 128).half()
    workspace = torch.zeros(16, dtype=torch.int32)
    marlin.mul(torch.zeros(16, 128).half(), B, torch.empty(16, 128).half(), s, workspace)
    with pytest.raises(
        RuntimeError, match=r"Problem \(m=17, n=128, k=128\) not compatible with thread_k=64, thread_n=256"
    ):
        marlin.mul(torch.zeros(17, 128).half(), B, torch.empty(17, 128).half(), s, workspace)


def test_pack_says_what_it_needs() -> None:
    layer, linear = marlin.Layer(K, N, 128), nn.Linear(K, N, bias=False)
    with pytest.raises(ValueError, match=r"only torch\.half weights are supported"):
        layer.pack(linear, torch.ones(N, 2))
    with pytest.raises(ValueError, match=r"scales: got \[2, 512\], expected \[512, 2\]"):
        layer.pack(linear.half(), torch.ones(2, N).half())
    with pytest.raises(ValueError, match="linear: got a weight"):
        layer.pack(nn.Linear(K, K).half(), torch.ones(N, 2).half())
    with pytest.warns(UserWarning, match="this layer has no bias"):
        layer.pack(nn.Linear(K, N).half(), torch.ones(N, 2).half())
    layer.pack(linear, torch.zeros(N, 2).half())  # scales of 0: no NaN
    assert not layer(torch.ones(1, K).half()).any()


def test_replace_linear() -> None:
    model = nn.ModuleDict(
        {
            "block": nn.ModuleDict({"up": nn.Linear(K, N, bias=False), "down": nn.Linear(N, K, bias=False)}),
            "lm_head": nn.Linear(K, 300, bias=False),
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marlin.replace_linear(model, lambda name: name != "lm_head", groupsize=128)
    up, head = model.get_submodule("block.up"), model["lm_head"]
    assert isinstance(up, marlin.Layer) and up.groupsize == 128 and isinstance(head, nn.Linear)
    assert set(model.state_dict()) == {"block.up.B", "block.up.s", "block.down.B", "block.down.s", "lm_head.weight"}
    marlin.replace_linear(up)  # a layer itself stays
    biased = nn.Sequential(nn.Linear(K, N))
    with pytest.warns(UserWarning, match="0 has a bias"):
        marlin.replace_linear(biased)
    assert isinstance(biased[0], marlin.Layer)
