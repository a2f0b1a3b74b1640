"""The layout formulas against fixed vectors, and the reference product against a plain matrix product."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch
from kernel_problems import activations, packed_weight
from torch import Tensor

from marlin_gptq.kernel import reference

Codes = Callable[[Tensor, Tensor], Tensor]


def t1(k: Tensor, n: Tensor) -> Tensor:
    return (3 * k + 5 * n + k * n) % 16


def t2(k: Tensor, n: Tensor) -> Tensor:
    """Not periodic in 16: sees tile errors too."""
    return (3 * k + 5 * n + k * n + 7 * (k >> 4) + 11 * (n >> 4)) % 16


def pack(codes: Tensor) -> Tensor:
    """Codes [K, N] into words, one formula for each."""
    k_total, n_total = codes.shape
    k, n = torch.arange(k_total)[:, None], torch.arange(n_total)[None, :]
    place = (k >> 4) * 2 * n_total + reference.weight_word(k, n)
    words = torch.zeros(k_total // 16 * 2 * n_total, dtype=torch.int64)
    words.scatter_add_(0, place.reshape(-1), (codes.long() << 4 * reference.weight_nibble(k, n)).reshape(-1))
    return words.to(torch.int32).reshape(k_total // 16, 2 * n_total)


def crc(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().numpy().tobytes()):08x}"


def words(tensor: Tensor, count: int = 8) -> str:
    return " ".join(f"{int(word) & 0xFFFFFFFF:08x}" for word in tensor.reshape(-1)[:count])


def grid(k: int, n: int, codes: Codes) -> Tensor:
    return codes(torch.arange(k)[:, None], torch.arange(n)[None, :])


@pytest.mark.parametrize(
    "codes, k, n, checksum, first",
    [
        (t1, 128, 256, "b50e3590", "b3b30880 b3b30880 b3b30880 b3b30880 19196ee6 19196ee6 19196ee6 19196ee6"),
        (t1, 256, 256, "b85d3c5c", None),
        (t2, 128, 256, "e37f57cb", "b3b30880 6e6eb33b 19196ee6 c4c41991 19196ee6 c4c41991 7f7fc44c 2a2a7ff7"),
        (t2, 256, 512, "6bc32b5c", None),
    ],
)
def test_weight_vectors(codes: Codes, k: int, n: int, checksum: str, first: str | None) -> None:
    expected = grid(k, n, codes)
    qweight = pack(expected)
    assert crc(qweight) == checksum
    assert first is None or words(qweight) == first
    assert torch.equal(reference.unpack_codes(qweight), expected.int())


def test_second_row_of_the_second_vector() -> None:
    assert words(pack(grid(128, 256, t2))[1], 2) == "2a2a7ff7 d5d52aa2"


@pytest.mark.parametrize(
    "groups, checksum, first",
    [(2, "754daf26", [1, 9, 17, 25, 33, 41, 49, 57]), (1, "91677a8c", [1, 2, 9, 10, 17, 18, 25, 26])],
)
def test_scale_vectors(groups: int, checksum: str, first: list[int]) -> None:
    n = torch.arange(256)
    natural = (((64 * torch.arange(groups)[:, None] + n) % 1024 + 1) / 1024).half()
    stored = torch.empty_like(natural)
    stored[:, reference.scale_column(n, groups)] = natural
    assert crc(stored) == checksum
    assert (stored[0, :8] * 1024).int().tolist() == first
    assert torch.equal(reference.unpack_scales(stored), natural)


def test_zero_point_vector() -> None:
    n, group = torch.arange(128), torch.arange(2)[:, None]
    natural = (7 * n + 3 * group + (n >> 3) + 5 * (n >> 4)) % 16
    stored = torch.zeros(2, 16, dtype=torch.int64)
    stored.scatter_add_(1, reference.zero_word(n).expand(2, -1), natural << 4 * reference.zero_nibble(n))
    zeros = stored.to(torch.int32)
    assert words(zeros, 4) == "e7095e70 5e70c5e7 c5e73c5e 3c5ea3c5"
    assert crc(zeros) == "29e61170"
    assert torch.equal(reference.unpack_zeros(zeros), natural.int())


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_element_by_element(group_size: int, dtype: torch.dtype) -> None:
    k_total, n_total = 256, 128
    qweight, stored = packed_weight(k_total, n_total, group_size, dtype, device="cpu")
    weight = reference.dequantize(qweight, stored, group_size)
    assert weight.shape == (n_total, k_total) and weight.dtype == torch.float32
    groups = stored.shape[0]
    for k, n in [(0, 0), (1, 0), (0, 1), (15, 63), (16, 64), (77, 101), (131, 17), (255, 127)]:
        word = int(qweight[k >> 4, 128 * (n >> 6) + 16 * (n & 7) + 4 * ((k >> 1) & 3) + ((n >> 4) & 3)])
        code = (word >> 4 * (4 * (k & 1) + 2 * ((n >> 3) & 1) + ((k >> 3) & 1))) & 15
        if groups > 1:
            column = 64 * (n >> 6) + 8 * (n & 7) + ((n >> 3) & 7)
        else:
            column = 32 * (n >> 5) + 8 * ((n >> 1) & 3) + 2 * ((n >> 3) & 3) + (n & 1)
        scale = float(stored[k * groups // k_total, column])
        assert float(weight[n, k]) == (code - 8) * scale


def test_dequantize_with_zero_points() -> None:
    qweight, scales = packed_weight(128, 64, 64, torch.float16, device="cpu")
    eights = torch.full((2, 8), 0x88888888 - 2**32, dtype=torch.int64).int()
    symmetric = reference.dequantize(qweight, scales, 64)
    assert torch.equal(reference.dequantize(qweight, scales, 64, eights), symmetric)
    natural = reference.unpack_scales(scales).float().repeat_interleave(64, dim=0).t()
    sevens = torch.full((2, 8), 0x77777777, dtype=torch.int32)
    shifted = reference.dequantize(qweight, scales, 64, sevens)
    torch.testing.assert_close(shifted, symmetric + natural, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemm_reference(dtype: torch.dtype) -> None:
    qweight, scales = packed_weight(128, 64, 32, dtype, device="cpu")
    a, bias = activations(5, 128, dtype, device="cpu"), activations(1, 64, dtype, seed=2, device="cpu")[0]
    weight = reference.dequantize(qweight, scales, 32)
    expected = a.double() @ weight.double().t() + bias.double()
    out = reference.gemm_reference(a, qweight, scales, bias, 32)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-7, atol=1e-5)


def test_one_hot_rows_return_the_weight() -> None:
    qweight, scales = packed_weight(64, 128, -1, torch.float16, device="cpu")
    out = reference.gemm_reference(torch.eye(64, dtype=torch.float16), qweight, scales)
    assert torch.equal(out, reference.dequantize(qweight, scales, -1).t().half())
