// Every compiled variant, in one place: instantiation (sm80/gemm_*.cu, sm90/decode_*.cu) and dispatch (launch.cpp,
// heuristics.cpp) read these tables. A new variant is one line here; a new dtype is one line in each of the last two
// tables and one file beside each kernel.
#pragma once

//                        tokens per tile, stages, scales per group, blocks per SM
#define MARLIN_GPTQ_TILES(X, dtype) \
    X(dtype, 8, 5, true, 2)         \
    X(dtype, 8, 5, false, 2)        \
    X(dtype, 16, 5, true, 2)        \
    X(dtype, 16, 5, false, 2)       \
    X(dtype, 32, 4, true, 1)        \
    X(dtype, 32, 4, false, 2)

//                               tokens per tile, warps along n (64 channels each) and k, scales
#define MARLIN_GPTQ_DECODE_TILES(X, dtype) \
    X(dtype, 8, 2, 4, unit)                \
    X(dtype, 8, 2, 4, part)                \
    X(dtype, 8, 2, 4, column)              \
    X(dtype, 16, 2, 4, unit)               \
    X(dtype, 16, 2, 4, part)               \
    X(dtype, 16, 2, 4, column)             \
    X(dtype, 16, 2, 8, unit)               \
    X(dtype, 16, 2, 8, part)               \
    X(dtype, 16, 2, 8, column)             \
    X(dtype, 32, 2, 4, unit)               \
    X(dtype, 32, 2, 4, part)               \
    X(dtype, 32, 2, 4, column)

#define MARLIN_GPTQ_VARIANTS(X) \
    MARLIN_GPTQ_TILES(X, f16)   \
    MARLIN_GPTQ_TILES(X, bf16)

#define MARLIN_GPTQ_DECODE_VARIANTS(X) \
    MARLIN_GPTQ_DECODE_TILES(X, f16)   \
    MARLIN_GPTQ_DECODE_TILES(X, bf16)
