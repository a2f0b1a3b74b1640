// The sums behind a tile, over the k-warps of a block and over the blocks that share the tile, and the store of the result.
// Both add in a fixed order, so equal inputs give equal bits.
#pragma once

#include "core/layout.cuh"
#include "core/params.h"
#include "core/types.cuh"
#include "ptx/cluster.cuh"
#include "ptx/ldst.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/config.h"
#include "sm90/decode_multiply.cuh"
#include "sm90/decode_ring.cuh"

namespace marlin_gptq::sm90 {

// Which piece of a tile a thread sums and stores: kAll times four channels of one token, a warp whole rows.
template <class Cfg>
struct Piece {
    static constexpr int kRow = Cfg::kTileN / 4;  // float4s in a row
    static constexpr int kRows = Cfg::kTileM < Cfg::kWarps ? Cfg::kTileM : Cfg::kWarps;  // at once
    static constexpr int kAll = Cfg::kTileM / kRows;
    static constexpr int64_t kSlot = static_cast<int64_t>(Cfg::kTileM) * kRow;  // float4s of a partial tile

    __device__ __forceinline__ static int token(int i) { return i * kRows + threadIdx.x / kRow; }
    __device__ __forceinline__ static int channel() { return threadIdx.x % kRow * 4; }
    __device__ __forceinline__ static bool valid(int i, int m) { return threadIdx.x < kRows * kRow && token(i) < m; }

