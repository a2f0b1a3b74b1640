// From a plan to a launch.
#pragma once

#include <cuda_runtime_api.h>

#include "core/config.h"
#include "core/params.h"
#include "dispatch/heuristics.h"

namespace marlin_gptq {

// cudaErrorInvalidDeviceFunction where no such variant was compiled.
cudaError_t launch(DType dtype, const Plan& plan, const GemmParams& params, int device, cudaStream_t stream);

}  // namespace marlin_gptq
