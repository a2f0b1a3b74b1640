// Every compiled wgmma variant, in one place: instantiation (sm90/wgmma_*.cu) and dispatch (dispatch/blocked_*.cpp) read
// this table. A new tile is one line: it is compiled for every dtype, group size and zero points.
#pragma once

// Tokens per tile, 64-channel tiles of each of the two warpgroups side by side (1: 128 channels a block, 2: 256), pairs of
// them that take turns along k.
#define MARLIN_GPTQ_WGMMA_TILES(X, ...) \
    X(16, 1, 2, __VA_ARGS__)            \
    X(32, 1, 2, __VA_ARGS__)            \
    X(64, 1, 1, __VA_ARGS__)            \
    X(64, 1, 2, __VA_ARGS__)            \
    X(128, 1, 1, __VA_ARGS__)           \
    X(128, 2, 1, __VA_ARGS__)
