"""gemm_blocked on a Hopper GPU against float64 of the dequantized weights: shapes, values, edges, every variant."""

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
    inside_guards,
    packed_weight,
    relative_error,
)
from torch import Tensor

from marlin_gptq.kernel import blocked, gemm_blocked, library
from marlin_gptq.kernel.blocked_op import CAPABILITY, _gemm_blocked_cuda
from marlin_gptq.kernel.library import BlockedChoice
from marlin_gptq.kernel.reference import dequantize, scale_column

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == CAPABILITY
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not library.status().available, reason=f"no kernel: {library.status().reason}"),
    pytest.mark.skipif(not hopper, reason="needs a GPU of compute capability 9.0"),
]

ALL_M = [*range(1, 18), 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4096]
ALL_K = [16, 48, 64, 112, 128, 144, 1024, 4096, 11008, 8192 + 16]
ALL_N = [64, 192, 320, 4096, 6144, 57344]
NAN = float("nan")


def variants() -> list[int]:
    """The rows of the table of compiled tiles."""
    found = []
    while True:
        try:
            library.plan_blocked(1, 64, 16, -1, sms=132, choice=BlockedChoice(len(found), 0, 0))
        except ValueError:
            return found
        found.append(len(found))


VARIANTS = variants() if library.status().available else []


