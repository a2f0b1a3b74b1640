// Balanced stream-K: which units of work a block takes. A unit is one k-tile of one output tile; units are numbered
// tile by tile, tiles with the token dimension fastest (so that neighbours read the same weights from L2). Block c of G
// takes units [c*U/G, (c+1)*U/G): their counts differ by at most one. With G <= U nobody is idle.
#pragma once

#include "core/layout.cuh"

namespace marlin_gptq {

MARLIN_GPTQ_HD constexpr int64_t first_unit(int64_t block, int64_t units, int64_t grid) { return block * units / grid; }

// The block that takes unit u: the largest c with c*U/G <= u.
MARLIN_GPTQ_HD constexpr int owner_of_unit(int64_t unit, int64_t units, int64_t grid) {
    return static_cast<int>(((unit + 1) * grid - 1) / units);
}

// The same for streams of less than 2^31 units and without 64-bit divisions, which cost a small launch a microsecond.
struct Shares {
    int units, grid, each, rest;  // each * grid + rest == units

    MARLIN_GPTQ_HD constexpr int first(int block) const { return block * each + block * rest / grid; }
    MARLIN_GPTQ_HD constexpr int owner(int unit) const {
        int block = static_cast<int>(static_cast<float>(unit) * static_cast<float>(grid) / static_cast<float>(units));
        if (block >= grid) block = grid - 1;
        while (first(block) > unit) --block;
        while (block + 1 < grid && first(block + 1) <= unit) ++block;
        return block;
    }
};

// A position in the stream of units.
struct TileCursor {
    int m_tile;
    int n_tile;
    int k_tile;

    MARLIN_GPTQ_HD TileCursor(int64_t unit, int m_tiles, int k_tiles)
        : m_tile(static_cast<int>(unit / k_tiles % m_tiles)),
          n_tile(static_cast<int>(unit / k_tiles / m_tiles)),
          k_tile(static_cast<int>(unit % k_tiles)) {}

    // One unit on; true when that began a new tile.
    MARLIN_GPTQ_HD bool advance(int m_tiles, int k_tiles) {
        if (++k_tile < k_tiles) return false;
        k_tile = 0;
        if (++m_tile == m_tiles) {
            m_tile = 0;
            ++n_tile;
        }
        return true;
    }
};

}  // namespace marlin_gptq
