// The compile-time choices of one decode variant (sm90/decode.cuh). Host code includes this.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/config.h"
#include "core/layout.cuh"

namespace marlin_gptq::sm90 {

// Where scales change: never (one per column), every unit of 128 k, or within a unit (groups of 32 or 64).
enum class Groups : int { column = 0, unit = 1, part = 2 };

// Where weights come from: the Marlin layout, or blocks of 128 channels x 128 k with their scales and zero points.
enum class Source : int { marlin = 0, blocks = 1 };

constexpr int kMaxSlots = 24;
constexpr int kBoxN = 128;  // channels of one copy of weights: 256 words, as many as a copy takes
constexpr int kBoxK = 64;   // k of one copy of activations: the 128 bytes that are swizzled together

// kWarpsN warps side by side along n, and kWarpsK rows of them along k that share out the units. Up to 16 tokens there are 16
// warps, which hide from each other what each of them waits for. For 32 tokens a warp needs more registers than that
// leaves, and more channels for the activations it reads.
template <DType kDtypeArg, Source kSourceArg, int kTileMArg, Groups kGroupsArg>
struct DecodeConfig {
    static constexpr DType kDtype = kDtypeArg;
    static constexpr Source kSource = kSourceArg;
    static constexpr int kTileM = kTileMArg;
    static constexpr Groups kGroups = kGroupsArg;
    static constexpr int kWarpsN = kTileM == 32 ? 2 : 4;
    static constexpr int kWarpsK = 4;
    static constexpr int kWarps = kWarpsN * kWarpsK;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kTileN = kBoxN;
    static constexpr int kWarpTiles = kTileN / kWarpsN / 16;  // of 16 channels

    // One slot of the ring holds one unit. All activations come first, as boxes of kTileM rows (their swizzling wants
    // multiples of 1024 bytes), then all weights: codes, scales, zero points.
    static constexpr int kWeightRowBytes = 8 * kBoxN;  // of one k16 in the Marlin layout
    static constexpr int kActivationBoxBytes = kTileM * kBoxK * 2;
    static constexpr int kActivationBytes = kTileK / kBoxK * kActivationBoxBytes;
    static constexpr int kScaleRows = kGroups == Groups::column ? 0 : kGroups == Groups::unit ? 1 : kTileK / kMinGroupSize;
    static constexpr int kZeroRows = kGroups == Groups::column ? 1 : kScaleRows;
    static constexpr int kScaleOffset = layout::kBlockCodeBytes;  // of the weights of a slot
    static constexpr int kZeroOffset = kScaleOffset + kScaleRows * layout::kBlockScaleRowBytes;  // Marlin layout
    static constexpr int kWeightBytes = layout::block_bytes(kScaleRows, kZeroRows);
    static constexpr int kSlotBytes = kActivationBytes + kWeightBytes;

    // Behind the ring: FP32 partials of a tile from each of the k-warps, and the barriers. Rows are padded by 4 floats
    // against bank conflicts.
    static constexpr int kReduceRow = kTileN + 4;
    static constexpr int kReduceBytes = kWarpsK * kTileM * kReduceRow * 4;
    static constexpr int kBarrierBytes = kMaxSlots * 16 + 16;

    // Behind those, for blocks of a cluster that share a tile: the sums of all but the first of them.
    static constexpr int kMaxCluster = kTileM <= 16 ? 4 : 1;
    static constexpr int kClusterOffset = kReduceBytes + kBarrierBytes;  // from the end of the ring
    static constexpr int kTailBytes = kClusterOffset + (kMaxCluster - 1) * kTileM * kTileN * 4;

    static_assert(kTileM % 8 == 0 && kWarps <= kTicketsPerBlock);
    static_assert(kActivationBytes % 1024 == 0 && kWeightBytes % 128 == 0);
};

}  // namespace marlin_gptq::sm90
