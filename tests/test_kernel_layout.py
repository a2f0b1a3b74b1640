"""The formulas of core/layout.cuh and core/scheduler.cuh, compiled for the host, against the Python reference."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from marlin_gptq.kernel import reference
from marlin_gptq.kernel.blocked import block_words, to_blocks

CXX = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

K, N = 64, 192
SPLITS = [(1, 1), (7, 3), (264, 264), (1000, 132), (1024, 7), (5 * 10**9, 264)]

PROGRAM = f"""
#include <cstdio>
#include "core/layout.cuh"
#include "core/scheduler.cuh"
using namespace marlin_gptq;
using namespace marlin_gptq::layout;
static_assert(weight_word(17, 70) == 128 + 16 * 6, "usable at compile time");
int main() {{
    for (int k = 0; k < {K}; ++k)
        for (int n = 0; n < {N}; ++n) {{
            const int row = weight_row(k), word = weight_word(k, n), nibble = weight_nibble(k, n);
            if (weight_k(row, word, nibble) != k || weight_n(word, nibble) != n) return 1;
            if (word < block_word(n / 64 * 64) || word >= block_word(n / 64 * 64) + 128) return 2;
            std::printf("%d %d %d\\n", row, word, nibble);
        }}
    for (int n = 0; n < {N}; ++n)
        std::printf("%d %d %d %d\\n", scale_column_grouped(n), scale_column_per_channel(n), zero_word(n),
                    zero_nibble(n));
    for (int step = 0; step < 8; ++step)
        for (int tile = 0; tile < 8; ++tile) std::printf("%d\\n", block_part_bytes(step, tile));
    for (int rows = 0; rows < 5; ++rows) std::printf("%d\\n", block_bytes(rows, rows));
    const int64_t splits[][2] = {{{", ".join(f"{{{u}, {g}}}" for u, g in SPLITS)}}};
    for (const auto& split : splits) {{
        const int64_t units = split[0], grid = split[1];
        for (int64_t block = 0; block < grid; ++block) {{
            const int64_t begin = first_unit(block, units, grid), end = first_unit(block + 1, units, grid);
            if (begin >= end || end - begin > units / grid + 1) return 3;
            if (owner_of_unit(begin, units, grid) != block || owner_of_unit(end - 1, units, grid) != block) return 4;
        }}
        if (first_unit(0, units, grid) != 0 || first_unit(grid, units, grid) != units) return 5;
    }}
    TileCursor cursor(0, 3, 4);
    for (int unit = 0; unit < 60; ++unit) {{
        const TileCursor direct(unit, 3, 4);
        if (direct.m_tile != cursor.m_tile || direct.n_tile != cursor.n_tile) return 6;
        if (direct.k_tile != cursor.k_tile) return 6;
        if (cursor.advance(3, 4) != (unit % 4 == 3)) return 7;
    }}
    for (int row = 0; row < 16; ++row) {{
        unsigned seen = 0;
        for (int chunk = 0; chunk < 16; ++chunk) seen |= 1u << swizzled_chunk(row, chunk);
        if (seen != 0xffff) return 8;
    }}
    return 0;
}}
"""


def test_formulas_agree(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "layout.cpp").write_text(PROGRAM)
    program = tmp_path / "layout"
    command = [str(CXX), "-std=c++17", "-Wall", "-Werror", f"-I{repository / 'kernel/csrc'}"]
    built = subprocess.run([*command, "-o", str(program), str(tmp_path / "layout.cpp")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, f"check {ran.returncode} of the program failed"
    lines = [[int(number) for number in line.split()] for line in ran.stdout.splitlines()]

    k, n = torch.arange(K)[:, None], torch.arange(N)[None, :]
    weights = torch.stack(
        [
            (k >> 4).expand(K, N),
            reference.weight_word(k, n),
            reference.weight_nibble(k, n).expand(K, N),
        ],
        dim=-1,
    )
    assert lines[: K * N] == weights.reshape(-1, 3).tolist()
    channels = torch.arange(N)
    columns = [
        reference.scale_column(channels, 2),
        reference.scale_column(channels, 1),
        reference.zero_word(channels),
        reference.zero_nibble(channels),
    ]
    assert lines[K * N : K * N + N] == torch.stack(columns, dim=-1).tolist()

    # Blocks: which word of to_blocks holds the first code of a channel tile and k16 step, less the step's place in it.
    qweight = torch.arange(8 * 256, dtype=torch.int32).reshape(8, 256)
    first = to_blocks(qweight, None, None, -1).reshape(-1).tolist()
    parts = []
    for step in range(8):
        for tile in range(8):
            word = int(reference.weight_word(torch.tensor(0), torch.tensor(16 * tile)))
            parts.append([4 * (first.index(step * 256 + word) - step % 4)])
    assert lines[K * N + N : K * N + N + 64] == parts
    sizes = [[4 * block_words(128 * 128, 128 // rows, True)] for rows in (1, 2, 4)]
    found = lines[K * N + N + 64 :]
    assert [found[rows] for rows in (1, 2, 4)] == sizes and found[0] == [4 * block_words(128, -1, False)]


def test_bit_arithmetic_stays_in_one_file(repository: Path) -> None:
    """Positions are computed by layout.cuh alone; the kernel calls it."""
    folder = repository / "kernel/csrc"
    for source in [*folder.rglob("*.cuh"), *folder.rglob("*.cu"), *folder.rglob("*.cpp")]:
        if source.name != "layout.cuh":
            assert " >> 6" not in source.read_text(), source
