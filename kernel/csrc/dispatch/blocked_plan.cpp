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

// What a unit of 128 k of each tile takes a block (microseconds) while all 132 multiprocessors of an H200 are at work, and
// what the tile is for. Together with the costs below fitted to 1,052 timings of the 11 layers of docs/benchmarks.md at
// M = 16 to 4096 (FP16, group size 128); the plans so chosen are within 0.6 % of the best ones timed, on average.
struct Cost {
    double unit;
    const char* reason;
};
constexpr Cost kCosts[kVariants] = {
    {0.33, "16 tokens: half the products of 32, two pairs of warpgroups unpack (0.33 us a unit)"},
    {0.37, "32 tokens: two pairs of warpgroups unpack (0.37 us a unit; with one pair 0.46)"},
    {0.52, "64 tokens, one pair of warpgroups: sets up and adds up sooner (10.9 us for the smallest layer; two pairs 11.4)"},
    {0.49, "64 tokens, two pairs of warpgroups (0.49 us a unit; one pair 0.52)"},
    {0.745, "128 tokens x 128 channels: more tiles to share out, or fewer channels than would fill wide ones (0.75 us a unit)"},
    {1.419, "128 tokens x 256 channels: activations are read half as often (1.42 us for twice the work of 128 channels)"},
};
constexpr double kStart = 1.3;         // of a launch
constexpr double kTileEnd = 0.93;      // of 128 tokens: the last products, the way out, the next tile's first,
constexpr double kTileEndWidth = 0.62;  // and this more for each 128 channels
constexpr double kSum = 2.88;          // of a tile that several blocks share: store, ticket, load
constexpr double kPerMegabyte = 8.9;   // of FP32 parts of such a tile, to or from L2
constexpr double kDoubt = 1.01;        // whole tiles where the two come out alike: they are surer
constexpr int kBand = 8;               // m-tiles walked together

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// `split_tiles` of the tiles over `split_blocks`, the others whole: microseconds.
double time_of(const Tile& tile, double unit, const Schedule& s, int sms, int64_t split_tiles, int64_t split_blocks) {
    const double end = (kTileEnd + kTileEndWidth * tile.row_tiles) * tile.tile_m / 128;
    double time = kStart + static_cast<double>(ceil_div(s.tiles - split_tiles, sms)) * (s.k_tiles * unit + end);
    if (split_tiles == 0) return time;
    const int64_t each = ceil_div(split_tiles * s.k_tiles, split_blocks);
    const bool aligned = split_blocks % split_tiles == 0;  // no block crosses from one tile into the next
    const int64_t parts = ceil_div(s.k_tiles, each) + (!aligned && s.k_tiles % each != 0);
    const double part = kPerMegabyte * 1e-6 * tile.tile_m * tile.row_tiles * sm90::kBlockN * 4;
    time += each * unit + end + (aligned ? 1 : 2) * (kSum + part);
    time += (parts <= 2 ? 1 : parts) * part;  // of two parts a block reads only the other's
    return time * kDoubt;
}

void consider(const Tile& tile, double unit, int sms, int64_t split_tiles, int64_t split_blocks, BlockedPlan* plan) {
    const Schedule& s = plan->schedule;
    if (split_tiles > s.tiles || split_blocks > split_tiles * s.k_tiles || split_blocks > sms) return;
    if ((split_tiles > 0) != (split_blocks > 0)) return;
    const double time = time_of(tile, unit, s, sms, split_tiles, split_blocks);
    if (plan->microseconds > 0 && time >= plan->microseconds) return;
    plan->microseconds = time;
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
    plan->reason = kCosts[variant].reason;
    plan->groups = !is_grouped(p) ? Groups::column : p.group_size == kTileK ? Groups::unit : Groups::part;
    plan->scale_rows = is_grouped(p) ? static_cast<int>(kTileK / p.group_size) : 0;
    plan->group_shift = p.group_size == 64 ? 1 : 0;
    plan->block_bytes = sm90::block_bytes(plan->scale_rows, zeros);
    const int64_t m_tiles = ceil_div(p.m, tile.tile_m), n_tiles = ceil_div(p.n, sm90::kBlockN * tile.row_tiles);
    const int64_t k_tiles = ceil_div(p.k, kTileK), tiles = m_tiles * n_tiles;
    if (tiles > INT32_MAX / 2 / k_tiles) return false;
    Schedule& s = plan->schedule;
    s.m_tiles = static_cast<int>(m_tiles);
    s.n_tiles = static_cast<int>(n_tiles);
    s.k_tiles = static_cast<int>(k_tiles);
    s.tiles = static_cast<int>(tiles);
    s.band = kBand;

    const double unit = kCosts[variant].unit;
    if (choice.split_tiles >= 0) {
        consider(tile, unit, sms, choice.split_tiles, choice.split_blocks, plan);
    } else {
        consider(tile, unit, sms, 0, 0, plan);
        // The tiles of the last, unfilled wave, alone or with those of the wave before.
        for (int64_t split = tiles % sms; split > 0 && split <= tiles && split < 2 * sms; split += sms) {
            consider(tile, unit, sms, split, std::min<int64_t>(sms, split * k_tiles), plan);
            for (const int64_t parts : {sms / split, sms / split - 1, int64_t{2}})
                if (parts >= 2) consider(tile, unit, sms, split, split * parts, plan);
        }
    }
    if (plan->microseconds == 0) return false;
    const int blocks = s.shares.grid;
    s.shares.units = s.split_tiles * s.k_tiles;
    s.shares.each = blocks > 0 ? s.shares.units / blocks : 0;
    s.shares.rest = blocks > 0 ? s.shares.units % blocks : 0;
    plan->grid = std::min(sms, std::max(blocks, s.tiles - s.split_tiles));
    plan->slot_bytes = size_t{2} * blocks * tile.tile_m * tile.row_tiles * sm90::kBlockN * 4;
    return true;
}

}  // namespace

bool plan_blocked(const Problem& problem, bool zeros, int sms, const BlockedChoice& choice, BlockedPlan* plan) {
    bool found = false;
    for (int variant = 0; variant < kVariants; ++variant) {
        BlockedPlan candidate;
        if (choice.variant >= 0 && choice.variant != variant) continue;
        if (!plan_variant(problem, zeros, sms, choice, variant, &candidate)) continue;
        if (!found || candidate.microseconds < plan->microseconds) *plan = candidate;
        found = true;
    }
    return found;
}

}  // namespace marlin_gptq
