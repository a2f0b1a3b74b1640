// C[m, n] = A[m, k] W[k, n] with 4-bit W in the run-time layout (kernel/blocked.py), by wgmma, for sm_90a.
//
// Operands are swapped as in the other families: weights are the 64-row operand, unpacked into registers; tokens are the
// columns, read from shared memory. Two warpgroups multiply, each its own 64 * kRowTiles channels of a stage of 128 k; in some
// variants a second pair of them takes every other stage. One thread more keeps the ring of stages full by the copy engine. csrc/sm90/README.md draws who
// waits for whom. Blocks stay for the whole grid (sm90/wgmma_schedule.h says what they compute), and the ring runs on
// from tile to tile.
#pragma once

#include <atomic>

#include "core/types.cuh"
#include "ptx/griddep.cuh"
#include "ptx/ldst.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma_store.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/wgmma_epilogue.cuh"
#include "sm90/wgmma_launch.h"
#include "sm90/wgmma_mainloop.cuh"
#include "sm90/wgmma_schedule.h"

namespace marlin_gptq::sm90 {

// Shared memory of a block, as addresses.
template <class Cfg>
struct WgmmaShared {
    uint32_t base;

    __device__ __forceinline__ uint32_t stage(int i) const { return base + i * Cfg::kStageBytes; }
    __device__ __forceinline__ uint32_t out(int consumer) const {
        return base + Cfg::kStages * Cfg::kStageBytes + consumer * Cfg::kRowTiles * Cfg::kOutBoxBytes;
    }
    __device__ __forceinline__ uint32_t full(int i) const {
        return base + Cfg::kStages * Cfg::kStageBytes + Cfg::kOutBytes + Cfg::kPairBytes + 16 * i;
    }
    __device__ __forceinline__ uint32_t empty(int i) const { return full(i) + 8; }
    static constexpr int kPairOffset = Cfg::kStages * Cfg::kStageBytes + Cfg::kOutBytes;
    static constexpr int kFlagOffset = kPairOffset + Cfg::kPairBytes + kMaxStages * 16;
};

// A stage of the ring and the parity of its phase.
template <class Cfg>
struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == Cfg::kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// ---- the producer: one thread ----

template <class Cfg>
__device__ __forceinline__ void load_weights(const WgmmaParams& p, const WgmmaShared<Cfg>& shared, int stage, int n_tile,
                                             int k_tile, uint64_t policy) {
    const int first = n_tile * Cfg::kBlocks;
    const int count = min(Cfg::kBlocks, p.n_blocks - first);  // channels beyond the last block are computed, not stored
    ptx::mbarrier_arrive_expect(shared.full(stage), Cfg::kActivationBytes + count * p.block_bytes);
    for (int i = 0; i < count; ++i) {
        const int64_t block = static_cast<int64_t>(first + i) * p.k_blocks + k_tile;
        ptx::bulk_copy(shared.stage(stage) + Cfg::kActivationBytes + i * p.block_bytes, p.blocks + block * p.block_bytes,
                       p.block_bytes, shared.full(stage), policy);
    }
}

// Zeros past m and k: they silence whatever weights they meet.
template <class Cfg>
__device__ __forceinline__ void load_activations(const WgmmaMaps& maps, const WgmmaShared<Cfg>& shared, int stage, int m_tile,
                                                 int k_tile) {
#pragma unroll
    for (int box = 0; box < kTileK / kBoxK; ++box)
        ptx::tensor_copy(shared.stage(stage) + box * Cfg::kBoxBytes, &maps.activations, k_tile * kTileK + box * kBoxK,
                         m_tile * Cfg::kTileM, shared.full(stage));
}

template <class Cfg>
__device__ __forceinline__ void produce(const WgmmaParams& p, const WgmmaMaps& maps, const WgmmaShared<Cfg>& shared) {
    const Schedule& schedule = p.schedule;
    const uint64_t policy = p.weights_once ? ptx::evict_first_policy() : ptx::evict_normal_policy();
    Segment segment;
    // Constant as they are, the weights of the first stages need not wait for the grid before this one.
    int early = 0;
    if (p.overlap) {
        Walk ahead(schedule, blockIdx.x, gridDim.x);
        while (early < Cfg::kStages && ahead.next(schedule, &segment))
            for (int k = segment.k_begin; k < segment.k_end && early < Cfg::kStages; ++k)
                load_weights(p, shared, early++, n_tile_of(schedule, segment.tile), k, policy);
    }
    ptx::wait_for_previous_grid();
    RingPosition<Cfg> at;
    Walk walk(schedule, blockIdx.x, gridDim.x);
    while (walk.next(schedule, &segment)) {
        const int m_tile = m_tile_of(schedule, segment.tile), n_tile = n_tile_of(schedule, segment.tile);
        for (int k = segment.k_begin; k < segment.k_end; ++k, at.advance()) {
            if (early > 0) {
                --early;
            } else {
                ptx::mbarrier_wait(shared.empty(at.stage), at.parity ^ 1);
                load_weights(p, shared, at.stage, n_tile, k, policy);
            }
            load_activations(maps, shared, at.stage, m_tile, k);
        }
    }
}

// ---- the consumers: two warpgroups, or two pairs of them ----

template <class Cfg>
__device__ __forceinline__ void consume(const WgmmaParams& p, const WgmmaMaps& maps, const WgmmaShared<Cfg>& shared,
                                        char* memory, int consumer, int pair) {
    const Schedule& schedule = p.schedule;
    const Lane<Cfg> lane(consumer, p.block_bytes);
    auto* buffer = reinterpret_cast<float4*>(memory + WgmmaShared<Cfg>::kPairOffset);
    auto* flag = reinterpret_cast<volatile unsigned*>(memory + WgmmaShared<Cfg>::kFlagOffset) + consumer;
    const auto give_back = [&](uint32_t barrier) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
    };
    ptx::wait_for_previous_grid();  // the workspace and C may be in use until then
    RingPosition<Cfg> at;
    Walk walk(schedule, blockIdx.x, gridDim.x);
    Segment segment;
    int turn = 0;  // of the pairs
    while (walk.next(schedule, &segment)) {
        Fragments<Cfg> fragments{};
        WgmmaSums<Cfg> totals{}, products{};
        ptx::keep(fragments[0]);
        ptx::keep(fragments[1]);
        ptx::keep(products);
        uint32_t release = 0;
#pragma unroll 1
        for (int k = segment.k_begin; k < segment.k_end; ++k, at.advance()) {
            if constexpr (Cfg::kPairs > 1) {
                const bool mine = turn == pair;
                turn ^= 1;
                if (!mine) continue;
            }
            ptx::mbarrier_wait(shared.full(at.stage), at.parity);
            // A shuffle tells the compiler that all lanes agree: descriptors are then made once for the warp.
            const uint32_t stage = __shfl_sync(0xffffffff, shared.stage(at.stage), 0);
            multiply_unit<Cfg>(stage, release, lane, p, fragments, products, totals);
            if constexpr (Cfg::kScaleSums) {
                give_back(shared.empty(at.stage));
            } else {
                release = shared.empty(at.stage);
            }
        }
        if constexpr (!Cfg::kScaleSums) {
            ptx::wgmma_wait<0>();
            ptx::keep(fragments[0]);
            ptx::keep(fragments[1]);
            ptx::keep(products);
            if (release != 0) give_back(release);
        }
        auto& sums = Cfg::kScaleSums ? totals : products;
        if constexpr (Cfg::kPairs > 1) {
            sum_pairs<Cfg>(consumer, pair, buffer, sums);
            if (pair > 0) continue;
        }
        bool last = true;
        if (segment.k_begin > 0 || segment.k_end < schedule.k_tiles) {
            const int first_block = schedule.shares.owner(segment.tile * schedule.k_tiles);
            const int last_block = schedule.shares.owner((segment.tile + 1) * schedule.k_tiles - 1);
            last = sum_blocks<Cfg>(p, consumer, first_block, last_block, flag, sums);
        }
        if (last)
            store_tile<Cfg>(p, maps, consumer, m_tile_of(schedule, segment.tile) * Cfg::kTileM,
                            n_tile_of(schedule, segment.tile) * Cfg::kTileN + consumer * 64 * Cfg::kRowTiles,
                            shared.out(consumer), sums);
    }
    if (pair == 0 && threadIdx.x % kWarpgroup == 0) ptx::tensor_store_wait_read();  // shared memory must outlive its readers
}

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    wgmma_kernel(const __grid_constant__ WgmmaParams p, const __grid_constant__ WgmmaMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    const WgmmaShared<Cfg> shared{ptx::shared_address(memory)};
    if (threadIdx.x == 0) {
        ptx::prefetch_map(&maps.activations);
        ptx::prefetch_map(&maps.output);
        for (int i = 0; i < Cfg::kStages; ++i) {
            ptx::mbarrier_init(shared.full(i), 1);
            ptx::mbarrier_init(shared.empty(i), kConsumers * kWarpgroup / 32);
        }
        ptx::mbarrier_init_fence();
    }
    __syncthreads();
    ptx::let_next_grid_start();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup < Cfg::kPairs * kConsumers) {
        ptx::take_registers<Cfg::kComputeRegisters>();
        consume<Cfg>(p, maps, shared, memory, warpgroup % kConsumers, warpgroup / kConsumers);
    } else {
        ptx::give_registers<Cfg::kLoadRegisters>();
        if (threadIdx.x % kWarpgroup == 0) produce<Cfg>(p, maps, shared);
    }
#endif
}

template <class Cfg>
cudaError_t launch_wgmma(const WgmmaParams& params, const WgmmaMaps& maps, int grid, int device, cudaStream_t stream) {
    // More than 48 KB of shared memory has to be asked for, once per device.
    static std::atomic<bool> asked[64];
    if (device >= 64 || !asked[device].load(std::memory_order_acquire)) {
        const cudaError_t error = cudaFuncSetAttribute(wgmma_kernel<Cfg>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       Cfg::kSharedBytes);
        if (error != cudaSuccess) return error;
        if (device < 64) asked[device].store(true, std::memory_order_release);
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(Cfg::kThreads);
    config.dynamicSmemBytes = Cfg::kSharedBytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, wgmma_kernel<Cfg>, params, maps);
}

}  // namespace marlin_gptq::sm90
