"""The CUDA kernel in time: determinism, splits of the work, streams, graphs, torch.compile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

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

from marlin_gptq.kernel import gemm, library, set_overlap
from marlin_gptq.kernel.op import _gemm_with_grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not library.status().available, reason=f"no kernel: {library.status().reason}"),
]


@pytest.mark.parametrize("grid", [1, 7, 131, 132])
@pytest.mark.parametrize("m, dtype", [(3, FLOAT16), (16, BFLOAT16), (50, FLOAT16)])
def test_forced_grids(m: int, dtype: torch.dtype, grid: int) -> None:
    """However the work is cut, the result is right, repeatable, and the tickets are clean."""
    k, n = 4096, 576
    qweight, scales = packed_weight(k, n, 128, dtype)
    a = activations(m, k, dtype)
    out = _gemm_with_grid(a, qweight, scales, None, 128, grid)
    assert relative_error(out, exact(a, qweight, scales)) < LIMIT[dtype]
    for _ in range(20):
        assert torch.equal(out, _gemm_with_grid(a, qweight, scales, None, 128, grid))
    assert dirty_tickets()[0] == 0


def test_grids_that_do_not_fit_are_refused() -> None:
    qweight, scales = packed_weight(256, 128, 128, FLOAT16)
    a = activations(1, 256, FLOAT16)
    for grid in (-1, 3, 10**6):
        with pytest.raises(RuntimeError, match="grid: needs 1 to"):
            _gemm_with_grid(a, qweight, scales, None, 128, grid)


@pytest.mark.parametrize("m, k, n", [(1, 4096, 4096), (16, 11008, 4096), (48, 4096, 1024), (300, 1024, 6144)])
@pytest.mark.parametrize("noise", [False, True], ids=["alone", "beside other work"])
def test_two_hundred_equal_runs(m: int, k: int, n: int, noise: bool) -> None:
    qweight, scales = packed_weight(k, n, 128, FLOAT16)
    a = activations(m, k, FLOAT16)
    first = gemm(a, qweight, scales, None, 128)
    other = torch.cuda.Stream()
    busy = torch.randn(2048, 2048, device="cuda", dtype=FLOAT16)
    torch.cuda.synchronize()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for run in range(200):
        if noise:
            with torch.cuda.stream(other):
                torch.mm(busy[: 64 + 32 * (run % 40)], busy)
        differing += (gemm(a, qweight, scales, None, 128) != first).sum()
    assert int(differing) == 0
    assert dirty_tickets()[0] == 0


def test_streams_at_once() -> None:
    """Each stream has its own workspace: launches that overlap do not disturb each other."""
    problems = []
    for seed, (m, k, n) in enumerate([(1, 8192, 1024), (16, 4096, 1024), (40, 4096, 512), (8, 11008, 1024)]):
        a, weight = activations(m, k, FLOAT16, seed=10 + seed), packed_weight(k, n, 128, FLOAT16, seed=seed)
        problems.append((torch.cuda.Stream(), a, weight, gemm(a, *weight, None, 128)))
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = [[] for _ in problems]
    for _ in range(100):
        for results, (stream, a, weight, _expected) in zip(outputs, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(gemm(a, *weight, None, 128))
    torch.cuda.synchronize()
    for results, (*_, expected) in zip(outputs, problems, strict=True):
        assert all(torch.equal(out, expected) for out in results)
    assert dirty_tickets()[0] == 0


def test_the_current_stream_is_used() -> None:
    """Inputs made late on a side stream are seen: the kernel waited for them."""
    qweight, scales = packed_weight(1024, 512, 128, FLOAT16)
    a = torch.zeros(4, 1024, device="cuda", dtype=FLOAT16)
    fresh = activations(4, 1024, FLOAT16)
    expected = gemm(fresh, qweight, scales, None, 128)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        a.copy_(fresh)
        out = gemm(a, qweight, scales, None, 128)
    stream.synchronize()
    assert torch.equal(out, expected)


def captured(a: Tensor, weight: tuple[Tensor, Tensor], calls: int) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [gemm(a, *weight, None, 128) for _ in range(calls)]
    return graph, outputs


def test_graph_capture_and_replay() -> None:
    weight = packed_weight(4096, 1024, 128, FLOAT16)
    a = activations(2, 4096, FLOAT16)
    graph, (first, second) = captured(a, weight, calls=2)
    for seed in range(20):
        a.copy_(activations(2, 4096, FLOAT16, seed=seed))
        graph.replay()
        eager = gemm(a, *weight, None, 128)
        assert torch.equal(first, eager) and torch.equal(second, eager)
    assert dirty_tickets()[0] == 0


def test_graphs_replayed_at_once() -> None:
    """Captured one after the other on the same stream, replayed side by side on three."""
    inputs = [
        (activations(m, 8192, FLOAT16, seed=m), packed_weight(8192, 1024, 128, FLOAT16, seed=m)) for m in (1, 12, 24)
    ]
    expected = [gemm(a, *weight, None, 128) for a, weight in inputs]
    graphs = [captured(a, weight, calls=3) for a, weight in inputs]
    streams = [torch.cuda.Stream() for _ in graphs]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(200):
        for (graph, outputs), stream, want, count in zip(graphs, streams, expected, wrong, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                for out in outputs:
                    count += (out != want).sum()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0, 0]
    assert dirty_tickets()[0] == 0


@pytest.mark.parametrize("m", [1, 16, 32, 48])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_chain_of_layers_that_overlap(m: int, graph: bool) -> None:
    """Each layer reads what the one before, or torch, wrote last: weights may come early, nothing else."""
    layers = [packed_weight(4096, 4096, 128, FLOAT16, seed=seed) for seed in range(4)]
    bias = activations(1, 4096, FLOAT16, seed=9)[0]

    def chain(x: Tensor) -> Tensor:
        for index, layer in enumerate(layers):
            x = gemm(x, *layer, bias, 128)
            x = x * 0.05 if index == 1 else x
        return x

    inputs = [activations(m, 4096, FLOAT16, seed=seed) / 64 for seed in range(30)]
    assert differing_where_kernels_overlap(chain, inputs, graph) == 0
    assert dirty_tickets()[0] == 0


@pytest.fixture
def overlap() -> Iterator[None]:
    torch.cuda.synchronize()
    set_overlap(True)
    yield
    set_overlap(False)


@pytest.mark.slow
def test_a_hundred_thousand_replays(overlap: None) -> None:
    """Nothing hangs and no result changes."""
    problems = [(activations(m, 4096, FLOAT16), packed_weight(4096, 1024, 128, FLOAT16, seed=m)) for m in (1, 12, 30)]
    graph = torch.cuda.CUDAGraph()
    first = [gemm(a, *weight, None, 128) for a, weight in problems]
    with torch.cuda.graph(graph):
        outputs = [gemm(a, *weight, None, 128) for a, weight in problems]
    for _ in range(100_000):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out, want in zip(outputs, first, strict=True))
    assert dirty_tickets()[0] == 0


def test_workspaces_of_dead_graphs_are_used_again() -> None:
    weight = packed_weight(4096, 1024, 128, FLOAT16)
    a = activations(1, 4096, FLOAT16)
    eager = gemm(a, *weight, None, 128)
    before = dirty_tickets()[1]
    for _ in range(10):
        graph, outputs = captured(a, weight, calls=1)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(outputs[0], eager)
        del graph, outputs
    assert dirty_tickets()[1] <= before + 2


def test_the_first_call_may_be_under_capture() -> None:
    program = """
