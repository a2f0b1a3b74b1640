// Registers -> shared memory -> global memory by the copy engine (sm_90 and newer).
#pragma once

#include <cstdint>

namespace marlin_gptq::ptx {

// Four 8 x 8 matrices of 16 bits, transposed on the way: lane L holds columns 2(L%4), +1 of row L/4 of each and gives the
// address of what becomes row L%8 of matrix L/8.
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t shared, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// What this thread wrote to shared memory may from now on be read by the copy engine.
__device__ __forceinline__ void shared_to_copy_engine_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box at (column, row) of a two-dimensional tensor from shared memory; what lies beyond its edges is not written.
__device__ __forceinline__ void tensor_store(const void* map, int column, int row, uint32_t shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(shared)
                 : "memory");
}

__device__ __forceinline__ void tensor_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's stores have left shared memory.
__device__ __forceinline__ void tensor_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// A barrier of `threads` threads of the block, other than that of __syncthreads (id 0).
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace marlin_gptq::ptx
