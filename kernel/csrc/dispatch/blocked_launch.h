// From a plan to a launch.
#pragma once

#include <cuda_runtime_api.h>

#include "dispatch/blocked_plan.h"
#include "sm90/wgmma_launch.h"

namespace marlin_gptq {

// cudaErrorInvalidDeviceFunction where no such variant was compiled.
cudaError_t launch_blocked(DType dtype, bool zeros, const BlockedPlan& plan, const sm90::WgmmaParams& params,
                           const sm90::WgmmaMaps& maps, int device, cudaStream_t stream);

}  // namespace marlin_gptq
