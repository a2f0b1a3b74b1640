#include "sm90/encode.h"
#include "sm90/wgmma_launch.h"

namespace marlin_gptq::sm90 {

cudaError_t make_wgmma_maps(const void* a, void* c, int64_t m, int64_t n, int64_t k, int64_t lda, int tile_m, WgmmaMaps* maps) {
    // 16-bit integers stand for both floating-point types: bits are copied.
    constexpr CUtensorMapDataType kBits = CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const cudaError_t error =
        encode_map(&maps->activations, kBits, a, k, m, lda * 2, kBoxK, tile_m, CU_TENSOR_MAP_SWIZZLE_128B);
    if (error != cudaSuccess) return error;
    return encode_map(&maps->output, kBits, c, n, m, n * 2, 64, tile_m, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace marlin_gptq::sm90
