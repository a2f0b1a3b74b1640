// One unit of 128 k from a slot into the totals of a warp: 16 kWarpTiles channels x kTileM tokens.
//
// Both layouts hold the same words, one m16 x k16 fragment each for a lane; they differ in what a load brings: all
// channel tiles of one k16 step (Marlin), or four k16 steps of one channel tile (blocks). Either way an accumulator takes
// the steps in their order, so both give the same bits.
#pragma once

#include "core/dequant.cuh"
#include "core/layout.cuh"
#include "core/types.cuh"
#include "core/zeros.cuh"
#include "ptx/ldst.cuh"
#include "ptx/mma.cuh"
#include "sm90/config.h"

namespace marlin_gptq::sm90 {

template <class Cfg>
using Accumulators = float[Cfg::kWarpTiles][Cfg::kTileM / 8][4];  // [16 channels][8 tokens][mma register]

template <class Cfg>
__device__ __forceinline__ void clear(Accumulators<Cfg>& acc) {
#pragma unroll
    for (int j = 0; j < Cfg::kWarpTiles; ++j)
#pragma unroll
        for (int b = 0; b < Cfg::kTileM / 8; ++b)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[j][b][i] = 0.f;
}

// What this lane reads of a slot.
template <class Cfg>
class Unit {
  public:
    static constexpr int kBlocks = Cfg::kTileM / 8;
    static constexpr bool kMarlin = Cfg::kSource == Source::marlin;

    // A batch: the words of kLoads loads, of kSteps k16 steps x kTiles channel tiles.
    static constexpr int kTiles = kMarlin ? Cfg::kWarpTiles : kBlocks <= 2 ? 2 : 1;  // what registers hold
    static constexpr int kSteps = kMarlin ? 2 : 4;
    static constexpr int kLoads = kMarlin ? kSteps : kTiles;
    static constexpr int kWords = kMarlin ? kTiles : kSteps;  // of a load
    static constexpr int kLast = kTileK / 16 - 1;             // k16 step of a unit
    static constexpr int kPerTile = (kLast + 1) / kSteps;
    static constexpr int kBatches = kPerTile * Cfg::kWarpTiles / kTiles;

    // All steps of some channel tiles, then the next: their products are folded away first.
    __device__ __forceinline__ static constexpr int first_step(int batch) { return batch % kPerTile * kSteps; }
    __device__ __forceinline__ static constexpr int first_tile(int batch) { return batch / kPerTile * kTiles; }

    __device__ __forceinline__ Unit(uint32_t weights, uint32_t activations, int thread) {
        const int lane = thread % 32, warp_n = thread / 32 % Cfg::kWarpsN, row = lane / 4;
        token_ = lane % 8;
        chunk_ = lane / 8;
        tokens_ = activations + token_ * (kBoxK * 2);
        if constexpr (kMarlin) {  // 64 channels, four tiles, are one piece
            const int half = warp_n * Cfg::kWarpTiles / 4;
            first_ = warp_n * Cfg::kWarpTiles % 4;
            words_ = weights + half * 512 + lane * 16 + first_ * 4;
            scales_ = weights + Cfg::kScaleOffset + half * 128 + row * 16 + first_ * 4;
            zeros_ = weights + Cfg::kZeroOffset + half * 32 + row * 4;
        } else {
            first_ = warp_n * Cfg::kWarpTiles;
            words_ = weights + layout::block_part_bytes(0, first_) + lane * 16;
            scales_ = weights + Cfg::kScaleOffset + first_ * 32 + row * 4;
            zeros_ = weights + first_ * 16 + row * 2;
        }
    }

    __device__ __forceinline__ void load(int batch, int i, uint32_t (&out)[kWords]) const {
        if constexpr (kMarlin) {
            ptx::load_shared(words_ + (first_step(batch) + i) * Cfg::kWeightRowBytes, out);
        } else {
            ptx::load_shared(words_ + layout::block_part_bytes(first_step(batch), first_tile(batch) + i), out);
        }
    }

    // The operand registers of 8 tokens for the k16 steps 2 * pair and one more.
    __device__ __forceinline__ void tokens(int pair, int b, uint32_t (&out)[4]) const {
        const int chunk = layout::swizzled_chunk(token_, 4 * (pair % 2) + chunk_);
        ptx::ldmatrix_x4(out, tokens_ + pair / 2 * Cfg::kActivationBoxBytes + b * 8 * (kBoxK * 2) + chunk * 16);
    }

    // Scales of the channels g (x) and g + 8 (y) of a channel tile, g = lane / 4.
    __device__ __forceinline__ float2 scale(int row, int tile) const {
        return unpack_pair<Cfg::kDtype>(
            ptx::load_shared_4(scales_ + row * layout::kBlockScaleRowBytes + tile * (kMarlin ? 4 : 32)));
    }

    // 8 minus their zero points. Blocks have just as many rows of scales as there are, and then the zero points.
    __device__ __forceinline__ float2 offset(int row, int rows, int tile) const {
        if constexpr (kMarlin) {
            const uint32_t word = ptx::load_shared_4(zeros_ + row * layout::kBlockZeroRowBytes);
            return zero_offsets(word >> 4 * layout::zero_nibble(16 * first_), tile);
        }
        const uint32_t pair = ptx::load_shared_2(zeros_ + layout::block_bytes(rows, row) + tile * 16);
        return {zero_offset(pair), zero_offset(pair >> 8)};
    }

