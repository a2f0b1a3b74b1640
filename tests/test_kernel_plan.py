"""Choosing a variant and cutting the work: a pure function of the library, called without a GPU."""

from __future__ import annotations

import pytest

from marlin_gptq.kernel import library

pytestmark = pytest.mark.skipif(library.loaded() is None, reason=f"no kernel: {library.status().reason}")

H200 = {"sms": 132, "shared_bytes_per_sm": 228 * 1024, "compute_capability": 90}
A100 = {"sms": 108, "shared_bytes_per_sm": 164 * 1024}
RTX4090 = {"sms": 128, "shared_bytes_per_sm": 100 * 1024}
RTX5090 = {"sms": 170, "shared_bytes_per_sm": 100 * 1024, "compute_capability": 120}
GPUS = [H200, A100, RTX4090, RTX5090, {"sms": 1, "shared_bytes_per_sm": 100 * 1024}]
RING, DECODE = 0, 1  # families
SHAPES = [
    (m, n, k, group_size)
    for m in (1, 8, 9, 16, 17, 33, 4096)
    for n in (64, 192, 57344)
    for k in (16, 128, 11008)
    for group_size in (-1, 32, 64, 128)
    if group_size == -1 or (k % group_size == 0 and k >= group_size)
]


@pytest.mark.parametrize("m, tile_m", [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (100000, 32)])
def test_tokens_choose_the_tile(m: int, tile_m: int) -> None:
    plan = library.plan(m, 4096, 4096, 128, **H200)
    assert plan["tile_m"] == tile_m
    assert plan["reason"]


@pytest.mark.parametrize("gpu", GPUS, ids=["H200", "A100", "RTX 4090", "RTX 5090", "one SM"])
def test_every_plan_fits(gpu: dict[str, int]) -> None:
    for m, n, k, group_size in SHAPES:
        plan = {
            name: value for name, value in library.plan(m, n, k, group_size, **gpu).items() if isinstance(value, int)
        }
        assert plan["m_tiles"] * plan["tile_m"] >= m > (plan["m_tiles"] - 1) * plan["tile_m"]
        assert plan["n_tiles"] * plan["tile_n"] >= n > (plan["n_tiles"] - 1) * plan["tile_n"]
        assert plan["k_tiles"] * plan["tile_k"] >= k > (plan["k_tiles"] - 1) * plan["tile_k"]
        assert plan["units"] == plan["m_tiles"] * plan["n_tiles"] * plan["k_tiles"]
        most = min(plan["units"], gpu["sms"] * plan["ctas_per_sm"])
        assert plan["grid"] == most if plan["family"] == RING else 0.7 * most <= plan["grid"] <= most
        assert plan["grouped"] == (group_size not in (-1, k))
        assert plan["shared_bytes"] + 1024 <= gpu["shared_bytes_per_sm"]
        assert plan["shared_bytes"] <= 99 * 1024 or plan["family"] == DECODE
        assert (
            plan["ctas_per_sm"] == 1
            or plan["ctas_per_sm"] * (plan["shared_bytes"] + 1024) <= (gpu["shared_bytes_per_sm"])
        )


def test_two_blocks_share_an_sm_where_they_fit() -> None:
    assert library.plan(40, 4096, 4096, -1, **H200)["grid"] == 2 * 132
    assert library.plan(1, 4096, 4096, 128, **A100)["grid"] == 2 * 108
    assert library.plan(1, 4096, 4096, 128, **RTX4090)["grid"] == 128


def test_few_units_take_few_blocks() -> None:
    assert library.plan(1, 64, 48, -1, **H200)["grid"] == 1
    assert library.plan(16, 192, 384, 64, **H200)["grid"] == 6


def test_few_tokens_take_the_decode_family_where_it_runs() -> None:
    for m in (1, 8, 16, 32):
        plan = library.plan(m, 4096, 4096, 128, **H200)
        assert plan["family"] == DECODE and plan["ctas_per_sm"] == 1
        two = 2 * (int(plan["shared_bytes"]) + 1024)
        assert two > H200["shared_bytes_per_sm"] or 2 * int(plan["threads"]) * 65 > 65536, "two blocks on one SM"
        assert library.plan(m, 4096, 4096, 128, **A100)["family"] == RING
        assert library.plan(m, 4096, 4096, 128, **RTX5090)["family"] == RING, "its shared memory is too small"
    assert library.plan(33, 4096, 4096, 128, **H200)["family"] == RING


def test_blocks_of_the_decode_family_stay_in_their_tile_where_few_sms_idle() -> None:
    assert library.plan(1, 4096, 4096, 128, **H200)["grid"] == 32 * 4
    assert library.plan(1, 12288, 4096, 128, **H200)["grid"] == 96
    assert library.plan(1, 10240, 8192, 128, **H200)["grid"] == 132, "80 of 132 would be too few"


def test_blocks_that_share_a_tile_and_nothing_else_are_a_cluster() -> None:
    assert library.plan(1, 4096, 4096, 128, **H200)["cluster"] == 4
    assert library.plan(16, 6144, 4096, 128, **H200)["cluster"] == 2
    assert library.plan(1, 12288, 4096, 128, **H200)["cluster"] == 1, "nobody shares"
    assert library.plan(1, 10240, 8192, 128, **H200)["cluster"] == 1, "blocks cross from tile to tile"
    assert library.plan(32, 8192, 8192, 128, **H200)["cluster"] == 1, "no room for the others' sums"
    assert library.plan(1, 1024, 4096, 128, **H200)["cluster"] == 1, "16 blocks a tile"


def test_long_streams_get_a_deeper_ring() -> None:
    assert library.plan(1, 57344, 8192, 128, **H200)["stages"] == 12
    assert library.plan(1, 8192, 8192, 128, **H200)["stages"] == 8
    assert library.plan(16, 57344, 8192, 128, **H200)["stages"] == 12


def test_units_may_exceed_32_bits() -> None:
    plan = library.plan(2_000_000, 57344, 28672, 128, **H200)
    assert plan["units"] == 62500 * 448 * 224


@pytest.mark.parametrize(
    "m, n, k, group_size, message",
    [
        (1, 96, 128, -1, "n a multiple of 64"),
        (1, 64, 40, -1, "k a multiple of 16"),
        (1, 0, 128, -1, "n a multiple of 64"),
        (-1, 64, 128, -1, "m >= 0"),
        (1, 64, 128, 48, "32, 64 or 128 dividing k"),
        (1, 64, 192, 128, "32, 64 or 128 dividing k"),
        (1, 64, 128, 256, "32, 64 or 128 dividing k"),
        (1, 64, 128, 0, "32, 64 or 128 dividing k"),
    ],
)
def test_bad_problems_are_refused(m: int, n: int, k: int, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        library.plan(m, n, k, group_size, **H200)
