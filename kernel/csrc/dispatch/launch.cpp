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
    sm90::Source source;
    int tile_m;
    sm90::Groups groups;
    cudaError_t (*launch)(const GemmParams&, const sm90::Maps&, int, int, cudaStream_t);
};

template <class Cfg>
constexpr DecodeVariant decode_variant() {
    return {Cfg::kDtype, Cfg::kSource, Cfg::kTileM, Cfg::kGroups, &sm90::launch_decode<Cfg>};
}

const DecodeVariant kDecodeVariants[] = {
#define MARLIN_GPTQ_VARIANT(...) decode_variant<MARLIN_GPTQ_DECODE_CONFIG(__VA_ARGS__)>(),
    MARLIN_GPTQ_DECODE_VARIANTS(MARLIN_GPTQ_VARIANT)
#undef MARLIN_GPTQ_VARIANT
};

cudaError_t launch_decode(DType dtype, const Plan& plan, const GemmParams& params, int device, cudaStream_t stream) {
    sm90::Maps maps;
    if (const cudaError_t error = sm90::make_maps(params, plan.source, plan.tile_m, &maps)) return error;
    for (const DecodeVariant& variant : kDecodeVariants) {
        if (variant.dtype == dtype && variant.source == plan.source && variant.tile_m == plan.tile_m &&
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
