// Which variant a problem gets and how the work is cut: a pure function, tested without a GPU.
#pragma once

#include <cstdint>

#include "core/config.h"
#include "sm90/config.h"

namespace marlin_gptq {

struct Problem {
    int64_t m;           // tokens
    int64_t n;           // output channels
    int64_t k;           // input channels
    int64_t group_size;  // k per scale; -1: one scale per column
    sm90::Source source = sm90::Source::marlin;
};

struct DeviceShape {
    int sms;
    int shared_bytes_per_sm;
    int compute_capability;  // 10 * major + minor; below 90: no decode family
};

enum class Family : int { ring = 0, decode = 1 };  // sm80/gemm.cuh, sm90/decode.cuh

struct Plan {
    Family family = Family::ring;
    int tile_m = 0;
    int tile_n = 0;
    int stages = 0;  // or slots
    int threads = 0;
    bool grouped = false;
    sm90::Groups groups = sm90::Groups::column;  // of the decode family
    sm90::Source source = sm90::Source::marlin;
    int ctas_per_sm = 0;
    int m_tiles = 0;
    int n_tiles = 0;
    int k_tiles = 0;
    int64_t units = 0;
    int grid = 0;
    int cluster = 1;  // blocks that share a tile and nothing else, where they may be a cluster
    size_t shared_bytes = 0;
    size_t partial_bytes = 0;  // of a tile in the workspace
    const char* reason = nullptr;
};

// Problem with no scale per group: one scale for the whole column.
constexpr bool is_grouped(const Problem& p) { return p.group_size > 0 && p.group_size < p.k; }

// `m` at least 1 and the shape valid (see capi.h). Never fails on the Marlin layout; weights in blocks have a plan (units
// > 0) for up to 32 tokens on compute capability 9.0.
Plan choose_config(const Problem& problem, const DeviceShape& device);

}  // namespace marlin_gptq
