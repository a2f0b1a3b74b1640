// The host side of sm80/gemm.cuh. Launchers are instantiated beside their kernels (gemm_f16.cu, gemm_bf16.cu).
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "core/config.h"
#include "core/params.h"

namespace marlin_gptq::sm80 {

template <class Cfg>
cudaError_t launch_gemm(const GemmParams& params, int grid, int device, cudaStream_t stream);

}  // namespace marlin_gptq::sm80
