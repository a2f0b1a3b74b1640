// Programmatic dependent launch (sm_90 and newer): both do nothing where the launch did not ask for it.
#pragma once

namespace marlin_gptq::ptx {

// Until the grids before this one have ended and their writes are visible.
__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next grid may be started as soon as every block has said so and there is room.
__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace marlin_gptq::ptx
