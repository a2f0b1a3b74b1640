"""gemm_blocked in time: determinism, splits of the work, streams, graphs."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import (
    BFLOAT16,
    FLOAT16,
    LIMIT,
    activations,
    differing_where_kernels_overlap,
    dirty_tickets,
    exact,
    packed_weight,
    relative_error,
)
from torch import Tensor

from marlin_gptq.kernel import blocked, gemm_blocked, library
from marlin_gptq.kernel.blocked_op import CAPABILITY, _gemm_blocked_cuda
from marlin_gptq.kernel.library import BlockedChoice

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == CAPABILITY
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not library.status().available, reason=f"no kernel: {library.status().reason}"),
    pytest.mark.skipif(not hopper, reason="needs a GPU of compute capability 9.0"),
]


def weight(k: int, n: int, dtype: torch.dtype = FLOAT16, seed: int = 0) -> Tensor:
    return blocked.to_blocks(*packed_weight(k, n, 128, dtype, seed=seed), None, 128)


def multiply(a: Tensor, blocks: Tensor, n: int) -> Tensor:
    return gemm_blocked(a, blocks, n=n, group_size=128)


@pytest.mark.parametrize("blocks", [1, 7, 131, 132])
@pytest.mark.parametrize("m, dtype", [(10, BFLOAT16), (30, FLOAT16), (50, FLOAT16), (130, BFLOAT16), (300, FLOAT16)])
def test_forced_grids(m: int, dtype: torch.dtype, blocks: int) -> None:
    """However the work is cut, the result is right, repeatable, and the tickets are clean."""
    k, n = 4096, 576
    packed = packed_weight(k, n, 128, dtype)
    layer = blocked.to_blocks(*packed, None, 128)
    a = activations(m, k, dtype)
    plan = library.plan_blocked(m, n, k, 128, sms=132)
    choice = BlockedChoice(int(plan["variant"]), int(plan["m_tiles"]) * int(plan["n_tiles"]), blocks)
    out = _gemm_blocked_cuda(a, layer, None, None, n, 128, False, choice)
    assert relative_error(out, exact(a, *packed)) < LIMIT[dtype]
    for _ in range(20):
        assert torch.equal(out, _gemm_blocked_cuda(a, layer, None, None, n, 128, False, choice))
    assert dirty_tickets()[0] == 0


EQUAL = [
    (17, 4096, 4096),
    (32, 11008, 4096),
    (64, 4096, 6144),
    (128, 4096, 4096),
    (256, 4096, 4096),
    (1000, 4096, 6144),
]
EQUAL += [(2048, 4096, 4096), (4096, 4096, 6144)]


@pytest.mark.parametrize("m, k, n", EQUAL)
@pytest.mark.parametrize("noise", [False, True], ids=["alone", "beside other work"])
def test_sixty_equal_runs(m: int, k: int, n: int, noise: bool) -> None:
    layer, a = weight(k, n), activations(m, k, FLOAT16)
    first = multiply(a, layer, n)
    other = torch.cuda.Stream()
    busy = torch.randn(2048, 2048, device="cuda", dtype=FLOAT16)
    torch.cuda.synchronize()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for run in range(60):
        if noise:
            with torch.cuda.stream(other):
                torch.mm(busy[: 64 + 32 * (run % 40)], busy)
        differing += (multiply(a, layer, n) != first).sum()
    assert int(differing) == 0
    assert dirty_tickets()[0] == 0


def test_streams_at_once() -> None:
    """Each stream has its own workspace: launches that overlap do not disturb each other."""
    problems = []
    for seed, (m, k, n) in enumerate([(17, 8192, 1024), (64, 4096, 1024), (256, 4096, 512), (40, 11008, 1024)]):
        a, layer = activations(m, k, FLOAT16, seed=10 + seed), weight(k, n, seed=seed)
        problems.append((torch.cuda.Stream(), a, layer, n, multiply(a, layer, n)))
    torch.cuda.synchronize()
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in problems]
    torch.cuda.synchronize()
    for _ in range(100):
        for (stream, a, layer, n, expected), count in zip(problems, wrong, strict=True):
            with torch.cuda.stream(stream):
                count += (multiply(a, layer, n) != expected).sum()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0] * len(problems)
    assert dirty_tickets()[0] == 0


@pytest.mark.parametrize("m", [20, 100, 500])
def test_graph_replays(m: int) -> None:
    layer, a = weight(4096, 1024), activations(m, 4096, FLOAT16)
    graph = torch.cuda.CUDAGraph()
    multiply(a, layer, 1024)
    with torch.cuda.graph(graph):
        first, second = multiply(a, layer, 1024), multiply(a, layer, 1024)
    for seed in range(20):
        a.copy_(activations(m, 4096, FLOAT16, seed=seed))
        graph.replay()
        eager = multiply(a, layer, 1024)
        assert torch.equal(first, eager) and torch.equal(second, eager)
    assert dirty_tickets()[0] == 0


@pytest.mark.parametrize("m", [17, 64, 300])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_chain_of_layers_that_overlap(m: int, graph: bool) -> None:
    """Each layer reads what the one before, or torch, wrote last: weights may come early, nothing else."""
    layers = [weight(4096, 4096, seed=seed) for seed in range(4)]

    def chain(x: Tensor) -> Tensor:
        for index, layer in enumerate(layers):
            x = multiply(x, layer, 4096) * 0.05 if index == 1 else multiply(x, layer, 4096)
        return x

    inputs = [activations(m, 4096, FLOAT16, seed=seed) / 64 for seed in range(10)]
    assert differing_where_kernels_overlap(chain, inputs, graph) == 0
    assert dirty_tickets()[0] == 0


def test_nothing_but_the_output_is_allocated() -> None:
    layer, a = weight(4096, 1024), activations(40, 4096, FLOAT16)
    multiply(a, layer, 1024)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    out = multiply(a, layer, 1024)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    assert torch.cuda.mem_get_info()[0] == free and out.shape == (40, 1024)


def test_opcheck() -> None:
    layer = weight(256, 128)
    for m in (0, 1, 40):
        arguments = (activations(m, 256, FLOAT16), layer, None, activations(1, 128, FLOAT16)[0], 128, 128, False)
        torch.library.opcheck(torch.ops.marlin_gptq.gemm_blocked.default, arguments)