import torch
from marlin_gptq.kernel import gemm
q = torch.randint(-2**31, 2**31, (256, 2048), device="cuda").int()
s = torch.rand(32, 1024, device="cuda").half() / 64
a = torch.randn(3, 4096, device="cuda").half()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = gemm(a, q, s, None, 128)
graph.replay()
assert torch.equal(out, gemm(a, q, s, None, 128)) and out.abs().sum() > 0
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


@pytest.mark.slow
def test_torch_compile() -> None:
    qweight, scales = packed_weight(1024, 512, 128, BFLOAT16)

    def layer(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(gemm(x * 2, qweight, scales, None, 128))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (2, 4, 33):
        x = activations(m, 1024, BFLOAT16)
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)


def test_opcheck() -> None:
    qweight, scales = packed_weight(256, 128, 128, FLOAT16)
    bias = activations(1, 128, FLOAT16)[0]
    for m in (0, 1, 9):
        arguments = (activations(m, 256, FLOAT16), qweight, scales, bias, 128)
        torch.library.opcheck(torch.ops.marlin_gptq.gemm.default, arguments)


def test_nothing_but_the_output_is_allocated() -> None:
    qweight, scales = packed_weight(4096, 1024, 128, FLOAT16)
    a = activations(4, 4096, FLOAT16)
    gemm(a, qweight, scales, None, 128)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    out = gemm(a, qweight, scales, None, 128)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    assert torch.cuda.mem_get_info()[0] == free and out.shape == (4, 1024)
