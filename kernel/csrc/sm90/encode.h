// Descriptions of two-dimensional tensors for the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace marlin_gptq::sm90 {

// A tensor [rows, columns] whose rows are `row_bytes` apart, moved in boxes. cudaErrorNotSupported where the driver has no
// such maps, cudaErrorInvalidValue where it refuses one.
cudaError_t encode_map(CUtensorMap* map, CUtensorMapDataType type, const void* base, int64_t columns, int64_t rows,
                       int64_t row_bytes, int box_columns, int box_rows, CUtensorMapSwizzle swizzle);

}  // namespace marlin_gptq::sm90