  private:
    uint32_t words_, tokens_, scales_, zeros_;
    int first_, token_, chunk_;  // channel tile; of this lane's rows of activations
};

template <class Cfg>
__device__ __forceinline__ void multiply_unit(const Unit<Cfg>& unit, int group_shift, Accumulators<Cfg>& total) {
    using U = Unit<Cfg>;
    constexpr DType kDtype = Cfg::kDtype;
    constexpr int kBlocks = U::kBlocks;
    const float zero[4] = {0.f, 0.f, 0.f, 0.f};

    Accumulators<Cfg> products;
    const auto fold = [&](int j, int row) {  // total += scale * products
        const float2 scale = unit.scale(row, j);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                total[j][b][r] = fmaf(r < 2 ? scale.x : scale.y, products[j][b][r], total[j][b][r]);
    };

    // Read ahead of their use, as far as registers allow. Tokens are read again for every batch.
    constexpr int kPairs = U::kSteps / 2, kPieces = U::kBatches * kPairs;
    constexpr int kAhead = kBlocks == 1 ? U::kBatches - 1 : 1;
    constexpr int kTokensAhead = kBlocks == 1 ? kPieces - 1 : 1;
    uint32_t loaded[U::kBatches][U::kLoads][U::kWords];
    uint32_t tokens[kPieces][kBlocks][4];
    const auto read_words = [&](int batch) {
#pragma unroll
        for (int i = 0; i < U::kLoads; ++i) unit.load(batch, i, loaded[batch][i]);
    };
    const auto read_tokens = [&](int piece) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
            unit.tokens(U::first_step(piece / kPairs) / 2 + piece % kPairs, b, tokens[piece][b]);
    };
#pragma unroll
    for (int batch = 0; batch < kAhead; ++batch) read_words(batch);
#pragma unroll
    for (int piece = 0; piece < kTokensAhead; ++piece) read_tokens(piece);
#pragma unroll
    for (int batch = 0; batch < U::kBatches; ++batch) {
        if (batch + kAhead < U::kBatches) read_words(batch + kAhead);
#pragma unroll
        for (int i = 0; i < U::kSteps; ++i) {
            const int step = U::first_step(batch) + i, piece = batch * kPairs + i / 2;
            if (i % 2 == 0 && piece + kTokensAhead < kPieces) read_tokens(piece + kTokensAhead);
#pragma unroll
            for (int t = 0; t < U::kTiles; ++t) {
                const int j = U::first_tile(batch) + t;
                uint32_t fragment[4];
                dequantize<kDtype>(loaded[batch][U::kMarlin ? i : t][U::kMarlin ? t : i], fragment);
#pragma unroll
                for (int b = 0; b < kBlocks; ++b) {
                    auto& sum = Cfg::kGroups == Groups::column ? total[j][b] : products[j][b];
                    const uint32_t b0 = tokens[piece][b][i % 2 * 2], b1 = tokens[piece][b][i % 2 * 2 + 1];
                    if ((Cfg::kGroups == Groups::unit && step == 0) || (Cfg::kGroups == Groups::part && step % 2 == 0)) {
                        ptx::mma_m16n8k16<kDtype>(sum, fragment, b0, b1, zero);
                    } else {
                        ptx::mma_m16n8k16<kDtype>(sum, fragment, b0, b1, sum);
                    }
                }
            }
            // Groups of 128 end with the unit; in groups of 32 or 64 the products are scaled every 32 k. That group_shift
            // is asked for what is known of it anyway makes a branch, which keeps the compiler from beginning with
            // everything at once: there are no registers for that.
            bool ends = false;
            if (Cfg::kGroups == Groups::unit) ends = step == U::kLast;
            if (Cfg::kGroups == Groups::part) ends = step % 2 == 1 && group_shift < 2;
            if (ends) {
#pragma unroll
                for (int t = 0; t < U::kTiles; ++t)
                    fold(U::first_tile(batch) + t, Cfg::kGroups == Groups::unit ? 0 : step / 2 >> group_shift);
            }
        }
    }
}

// What zero points other than 8 add to the totals over one unit (core/zeros.cuh).
template <class Cfg>
__device__ __forceinline__ void add_zero_points(uint32_t weights, uint32_t activations, int group_shift,
                                                Accumulators<Cfg>& total) {
    constexpr int kBlocks = Cfg::kTileM / 8;
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // what follows from it is computed here: kept over the loop, it would spill
    const Unit<Cfg> unit(weights, activations, thread);
    const int rows = Cfg::kGroups == Groups::part ? (kTileK / kMinGroupSize) >> group_shift : 1;
    const int pairs = kTileK / 32 / rows;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
            for (int pair = row * pairs; pair < (row + 1) * pairs; ++pair) {
                uint32_t tokens[4];
                unit.tokens(pair, b, tokens);
                add_tokens<Cfg::kDtype>(tokens, sums);
            }
#pragma unroll
            for (int j = 0; j < Cfg::kWarpTiles; ++j) {
                float2 offset = unit.offset(row, Cfg::kGroups == Groups::column ? 0 : rows, j);
                if constexpr (Cfg::kGroups != Groups::column) {
                    const float2 scale = unit.scale(row, j);
                    offset = {offset.x * scale.x, offset.y * scale.y};  // exact: 11 bits times 4
                }
                add_offsets(offset, sums, total[j][b]);
            }
        }
    }
}

}  // namespace marlin_gptq::sm90
