"""The CUDA kernel against float64 of the dequantized weights: shapes, values, edges."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    LIMIT,
    activations,
    dtype_name,
    exact,
    in_blocks,
    inside_guards,
    packed_weight,
    relative_error,
    zero_points,
)
from torch import Tensor

from marlin_gptq.kernel import gemm, library
from marlin_gptq.kernel.decode_blocks import MAX_TOKENS, decode_blocks
from marlin_gptq.kernel.op import _gemm_with_grid
from marlin_gptq.kernel.reference import dequantize, scale_column

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not library.status().available, reason=f"no kernel: {library.status().reason}"),
]

ALL_M = [*range(1, 18), 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4096]
ALL_K = [16, 48, 64, 112, 128, 144, 1024, 4096, 11008, 8192 + 16]
ALL_N = [64, 192, 320, 4096, 6144, 57344]
NAN = float("nan")


def group_sizes(k: int) -> list[int]:
    return [-1, *(g for g in (32, 64, 128) if k % g == 0 and g < k), k]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", ALL_M)
def test_every_m(m: int, dtype: torch.dtype) -> None:
    k, n = 1024, 320
    qweight, scales = packed_weight(k, n, 128, dtype)
    a = activations(m, k, dtype)
    out = gemm(a, qweight, scales, None, 128)
    assert out.shape == (m, n) and out.dtype == dtype
    assert relative_error(out, exact(a, qweight, scales)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 32])
def test_the_portable_kernels(m: int, group_size: int, dtype: torch.dtype) -> None:
    """Those of every GPU, also where few tokens have kernels of their own; the two agree but for rounding."""
    k, n = 1152, 320
    qweight, scales = packed_weight(k, n, group_size, dtype)
    a = activations(m, k, dtype)
    expected = exact(a, qweight, scales, None, group_size)
    for grid in (0, 1, 7):
        out = _gemm_with_grid(a, qweight, scales, None, group_size, grid, portable=True)
        assert relative_error(out, expected) < LIMIT[dtype]


@pytest.mark.parametrize("k, n", [(8192, 8192), (16384, 8192)], ids=["short streams", "long streams"])
@pytest.mark.parametrize("group_size", [-1, 64, 128])
@pytest.mark.parametrize("m", [5, 16, 32])
def test_slots_are_used_again(m: int, group_size: int, k: int, n: int) -> None:
    """Many units for each block: the ring goes round several times."""
    qweight, scales = packed_weight(k, n, group_size, FLOAT16)
    a = activations(m, k, FLOAT16)
    expected = exact(a, qweight, scales, None, group_size)
    assert relative_error(gemm(a, qweight, scales, None, group_size), expected) < LIMIT[FLOAT16]


@pytest.mark.slow
@pytest.mark.parametrize("n", ALL_N)
@pytest.mark.parametrize("k", ALL_K)
def test_every_shape(k: int, n: int) -> None:
    """Every M, group size and dtype of the test plan; the rows of one product serve all M."""
    for dtype in DTYPES:
        a = activations(max(ALL_M), k, dtype)
        for group_size in group_sizes(k):
            qweight, scales = packed_weight(k, n, group_size, dtype)
            expected = exact(a, qweight, scales, None, group_size)
            for m in ALL_M:
                error = relative_error(gemm(a[:m], qweight, scales, None, group_size), expected[:m])
                assert error < LIMIT[dtype], f"m={m} k={k} n={n} group_size={group_size} {dtype}: {error}"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 384])
@pytest.mark.parametrize("m", [1, 16, 70])
def test_group_sizes_and_bias(m: int, group_size: int, dtype: torch.dtype) -> None:
    k, n = 384, 192
    qweight, scales = packed_weight(k, n, group_size, dtype)
    a, bias = activations(m, k, dtype), activations(1, n, dtype, seed=2)[0]
    with_bias = gemm(a, qweight, scales, bias, group_size)
    assert relative_error(with_bias, exact(a, qweight, scales, bias, group_size)) < LIMIT[dtype]
    without = gemm(a, qweight, scales, None, group_size)
    assert relative_error(without, exact(a, qweight, scales, None, group_size)) < LIMIT[dtype]
    assert not torch.equal(with_bias, without)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("k, n", [(256, 320), (384, 128)])
def test_one_hot_rows_return_the_weight(k: int, n: int, group_size: int, dtype: torch.dtype) -> None:
    """Row k of the identity times W is row k of W, to the bit: every permutation error shows."""
    qweight, scales = packed_weight(k, n, group_size, dtype)
    identity = torch.eye(k, device="cuda", dtype=dtype)
    expected = dequantize(qweight, scales, group_size).t().to(dtype)
    assert torch.equal(gemm(identity, qweight, scales, None, group_size), expected)
    for row in (0, 1, 31, 32, 127, k - 1):
        out = gemm(identity[row : row + 1], qweight, scales, None, group_size)
        assert torch.equal(out[0], expected[row])


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_subnormal_scales_are_exact(group_size: int) -> None:
    """Multiples of 2⁻²⁴ in float16: no kernel takes them for 0."""
    qweight, scales = packed_weight(256, 320, group_size, FLOAT16)
    scales = (scales.float() * 4096).round().mul(2.0**-24).half()
    assert bool((scales > 0).all()) and bool((scales < torch.finfo(FLOAT16).tiny).all())
    identity = torch.eye(256, device="cuda", dtype=FLOAT16)
    expected = dequantize(qweight, scales, group_size).t().half()
    for m in (1, 9, 17, 33, 256):
        assert torch.equal(gemm(identity[:m], qweight, scales, None, group_size), expected[:m])
        portable = _gemm_with_grid(identity[:m], qweight, scales, None, group_size, 0, portable=True)
        assert torch.equal(portable, expected[:m])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", [3, 12, 40])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_integers_are_exact(m: int, group_size: int, dtype: torch.dtype) -> None:
    """Small integers and scales that are powers of two: sums fit FP32, only the last rounding remains."""
    k, n = 4096, 192
    qweight, scales = packed_weight(k, n, group_size, dtype)
    scales = torch.exp2(torch.floor(scales.float() * 128) - 9).to(dtype)
    generator = torch.Generator("cuda").manual_seed(5)
    a = torch.randint(-4, 5, (m, k), generator=generator, device="cuda").to(dtype)
    expected = exact(a, qweight, scales, None, group_size).float().to(dtype)
    assert torch.equal(gemm(a, qweight, scales, None, group_size), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("code", [0, 8, 15])
def test_constant_codes(code: int, dtype: torch.dtype) -> None:
    k, n = 512, 128
    _, scales = packed_weight(k, n, 128, dtype)
    word = code * 0x11111111
    qweight = torch.full((k // 16, 2 * n), word - (word >> 31 << 32), device="cuda").int()
    a = activations(9, k, dtype)
    out = gemm(a, qweight, scales, None, 128)
    if code == 8:
        assert not out.any()
    else:
        assert relative_error(out, exact(a, qweight, scales)) < LIMIT[dtype]


@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_extreme_scales(group_size: int) -> None:
    """FP16 scales: the smallest subnormal, the largest number, zero, by turns."""
    k, n = 256, 192
    qweight, scales = packed_weight(k, n, group_size, FLOAT16)
    channel = torch.arange(n, device="cuda")
    column = scale_column(channel, scales.shape[0])
    tiny, huge, zero = (channel % 3 == i for i in range(3))
    scales[:, column[tiny]] = 2.0**-24
    scales[:, column[huge]] = 65504.0
    scales[:, column[zero]] = 0.0
    large, small = activations(5, k, FLOAT16) * 1000, activations(5, k, FLOAT16) * 2.0**-14
    of_large = gemm(large, qweight, scales, None, group_size)
    of_small = gemm(small, qweight, scales, None, group_size)
    expected_large = exact(large, qweight, scales, None, group_size)
    expected_small = exact(small, qweight, scales, None, group_size)
    assert relative_error(of_large[:, tiny], expected_large[:, tiny]) < 1e-3
    assert relative_error(of_small[:, huge], expected_small[:, huge]) < 1e-3
    assert not of_large[:, zero].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_activations_of_large_mean(dtype: torch.dtype) -> None:
    """Cancellation: each error is below the output's rounding plus 2^-19 of |A| |W|."""
    k, n = 4096, 192
    qweight, scales = packed_weight(k, n, 128, dtype)
    a = activations(20, k, dtype) + 100
    out, expected = gemm(a, qweight, scales, None, 128).double(), exact(a, qweight, scales)
    bound = a.double().abs() @ dequantize(qweight, scales, 128).double().abs().t()
    rounding = 2.0**-11 if dtype == FLOAT16 else 2.0**-8
    assert bool(((out - expected).abs() <= rounding * expected.abs() + 2.0**-19 * bound).all())


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("m", [2, 8, 17, 40])
def test_a_bad_row_stays_alone(m: int, value: float) -> None:
    k, n = 512, 192
    qweight, scales = packed_weight(k, n, 64, FLOAT16)
    a = activations(m, k, FLOAT16)
    clean = gemm(a, qweight, scales, None, 64)
    bad = a.clone()
    bad[m // 2, 37] = value
    out = gemm(bad, qweight, scales, None, 64)
    others = torch.arange(m, device="cuda") != m // 2
    assert torch.equal(out[others], clean[others])
    assert not torch.isfinite(out[m // 2]).any()


def raw_gemm(
    a: Tensor, qweight: Tensor, scales: Tensor, c: Tensor, group_size: int, qzeros: Tensor | None = None
) -> None:
    """The C function, with an output of our own."""
    handle = library.loaded()
    assert handle is not None
    pointers = [*(t.data_ptr() for t in (a, qweight, scales)), None if qzeros is None else qzeros.data_ptr()]
    (m, k), n, stream = a.shape, c.shape[1], torch.cuda.current_stream().cuda_stream
    code = handle.marlin_gptq_gemm(
        *pointers, None, c.data_ptr(), m, n, k, a.stride(0), group_size, a.dtype == BFLOAT16, 0, stream, 0, 0
    )
    assert code == 0, library.error_string(code)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "m, k, n, group_size",
    [
        (1, 48, 64, -1),
        (5, 144, 192, -1),
        (9, 96, 320, 32),
        (17, 192, 192, 64),
        (33, 1024, 320, 128),
        (70, 112, 64, -1),
    ],
)
def test_poisoned_surroundings(m: int, k: int, n: int, group_size: int, dtype: torch.dtype) -> None:
    """NaN around every input, in C, shared memory and workspace: none gets in, nothing gets out of C."""
    for tokens in (64, 8):  # leaves NaN in shared memory and in the reduction slots
        poison = torch.full((tokens, 4096), NAN, device="cuda", dtype=dtype)
        assert gemm(poison, *packed_weight(4096, 1024, 128, dtype), None, 128).isnan().all()

    qweight, scales = packed_weight(k, n, group_size, dtype)
    a_guarded, _ = inside_guards(activations(m, k, dtype), NAN)
    q_guarded, _ = inside_guards(qweight, -1)
    s_guarded, _ = inside_guards(scales, NAN)
    z_guarded, _ = inside_guards(zero_points(k, n, group_size), -1)
    for qzeros in (None, z_guarded):
        c, whole = inside_guards(torch.full((m, n), NAN, device="cuda", dtype=dtype), 7.0)
        raw_gemm(a_guarded, q_guarded, s_guarded, c, group_size, qzeros)
        assert relative_error(c, exact(a_guarded, qweight, scales, None, group_size, qzeros)) < LIMIT[dtype]
        band = 4096 // c.element_size()
        assert bool((whole[:band] == 7).all()) and bool((whole[-band:] == 7).all())


@pytest.mark.parametrize("m", [1, 5, 33])
def test_rows_further_apart_than_k(m: int) -> None:
    k, n = 512, 192
    qweight, scales = packed_weight(k, n, 128, FLOAT16)
    wide = torch.full((m, k + 24), NAN, device="cuda", dtype=FLOAT16)
    a = wide[:, 8 : 8 + k]
    a.copy_(activations(m, k, FLOAT16))
    out = gemm(a, qweight, scales, None, 128)
    assert torch.equal(out, gemm(a.contiguous(), qweight, scales, None, 128))


def test_misaligned_tensors_are_named() -> None:
    qweight, scales = packed_weight(256, 128, 128, FLOAT16)
    a = torch.zeros(4 * 256 + 1, device="cuda", dtype=FLOAT16)[1:].view(4, 256)
    message = r"a: got an address 2 bytes past a multiple of 16, expected a multiple of 16"
    with pytest.raises(ValueError, match=message):
        gemm(a, qweight, scales, None, 128)


def test_no_tokens() -> None:
    qweight, scales = packed_weight(256, 128, 128, FLOAT16)
    out = gemm(torch.empty(0, 256, device="cuda", dtype=FLOAT16), qweight, scales, None, 128)
    assert out.shape == (0, 128) and out.is_cuda


def test_devices_must_agree() -> None:
    qweight, scales = packed_weight(256, 128, 128, FLOAT16)
    with pytest.raises(ValueError, match=r"qweight: got device cpu, expected cuda:0 \(the device of a\)"):
        gemm(activations(1, 256, FLOAT16), qweight.cpu(), scales, None, 128)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    qweight, scales = (t.to("cuda:1") for t in packed_weight(1024, 512, 128, FLOAT16))
    a = activations(3, 1024, FLOAT16).to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert relative_error(gemm(a, qweight, scales, None, 128), exact(a, qweight, scales)) < LIMIT[FLOAT16]
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(
    "m, k, n, group_size",
    [
        (1, 128, 64, -1),
        (3, 144, 192, -1),
        (8, 256, 320, 32),
        (11, 256, 128, 64),
        (20, 384, 192, 128),
        (70, 512, 192, 128),
        (2, 256, 6144, 128),  # sums through clusters
    ],
)
def test_inputs_from_host_memory(m: int, k: int, n: int, group_size: int) -> None:
    """No kernel but ours touches the GPU here: this is the test to run under compute-sanitizer."""
    for dtype in DTYPES:
        qweight, scales = packed_weight(k, n, group_size, dtype, device="cpu")
        a = activations(m, k, dtype, device="cpu")
        bias = activations(1, n, dtype, seed=3, device="cpu")[0]
        zeros = zero_points(k, n, group_size, device="cpu")
        on_gpu = [t.cuda() for t in (a, qweight, scales, bias)]
        units = -(-k // 128) * -(-n // 128)
        forced = (1, min(3, units)) if units < 16 else ()  # slots are not filled a second time, see docs/kernel.md
        for qzeros in (None, zeros):
            expected = exact(a, qweight, scales, bias, group_size, qzeros)
            z = None if qzeros is None else qzeros.cuda()
            for grid, portable in [(g, p) for p in (False, True) for g in (0, *forced)]:
                out = _gemm_with_grid(*on_gpu, group_size, grid, portable, z).cpu()
                assert relative_error(out, expected) < LIMIT[dtype]
            if m <= MAX_TOKENS and torch.cuda.get_device_capability() == (9, 0):
                blocks, columns = in_blocks(qweight, scales, qzeros, group_size)
                for grid in (0, *forced):
                    arguments = (on_gpu[0], blocks.cuda(), None if columns is None else columns.cuda(), on_gpu[3])
                    out = decode_blocks(*arguments, n, group_size, qzeros is not None, grid).cpu()
                    assert relative_error(out, expected) < LIMIT[dtype]