class Problem:
    """A random weight, in blocks and dequantized."""

    def __init__(
        self, k: int, n: int, group_size: int, dtype: torch.dtype, asymmetric: bool = False, device: str = "cuda"
    ) -> None:
        self.n, self.group_size, self.asymmetric = n, group_size, asymmetric
        self.qweight, self.stored = packed_weight(k, n, group_size, dtype, device=device)
        self.zeros = None
        if asymmetric:
            generator = torch.Generator(device).manual_seed(4)
            shape = (self.stored.shape[0], n // 8)
            self.zeros = torch.randint(-(2**31), 2**31, shape, generator=generator, device=device).int()
        self.blocks = blocked.to_blocks(self.qweight, self.stored, self.zeros, group_size)

    @property
    def scales(self) -> Tensor | None:
        return blocked.natural_scales(self.stored) if self.stored.shape[0] == 1 else None

    def weight(self) -> Tensor:
        return dequantize(self.qweight, self.stored, self.group_size, self.zeros)

    def exact(self, a: Tensor, bias: Tensor | None = None) -> Tensor:
        product = a.double() @ self.weight().double().t()
        return product if bias is None else product + bias.double()

    def run(self, a: Tensor, bias: Tensor | None = None, choice: BlockedChoice | None = None) -> Tensor:
        return _gemm_blocked_cuda(a, self.blocks, self.scales, bias, self.n, self.group_size, self.asymmetric, choice)


def group_sizes(k: int) -> list[int]:
    return [-1, *(g for g in (32, 64, 128) if k % g == 0 and g < k), k]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", ALL_M)
def test_every_m(m: int, dtype: torch.dtype) -> None:
    problem = Problem(1024, 320, 128, dtype)
    a = activations(m, 1024, dtype)
    out = gemm_blocked(a, problem.blocks, n=320, group_size=128)
    assert out.shape == (m, 320) and out.dtype == dtype
    assert relative_error(out, problem.exact(a)) < LIMIT[dtype]


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_subnormal_scales_are_exact(group_size: int, asymmetric: bool) -> None:
    """Multiples of 2⁻²⁴ in float16: no kernel takes them for 0."""
    problem = Problem(256, 320, group_size, FLOAT16, asymmetric)
    problem.stored = (problem.stored.float() * 4096).round().mul(2.0**-24).half()
    problem.blocks = blocked.to_blocks(problem.qweight, problem.stored, problem.zeros, group_size)
    assert bool((problem.stored > 0).all()) and bool((problem.stored < torch.finfo(FLOAT16).tiny).all())
    identity = torch.eye(256, device="cuda", dtype=FLOAT16)
    for m in (1, 9, 17, 33, 65, 256):
        assert torch.equal(problem.run(identity[:m]), problem.weight().t().half()[:m])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: int, group_size: int, asymmetric: bool, dtype: torch.dtype) -> None:
    """Whole tiles, all tiles shared out, and a mixture: the same answer but for rounding."""
    k, n, m = 1152, 448, 100
    problem = Problem(k, n, group_size, dtype, asymmetric)
    a, bias = activations(m, k, dtype), activations(1, n, dtype, seed=2)[0]
    expected = problem.exact(a, bias)
    plan = library.plan_blocked(m, n, k, group_size, sms=132, choice=BlockedChoice(variant, 0, 0))
    tiles = int(plan["m_tiles"]) * int(plan["n_tiles"])
    for split_tiles, split_blocks in [(0, 0), (tiles, min(132, 5 * tiles)), (tiles, 1), (1, 2), (tiles, tiles)]:
        choice = BlockedChoice(variant, split_tiles, split_blocks)
        assert relative_error(problem.run(a, bias, choice), expected) < LIMIT[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("n", ALL_N)
@pytest.mark.parametrize("k", ALL_K)
def test_every_shape(k: int, n: int) -> None:
    """Every M, group size and dtype of the test plan; the rows of one product serve all M."""
    for dtype in DTYPES:
        a = activations(max(ALL_M), k, dtype)
        for group_size in group_sizes(k):
            for asymmetric in (False, True):
                problem = Problem(k, n, group_size, dtype, asymmetric)
                expected = problem.exact(a)
                for m in ALL_M:
                    error = relative_error(problem.run(a[:m]), expected[:m])
                    assert error < LIMIT[dtype], f"m={m} {group_size} {asymmetric} {dtype}: {error}"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("k, n", [(256, 320), (384, 128)])
def test_one_hot_rows_return_the_weight(k: int, n: int, group_size: int, asymmetric: bool, dtype: torch.dtype) -> None:
    """Row k of the identity times W is row k of W, to the bit: every permutation error shows."""
    problem = Problem(k, n, group_size, dtype, asymmetric)
    identity = torch.eye(k, device="cuda", dtype=dtype)
    expected = problem.weight().t().to(dtype)
    for variant in VARIANTS:
        assert torch.equal(problem.run(identity, choice=BlockedChoice(variant, 0, 0)), expected)
    for row in (0, 1, 31, 32, 127, k - 1):
        assert torch.equal(problem.run(identity[row : row + 1])[0], expected[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", [3, 20, 40, 100, 300])
@pytest.mark.parametrize("group_size", [-1, 64, 128])
def test_integers_are_exact(m: int, group_size: int, dtype: torch.dtype) -> None:
    """Small integers and scales that are powers of two: sums fit FP32, only the last rounding remains."""
    k, n = 4096, 192
    problem = Problem(k, n, group_size, dtype, asymmetric=True)
    scales = torch.exp2(torch.floor(problem.stored.float() * 128) - 9).to(dtype)
    problem.stored = scales
    problem.blocks = blocked.to_blocks(problem.qweight, scales, problem.zeros, group_size)
    generator = torch.Generator("cuda").manual_seed(5)
    a = torch.randint(-4, 5, (m, k), generator=generator, device="cuda").to(dtype)
    assert torch.equal(problem.run(a), problem.exact(a).float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("code", [0, 8, 15])
@pytest.mark.parametrize("m", [9, 200])
def test_constant_codes(m: int, code: int, dtype: torch.dtype) -> None:
    k, n = 512, 128
    problem = Problem(k, n, 128, dtype)
    word = code * 0x11111111
    problem.qweight.fill_(word - (word >> 31 << 32))
    problem.blocks = blocked.to_blocks(problem.qweight, problem.stored, None, 128)
    a = activations(m, k, dtype)
    out = problem.run(a)
    if code == 8:
        assert not out.any()
    else:
        assert relative_error(out, problem.exact(a)) < LIMIT[dtype]


@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("m", [5, 40, 130])
def test_extreme_scales(m: int, group_size: int) -> None:
    """FP16 scales: the smallest subnormal, the largest that a weight of 16 bits can have, zero, by turns."""
    k, n = 256, 192
    problem = Problem(k, n, group_size, FLOAT16)
    channel = torch.arange(n, device="cuda")
    column = scale_column(channel, problem.stored.shape[0])
    tiny, huge, zero = (channel % 3 == i for i in range(3))
    problem.stored[:, column[tiny]] = 2.0**-24
    problem.stored[:, column[huge]] = 65504.0 / 8
    problem.stored[:, column[zero]] = 0.0
    problem.blocks = blocked.to_blocks(problem.qweight, problem.stored, None, group_size)
    large, small = activations(m, k, FLOAT16) * 1000, activations(m, k, FLOAT16) * 2.0**-11
    of_large, of_small = problem.run(large), problem.run(small)
    assert relative_error(of_large[:, tiny], problem.exact(large)[:, tiny]) < 1e-3
    assert relative_error(of_small[:, huge], problem.exact(small)[:, huge]) < 1e-3
    assert not of_large[:, zero].any()


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("m", [2, 17, 40, 100, 300])
def test_a_bad_row_stays_alone(m: int, value: float) -> None:
    k, n = 512, 192
    problem = Problem(k, n, 64, FLOAT16)
    a = activations(m, k, FLOAT16)
    clean = problem.run(a)
    bad = a.clone()
    bad[m // 2, 37] = value
    out = problem.run(bad)
    others = torch.arange(m, device="cuda") != m // 2
    assert torch.equal(out[others], clean[others])
    assert not torch.isfinite(out[m // 2]).any()


def raw_gemm(problem: Problem, a: Tensor, c: Tensor, variant: int) -> None:
    """The C function, with an output of our own."""
    handle = library.loaded()
    assert handle is not None
    scales, zero = problem.scales, None
    (m, k), stream = a.shape, torch.cuda.current_stream().cuda_stream
    pointers = (
        a.data_ptr(),
        problem.blocks.data_ptr(),
        zero if scales is None else scales.data_ptr(),
        None,
        c.data_ptr(),
    )
    sizes = (m, problem.n, k, a.stride(0), problem.group_size)
    code = handle.marlin_gptq_gemm_blocked(
        *pointers, *sizes, problem.asymmetric, a.dtype == BFLOAT16, 0, stream, 0, BlockedChoice(variant, -1, -1)
    )
    assert code == 0, library.error_string(code)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "m, k, n, group_size",
    [
        (1, 48, 64, -1),
        (17, 144, 192, -1),
        (33, 96, 320, 32),
        (70, 192, 192, 64),
        (129, 1024, 320, 128),
        (257, 112, 64, -1),
    ],
)
def test_poisoned_surroundings(m: int, k: int, n: int, group_size: int, dtype: torch.dtype) -> None:
    """NaN around every input, in C, shared memory and workspace: none gets in, nothing gets out of C."""
    for variant in VARIANTS:
        for tokens in (300, 40):  # leaves NaN in shared memory and in the reduction slots
            other = Problem(2048, 1024, 128, dtype)
            poison = torch.full((tokens, 2048), NAN, device="cuda", dtype=dtype)
            assert other.run(poison, choice=BlockedChoice(variant, -1, -1)).isnan().all()

        problem = Problem(k, n, group_size, dtype, asymmetric=variant % 2 == 1)
        a_guarded, _ = inside_guards(activations(m, k, dtype), NAN)
        expected = problem.exact(a_guarded)
        problem.blocks, _ = inside_guards(problem.blocks, -1)
        c, whole = inside_guards(torch.full((m, n), NAN, device="cuda", dtype=dtype), 7.0)
        raw_gemm(problem, a_guarded, c, variant)
        assert relative_error(c, expected) < LIMIT[dtype]
        band = 4096 // c.element_size()
        assert bool((whole[:band] == 7).all()) and bool((whole[-band:] == 7).all())


@pytest.mark.parametrize("m", [1, 33, 200])
def test_rows_further_apart_than_k(m: int) -> None:
    k = 512
    problem = Problem(k, 192, 128, FLOAT16)
    wide = torch.full((m, k + 24), NAN, device="cuda", dtype=FLOAT16)
    a = wide[:, 8 : 8 + k]
    a.copy_(activations(m, k, FLOAT16))
    assert torch.equal(problem.run(a), problem.run(a.contiguous()))


def test_misaligned_tensors_are_named() -> None:
    problem = Problem(256, 128, 128, FLOAT16)
    a = torch.zeros(4 * 256 + 1, device="cuda", dtype=FLOAT16)[1:].view(4, 256)
    message = r"a: got an address 2 bytes past a multiple of 16, expected a multiple of 16"
    with pytest.raises(ValueError, match=message):
        problem.run(a)


def test_no_tokens() -> None:
    out = Problem(256, 128, 128, FLOAT16).run(torch.empty(0, 256, device="cuda", dtype=FLOAT16))
    assert out.shape == (0, 128) and out.is_cuda


def test_choices_that_do_not_fit_are_refused() -> None:
    problem = Problem(256, 128, 128, FLOAT16)
    a = activations(1, 256, FLOAT16)
    for choice in [(len(VARIANTS), 0, 0), (0, 2, 2), (0, 1, 3), (0, 1, 0), (0, 1, 10**6)]:
        with pytest.raises(RuntimeError, match="choice: no such variant"):
            problem.run(a, choice=BlockedChoice(*choice))


@pytest.mark.parametrize(
    "m, k, n, group_size",
    [(1, 128, 64, -1), (17, 144, 192, -1), (40, 256, 320, 32), (70, 256, 128, 64), (140, 512, 192, 128)],
)
def test_inputs_from_host_memory(m: int, k: int, n: int, group_size: int) -> None:
    """No kernel but ours touches the GPU here: this is the test to run under compute-sanitizer."""
    for dtype, asymmetric in zip(DTYPES, (True, False), strict=True):
        problem = Problem(k, n, group_size, dtype, asymmetric, device="cpu")
        a = activations(m, k, dtype, device="cpu")
        bias = activations(1, n, dtype, seed=3, device="cpu")[0]
        expected = problem.exact(a, bias)
        blocks, scales = problem.blocks.cuda(), problem.scales
        on_gpu = (a.cuda(), blocks, None if scales is None else scales.cuda(), bias.cuda())
        for variant in VARIANTS:
            plan = library.plan_blocked(m, n, k, group_size, sms=132, choice=BlockedChoice(variant, 0, 0))
            tiles, k_tiles = int(plan["m_tiles"]) * int(plan["n_tiles"]), int(plan["k_tiles"])
            for split in [(0, 0), (tiles, min(132, tiles * k_tiles)), (tiles, min(3, tiles * k_tiles))]:
                choice = BlockedChoice(variant, *split)
                out = _gemm_blocked_cuda(*on_gpu, n, group_size, asymmetric, choice).cpu()
                assert relative_error(out, expected) < LIMIT[dtype]
