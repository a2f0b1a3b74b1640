// Which wgmma variant a problem in the run-time layout gets and how its work is cut: a pure function, tested without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch/heuristics.h"
#include "sm90/wgmma_config.h"
#include "sm90/wgmma_schedule.h"

namespace marlin_gptq {

struct BlockedPlan {
    int variant = 0;  // row of the table of tiles
    int tile_m = 0, row_tiles = 0, pairs = 0;
    sm90::Groups groups = sm90::Groups::column;
    int grid = 0;
    int scale_rows = 0, group_shift = 0, block_bytes = 0;
    sm90::Schedule schedule{};
    size_t slot_bytes = 0;  // of the workspace, all blocks together
    double microseconds = 0;  // estimated, for an H200
    const char* reason = nullptr;
};

// For tests and tuning: -1 leaves the choice to the plan.
struct BlockedChoice {
    int variant = -1;
    int split_tiles = -1;   // how many tiles are shared out in units of k, and
    int split_blocks = -1;  // over how many blocks
};

// `m` at least 1 and the shape valid (see capi.h). False where the choice does not fit, or the work has 2^31 units.
bool plan_blocked(const Problem& problem, bool zeros, int sms, const BlockedChoice& choice, BlockedPlan* plan);

}  // namespace marlin_gptq
