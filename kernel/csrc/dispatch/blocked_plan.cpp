#include "dispatch/blocked_plan.h"

#include <algorithm>

#include "sm90/wgmma_variants.h"

namespace marlin_gptq {
namespace {

using sm90::Groups;
using sm90::Schedule;

struct Tile {
    int tile_m, row_tiles, pairs;
};

constexpr Tile kTiles[] = {
#define MARLIN_GPTQ_TILE(tile_m, row_tiles, pairs, ...) {tile_m, row_tiles, pairs},
    MARLIN_GPTQ_WGMMA_TILES(MARLIN_GPTQ_TILE, )
#undef MARLIN_GPTQ_TILE
};
constexpr int kVariants = sizeof(kTiles) / sizeof(kTiles[0]);

// Clocks and bytes a clock, of one multiprocessor unless said otherwise; from section I of the design and the sweeps of
// docs/benchmarks.md.
constexpr double kMemoryRate = 2500;   // of the whole GPU
constexpr double kCacheRate = 5000;    // L2, of the whole GPU
constexpr double kPartialRate = 40;    // partial tiles to and from L2
constexpr double kSumClocks = 1500;    // a store, a fence, a ticket and a load
constexpr double kTileClocks = 600;    // a tile's way out
constexpr int kBand = 8;               // m-tiles walked together

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// What one unit costs where `busy` blocks compute.
double unit_clocks(const Tile& tile, const BlockedPlan& plan, int busy) {
    const double products = tile.row_tiles * sm90::kConsumers * (kTileK / 16) * std::max(tile.tile_m / 2, 14) / 0.9;
    const double weights = static_cast<double>(plan.block_bytes) * tile.row_tiles;
    const double memory = weights / std::min(plan.schedule.m_tiles, kBand) * busy / kMemoryRate;
    const double cache = (weights + tile.tile_m * kTileK * 2) * busy / kCacheRate;
    return std::max({products, memory, cache});
}

// `split_tiles` of the tiles over `split_blocks`, the others whole.
double schedule_clocks(const Tile& tile, const BlockedPlan& plan, int sms, int split_tiles, int split_blocks) {
    const Schedule& s = plan.schedule;
    const int whole = s.tiles - split_tiles;
    const double unit = unit_clocks(tile, plan, std::min(sms, std::max(split_blocks, whole)));
    double clocks = static_cast<double>(ceil_div(whole, sms)) * (s.k_tiles * unit + kTileClocks);
    if (split_tiles > 0) {
        const int64_t units = static_cast<int64_t>(split_tiles) * s.k_tiles;
        const int64_t each = ceil_div(units, split_blocks);
        const double partial = static_cast<double>(tile.tile_m) * tile.row_tiles * sm90::kBlockN * 4 / kPartialRate;
        const double parts = static_cast<double>(ceil_div(s.k_tiles, each));
        const bool aligned = split_blocks % split_tiles == 0;
        const double read = parts <= 2 ? 1 : parts;
        clocks += each * unit + kTileClocks + (aligned ? 1 : 2) * (kSumClocks + partial) + read * partial;
    }
    return clocks;
}

void consider(const Tile& tile, int sms, int64_t split_tiles, int64_t split_blocks, BlockedPlan* plan) {
    const Schedule& s = plan->schedule;
    if (split_tiles < 0 || split_tiles > s.tiles || split_blocks > split_tiles * s.k_tiles) return;
    if (split_tiles > 0 && split_blocks < 1) return;
    const double clocks = schedule_clocks(tile, *plan, sms, static_cast<int>(split_tiles), static_cast<int>(split_blocks));
    if (plan->clocks > 0 && clocks >= plan->clocks) return;
    plan->clocks = clocks;
    plan->schedule.split_tiles = static_cast<int>(split_tiles);
    plan->schedule.shares.grid = static_cast<int>(split_blocks);
}

bool plan_variant(const Problem& p, bool zeros, int sms, const BlockedChoice& choice, int variant, BlockedPlan* plan) {
    const Tile& tile = kTiles[variant];
    *plan = BlockedPlan{};
    plan->variant = variant;
    plan->tile_m = tile.tile_m;
    plan->row_tiles = tile.row_tiles;
    plan->pairs = tile.pairs;
    plan->groups = !is_grouped(p) ? Groups::column : p.group_size == kTileK ? Groups::unit : Groups::part;
    plan->scale_rows = is_grouped(p) ? static_cast<int>(kTileK / p.group_size) : 0;
    plan->group_shift = p.group_size == 64 ? 1 : 0;
    plan->block_bytes = sm90::block_bytes(plan->scale_rows, zeros);
    const int64_t m_tiles = ceil_div(p.m, tile.tile_m), n_tiles = ceil_div(p.n, sm90::kBlockN * tile.row_tiles);
    const int64_t k_tiles = ceil_div(p.k, kTileK);
    const int64_t tiles = m_tiles * n_tiles;
    if (tiles * k_tiles > INT32_MAX / 2) return false;
    Schedule& s = plan->schedule;
    s.m_tiles = static_cast<int>(m_tiles);
    s.n_tiles = static_cast<int>(n_tiles);
    s.k_tiles = static_cast<int>(k_tiles);
    s.tiles = static_cast<int>(tiles);
    s.band = kBand;

    if (choice.split_tiles >= 0) {
        if (choice.split_blocks > sms) return false;
        consider(tile, sms, choice.split_tiles, choice.split_blocks, plan);
    } else {
        const int64_t rest = tiles % sms;
        consider(tile, sms, 0, 0, plan);
        for (int64_t split = rest; split > 0 && split <= tiles && split < 2 * sms; split += sms) {
            consider(tile, sms, split, std::min<int64_t>(sms, split * k_tiles), plan);
            if (split <= sms / 2)
                for (int64_t parts = 2; parts <= sms / split; ++parts) consider(tile, sms, split, split * parts, plan);
        }
    }
    if (plan->clocks == 0) return false;
    const int blocks = s.shares.grid;
    s.shares.units = s.split_tiles * s.k_tiles;
    s.shares.each = blocks > 0 ? s.shares.units / blocks : 0;
    s.shares.rest = blocks > 0 ? s.shares.units % blocks : 0;
    plan->grid = std::min(sms, std::max(blocks, s.tiles - s.split_tiles));
    plan->slot_bytes = size_t{2} * blocks * tile.tile_m * tile.row_tiles * sm90::kBlockN * 4;
    plan->reason = "the smallest estimate of clocks";
    return true;
}

}  // namespace

bool plan_blocked(const Problem& problem, bool zeros, int sms, const BlockedChoice& choice, BlockedPlan* plan) {
    if (choice.variant >= kVariants) return false;
    bool found = false;
    for (int variant = 0; variant < kVariants; ++variant) {
        BlockedPlan candidate;
        if (choice.variant >= 0 && choice.variant != variant) continue;
        if (!plan_variant(problem, zeros, sms, choice, variant, &candidate)) continue;
        if (!found || candidate.clocks < plan->clocks) *plan = candidate;
        found = true;
    }
    return found;
}

}  // namespace marlin_gptq
