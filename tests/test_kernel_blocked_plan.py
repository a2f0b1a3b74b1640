"""The plan and the schedule of the wgmma kernel: pure functions, checked without a GPU."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from marlin_gptq.kernel import library
from marlin_gptq.kernel.library import BlockedChoice

needs_library = pytest.mark.skipif(library.loaded() is None, reason=f"no kernel: {library.status().reason}")
CXX = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
SHAPES = [
    (m, n, k, group_size)
    for m in (1, 16, 17, 33, 65, 129, 1000, 4096)
    for n in (64, 192, 4096, 57344)
    for k in (16, 128, 4096, 11008)
    for group_size in (-1, 32, 128)
    if group_size == -1 or k % group_size == 0
]


@needs_library
@pytest.mark.parametrize("m, tile_m", [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (4096, 128)])
def test_tokens_choose_the_tile(m: int, tile_m: int) -> None:
    plan = library.plan_blocked(m, 8192, 8192, 128, sms=132)
    assert plan["tile_m"] == tile_m
    assert plan["reason"]


@needs_library
def test_many_tokens_take_wide_tiles_and_small_problems_narrow_ones() -> None:
    assert library.plan_blocked(4096, 57344, 8192, 128, sms=132)["tile_n"] == 256
    assert library.plan_blocked(128, 8192, 8192, 128, sms=132)["tile_n"] == 128


@needs_library
@pytest.mark.parametrize("sms", [1, 66, 132])
def test_every_plan_fits(sms: int) -> None:
    for m, n, k, group_size in SHAPES:
        plan = {
            name: value
            for name, value in library.plan_blocked(m, n, k, group_size, sms=sms).items()
            if not isinstance(value, str)
        }
        assert plan["m_tiles"] * plan["tile_m"] >= m > (plan["m_tiles"] - 1) * plan["tile_m"]
        assert plan["n_tiles"] * plan["tile_n"] >= n > (plan["n_tiles"] - 1) * plan["tile_n"]
        assert plan["k_tiles"] == -(-k // 128)
        tiles = plan["m_tiles"] * plan["n_tiles"]
        assert 0 <= plan["split_tiles"] <= tiles
        assert plan["split_blocks"] <= min(sms, plan["split_tiles"] * plan["k_tiles"])
        assert 1 <= plan["grid"] <= sms
        assert plan["slot_bytes"] == 2 * plan["split_blocks"] * plan["tile_m"] * plan["tile_n"] * 4
        assert plan["slot_bytes"] <= 2 * sms * 128 * 256 * 4, "the large workspace"


@needs_library
def test_the_same_problem_has_the_same_plan() -> None:
    assert library.plan_blocked(77, 4096, 4096, 64, sms=132) == library.plan_blocked(77, 4096, 4096, 64, sms=132)


@needs_library
def test_a_small_problem_is_split_along_k() -> None:
    plan = library.plan_blocked(32, 4096, 4096, 128, sms=132)
    assert (plan["split_tiles"], plan["split_blocks"]) == (32, 128), "four blocks a tile, none of them in two tiles"


@needs_library
def test_a_choice_is_obeyed_or_refused() -> None:
    plan = library.plan_blocked(100, 4096, 4096, 128, sms=132, choice=BlockedChoice(0, 3, 7))
    assert (plan["variant"], plan["split_tiles"], plan["split_blocks"]) == (0, 3, 7)
    for choice in [(99, -1, -1), (0, 10**6, 7), (0, 3, 0), (0, 0, 3), (0, 3, 133)]:
        with pytest.raises(ValueError, match="choice: no such variant, or the work does not divide like that"):
            library.plan_blocked(100, 4096, 4096, 128, sms=132, choice=BlockedChoice(*choice))


@needs_library
@pytest.mark.parametrize(
    "m, n, k, group_size, message",
    [
        (1, 96, 128, -1, "n a multiple of 64"),
        (1, 64, 40, -1, "k a multiple of 16"),
        (0, 64, 128, -1, "m >= 0"),
        (1, 64, 192, 128, "32, 64 or 128 dividing k"),
        (2**30, 57344, 28672, 128, "shape"),
    ],
)
def test_bad_problems_are_refused(m: int, n: int, k: int, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        library.plan_blocked(m, n, k, group_size, sms=132)


PROGRAM = r"""
#include <cstdio>
#include <vector>
#include "sm90/wgmma_schedule.h"
using namespace marlin_gptq;
using namespace marlin_gptq::sm90;
int main() {
    for (int m_tiles : {1, 3, 8, 19})
        for (int n_tiles : {1, 5, 16})
            for (int k_tiles : {1, 4, 7})
                for (int grid : {1, 6, 13})
                    for (int split : {0, 1, m_tiles * n_tiles / 2, m_tiles * n_tiles})
                        for (int blocks : {1, 5, grid}) {
                            Schedule s{m_tiles, n_tiles, k_tiles, 8, m_tiles * n_tiles, split, {}};
                            const int units = split * k_tiles;
                            if (blocks > grid) blocks = grid;
                            if (blocks > units) blocks = units;
                            s.shares = {units, blocks, blocks ? units / blocks : 0, blocks ? units % blocks : 0};
                            std::vector<int> times(s.tiles * k_tiles), parts(s.tiles);
                            for (int block = 0; block < grid; ++block) {
                                Walk walk(s, block, grid);
                                Segment g;
                                while (walk.next(s, &g)) {
                                    if (g.tile < 0 || g.tile >= s.tiles) return 1;
                                    if (g.k_begin >= g.k_end || g.k_end > k_tiles) return 1;
                                    const bool whole = g.k_begin == 0 && g.k_end == k_tiles;
                                    if (!whole && g.tile >= split) return 2;
                                    if (!whole) {  // its blocks are counted from the first to the last
                                        const int first = s.shares.owner(g.tile * k_tiles);
                                        const int last = s.shares.owner((g.tile + 1) * k_tiles - 1);
                                        if (block < first || block > last) return 3;
                                        if (++parts[g.tile] > last - first + 1) return 4;
                                    }
                                    for (int k = g.k_begin; k < g.k_end; ++k) ++times[g.tile * k_tiles + k];
                                }
                            }
                            for (int n : times) if (n != 1) return 5;
                            for (int tile = 0; tile < split; ++tile)
                                if (parts[tile] && parts[tile] != s.shares.owner((tile + 1) * k_tiles - 1) -
                                                                      s.shares.owner(tile * k_tiles) + 1) return 6;
                            std::vector<int> seen(s.tiles);
                            for (int tile = 0; tile < s.tiles; ++tile) {
                                const int m = m_tile_of(s, tile), n = n_tile_of(s, tile);
                                if (m < 0 || m >= m_tiles || n < 0 || n >= n_tiles) return 7;
                                if (seen[m * n_tiles + n]++) return 8;
                            }
                        }
    std::puts("good");
}
"""


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_every_unit_is_computed_once(tmp_path: Path, repository: Path) -> None:
    """However tiles are shared out; and the parts of a tile are those the last of its blocks waits for."""
    (tmp_path / "schedule.cpp").write_text(PROGRAM)
    command = [str(CXX), "-std=c++17", "-Wall", "-Werror", f"-I{repository / 'kernel/csrc'}"]
    command += ["-o", str(tmp_path / "schedule"), str(tmp_path / "schedule.cpp")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(tmp_path / "schedule")], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "good\n"), f"check {ran.returncode} of the program failed"


def test_the_wrappers_of_wgmma_are_those_of_the_script(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_wgmma", repository / "scripts" / "make_wgmma.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.text()