    static_assert(kRow == 32 && Cfg::kTileM % kRows == 0);
};

template <class Cfg>
using Sums = float4[Piece<Cfg>::kAll];

__device__ __forceinline__ void accumulate(float4& sum, const float4& term) {
    sum.x += term.x;
    sum.y += term.y;
    sum.z += term.z;
    sum.w += term.w;
}

// Adds up the k-warps' totals, in their order.
template <class Cfg>
__device__ __forceinline__ void reduce_warps(float* buffer, int m, const Accumulators<Cfg>& acc, Sums<Cfg>& sums) {
    constexpr int kPartial = Cfg::kTileM * Cfg::kReduceRow;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_n = warp % Cfg::kWarpsN, warp_k = warp / Cfg::kWarpsN;
    float* mine = buffer + warp_k * kPartial + 16 * Cfg::kWarpTiles * warp_n + lane / 4;
#pragma unroll
    for (int b = 0; b < Cfg::kTileM / 8; ++b) {
        const int token = 8 * b + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < Cfg::kWarpTiles; ++j) {
            float* at = mine + token * Cfg::kReduceRow + 16 * j;
            if (token < m) {
                at[0] = acc[j][b][0];
                at[8] = acc[j][b][2];
            }
            if (token + 1 < m) {
                at[Cfg::kReduceRow] = acc[j][b][1];
                at[Cfg::kReduceRow + 8] = acc[j][b][3];
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Piece<Cfg>::kAll; ++i) {
        if (!Piece<Cfg>::valid(i, m)) continue;
        const float* row = buffer + Piece<Cfg>::token(i) * Cfg::kReduceRow + Piece<Cfg>::channel();
        sums[i] = *reinterpret_cast<const float4*>(row);
#pragma unroll
        for (int other = 1; other < Cfg::kWarpsK; ++other)
            accumulate(sums[i], *reinterpret_cast<const float4*>(row + other * kPartial));
    }
}

// Adds up a tile shared by the blocks first..last (see core/reduce.cuh), each warp its own piece: true in the warp that
// came last, which holds the sums then.
template <class Cfg>
__device__ __forceinline__ bool reduce_blocks(const GemmParams& p, int first, int last, Sums<Cfg>& sums) {
    using P = Piece<Cfg>;
    const int me = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto slot_of = [&](int64_t slot) { return p.slots + slot * P::kSlot + threadIdx.x; };
    constexpr int kStep = P::kRows * P::kRow;
    float4* mine = slot_of(2 * static_cast<int64_t>(me) + (me == first));
#pragma unroll
    for (int i = 0; i < P::kAll; ++i)
        if (P::valid(i, p.m)) __stcg(mine + i * kStep, sums[i]);

    __syncwarp();
    unsigned* ticket = p.tickets + first * kTicketsPerBlock + warp;
    unsigned drawn = 0;
    if (lane == 0) drawn = ptx::count_one(ticket);
    drawn = __shfl_sync(0xffffffff, drawn, 0);
    __syncwarp();  // a shuffle orders no memory: what lane 0 acquired, all lanes may now read
    if (drawn != static_cast<unsigned>(last - first)) return false;

    const float4* from = slot_of(2 * static_cast<int64_t>(first) + 1);
#pragma unroll
    for (int i = 0; i < P::kAll; ++i)
        if (P::valid(i, p.m)) sums[i] = __ldcg(from + i * kStep);
#pragma unroll 4
    for (int block = first + 1; block <= last; ++block) {
        from = slot_of(2 * static_cast<int64_t>(block));
#pragma unroll
        for (int i = 0; i < P::kAll; ++i)
            if (P::valid(i, p.m)) accumulate(sums[i], __ldcg(from + i * kStep));
    }
    if (lane == 0) *ticket = 0;  // clean for the next launch
    return true;
}

// The same where the blocks of a cluster share one tile and nothing else: the others send their sums into the shared memory
// of the first, which adds them in the order of the blocks and returns true. Called by all threads.
template <class Cfg>
__device__ __forceinline__ bool reduce_cluster(const GemmParams& p, const Ring<Cfg>& ring, Sums<Cfg>& sums) {
    using P = Piece<Cfg>;
    constexpr int kStep = P::kRows * P::kRow * 16;
    ptx::cluster_wait();  // the first block has set up its barrier
    const uint32_t rank = ptx::cluster_rank(), mine = ring.cluster_sums() + threadIdx.x * 16;
    if (rank != 0) {
        const uint32_t there = ptx::in_block(mine + (rank - 1) * static_cast<uint32_t>(P::kSlot) * 16, 0);
        const uint32_t full = ptx::in_block(ring.cluster_full(), 0);
#pragma unroll
        for (int i = 0; i < P::kAll; ++i)
            if (P::valid(i, p.m)) ptx::store_remote(there + i * kStep, sums[i], full);
        return false;
    }
    ptx::mbarrier_wait(ring.cluster_full(), 0);
    for (uint32_t other = 1; other < ptx::cluster_size(); ++other) {
#pragma unroll
        for (int i = 0; i < P::kAll; ++i) {
            if (!P::valid(i, p.m)) continue;
            const uint4 bits = ptx::load_shared_16(mine + (other - 1) * static_cast<uint32_t>(P::kSlot) * 16 + i * kStep);
            accumulate(sums[i], {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                                 __uint_as_float(bits.w)});
        }
    }
    return true;
}

// FP32 sums -> C: the scale of the column (where there is one per column), the bias, one rounding.
template <class Cfg>
__device__ __forceinline__ void store(const GemmParams& p, int n0, const Sums<Cfg>& sums) {
    constexpr DType kDtype = Cfg::kDtype;
    using P = Piece<Cfg>;
#pragma unroll
    for (int i = 0; i < P::kAll; ++i) {
        const int n = n0 + P::channel();
        if (!P::valid(i, p.m) || n >= p.n) continue;
        float4 scale = {1.f, 1.f, 1.f, 1.f}, bias = {0.f, 0.f, 0.f, 0.f};
        const auto pairs = [](const void* at, int low, int high) {
            const auto pair = [&](int column) {
                return unpack_pair<kDtype>(
                    *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(at) + column));
            };
            const float2 x = pair(low), y = pair(high);
            return float4{x.x, x.y, y.x, y.y};
        };
        if constexpr (Cfg::kGroups == Groups::column && Cfg::kSource == Source::marlin)
            scale = pairs(p.scales, layout::scale_column_per_channel(n), layout::scale_column_per_channel(n + 2));
        if constexpr (Cfg::kGroups == Groups::column && Cfg::kSource == Source::blocks)
            scale = pairs(p.scales, n, n + 2);
        if (p.bias != nullptr) bias = pairs(p.bias, n, n + 2);
        uint2 bits;
        bits.x = pack_pair<kDtype>(fmaf(sums[i].x, scale.x, bias.x), fmaf(sums[i].y, scale.y, bias.y));
        bits.y = pack_pair<kDtype>(fmaf(sums[i].z, scale.z, bias.z), fmaf(sums[i].w, scale.w, bias.w));
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.c) + static_cast<int64_t>(P::token(i)) * p.n + n) = bits;
    }
}

}  // namespace marlin_gptq::sm90
