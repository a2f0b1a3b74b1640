#include "dispatch/variants.h"
#include "sm90/decode.cuh"

namespace marlin_gptq::sm90 {

#define MARLIN_GPTQ_INSTANTIATE(...)                                               \
    template cudaError_t launch_decode<MARLIN_GPTQ_DECODE_CONFIG(__VA_ARGS__)>( \
        const GemmParams&, const Maps&, int, int, cudaStream_t);
MARLIN_GPTQ_DECODE_SOURCES(MARLIN_GPTQ_INSTANTIATE, f16)
#undef MARLIN_GPTQ_INSTANTIATE

bool decode_compiled(int device) {
    using Any = MARLIN_GPTQ_DECODE_CONFIG(f16, marlin, 8, unit);
    // 0: not asked yet, 1: no, 2: yes
    static std::atomic<int> known[64];
    if (device >= 64) return compiled<Any>();
    int answer = known[device].load(std::memory_order_acquire);
    if (answer == 0) {
        answer = 1 + compiled<Any>();
        known[device].store(answer, std::memory_order_release);
    }
    return answer == 2;
}

}  // namespace marlin_gptq::sm90
