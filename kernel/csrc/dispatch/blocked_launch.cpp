#include "dispatch/blocked_launch.h"

#include "sm90/wgmma_variants.h"

namespace marlin_gptq {
namespace {

using sm90::Groups;
using sm90::WgmmaConfig;

struct Variant {
    DType dtype;
    int tile_m, row_tiles, pairs;
    Groups groups;
    bool zeros;
    cudaError_t (*launch)(const sm90::WgmmaParams&, const sm90::WgmmaMaps&, int, int, cudaStream_t);
};

const Variant kVariants[] = {
#define MARLIN_GPTQ_VARIANT(tile_m, row_tiles, pairs, dtype, groups, zeros)    \
    {DType::dtype, tile_m, row_tiles, pairs, Groups::groups, zeros,            \
     &sm90::launch_wgmma<WgmmaConfig<DType::dtype, tile_m, row_tiles, pairs, Groups::groups, zeros>>},
#define MARLIN_GPTQ_VARIANTS_OF(dtype)                                        \
    MARLIN_GPTQ_WGMMA_TILES(MARLIN_GPTQ_VARIANT, dtype, column, false)        \
    MARLIN_GPTQ_WGMMA_TILES(MARLIN_GPTQ_VARIANT, dtype, column, true)         \
    MARLIN_GPTQ_WGMMA_TILES(MARLIN_GPTQ_VARIANT, dtype, unit, false)          \
    MARLIN_GPTQ_WGMMA_TILES(MARLIN_GPTQ_VARIANT, dtype, unit, true)           \
    MARLIN_GPTQ_WGMMA_TILES(MARLIN_GPTQ_VARIANT, dtype, part, false)          \
    MARLIN_GPTQ_WGMMA_TILES(MARLIN_GPTQ_VARIANT, dtype, part, true)
    MARLIN_GPTQ_VARIANTS_OF(f16) MARLIN_GPTQ_VARIANTS_OF(bf16)
#undef MARLIN_GPTQ_VARIANTS_OF
#undef MARLIN_GPTQ_VARIANT
};

}  // namespace

cudaError_t launch_blocked(DType dtype, bool zeros, const BlockedPlan& plan, const sm90::WgmmaParams& params,
                           const sm90::WgmmaMaps& maps, int device, cudaStream_t stream) {
    for (const Variant& variant : kVariants) {
        if (variant.dtype == dtype && variant.tile_m == plan.tile_m && variant.row_tiles == plan.row_tiles &&
            variant.pairs == plan.pairs && variant.groups == plan.groups && variant.zeros == zeros)
            return variant.launch(params, maps, plan.grid, device, stream);
    }
    return cudaErrorInvalidDeviceFunction;
}

}  // namespace marlin_gptq
