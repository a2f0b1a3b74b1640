#include "dispatch/launch.h"

#include "dispatch/variants.h"
#include "sm80/launch.h"
#include "sm90/launch.h"

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

struct DecodeVariant {
    DType dtype;
    int tile_m, tile_n, threads;
    sm90::Groups groups;
    cudaError_t (*launch)(const GemmParams&, const sm90::Maps&, int, int, cudaStream_t);
};

const DecodeVariant kDecodeVariants[] = {
#define MARLIN_GPTQ_VARIANT(dtype, tile_m, warps_n, warps_k, groups)                                   \
    {DType::dtype, tile_m, 64 * warps_n, 32 * warps_n * warps_k, sm90::Groups::groups,                 \
     &sm90::launch_decode<sm90::DecodeConfig<DType::dtype, tile_m, warps_n, warps_k, sm90::Groups::groups>>},
    MARLIN_GPTQ_DECODE_VARIANTS(MARLIN_GPTQ_VARIANT)
#undef MARLIN_GPTQ_VARIANT
};

cudaError_t launch_decode(DType dtype, const Plan& plan, const GemmParams& params, int device, cudaStream_t stream) {
    sm90::Maps maps;
    if (const cudaError_t error = sm90::make_maps(params, plan.tile_m, &maps)) return error;
    for (const DecodeVariant& variant : kDecodeVariants) {
        if (variant.dtype == dtype && variant.tile_m == plan.tile_m && variant.tile_n == plan.tile_n &&
            variant.threads == plan.threads &&
            variant.groups == plan.groups)
            return variant.launch(params, maps, plan.grid, device, stream);
    }
    return cudaErrorInvalidDeviceFunction;
}

}  // namespace

cudaError_t launch(DType dtype, const Plan& plan, const GemmParams& params, int device, cudaStream_t stream) {
    if (plan.family == Family::decode) return launch_decode(dtype, plan, params, device, stream);
    for (const Variant& variant : kVariants) {
        if (variant.dtype == dtype && variant.tile_m == plan.tile_m && variant.stages == plan.stages &&
            variant.grouped == plan.grouped)
            return variant.launch(params, plan.grid, device, stream);
    }
    return cudaErrorInvalidDeviceFunction;
}

}  // namespace marlin_gptq
