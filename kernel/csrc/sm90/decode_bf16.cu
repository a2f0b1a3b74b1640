#include "dispatch/variants.h"
#include "sm90/decode.cuh"

namespace marlin_gptq::sm90 {

#define MARLIN_GPTQ_INSTANTIATE(dtype, tile_m, warps_n, warps_k, groups)                                         \
    template cudaError_t launch_decode<DecodeConfig<DType::dtype, tile_m, warps_n, warps_k, Groups::groups>>( \
        const GemmParams&, const Maps&, int, int, cudaStream_t);
MARLIN_GPTQ_DECODE_TILES(MARLIN_GPTQ_INSTANTIATE, bf16)
#undef MARLIN_GPTQ_INSTANTIATE

}  // namespace marlin_gptq::sm90
