// The compile-time choices of one wgmma variant (sm90/wgmma.cuh). Host code includes this.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/config.h"
#include "sm90/config.h"

namespace marlin_gptq::sm90 {

constexpr int kBlockN = 128;             // channels of a block of the run-time layout (kernel/blocked.py)
constexpr int kBlockCodeBytes = 8192;
constexpr int kConsumers = 2;            // warpgroups that multiply
constexpr int kWarpgroup = 128;          // threads
constexpr int kWgmmaThreads = (1 + kConsumers) * kWarpgroup;  // and one that loads
constexpr int kMaxStages = 12;
constexpr int kWgmmaSharedBytes = 227 * 1024;  // of one block on sm_90

constexpr size_t kLargestPartialBytes = 256 * 128 * 4;  // FP32 of the largest tile: sizes the large workspace

// Bytes of a block of the layout: codes, `rows` rows of 128 scales of 16 bits, and (zeros) of 128 zero points of 8 bits.
constexpr int block_bytes(int rows, bool zeros) {
    return kBlockCodeBytes + rows * 256 + (zeros ? (rows > 0 ? rows : 1) * 128 : 0);
}

// `tile_m`: tokens; `row_tiles`: 64-channel tiles of each of the two consumers (so a block computes 128 * row_tiles
// channels); `groups`: where scales change; `zeros`: whether there are zero points.
template <DType kDtypeArg, int kTileMArg, int kRowTilesArg, Groups kGroupsArg, bool kZerosArg>
struct WgmmaConfig {
    static constexpr DType kDtype = kDtypeArg;
    static constexpr int kTileM = kTileMArg;
    static constexpr int kRowTiles = kRowTilesArg;
    static constexpr Groups kGroups = kGroupsArg;
    static constexpr bool kZeros = kZerosArg;
    static constexpr int kBlocks = kRowTiles;  // of the layout side by side
    static constexpr int kTileN = kBlockN * kBlocks;
    static constexpr int kSums = kTileM / 2;   // accumulators of a thread in one 64-channel tile

    // Scales of groups of 128 multiply FP32 accumulators while tokens are few: kTileM / 2 multiplications instead of 32
    // for each 64 channels, and more exact. Otherwise they multiply the fragments.
    static constexpr bool kScaleSums = kGroups == Groups::unit && kTileM <= 64;
    static constexpr bool kScaleFragments = kGroups != Groups::column && !kScaleSums;
    // Steps of 16 k whose products are issued together. Short products are issued in fours, so that fences and waits are
    // few; long ones hide them.
    static constexpr int kSteps = kTileM <= 32 || kRowTiles == 1 ? 4 : kTileM <= 64 ? 2 : 1;

    // A stage of the ring: activations (two boxes of 64 k, kTileM rows of 128 bytes), then the blocks of weights.
    static constexpr int kBoxBytes = kTileM * kBoxK * 2;
    static constexpr int kActivationBytes = kTileK / kBoxK * kBoxBytes;
    static constexpr int kMaxRows = kGroups == Groups::column ? 0 : kGroups == Groups::unit ? 1 : kTileK / kMinGroupSize;
    static constexpr int kMaxBlockBytes = block_bytes(kMaxRows, kZeros);
    static constexpr int kStageBytes = (kActivationBytes + kBlocks * kMaxBlockBytes + 1023) / 1024 * 1024;

    // Behind the ring: the tile on its way out, kTileM rows of 128 bytes for each 64 channels; then the barriers.
    static constexpr int kOutBoxBytes = kTileM * 128;
    static constexpr int kOutBytes = kConsumers * kRowTiles * kOutBoxBytes;
    static constexpr int kBarrierBytes = kMaxStages * 16 + 64;
    static constexpr int kFittingStages = (kWgmmaSharedBytes - kOutBytes - kBarrierBytes) / kStageBytes;
    static constexpr int kStages = kFittingStages < kMaxStages ? kFittingStages : kMaxStages;
    static constexpr int kSharedBytes = kStages * kStageBytes + kOutBytes + kBarrierBytes;

    static_assert(kTileN * kTileM * 4 <= kLargestPartialBytes);
    static_assert(kTileM % 16 == 0 && kTileM <= 256);
    static_assert(kStages >= 2, "one stage computing, one landing");
};

}  // namespace marlin_gptq::sm90
