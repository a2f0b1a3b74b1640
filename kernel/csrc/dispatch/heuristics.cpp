#include "dispatch/heuristics.h"

#include <algorithm>

#include "dispatch/variants.h"

namespace marlin_gptq {
namespace {

struct Row {
    int64_t max_m;
    int tile_m;
    const char* reason;
};

// The first row whose max_m is not below m.
constexpr Row kRows[] = {
    {8, 8, "at most 8 tokens: one mma per packed word, none of its columns idle"},
    {16, 16, "at most 16 tokens: weights are read once, two mma per packed word"},
    {INT64_MAX, 32, "more than 16 tokens: tiles of 32, weights of a column re-read from L2"},
};

struct Shape {
    int tile_m, stages;
    bool grouped;
    int ctas_per_sm;
    size_t shared_bytes;
};

constexpr Shape kShapes[] = {
#define MARLIN_GPTQ_SHAPE(dtype, tile_m, stages, grouped, ctas) \
    {tile_m, stages, grouped, ctas, Config<DType::dtype, tile_m, stages, grouped, ctas>::kSharedBytes},
    MARLIN_GPTQ_TILES(MARLIN_GPTQ_SHAPE, f16)
#undef MARLIN_GPTQ_SHAPE
};

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace

Plan choose_config(const Problem& problem, const DeviceShape& device) {
    Plan plan;
    plan.grouped = is_grouped(problem);
    for (const Row& row : kRows) {
        if (problem.m > row.max_m) continue;
        plan.tile_m = row.tile_m;
        plan.reason = row.reason;
        break;
    }
    for (const Shape& shape : kShapes) {
        if (shape.tile_m != plan.tile_m || shape.grouped != plan.grouped) continue;
        plan.stages = shape.stages;
        plan.shared_bytes = shape.shared_bytes;
        // 1 KB of every block's shared memory is the system's.
        const int fitting = static_cast<int>(device.shared_bytes_per_sm / (shape.shared_bytes + 1024));
        plan.ctas_per_sm = std::clamp(fitting, 1, shape.ctas_per_sm);
        break;
    }
    const int64_t m_tiles = ceil_div(problem.m, plan.tile_m);
    const int64_t n_tiles = ceil_div(problem.n, kTileN);
    const int64_t k_tiles = ceil_div(problem.k, kTileK);
    plan.m_tiles = static_cast<int>(m_tiles);
    plan.n_tiles = static_cast<int>(n_tiles);
    plan.k_tiles = static_cast<int>(k_tiles);
    plan.units = m_tiles * n_tiles * k_tiles;
    plan.grid = static_cast<int>(std::min<int64_t>(plan.units, int64_t{device.sms} * plan.ctas_per_sm));
    return plan;
}

}  // namespace marlin_gptq
