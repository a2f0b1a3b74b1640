"""formats/gptq, awq and compressed_tensors: against words packed one by one, round trips, sentences."""

from __future__ import annotations

import pytest
import torch
from foreign import AWQ_COLUMN_OF_NIBBLE, along
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_gptq.formats import awq, compressed_tensors, gptq

SHAPES = [(8, 8), (16, 24), (64, 128), (40, 16)]


def codes_of(n: int, k: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n * k))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_words_are_those_of_the_published_layouts(n: int, k: int) -> None:
    codes, zeros = codes_of(n, k), codes_of(n, 4, low=1)
    assert torch.equal(gptq.pack_codes(codes), along(codes).t())
    assert torch.equal(gptq.pack_zeros(zeros, 1), along(zeros.t() - 1))
    assert torch.equal(gptq.pack_zeros(zeros, 2), along(zeros.t()))
    assert torch.equal(awq.pack_codes(codes), along(codes.t(), AWQ_COLUMN_OF_NIBBLE))
    assert torch.equal(awq.pack_zeros(zeros), along(zeros.t(), AWQ_COLUMN_OF_NIBBLE))
    assert torch.equal(compressed_tensors.pack_codes(codes), along(codes))
    assert torch.equal(compressed_tensors.pack_zeros(zeros), along(zeros.t()).t())


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_round_trips(n: int, k: int) -> None:
    codes, zeros = codes_of(n, k), codes_of(n, 4)
    assert torch.equal(gptq.unpack_codes(gptq.pack_codes(codes)), codes)
    assert torch.equal(gptq.unpack_zeros(gptq.pack_zeros(zeros, 2), 2), zeros)
    assert torch.equal(gptq.unpack_zeros(gptq.pack_zeros(zeros.clamp_min(1), 1), 1), zeros.clamp_min(1))
    assert torch.equal(awq.unpack_codes(awq.pack_codes(codes)), codes)
    assert torch.equal(awq.unpack_zeros(awq.pack_zeros(zeros)), zeros)
    assert torch.equal(compressed_tensors.unpack_codes(compressed_tensors.pack_codes(codes), k), codes)
    assert torch.equal(compressed_tensors.unpack_zeros(compressed_tensors.pack_zeros(zeros), n), zeros)


def test_compressed_tensors_fills_what_is_no_multiple_of_eight() -> None:
    codes, zeros = codes_of(13, 21), codes_of(13, 3)
    packed, packed_zeros = compressed_tensors.pack_codes(codes), compressed_tensors.pack_zeros(zeros)
    assert packed.shape == (13, 3) and packed_zeros.shape == (2, 3)
    assert torch.equal(compressed_tensors.unpack_codes(packed, 21), codes)
    assert torch.equal(compressed_tensors.unpack_zeros(packed_zeros, 13), zeros)


def test_the_words_of_a_symmetric_file() -> None:
    zeros = torch.full((16, 2), 8, dtype=torch.uint8)
    assert {int(word) & 0xFFFFFFFF for word in gptq.pack_zeros(zeros, 1).flatten()} == {0x77777777}
    assert {int(word) & 0xFFFFFFFF for word in gptq.pack_zeros(zeros, 2).flatten()} == {0x88888888}


def test_version_1_has_no_zero_point_of_zero() -> None:
    with pytest.raises(ValueError, match="a zero point of 0, which version 1 cannot hold; use version 2"):
        gptq.pack_zeros(torch.zeros(8, 1, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match="version: got 3, expected 1 or 2"):
        gptq.pack_zeros(torch.ones(8, 1, dtype=torch.uint8), 3)
    assert gptq.unpack_zeros(torch.tensor([[-1]], dtype=torch.int32), 1).unique().tolist() == [0]


def test_codes_that_fill_no_word_are_refused() -> None:
    for pack in (gptq.pack_codes, lambda codes: awq.pack_codes(codes.t())):
        with pytest.raises(ValueError, match="expected"):
            pack(torch.zeros(8, 12, dtype=torch.uint8))


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 6), size=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_moved_groups_round_trip(groups: int, size: int, seed: int) -> None:
    shuffle = torch.randperm(groups * size, generator=torch.Generator().manual_seed(seed))
    g_idx = gptq.plain_groups(groups * size, groups)[shuffle]
    order = gptq.order_of_groups(g_idx, groups)
    if order is None:
        assert torch.equal(g_idx, gptq.plain_groups(groups * size, groups))
        return
    assert torch.equal(g_idx[order.long()], gptq.plain_groups(groups * size, groups))
    assert torch.equal(gptq.groups_of_order(order, groups), g_idx)


@pytest.mark.parametrize(
    ("g_idx", "groups", "message"),
    [
        ([0, 0, 0, 1], 2, "groups of 1 to 3 input features, expected 2 in each"),
        ([0, 0, 1, 2], 2, "got groups 0 to 2, expected 0 to 1"),
        ([0, -1, 1, 1], 2, "got groups -1 to 1"),
        ([0, 1, 2], 2, "got groups 0 to 2"),
        ([0, 1, 1], 2, "groups of 1 to 2 input features, expected 1.5"),
    ],
)
def test_groups_that_cannot_be_put_in_order(g_idx: list[int], groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq.order_of_groups(torch.tensor(g_idx), groups)
