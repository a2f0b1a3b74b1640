"""formats/marlin.py: published vectors, exact inverses, the closed forms digit by digit."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from marlin_gptq.formats import marlin


def codes_t1(k: int, n: int) -> Tensor:
    rows, columns = torch.arange(n)[:, None], torch.arange(k)[None]
    return ((3 * columns + 5 * rows + columns * rows) % 16).to(torch.uint8)


def codes_t2(k: int, n: int) -> Tensor:
    rows, columns = torch.arange(n)[:, None], torch.arange(k)[None]
    return ((3 * columns + 5 * rows + columns * rows + 7 * (columns >> 4) + 11 * (rows >> 4)) % 16).to(torch.uint8)


def crc32(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes()):08x}"


def words(tensor: Tensor) -> list[str]:
    return [f"{int(word) & 0xFFFFFFFF:08x}" for word in tensor.flatten()]


@pytest.mark.parametrize(
    ("codes", "crc"),
    [
        (codes_t1(128, 256), "b50e3590"),
        (codes_t1(256, 256), "b85d3c5c"),
        (codes_t2(128, 256), "e37f57cb"),
        (codes_t2(256, 512), "6bc32b5c"),
    ],
)
def test_code_vectors(codes: Tensor, crc: str) -> None:
    assert crc32(marlin.pack_codes(codes)) == crc


def test_code_words_in_digits() -> None:
    assert words(marlin.pack_codes(codes_t1(128, 256))[0, :8]) == ["b3b30880"] * 4 + ["19196ee6"] * 4
    packed = marlin.pack_codes(codes_t2(128, 256))
    expected = "b3b30880 6e6eb33b 19196ee6 c4c41991 19196ee6 c4c41991 7f7fc44c 2a2a7ff7"
    assert words(packed[0, :8]) == expected.split()
    assert words(packed[1, :2]) == ["2a2a7ff7", "d5d52aa2"]


@pytest.mark.parametrize(("n", "k"), [(64, 16), (192, 48), (320, 112), (128, 1024)])
def test_codes_round_trip_and_closed_form(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    packed = marlin.pack_codes(codes)
    assert packed.shape == (k // 16, 2 * n)
    assert torch.equal(marlin.unpack_codes(packed), codes)

    rows, columns = torch.arange(n)[:, None], torch.arange(k)[None]
    word = 128 * (rows >> 6) + 16 * (rows & 7) + 4 * ((columns >> 1) & 3) + ((rows >> 4) & 3)
    nibble = 4 * (columns & 1) + 2 * ((rows >> 3) & 1) + ((columns >> 3) & 1)
    found = (packed[(columns >> 4).expand(n, k), word] >> (4 * nibble)) & 15
    assert torch.equal(found.to(torch.uint8), codes)


@pytest.mark.parametrize(
    ("groups", "first", "crc"),
    [(2, [1, 9, 17, 25, 33, 41, 49, 57], "754daf26"), (1, [1, 2, 9, 10, 17, 18, 25, 26], "91677a8c")],
)
def test_scale_vectors(groups: int, first: list[int], crc: str) -> None:
    scales = ((64 * torch.arange(groups)[None] + torch.arange(256)[:, None]) % 1024 + 1) / 1024
    stored = marlin.pack_scales(scales.half())
    assert (stored[0, :8] * 1024).tolist() == first
    assert crc32(stored) == crc
    assert torch.equal(marlin.unpack_scales(stored), scales.half())


def test_zero_point_vector() -> None:
    n, group = torch.arange(128)[:, None], torch.arange(2)[None]
    zeros = ((7 * n + 3 * group + (n >> 3) + 5 * (n >> 4)) % 16).to(torch.uint8)
    packed = marlin.pack_zeros(zeros)
    assert words(packed[0, :4]) == ["e7095e70", "5e70c5e7", "c5e73c5e", "3c5ea3c5"]
    assert crc32(packed) == "29e61170"
    assert torch.equal(marlin.unpack_zeros(packed), zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(dtype: torch.dtype) -> None:
    scales = torch.rand(128, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = marlin.pack_scales(scales)
    assert stored.dtype == dtype and stored.shape == (3, 128)
    assert torch.equal(marlin.unpack_scales(stored), scales)


def test_messages_of_wrong_shapes_and_values() -> None:
    with pytest.raises(ValueError, match=r"codes: got \[60, 16\], expected \[N, K\] with N % 64 == 0 and K % 16 == 0"):
        marlin.pack_codes(torch.zeros(60, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"codes: got \[64, 24\]"):
        marlin.pack_codes(torch.zeros(64, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"codes: got torch\.int32, expected torch\.uint8"):
        marlin.pack_codes(torch.zeros(64, 16, dtype=torch.int32))
    with pytest.raises(ValueError, match="values: got a value of 16, expected 0 … 15"):
        marlin.pack_codes(torch.full((64, 16), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"qweight: got \[1, 100\]"):
        marlin.unpack_codes(torch.zeros(1, 100, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"qweight: got torch\.int64, expected torch\.int32"):
        marlin.unpack_codes(torch.zeros(1, 128, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"scales: got \[60, 2\]"):
        marlin.pack_scales(torch.ones(60, 2))
    with pytest.raises(ValueError, match=r"scales: got \[2, 60\]"):
        marlin.unpack_scales(torch.ones(2, 60))
    with pytest.raises(ValueError, match=r"zeros: got \[60, 2\]"):
        marlin.pack_zeros(torch.zeros(60, 2, dtype=torch.uint8))
