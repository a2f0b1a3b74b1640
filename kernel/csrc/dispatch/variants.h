// Every compiled variant, in one place: instantiation (sm80/gemm_*.cu) and dispatch (launch.cpp) both read this table.
// A new variant is one line here; a new dtype is one line below and one gemm_<dtype>.cu.
#pragma once

//                        tokens per tile, stages, scales per group, blocks per SM
#define MARLIN_GPTQ_TILES(X, dtype) \
    X(dtype, 8, 5, true, 2)         \
    X(dtype, 8, 5, false, 2)        \
    X(dtype, 16, 5, true, 2)        \
    X(dtype, 16, 5, false, 2)       \
    X(dtype, 32, 4, true, 1)        \
    X(dtype, 32, 4, false, 2)

#define MARLIN_GPTQ_VARIANTS(X) \
    MARLIN_GPTQ_TILES(X, f16)   \
    MARLIN_GPTQ_TILES(X, bf16)
