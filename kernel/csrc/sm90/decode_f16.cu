#include "dispatch/variants.h"
#include "sm90/decode.cuh"

namespace marlin_gptq::sm90 {

#define MARLIN_GPTQ_INSTANTIATE(dtype, tile_m, warps_n, warps_k, groups)                                         \
    template cudaError_t launch_decode<DecodeConfig<DType::dtype, tile_m, warps_n, warps_k, Groups::groups>>( \
        const GemmParams&, const Maps&, int, int, cudaStream_t);
MARLIN_GPTQ_DECODE_TILES(MARLIN_GPTQ_INSTANTIATE, f16)
#undef MARLIN_GPTQ_INSTANTIATE

bool decode_compiled(int device) {
    // 0: not asked yet, 1: no, 2: yes
    static std::atomic<int> known[64];
    if (device >= 64) return compiled<DecodeConfig<DType::f16, 8, 2, 4, Groups::unit>>();
    int answer = known[device].load(std::memory_order_acquire);
    if (answer == 0) {
        answer = 1 + compiled<DecodeConfig<DType::f16, 8, 2, 4, Groups::unit>>();
        known[device].store(answer, std::memory_order_release);
    }
    return answer == 2;
}

}  // namespace marlin_gptq::sm90
