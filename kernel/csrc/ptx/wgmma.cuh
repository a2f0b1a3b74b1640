// Warpgroup matrix products (sm_90a) and what must stand around them.
//
// A product runs on after its instruction: until a wait has covered it, its accumulators and register operands belong to
// the hardware. keep() holds the compiler to that: an empty instruction that seems to change the registers, so that
// nothing is computed early, moved or reused across it.
#pragma once

#include <cstdint>

#include "ptx/wgmma_shapes.cuh"

namespace marlin_gptq::ptx {

// Between writes to registers (accumulators or operands) and the next product that touches them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `kPending` of the newest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void keep(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int kCount>
__device__ __forceinline__ void keep(T (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) keep(x[i]);
}

// The operand b: rows of 64 values of 16 bits (128 bytes), swizzled by 128 bytes, as a tensor copy leaves them; `shared`
// a multiple of 1024. The next 16 values of every row are kStepK16 further.
constexpr uint64_t kStepK16 = 32 >> 4;
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t shared) {
    constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
    return (shared >> 4 & 0x3fff) | kEightRows << 32 | kSwizzle128 << 62;
}

// Registers per thread, from now on, of this warpgroup; all of its warps say so.
template <int kCount>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace marlin_gptq::ptx
