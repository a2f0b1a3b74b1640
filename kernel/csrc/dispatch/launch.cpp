#include "dispatch/launch.h"

#include "dispatch/variants.h"
#include "sm80/launch.h"

namespace marlin_gptq {
namespace {

struct Variant {
    DType dtype;
    int tile_m, stages;
    bool grouped;
    cudaError_t (*launch)(const GemmParams&, int, int, cudaStream_t);
};

const Variant kVariants[] = {
#define MARLIN_GPTQ_VARIANT(dtype, tile_m, stages, grouped, ctas) \
    {DType::dtype, tile_m, stages, grouped, &sm80::launch_gemm<Config<DType::dtype, tile_m, stages, grouped, ctas>>},
    MARLIN_GPTQ_VARIANTS(MARLIN_GPTQ_VARIANT)
#undef MARLIN_GPTQ_VARIANT
};

}  // namespace

cudaError_t launch(DType dtype, const Plan& plan, const GemmParams& params, int device, cudaStream_t stream) {
    for (const Variant& variant : kVariants) {
        if (variant.dtype == dtype && variant.tile_m == plan.tile_m && variant.stages == plan.stages &&
            variant.grouped == plan.grouped)
            return variant.launch(params, plan.grid, device, stream);
    }
    return cudaErrorInvalidDeviceFunction;
}

}  // namespace marlin_gptq
