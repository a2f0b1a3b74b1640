#include "dispatch/heuristics.h"

#include <algorithm>

#include "dispatch/variants.h"

namespace marlin_gptq {
namespace {

struct Row {
    int64_t max_m;
    int64_t min_units;  // of the whole problem, for each SM; decode only
    Family family;
    int tile_m, slots;
    const char* reason;
};

// The first row whose max_m is not below m, among those that the device and the size of the problem allow. Measured on one
// H200, group size 128, weights from memory.
constexpr Row kRows[] = {
    {8, 64, Family::decode, 8, 12, "at most 8 tokens, long streams: 96 KB of weights on their way (60 us, 4.0 TB/s)"},
    {8, 0, Family::decode, 8, 8, "at most 8 tokens, short streams: 64 KB, since a longer queue delays some blocks (11.5 us; 96 KB 12.2)"},
    {16, 64, Family::decode, 16, 12, "at most 16 tokens, long streams: 96 KB of weights on their way (75 us)"},
    {16, 0, Family::decode, 16, 8, "at most 16 tokens, short streams: 64 KB (13.4 us; 96 KB 14.2)"},
    {32, 0, Family::decode, 32, 8, "at most 32 tokens: 8 warps of 64 channels (104 us; 16 of 32 channels 129), as deep a ring as fits"},
    {8, 0, Family::ring, 8, 0, "at most 8 tokens: one mma per packed word, none of its columns idle"},
    {16, 0, Family::ring, 16, 0, "at most 16 tokens: weights are read once, two mma per packed word"},
    {INT64_MAX, 0, Family::ring, 32, 0, "more than 16 tokens: tiles of 32, weights of a column re-read from L2"},
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

struct DecodeShape {
    int tile_m;
    sm90::Groups groups;
    sm90::Source source;
    int tile_n, warps_k, threads, max_cluster;
    size_t slot_bytes, tail_bytes;
};

template <class Cfg>
constexpr DecodeShape decode_shape() {
    return {Cfg::kTileM,   Cfg::kGroups,     Cfg::kSource,    Cfg::kTileN,    Cfg::kWarpsK,
            Cfg::kThreads, Cfg::kMaxCluster, Cfg::kSlotBytes, Cfg::kTailBytes};
}

constexpr DecodeShape kDecodeShapes[] = {
#define MARLIN_GPTQ_SHAPE(...) decode_shape<MARLIN_GPTQ_DECODE_CONFIG(__VA_ARGS__)>(),
    MARLIN_GPTQ_DECODE_SOURCES(MARLIN_GPTQ_SHAPE, f16)
#undef MARLIN_GPTQ_SHAPE
};

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

constexpr int kAlignedPercent = 70;  // of the SMs that must have work
constexpr int kSystemBytes = 1024;  // of every block's shared memory

sm90::Groups groups_of(const Problem& p) {
    if (!is_grouped(p)) return sm90::Groups::column;
    return p.group_size == kTileK ? sm90::Groups::unit : sm90::Groups::part;
}

bool plan_decode(const Problem& problem, const DeviceShape& device, const Row& row, Plan* plan) {
    const int64_t units = ceil_div(problem.n, kTileN) * ceil_div(problem.k, kTileK);
    // Measured on 9.0 alone; newer GPUs with tensor maps may follow once somebody has run it there.
    if (device.compute_capability != 90 || units < row.min_units * device.sms || units > INT32_MAX) return false;
    for (const DecodeShape& shape : kDecodeShapes) {
        if (shape.tile_m != row.tile_m || shape.groups != groups_of(problem) || shape.source != problem.source) continue;
        // Every row of warps along k has as many slots, two at least: one fills while the other is computed.
        const int64_t ring = device.shared_bytes_per_sm - kSystemBytes - static_cast<int64_t>(shape.tail_bytes);
        const int64_t fitting = ring / static_cast<int64_t>(shape.slot_bytes) / shape.warps_k * shape.warps_k;
        plan->stages = static_cast<int>(std::min<int64_t>(fitting, row.slots));
        if (plan->stages < 2 * shape.warps_k) return false;
        plan->tile_n = shape.tile_n;
        plan->groups = shape.groups;
        plan->source = shape.source;
        plan->ctas_per_sm = 1;  // its registers and shared memory leave no room for a second, of the next grid either
        plan->threads = shape.threads;
        plan->cluster = shape.max_cluster;
        plan->shared_bytes = plan->stages * shape.slot_bytes + shape.tail_bytes;
        return true;
    }
    return false;
}

bool plan_ring(const DeviceShape& device, const Row& row, Plan* plan) {
    for (const Shape& shape : kShapes) {
        if (shape.tile_m != row.tile_m || shape.grouped != plan->grouped) continue;
        plan->stages = shape.stages;
        plan->shared_bytes = shape.shared_bytes;
        plan->tile_n = kTileN;
        plan->threads = kThreads;
        const int fitting = static_cast<int>(device.shared_bytes_per_sm / (shape.shared_bytes + kSystemBytes));
        plan->ctas_per_sm = std::clamp(fitting, 1, shape.ctas_per_sm);
        return true;
    }
    return false;
}

}  // namespace

Plan choose_config(const Problem& problem, const DeviceShape& device) {
    Plan plan;
    plan.grouped = is_grouped(problem);
    for (const Row& row : kRows) {
        if (problem.m > row.max_m || (row.family == Family::ring && problem.source != sm90::Source::marlin)) continue;
        if (row.family == Family::decode ? !plan_decode(problem, device, row, &plan) : !plan_ring(device, row, &plan))
            continue;
        plan.family = row.family;
        plan.tile_m = row.tile_m;
        plan.reason = row.reason;
        break;
    }
    if (plan.reason == nullptr) return plan;
    const int64_t m_tiles = ceil_div(problem.m, plan.tile_m);
    const int64_t n_tiles = ceil_div(problem.n, plan.tile_n);
    const int64_t k_tiles = ceil_div(problem.k, kTileK);
    plan.m_tiles = static_cast<int>(m_tiles);
    plan.n_tiles = static_cast<int>(n_tiles);
    plan.k_tiles = static_cast<int>(k_tiles);
    plan.units = m_tiles * n_tiles * k_tiles;
    plan.grid = static_cast<int>(std::min<int64_t>(plan.units, int64_t{device.sms} * plan.ctas_per_sm));
    if (plan.family == Family::decode) {
        // Idle SMs cost less than blocks that cross from one tile into the next, which have two tiles to add up: with 96
        // of 132 SMs at work (4096, 12288) takes 11.6 us instead of 12.9.
        const int64_t splits = std::max<int64_t>(plan.grid / n_tiles, 1);
        const int most = plan.cluster;
        plan.cluster = 1;
        const int64_t aligned = n_tiles * splits;
        if (aligned <= plan.grid && aligned * 100 >= int64_t{plan.grid} * kAlignedPercent && splits <= k_tiles) {
            plan.grid = static_cast<int>(aligned);
            if (splits <= most) plan.cluster = static_cast<int>(splits);
        }
    }
    plan.partial_bytes = size_t{4} * plan.tile_m * plan.tile_n;
    return plan;
}

}  // namespace marlin_gptq
