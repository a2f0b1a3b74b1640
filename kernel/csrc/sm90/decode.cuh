// C[m, n] = A[m, k] W[k, n] with 4-bit W for few tokens (m <= kTileM): mma.sync fed by the copy engine, for sm_90.
//
// The unit of work is 128 k x 128 channels: warps side by side, each with some of the channels, and rows of such warps
// take turns with the units. A ring of slots holds one unit each; the copy engine fills them, and two mbarriers a slot
// hand it over and back, so that no barrier of the whole block is in the loop. Weights, scales and zero points are
// constant: the first slots fill before the previous grid has ended. Operands are swapped and scaled as in sm80/gemm.cuh:
// one packed word is one lane's fragment, q - 8 is exact, and the products of a group are scaled in FP32 as they join the
// totals.
//
// Blocks walk their share of the unit stream (core/scheduler.cuh). Where a tile is shared, the last of its blocks adds
// the parts in the order of the blocks; each warp does so for its own piece of the tile, with a ticket of its own.
#pragma once

#include "core/params.h"
#include "core/scheduler.cuh"
#include "ptx/griddep.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/decode_multiply.cuh"
#include "sm90/decode_ring.cuh"
#include "sm90/decode_sums.cuh"
#include "sm90/launch.h"

namespace marlin_gptq::sm90 {

// Computes the block's `count` units, tile by tile, and keeps the ring full: of the warps side by side the first fetches,
// once all of them have left a slot, what comes into it next.
template <class Cfg>
__device__ __forceinline__ void compute(const GemmParams& p, const Shares& shares, const Ring<Cfg>& ring,
                                        Loader<Cfg>& loader, float* buffer, int n_tile, int k_tile, int count) {
    const bool leads = threadIdx.x % 32 == 0 && threadIdx.x / 32 % Cfg::kWarpsN == 0;
    int next = threadIdx.x / 32 / Cfg::kWarpsN;  // this warp's next unit
    int slot = next, left_slot = -1;             // its slot; the slot to be filled again
    uint32_t parity = 0, left_parity = 0;
    const auto refill = [&] {
        if (!leads || left_slot < 0) return;
        ptx::mbarrier_wait(ring.empty(left_slot), left_parity);
        loader.load_constants(left_slot, ptx::evict_first_policy());
        loader.load_activations(left_slot);
        loader.advance(Cfg::kWarpsK);
        left_slot = -1;
    };

    for (int done = 0; done < count;) {
        const int left = p.k_tiles - k_tile;
        const int until = min(count, done + left);
        const bool shared_tile = k_tile > 0 || until - done < left;
        int first_block = 0, last_block = 0;
        if (shared_tile) {
            first_block = shares.owner(n_tile * p.k_tiles);
            last_block = shares.owner((n_tile + 1) * p.k_tiles - 1);
        }
        Accumulators<Cfg> acc;
        clear<Cfg>(acc);
#pragma unroll 1
        for (; next < until; next += Cfg::kWarpsK) {
            ptx::mbarrier_wait(ring.full(slot), parity);
            refill();
            const Unit<Cfg> unit(ring.weights(slot), ring.activations(slot), threadIdx.x);
            multiply_unit<Cfg>(unit, p.group_shift, acc);
            if (p.asymmetric) add_zero_points<Cfg>(ring.weights(slot), ring.activations(slot), p.group_shift, acc);
            __syncwarp();
            if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ring.empty(slot));  // all is read
            if (next + ring.slots < count) {
                left_slot = slot;
                left_parity = parity;
            }
            slot += Cfg::kWarpsK;
            if (slot >= ring.slots) {
                slot -= ring.slots;
                parity ^= 1;
            }
        }
        refill();
        Sums<Cfg> sums;
        reduce_warps<Cfg>(buffer, p.m, acc, sums);
        if (until < count) __syncthreads();  // the buffer has been read, before the next tile's totals come
        bool last = true;
        if (Cfg::kMaxCluster > 1 && p.cluster > 1) last = reduce_cluster<Cfg>(p, ring, sums);
        if (Piece<Cfg>::valid(0, p.m)) {
            if (shared_tile && p.cluster == 1) last = reduce_blocks<Cfg>(p, first_block, last_block, sums);
            if (last) store<Cfg>(p, n_tile * Cfg::kTileN, sums);
        }
        done = until;
        k_tile = 0;
        ++n_tile;
    }
}

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    decode_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ Maps maps) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
    extern __shared__ __align__(1024) char shared[];
    ptx::let_next_grid_start();
    const Ring<Cfg> ring(ptx::shared_address(shared), p.ring_slots);
    auto* buffer = reinterpret_cast<float*>(shared + p.ring_slots * Cfg::kSlotBytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) {
        if (warp == Cfg::kWarps - 1 && Cfg::kSource == Source::marlin) ptx::prefetch_map(&maps.weights);
        if (warp == Cfg::kWarps - 2) ptx::prefetch_map(&maps.activations);
        ring.init();
        if (Cfg::kMaxCluster > 1 && p.cluster > 1 && warp == 0 && ptx::cluster_rank() == 0) {
            ptx::mbarrier_init(ring.cluster_full(), 1);
            ptx::mbarrier_init_fence();
            const int rows = min(p.m, Cfg::kTileM);
            ptx::mbarrier_arrive_expect(ring.cluster_full(), (p.cluster - 1) * rows * Cfg::kTileN * 4);
        }
    }
    const Shares shares{static_cast<int>(p.units), static_cast<int>(gridDim.x), p.units_each, p.units_rest};
    const int begin = shares.first(blockIdx.x);
    const int count = shares.first(blockIdx.x + 1) - begin;
    const int n_tile = begin / p.k_tiles, k_tile = begin % p.k_tiles;
    const int first = min(count, ring.slots);
    __syncthreads();
    if (Cfg::kMaxCluster > 1 && p.cluster > 1) ptx::cluster_arrive();
    if (!p.overlap) ptx::wait_for_previous_grid();
    // All warps share in filling the ring for the first time.
    Loader<Cfg> loader(p, maps, ring, n_tile, k_tile);
    if (lane == 0) {
        Loader<Cfg> filler = loader;
        filler.advance(warp);
        const uint64_t policy = ptx::evict_first_policy();
        for (int i = warp; i < first; i += Cfg::kWarps, filler.advance(Cfg::kWarps)) filler.load_constants(i, policy);
    }
    ptx::wait_for_previous_grid();  // from here on its results are read, and memory it may read is written
    if (lane == 0) {
        Loader<Cfg> filler = loader;
        filler.advance(warp);
        for (int i = warp; i < first; i += Cfg::kWarps, filler.advance(Cfg::kWarps)) filler.load_activations(i);
    }
    __syncwarp();
    loader.advance(warp / Cfg::kWarpsN + ring.slots);
    compute<Cfg>(p, shares, ring, loader, buffer, n_tile, k_tile, count);
