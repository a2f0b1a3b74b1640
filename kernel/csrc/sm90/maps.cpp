#include <cuda.h>
#include <cuda_runtime_api.h>

#include "sm90/config.h"
#include "sm90/encode.h"
#include "sm90/launch.h"

namespace marlin_gptq::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver at run time: the library does not link with it.
Encode find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

cudaError_t encode_map(CUtensorMap* map, CUtensorMapDataType type, const void* base, int64_t columns, int64_t rows,
                       int64_t row_bytes, int box_columns, int box_rows, CUtensorMapSwizzle swizzle) {
    static const Encode function = find_encode();
    if (function == nullptr) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result =
        function(map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t make_maps(const GemmParams& p, Source source, int tile_m, Maps* maps) {
    // 16-bit integers stand for both floating-point types: bits are copied.
    if (source == Source::marlin) {
        const cudaError_t error = encode_map(&maps->weights, CU_TENSOR_MAP_DATA_TYPE_INT32, p.qweight, int64_t{2} * p.n,
                                             p.k / 16, int64_t{8} * p.n, 2 * kBoxN, kTileK / 16, CU_TENSOR_MAP_SWIZZLE_NONE);
        if (error != cudaSuccess) return error;
    }
    return encode_map(&maps->activations, CU_TENSOR_MAP_DATA_TYPE_UINT16, p.a, p.k, p.m, p.lda * 2, kBoxK, tile_m,
                      CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace marlin_gptq::sm90
