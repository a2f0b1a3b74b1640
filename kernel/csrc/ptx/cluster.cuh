// Blocks of a cluster and each other's shared memory (sm_90 and newer).
#pragma once

#include <cstdint>

namespace marlin_gptq::ptx {

__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
    return rank;
}

// Every thread of the cluster arrives once and waits once: from then on all its blocks have begun, and see what was
// written before.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address of the same place in the shared memory of another block.
__device__ __forceinline__ uint32_t in_block(uint32_t shared, uint32_t rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
    return there;
}

// 16 bytes into another block's shared memory, which its barrier there counts.
__device__ __forceinline__ void store_remote(uint32_t there, float4 v, uint32_t barrier_there) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
        "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier_there)
        : "memory");
}

}  // namespace marlin_gptq::ptx