#endif
}

// Whether the code that this device would run has a body: PTX of an older architecture has none.
template <class Cfg>
bool compiled() {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, decode_kernel<Cfg>) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Whether `count` clusters of `size` blocks are on the device at once: else the last ones would start late.
template <class Cfg>
bool clusters_fit(int size, int count, cudaLaunchConfig_t config, int device) {
    static std::atomic<int> known[64][5];  // most of them, and one
    if (device >= 64 || size > 4) return false;
    int most = known[device][size].load(std::memory_order_acquire) - 1;
    if (most < 0) {
        if (cudaOccupancyMaxActiveClusters(&most, decode_kernel<Cfg>, &config) != cudaSuccess) {
            cudaGetLastError();
            most = 0;
        }
        known[device][size].store(most + 1, std::memory_order_release);
    }
    return count <= most;
}

template <class Cfg>
cudaError_t launch_decode(const GemmParams& params, const Maps& maps, int grid, int device, cudaStream_t stream) {
    const int shared_bytes = params.shared_bytes;
    // More than 48 KB of shared memory has to be asked for, once per device and size.
    static std::atomic<int> asked[64];
    if (device >= 64 || asked[device].load(std::memory_order_acquire) < shared_bytes) {
        const cudaError_t error = cudaFuncSetAttribute(decode_kernel<Cfg>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       shared_bytes);
        if (error != cudaSuccess) return error;
        if (device < 64) asked[device].store(shared_bytes, std::memory_order_release);
    }
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = params.cluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(Cfg::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 1;
    GemmParams p = params;
    if (p.cluster > 1 && !clusters_fit<Cfg>(p.cluster, grid / p.cluster, config, device)) p.cluster = 1;
    attributes[0].val.clusterDim.x = p.cluster;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, decode_kernel<Cfg>, p, maps);
}

}  // namespace marlin_gptq::sm90
