"""Blocks for Hopper: against the closed formulas, bit for bit there and back, and what is refused."""

from __future__ import annotations

import re
import zlib

import pytest
import torch
from kernel_problems import BFLOAT16, FLOAT16, packed_weight
from torch import Tensor

from marlin_gptq.formats import marlin
from marlin_gptq.kernel import blocked, reference


def weight(
    k: int, n: int, group_size: int, dtype: torch.dtype = FLOAT16, asymmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(qweight, scales, qzeros), every bit random but for the signs of the scales."""
    qweight, scales = packed_weight(k, n, group_size, dtype, device="cpu")
    generator = torch.Generator().manual_seed(7)
    qzeros = torch.randint(-(2**31), 2**31, (scales.shape[0], n // 8), generator=generator).int()
    return qweight, scales, qzeros if asymmetric else None


def test_unit_vector() -> None:
    """Codes that depend on every bit of k and n."""
    k, n = torch.arange(256)[None, :], torch.arange(512)[:, None]
    codes = ((3 * k + 5 * n + k * n + 7 * (k >> 4) + 11 * (n >> 4)) % 16).to(torch.uint8)
    blocks = blocked.to_blocks(marlin.pack_codes(codes), None, None, -1)
    assert blocks.shape == (4, 2, 2048)
    words = [word & 0xFFFFFFFF for word in blocks.reshape(-1)[:4].tolist()]
    assert [f"{word:08x}" for word in words] == ["b3b30880", "2a2a7ff7", "9191e66e", "08085dd5"]
    assert zlib.crc32(blocks.numpy().astype("<i4").tobytes()) == 0xD68FEB80


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_every_position_follows_the_formulas(group_size: int, asymmetric: bool) -> None:
    """The slow twin: each code, scale and zero point looked up by its own address."""
    k_total, n_total = 256, 192
    qweight, scales, qzeros = weight(k_total, n_total, group_size, asymmetric=asymmetric)
    blocks = blocked.to_blocks(qweight, scales, qzeros, group_size)
    rows = 0 if group_size == -1 else 128 // group_size
    k, n = torch.arange(k_total)[:, None], torch.arange(n_total)[None, :]
    word = 4 * (32 * (8 * ((k >> 6) & 1) + ((n >> 4) & 7)) + 4 * (n & 7) + ((k >> 1) & 3)) + ((k >> 4) & 3)
    found = (blocks[n >> 7, k >> 7, word] >> (4 * reference.weight_nibble(k, n)).int()) & 15
    assert torch.equal(found, reference.unpack_codes(qweight))

    octets = blocks.contiguous().view(torch.uint8)
    channel = torch.arange(n_total) & 127
    position = 2 * (8 * (channel >> 4) + (channel & 7)) + ((channel >> 3) & 1)
    for group in range(k_total // group_size if rows else 0):
        block, row = divmod(group, rows)
        inside = octets[torch.arange(n_total) >> 7, block].view(torch.float16)
        at = 4096 + 128 * row + position
        assert torch.equal(inside.gather(1, at[:, None])[:, 0], reference.unpack_scales(scales)[group])
    if qzeros is not None:
        expected = reference.unpack_zeros(qzeros)
        for block in range(2):
            for row in range(max(rows, 1)):
                at = 8192 + 256 * rows + 128 * row + position
                found = octets[torch.arange(n_total) >> 7, block].gather(1, at[:, None])[:, 0]
                assert torch.equal(found.int(), expected[block * rows + row if rows else 0])


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    "k, n, group_size",
    [(16, 64, -1), (128, 128, 128), (112, 192, -1), (96, 64, 32), (192, 320, 64), (384, 256, 128), (160, 128, 32)],
)
def test_there_and_back(k: int, n: int, group_size: int, asymmetric: bool, dtype: torch.dtype) -> None:
    qweight, scales, qzeros = weight(k, n, group_size, dtype, asymmetric)
    blocks = blocked.to_blocks(qweight, scales, qzeros, group_size)
    assert blocks.is_contiguous() and blocks.shape[2] * 4 % 128 == 0
    back = blocked.from_blocks(blocks, n, k, group_size, asymmetric, dtype)
    assert torch.equal(back[0], qweight) and back[0].is_contiguous()
    if scales.shape[0] == 1:
        assert back[1] is None
    else:
        assert back[1] is not None and back[1].dtype == dtype and torch.equal(back[1], scales)
    assert (back[2] is None) == (qzeros is None)
    if qzeros is not None:
        assert back[2] is not None and torch.equal(back[2], qzeros)


def test_a_group_as_long_as_k_counts_as_per_column() -> None:
    qweight, scales, _ = weight(128, 64, 128)
    assert torch.equal(blocked.to_blocks(qweight, scales, None, 128), blocked.to_blocks(qweight, None, None, -1))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_padding_is_silent(asymmetric: bool) -> None:
    """Code 8 with scale 0, or code and zero point 0, whatever stands beside it."""
    qweight, scales, qzeros = weight(96, 64, 32, asymmetric=asymmetric)
    blocks = blocked.to_blocks(qweight, scales, qzeros, 32)
    whole = blocked.from_blocks(blocks, 128, 128, 32, asymmetric, FLOAT16)
    codes = reference.unpack_codes(whole[0])
    padding = 0 if asymmetric else 8
    assert (codes[96:] == padding).all() and (codes[:, 64:] == padding).all()
    assert whole[1] is not None and not whole[1][3:].any() and not whole[1][:, 64:].any()
    if whole[2] is not None:
        assert not whole[2][3:].any() and not whole[2][:, 8:].any()


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_scales_per_column(dtype: torch.dtype) -> None:
    _, scales, _ = weight(128, 192, -1, dtype)
    natural = blocked.natural_scales(scales)
    assert torch.equal(natural, marlin.unpack_scales(scales)[:, 0])
    assert torch.equal(blocked.stored_scales(natural), scales)


GOOD = weight(256, 128, 64)
REFUSED = [
    (lambda: blocked.to_blocks(GOOD[0].long(), None, None, -1), TypeError, "qweight: got int64, expected int32"),
    (lambda: blocked.to_blocks(GOOD[0][:, :64], None, None, -1), ValueError, "qweight: got [16, 64], expected [K/16"),
    (lambda: blocked.to_blocks(GOOD[0], GOOD[1], None, 48), ValueError, "group_size: got 48, expected -1, K or one"),
    (lambda: blocked.to_blocks(GOOD[0], None, None, 64), ValueError, "scales: got None, expected [4, 128] float16"),
    (lambda: blocked.to_blocks(GOOD[0], GOOD[1].float(), None, 64), TypeError, "scales: got [4, 128] float32"),
    (lambda: blocked.to_blocks(GOOD[0], GOOD[1], None, 32), ValueError, "scales: got [4, 128], expected [8, 128]"),
    (
        lambda: blocked.to_blocks(GOOD[0], GOOD[1], torch.zeros(4, 8).int(), 64),
        ValueError,
        "qzeros: got [4, 8], expected [4, 16] int32",
    ),
    (
        lambda: blocked.to_blocks(GOOD[0], GOOD[1], torch.zeros(4, 16), 64),
        TypeError,
        "qzeros: got [4, 16] float32, expected [4, 16] int32",
    ),
    (
        lambda: blocked.from_blocks(torch.zeros(1, 2, 2048).int(), 128, 256, 64, False, FLOAT16),
        ValueError,
        "blocks: got [1, 2, 2048], expected [1, 2, 2176] (N = 128, K = 256, group_size 64, without zero points)",
    ),
    (
        lambda: blocked.from_blocks(torch.zeros(1, 2, 2048), 128, 256, -1, False, FLOAT16),
        TypeError,
        "blocks: got float32, expected int32",
    ),
    (
        lambda: blocked.from_blocks(torch.zeros(1, 2, 2048).int(), 128, 256, -1, False, torch.float32),
        TypeError,
        "dtype: got torch.float32, expected torch.float16 or torch.bfloat16",
    ),
    (
        lambda: blocked.from_blocks(torch.zeros(1, 2, 2048).int(), 100, 256, -1, False, FLOAT16),
        ValueError,
        "n: got 100, expected a positive multiple of 64",
    ),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_is_refused(call: object, error: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=re.escape(message)):
        call()
