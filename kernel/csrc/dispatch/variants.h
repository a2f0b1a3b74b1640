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

//                                tokens per tile, scales
#define MARLIN_GPTQ_DECODE_TILES(X, dtype, source) \
    X(dtype, source, 8, unit)                      \
    X(dtype, source, 8, part)                      \
    X(dtype, source, 8, column)                    \
    X(dtype, source, 16, unit)                     \
    X(dtype, source, 16, part)                     \
    X(dtype, source, 16, column)                   \
    X(dtype, source, 32, unit)                     \
    X(dtype, source, 32, part)                     \
    X(dtype, source, 32, column)

// Both layouts of weights (Source in sm90/config.h) have the same tiles.
#define MARLIN_GPTQ_DECODE_SOURCES(X, dtype)   \
    MARLIN_GPTQ_DECODE_TILES(X, dtype, marlin) \
    MARLIN_GPTQ_DECODE_TILES(X, dtype, blocks)

// What a row of the table names, for a file within the namespace marlin_gptq.
#define MARLIN_GPTQ_DECODE_CONFIG(dtype, source, tile_m, groups) \
    sm90::DecodeConfig<DType::dtype, sm90::Source::source, tile_m, sm90::Groups::groups>

#define MARLIN_GPTQ_VARIANTS(X) \
    MARLIN_GPTQ_TILES(X, f16)   \
    MARLIN_GPTQ_TILES(X, bf16)

#define MARLIN_GPTQ_DECODE_VARIANTS(X) \
    MARLIN_GPTQ_DECODE_SOURCES(X, f16) \
    MARLIN_GPTQ_DECODE_SOURCES(X, bf16)
