// The two sums behind a tile: over the k-warps of a block (shared memory) and over the blocks that share a tile
// (workspace). Both add in a fixed order, so equal inputs give equal bits.
//
// After the first sum, thread t holds for each 8 tokens the four channels 4*(t%32).. of token t/32: rows are contiguous
// across a warp, in the workspace and in C.
#pragma once

#include "core/config.h"
#include "core/params.h"
#include "core/scheduler.cuh"

namespace marlin_gptq {

template <class Cfg>
using Accumulators = float[4][Cfg::kTileM / 8][4];  // [16 channels][8 tokens][mma register]

template <class Cfg>
using TileSums = float4[Cfg::kTileM / 8];

__device__ __forceinline__ void add(float4& sum, const float4& term) {
    sum.x += term.x;
    sum.y += term.y;
    sum.z += term.z;
    sum.w += term.w;
}

template <class Cfg>
__device__ __forceinline__ void reduce_warps(float* buffer, const Accumulators<Cfg>& acc, TileSums<Cfg>& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_n = warp % kWarpsN, warp_k = warp / kWarpsN;
    float* mine = buffer + warp_k * 8 * Cfg::kReduceRow + 64 * warp_n;
    const int token = 2 * (lane % 4), channel = lane / 4;

#pragma unroll
    for (int block = 0; block < Cfg::kTileM / 8; ++block) {
        if (block > 0) __syncthreads();  // the buffer has been read
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float* at = mine + token * Cfg::kReduceRow + 16 * j + channel;
            at[0] = acc[j][block][0];
            at[Cfg::kReduceRow] = acc[j][block][1];
            at[8] = acc[j][block][2];
            at[Cfg::kReduceRow + 8] = acc[j][block][3];
        }
        __syncthreads();
        const float* row = buffer + warp * Cfg::kReduceRow + 4 * lane;
        float4 sum = *reinterpret_cast<const float4*>(row);
#pragma unroll
        for (int other = 1; other < kWarpsK; ++other)
            add(sum, *reinterpret_cast<const float4*>(row + other * 8 * Cfg::kReduceRow));
        sums[block] = sum;
    }
}

// Adds up a tile that several blocks computed parts of. Every contributor leaves its partial tile in a slot of its own
// and draws a ticket; whoever draws the last one sums all slots in the order of the blocks and returns true. Nobody
// waits for anybody, so blocks need not be resident together.
//
// A block has two slots: one for the tile it enters midway, one for the tile it leaves unfinished. The ticket is that of
// the tile's first contributor; a block is first in at most one shared tile.
template <class Cfg>
__device__ __forceinline__ bool reduce_blocks(const GemmParams& p, int first, int last, volatile unsigned* flag,
                                              TileSums<Cfg>& sums) {
    constexpr int kBlocks = Cfg::kTileM / 8;
    constexpr int64_t kSlot = static_cast<int64_t>(kBlocks) * kThreads;
    const int me = blockIdx.x;
    float4* slot = p.slots + (2 * static_cast<int64_t>(me) + (me == first)) * kSlot + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) __stcg(slot + i * kThreads, sums[i]);

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *flag = atomicAdd(p.tickets + first * kTicketsPerBlock, 1u);
    __syncthreads();
    if (*flag != static_cast<unsigned>(last - first)) return false;

    __threadfence();
    const float4* from = p.slots + (2 * static_cast<int64_t>(first) + 1) * kSlot + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) sums[i] = __ldcg(from + i * kThreads);
#pragma unroll 4
    for (int block = first + 1; block <= last; ++block) {
        from = p.slots + 2 * static_cast<int64_t>(block) * kSlot + threadIdx.x;
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) add(sums[i], __ldcg(from + i * kThreads));
    }
    if (threadIdx.x == 0) p.tickets[first * kTicketsPerBlock] = 0;  // clean for the next launch
    return true;
}

}  // namespace marlin_gptq
