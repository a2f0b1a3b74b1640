// FP32 sums of a tile -> C: what other blocks computed of it, the scale of the column, the bias, one rounding, and out by
// the copy engine. Each consumer warpgroup does this for its own channels.
#pragma once

#include "core/params.h"
#include "core/types.cuh"
#include "ptx/ldst.cuh"
#include "ptx/tma_store.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/wgmma_launch.h"
#include "sm90/wgmma_mainloop.cuh"

namespace marlin_gptq::sm90 {

__device__ __forceinline__ void add(float4& sum, const float4& term) {
    sum.x += term.x;
    sum.y += term.y;
    sum.z += term.z;
    sum.w += term.w;
}

// The second pair's sums are added to those of the first, which alone goes on with them.
template <class Cfg>
__device__ __forceinline__ void sum_pairs(int consumer, int pair, float4* buffer, WgmmaSums<Cfg>& sums) {
    constexpr int kPieces = Cfg::kSums / 4;
    float4* mine = buffer + consumer * Cfg::kRowTiles * kPieces * kWarpgroup + threadIdx.x % kWarpgroup;
    ptx::named_barrier(3 + consumer, 2 * kWarpgroup);  // what was there has been read
    if (pair == 1) {
#pragma unroll
        for (int i = 0; i < Cfg::kRowTiles; ++i)
#pragma unroll
            for (int j = 0; j < kPieces; ++j)
                mine[(i * kPieces + j) * kWarpgroup] = {sums[i][4 * j], sums[i][4 * j + 1], sums[i][4 * j + 2], sums[i][4 * j + 3]};
    }
    ptx::named_barrier(5 + consumer, 2 * kWarpgroup);
    if (pair == 1) return;
#pragma unroll
    for (int i = 0; i < Cfg::kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
            const float4 x = mine[(i * kPieces + j) * kWarpgroup];
            sums[i][4 * j] += x.x, sums[i][4 * j + 1] += x.y, sums[i][4 * j + 2] += x.z, sums[i][4 * j + 3] += x.w;
        }
}

// Adds up a tile shared by the blocks first..last, as core/reduce.cuh does: true in the warpgroup that came last, which
// holds the sums then. `flag`: a word of shared memory of this warpgroup's.
template <class Cfg>
__device__ __forceinline__ bool sum_blocks(const WgmmaParams& p, int consumer, int first, int last, volatile unsigned* flag,
                                           WgmmaSums<Cfg>& sums) {
    constexpr int kThreads = kConsumers * kWarpgroup;
    constexpr int kPieces = Cfg::kSums / 4;
    constexpr int64_t kSlot = static_cast<int64_t>(Cfg::kRowTiles) * kPieces * kThreads;  // float4s of a partial tile
    const int me = blockIdx.x, thread = threadIdx.x;
    const auto piece = [&](int64_t slot, int i, int j) { return p.slots + slot * kSlot + (i * kPieces + j) * kThreads + thread; };
    const auto mine = [&](int i, int j) {
        return float4{sums[i][4 * j], sums[i][4 * j + 1], sums[i][4 * j + 2], sums[i][4 * j + 3]};
    };
    const auto set = [&](int i, int j, const float4& x) {
        sums[i][4 * j] = x.x, sums[i][4 * j + 1] = x.y, sums[i][4 * j + 2] = x.z, sums[i][4 * j + 3] = x.w;
    };
    const int64_t slot = 2 * static_cast<int64_t>(me) + (me == first);
#pragma unroll
    for (int i = 0; i < Cfg::kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kPieces; ++j) __stcg(piece(slot, i, j), mine(i, j));

    // What the warpgroup wrote is ordered before its ticket by the barrier, and its ticket before what it reads by the next.
    ptx::named_barrier(1 + consumer, kWarpgroup);
    unsigned* ticket = p.tickets + first * kTicketsPerBlock + consumer;
    if (thread % kWarpgroup == 0) *flag = ptx::count_one(ticket);
    ptx::named_barrier(1 + consumer, kWarpgroup);
    const bool came_last = *flag == static_cast<unsigned>(last - first);
    ptx::named_barrier(1 + consumer, kWarpgroup);  // the flag has been read
    if (!came_last) return false;

    if (last - first == 1) {  // x + y == y + x: no need to keep the order
        const int64_t other = me == first ? 2 * static_cast<int64_t>(last) : 2 * static_cast<int64_t>(first) + 1;
#pragma unroll
        for (int i = 0; i < Cfg::kRowTiles; ++i)
#pragma unroll
            for (int j = 0; j < kPieces; ++j) {
                float4 x = __ldcg(piece(other, i, j));
                add(x, mine(i, j));
                set(i, j, x);
            }
    } else {
#pragma unroll
        for (int i = 0; i < Cfg::kRowTiles; ++i)
#pragma unroll
            for (int j = 0; j < kPieces; ++j) set(i, j, __ldcg(piece(2 * static_cast<int64_t>(first) + 1, i, j)));
        // Small tiles read several blocks' parts at once: each trip to L2 takes as long as all the additions.
        constexpr int kAtOnce = Cfg::kSums * Cfg::kRowTiles <= 8 ? 4 : Cfg::kSums * Cfg::kRowTiles <= 16 ? 2 : 1;
#pragma unroll kAtOnce
        for (int block = first + 1; block <= last; ++block) {
#pragma unroll
            for (int i = 0; i < Cfg::kRowTiles; ++i)
#pragma unroll
                for (int j = 0; j < kPieces; ++j) {
                    float4 x = mine(i, j);
                    add(x, __ldcg(piece(2 * static_cast<int64_t>(block), i, j)));
                    set(i, j, x);
                }
        }
    }
    if (thread % kWarpgroup == 0) *ticket = 0;  // clean for the next launch
    return true;
}

// The sums of a thread lie along tokens, C along channels: stmatrix transposes them into boxes of 64 channels, swizzled by
// 128 bytes, and the copy engine takes those to C, clipped at its edges. `out`: this warpgroup's boxes.
template <class Cfg>
__device__ __forceinline__ void store_tile(const WgmmaParams& p, const WgmmaMaps& maps, int consumer, int m0, int n0,
                                           uint32_t out, const WgmmaSums<Cfg>& sums) {
    constexpr DType kDtype = Cfg::kDtype;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const bool leads = threadIdx.x % kWarpgroup == 0;
    if (leads) ptx::tensor_store_wait_read();  // the tile before has left
    ptx::named_barrier(1 + consumer, kWarpgroup);

    const int chunk = 2 * warp + lane / 8 % 2;  // of eight channels
#pragma unroll
    for (int i = 0; i < Cfg::kRowTiles; ++i) {
        float scale[2] = {1.f, 1.f}, bias[2] = {0.f, 0.f};
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int n = n0 + 64 * i + 16 * warp + 8 * row + lane / 4;
            if (n >= p.n) continue;
            const auto value = [&](const void* from) {
                return unpack_pair<kDtype>(static_cast<const uint16_t*>(from)[n]).x;
            };
            if (Cfg::kGroups == Groups::column) scale[row] = value(p.scales);
            if (p.bias != nullptr) bias[row] = value(p.bias);
        }
        const uint32_t box = out + i * Cfg::kOutBoxBytes + lane % 8 * 128 + layout::swizzled_chunk(lane, chunk) * 16;
#pragma unroll
        for (int j = 0; j < Cfg::kTileM / 16; ++j) {
            uint32_t r[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const int row = q % 2, at = 8 * j + 2 * q;
                r[q] = pack_pair<kDtype>(fmaf(sums[i][at], scale[row], bias[row]), fmaf(sums[i][at + 1], scale[row], bias[row]));
            }
            ptx::stmatrix_x4_transposed(box + (16 * j + lane / 16 * 8) * 128, r);
        }
    }
    ptx::shared_to_copy_engine_fence();
    ptx::named_barrier(1 + consumer, kWarpgroup);
    if (!leads) return;
#pragma unroll
    for (int i = 0; i < Cfg::kRowTiles; ++i)
        if (n0 + 64 * i < p.n) ptx::tensor_store(&maps.output, n0 + 64 * i, m0, out + i * Cfg::kOutBoxBytes);
    ptx::tensor_store_commit();
}

}  // namespace marlin_gptq::sm90
