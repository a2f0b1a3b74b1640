#include "dispatch/variants.h"
#include "sm80/gemm.cuh"

namespace marlin_gptq::sm80 {

#define MARLIN_GPTQ_INSTANTIATE(dtype, tile_m, stages, grouped, ctas)                             \
    template cudaError_t launch_gemm<Config<DType::dtype, tile_m, stages, grouped, ctas>>( \
        const GemmParams&, int, int, cudaStream_t);
MARLIN_GPTQ_TILES(MARLIN_GPTQ_INSTANTIATE, bf16)
#undef MARLIN_GPTQ_INSTANTIATE

}  // namespace marlin_gptq::sm80
