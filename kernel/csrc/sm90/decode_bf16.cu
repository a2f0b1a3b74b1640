#include "dispatch/variants.h"
#include "sm90/decode.cuh"

namespace marlin_gptq::sm90 {

#define MARLIN_GPTQ_INSTANTIATE(...)                                               \
    template cudaError_t launch_decode<MARLIN_GPTQ_DECODE_CONFIG(__VA_ARGS__)>( \
        const GemmParams&, const Maps&, int, int, cudaStream_t);
MARLIN_GPTQ_DECODE_SOURCES(MARLIN_GPTQ_INSTANTIATE, bf16)
#undef MARLIN_GPTQ_INSTANTIATE

}  // namespace marlin_gptq::sm90
