// What a consumer warpgroup does with a unit: 64 * kRowTiles channels x kTileM tokens x 128 k.
//
// Fragments are double-buffered: while the products of one buffer run, the next words are unpacked into the other. The
// wait behind each group of products covers the group before it, so one is always under way, also across units.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/wgmma_fragments.cuh"
#include "sm90/wgmma_launch.h"

namespace marlin_gptq::sm90 {

template <class Cfg>
using WgmmaSums = float[Cfg::kRowTiles][Cfg::kSums];

// Register operands: [buffer][step of 16 k][64 channels][register]
template <class Cfg>
using Fragments = uint32_t[2][Cfg::kSteps][Cfg::kRowTiles][4];

// Where a consumer thread finds its share of a stage, as offsets from the stage.
template <class Cfg>
struct Lane {
    uint32_t codes[Cfg::kRowTiles];  // of the first 64 k; the second 64 are 4096 further
    uint32_t rows[Cfg::kRowTiles];   // first row of scales, or of zero points where there are none
    uint32_t position[Cfg::kRowTiles];  // pair of channels within such a row

    // `tile`: the 64-channel tile within the block of threads; tiles 2i and 2i + 1 share a block of the layout.
    __device__ __forceinline__ Lane(int consumer, int block_bytes) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
        for (int i = 0; i < Cfg::kRowTiles; ++i) {
            const int tile = consumer * Cfg::kRowTiles + i;
            const uint32_t block = Cfg::kActivationBytes + tile / 2 * block_bytes;
            const int row_tile = tile % 2 * 4 + warp;  // of 16 channels, in the block of the layout
            codes[i] = block + (row_tile * 32 + lane) * 16;
            rows[i] = block + kBlockCodeBytes;
            position[i] = row_tile * 8 + lane / 4;
        }
    }
};

// One step of 16 k, `k16` of the unit's eight.
__device__ __forceinline__ uint32_t word_of(const uint4& words, int k16) {
    return k16 % 4 == 0 ? words.x : k16 % 4 == 1 ? words.y : k16 % 4 == 2 ? words.z : words.w;
}

// totals += scale * products of one group.
template <class Cfg>
__device__ __forceinline__ void add_scaled(uint32_t stage, const Lane<Cfg>& lane, WgmmaSums<Cfg>& products,
                                           WgmmaSums<Cfg>& totals, const float2 (&scales)[Cfg::kRowTiles]) {
#pragma unroll
    for (int i = 0; i < Cfg::kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < Cfg::kSums; j += 4) {
            totals[i][j] = fmaf(scales[i].x, products[i][j], totals[i][j]);
            totals[i][j + 1] = fmaf(scales[i].x, products[i][j + 1], totals[i][j + 1]);
            totals[i][j + 2] = fmaf(scales[i].y, products[i][j + 2], totals[i][j + 2]);
            totals[i][j + 3] = fmaf(scales[i].y, products[i][j + 3], totals[i][j + 3]);
        }
    }
}

// `stage` has been filled. `release`: the barrier by which to give back the stage before, or 0. Where sums are scaled,
// all products have ended on return and the stage may be given back; otherwise the last group is still under way.
template <class Cfg>
__device__ __forceinline__ void multiply_unit(uint32_t stage, uint32_t release, const Lane<Cfg>& lane, const WgmmaParams& p,
                                              Fragments<Cfg>& fragments, WgmmaSums<Cfg>& products, WgmmaSums<Cfg>& totals) {
    constexpr int kGroups = kTileK / 16 / Cfg::kSteps;
    static_assert(kGroups % 2 == 0, "each unit begins with the same buffer");
    uint4 words[Cfg::kRowTiles];
    Channels<Cfg> channels[Cfg::kRowTiles];
    float2 scales[Cfg::kRowTiles];
    const uint64_t operand = ptx::swizzled_operand(stage);
    if constexpr (Cfg::kScaleSums) {
#pragma unroll
        for (int i = 0; i < Cfg::kRowTiles; ++i)
            scales[i] = unpack_pair<Cfg::kDtype>(ptx::load_shared_4(stage + lane.rows[i] + lane.position[i] * 4));
    }

#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        auto& buffer = fragments[group % 2];
#pragma unroll
        for (int step = 0; step < Cfg::kSteps; ++step) {
            const int k16 = group * Cfg::kSteps + step;
#pragma unroll
            for (int i = 0; i < Cfg::kRowTiles; ++i) {
                if (k16 % 4 == 0) words[i] = ptx::load_shared_16(stage + lane.codes[i] + k16 / 4 * (kBlockCodeBytes / 2));
                // The smallest group is two steps long.
                if (k16 == 0 || (Cfg::kGroups == Groups::part && k16 % 2 == 0)) {
                    const int row = Cfg::kGroups == Groups::part ? k16 / 2 >> p.group_shift : 0;
                    const uint32_t scale_row = stage + lane.rows[i];
                    if constexpr (Cfg::kScaleFragments) load_scales<Cfg>(scale_row + row * 256, lane.position[i], channels[i]);
                    load_zeros<Cfg>(scale_row + p.scale_rows * 256 + row * 128, lane.position[i], channels[i]);
                }
                unpack<Cfg>(word_of(words[i], k16), channels[i], buffer[step][i]);
            }
        }
        ptx::keep(buffer);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < Cfg::kSteps; ++step) {
            const int k16 = group * Cfg::kSteps + step;
            const uint64_t tokens = operand + k16 / 4 * (Cfg::kBoxBytes >> 4) + k16 % 4 * ptx::kStepK16;
#pragma unroll
            for (int i = 0; i < Cfg::kRowTiles; ++i)
                ptx::Wgmma<Cfg::kDtype, Cfg::kTileM>::multiply(products[i], buffer[step][i], tokens,
                                                               !(Cfg::kScaleSums && k16 == 0));
        }
        ptx::wgmma_commit();
        if constexpr (Cfg::kScaleSums) {
            if (group == kGroups - 1) {
                ptx::wgmma_wait<0>();
                ptx::keep(products);
            } else {
                ptx::wgmma_wait<1>();
            }
        } else {
            ptx::wgmma_wait<1>();
        }
        ptx::keep(fragments[(group + 1) % 2]);
        if (group == 0 && release != 0) {
            __syncwarp();
            if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(release);
        }
    }
    if constexpr (Cfg::kScaleSums) add_scaled<Cfg>(stage, lane, products, totals, scales);
}

}  // namespace marlin_gptq::sm90
