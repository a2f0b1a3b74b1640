"""Zero points, and weights in blocks for few tokens: the CUDA kernels against float64 and against each other."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    LIMIT,
    activations,
    differing_where_kernels_overlap,
    dtype_name,
    exact,
    in_blocks,
    packed_weight,
    relative_error,
    zero_points,
)
from torch import Tensor

from marlin_gptq.formats import marlin
from marlin_gptq.kernel import gemm, library
from marlin_gptq.kernel.decode_blocks import MAX_TOKENS, decode_blocks
from marlin_gptq.kernel.op import _gemm_with_grid
from marlin_gptq.kernel.reference import dequantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not library.status().available, reason=f"no kernel: {library.status().reason}"),
]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="blocks are for 9.0"
)

SHAPES = [(16, 64), (48, 192), (112, 320), (128, 128), (384, 320), (1152, 192), (4096, 576)]


def group_sizes(k: int) -> list[int]:
    return [-1, *(g for g in (32, 64, 128) if k % g == 0 and g < k), k]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("k, n", SHAPES)
def test_every_group_size_and_number_of_tokens(k: int, n: int, dtype: torch.dtype) -> None:
    bias = activations(1, n, dtype, seed=2)[0]
    a = activations(70, k, dtype)
    for group_size in group_sizes(k):
        qweight, scales = packed_weight(k, n, group_size, dtype)
        qzeros = zero_points(k, n, group_size)
        expected = exact(a, qweight, scales, bias, group_size, qzeros)
        for m in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 70):
            for portable in (False, True):
                out = _gemm_with_grid(a[:m], qweight, scales, bias, group_size, 0, portable, qzeros)
                assert relative_error(out, expected[:m]) < LIMIT[dtype], (m, group_size, portable)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("k, n", [(256, 320), (384, 128)])
def test_one_hot_rows_return_the_weight(k: int, n: int, group_size: int, dtype: torch.dtype) -> None:
    """To the bit, for every code and zero point: no permutation error hides."""
    qweight, scales = packed_weight(k, n, group_size, dtype)
    qzeros = zero_points(k, n, group_size)
    identity = torch.eye(k, device="cuda", dtype=dtype)
    expected = dequantize(qweight, scales, group_size, qzeros).t().to(dtype)
    for m in (1, 8, 16, 32, 100):
        rows = slice(max(0, k - m - 3), max(0, k - m - 3) + m)
        assert torch.equal(gemm(identity[rows], qweight, scales, None, group_size, qzeros), expected[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("group_size", [-1, 64])
@pytest.mark.parametrize("zero", range(16))
def test_every_zero_point_is_exact(zero: int, group_size: int, dtype: torch.dtype) -> None:
    """Small integers and a scale of 1/64: sums fit FP32, only the last rounding remains."""
    k, n = 512, 192
    qweight, scales = packed_weight(k, n, group_size, dtype)
    scales = torch.full_like(scales, 1 / 64)
    groups = scales.shape[0]
    qzeros = marlin.pack_zeros(torch.full((n, groups), zero, dtype=torch.uint8, device="cuda"))
    generator = torch.Generator("cuda").manual_seed(5)
    a = torch.randint(-4, 5, (40, k), generator=generator, device="cuda").to(dtype)
    expected = exact(a, qweight, scales, None, group_size, qzeros).float().to(dtype)
    for m in (3, 12, 40):
        assert torch.equal(gemm(a[:m], qweight, scales, None, group_size, qzeros), expected[:m])
    if zero == 8:
        symmetric = gemm(a, qweight, scales, None, group_size)
        assert torch.equal(gemm(a, qweight, scales, None, group_size, qzeros), symmetric)


def test_rows_do_not_leak() -> None:
    qweight, scales = packed_weight(1024, 192, 128, FLOAT16)
    qzeros = zero_points(1024, 192, 128)
    a = activations(12, 1024, FLOAT16)
    clean = gemm(a, qweight, scales, None, 128, qzeros)
    a[5] = float("nan")
    a[7, 100] = float("inf")
    out = gemm(a, qweight, scales, None, 128, qzeros)
    kept = [row for row in range(12) if row not in (5, 7)]
    assert torch.equal(out[kept], clean[kept]) and out[5].isnan().all() and not out[7].isfinite().any()


@pytest.mark.parametrize("grid", [1, 7, 131, 132])
def test_forced_grids_and_equal_runs(grid: int) -> None:
    k, n = 4096, 576
    for m, dtype in ((3, FLOAT16), (16, BFLOAT16), (50, FLOAT16)):
        qweight, scales = packed_weight(k, n, 128, dtype)
        qzeros = zero_points(k, n, 128)
        a = activations(m, k, dtype)
        out = _gemm_with_grid(a, qweight, scales, None, 128, grid, False, qzeros)
        assert relative_error(out, exact(a, qweight, scales, None, 128, qzeros)) < LIMIT[dtype]
        for _ in range(20):
            assert torch.equal(out, _gemm_with_grid(a, qweight, scales, None, 128, grid, False, qzeros))


@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize("k, n", [(4096, 4096), (4096, 6144), (2064, 8192 - 64)])
def test_sums_through_clusters_and_through_memory_are_the_same(k: int, n: int, m: int) -> None:
    """A forced grid takes no clusters; the order of the sum is that of the blocks either way."""
    for dtype in DTYPES:
        qweight, scales = packed_weight(k, n, -1, dtype)
        a = activations(m, k, dtype)
        plan = library.plan(m, n, k, -1, sms=132, shared_bytes_per_sm=228 * 1024, compute_capability=90)
        out = gemm(a, qweight, scales, None, -1)
        assert relative_error(out, exact(a, qweight, scales, None, -1)) < LIMIT[dtype]
        for _ in range(20):
            assert torch.equal(out, gemm(a, qweight, scales, None, -1))
        if torch.cuda.get_device_properties().multi_processor_count == 132 and plan["family"] == 1:
            assert int(plan["cluster"]) > 1
            assert torch.equal(out, _gemm_with_grid(a, qweight, scales, None, -1, int(plan["grid"])))


def blocked(
    a: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], group_size: int, bias: Tensor | None = None
) -> Tensor:
    blocks, scales = in_blocks(*weight, group_size)
    n = weight[0].shape[1] // 2
    return decode_blocks(a, blocks, scales, bias, n, group_size, weight[2] is not None)


@needs_hopper
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("k, n", SHAPES)
def test_blocks_give_the_bits_of_the_marlin_layout(k: int, n: int, dtype: torch.dtype, asymmetric: bool) -> None:
    bias = activations(1, n, dtype, seed=2)[0]
    a = activations(MAX_TOKENS, k, dtype)
    for group_size in group_sizes(k):
        qweight, scales = packed_weight(k, n, group_size, dtype)
        qzeros = zero_points(k, n, group_size) if asymmetric else None
        for m in (1, 7, 8, 9, 16, 17, 32):
            out = blocked(a[:m], (qweight, scales, qzeros), group_size, bias)
            assert torch.equal(out, gemm(a[:m], qweight, scales, bias, group_size, qzeros)), (m, group_size)


@needs_hopper
@pytest.mark.parametrize("group_size", [-1, 64, 128])
@pytest.mark.parametrize("m", [5, 16, 32])
def test_blocks_of_long_streams(m: int, group_size: int) -> None:
    """The ring goes round many times."""
    for k, n in ((8192, 8192), (16384, 8192)):
        weight = (*packed_weight(k, n, group_size, FLOAT16), None)
        a = activations(m, k, FLOAT16)
        out = blocked(a, weight, group_size)
        assert relative_error(out, exact(a, *weight[:2], None, group_size)) < LIMIT[FLOAT16]
        assert torch.equal(out, blocked(a, weight, group_size))


@needs_hopper
@pytest.mark.parametrize("m", [1, 16, 32])
def test_a_chain_of_blocks_that_overlap(m: int) -> None:
    """Activations of each layer are what the one before, or torch, wrote last."""
    layers = [in_blocks(*packed_weight(4096, 4096, 128, FLOAT16, seed=seed), None, 128)[0] for seed in range(4)]

    def chain(x: Tensor) -> Tensor:
        for index, layer in enumerate(layers):
            x = decode_blocks(x, layer, None, None, 4096, 128, False)
            x = x * 0.05 if index == 1 else x
        return x

    inputs = [activations(m, 4096, FLOAT16, seed=seed) / 64 for seed in range(30)]
    assert differing_where_kernels_overlap(chain, inputs, graph=True) == 0


@needs_hopper
def test_too_many_tokens_for_blocks_are_refused() -> None:
    weight = (*packed_weight(256, 128, 128, FLOAT16), None)
    with pytest.raises(RuntimeError, match=r"blocks: need compute capability 9\.0 and at most 32 tokens"):
        blocked(activations(33, 256, FLOAT16), weight, 128)
