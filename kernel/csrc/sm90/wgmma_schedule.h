// Which tiles, and which k of them, a block of the wgmma kernel computes. Plain C++, usable on the host.
//
// Tiles 0..split_tiles-1 are shared out in units of 128 k over the first blocks ("stream-K"); the others, whole, by turns
// over all blocks. A block begins with its share of the split tiles: whoever comes last to one of them adds up its parts
// while the others go on.
#pragma once

#include "core/layout.cuh"
#include "core/scheduler.cuh"

namespace marlin_gptq::sm90 {

struct Schedule {
    int m_tiles, n_tiles, k_tiles;
    int band;         // m-tiles walked together along n: their activations stay in L2
    int tiles;        // m_tiles * n_tiles
    int split_tiles;  // the first of them
    Shares shares;    // of the units of split tiles; shares.grid blocks have one
};

// A run of k-tiles of one tile.
struct Segment {
    int tile, k_begin, k_end;
};

// Tiles are numbered along m first, in bands of `band` m-tiles that go along n.
MARLIN_GPTQ_HD constexpr int m_tile_of(const Schedule& s, int tile) {
    const int first = tile / (s.band * s.n_tiles) * s.band;
    const int width = s.m_tiles - first < s.band ? s.m_tiles - first : s.band;
    return first + (tile - first * s.n_tiles) % width;
}
MARLIN_GPTQ_HD constexpr int n_tile_of(const Schedule& s, int tile) {
    const int first = tile / (s.band * s.n_tiles) * s.band;
    const int width = s.m_tiles - first < s.band ? s.m_tiles - first : s.band;
    return (tile - first * s.n_tiles) / width;
}

// A block's way through its work.
class Walk {
  public:
    MARLIN_GPTQ_HD Walk(const Schedule& s, int block, int grid)
        : unit_(block < s.shares.grid ? s.shares.first(block) : 0),
          end_(block < s.shares.grid ? s.shares.first(block + 1) : 0),
          tile_(s.split_tiles + block),
          grid_(grid) {}

    // The next run of k-tiles; false when there is none.
    MARLIN_GPTQ_HD bool next(const Schedule& s, Segment* segment) {
        if (unit_ < end_) {
            segment->tile = unit_ / s.k_tiles;
            segment->k_begin = unit_ % s.k_tiles;
            const int left = s.k_tiles - segment->k_begin;
            const int count = end_ - unit_ < left ? end_ - unit_ : left;
            segment->k_end = segment->k_begin + count;
            unit_ += count;
            return true;
        }
        if (tile_ >= s.tiles) return false;
        *segment = {tile_, 0, s.k_tiles};
        tile_ += grid_;
        return true;
    }

  private:
    int unit_, end_, tile_, grid_;
};

}  // namespace marlin_gptq::sm90
