// The compile-time choices of one wgmma variant (sm90/wgmma.cuh). Host code includes this.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/config.h"
#include "sm90/config.h"

namespace marlin_gptq::sm90 {

constexpr int kBlockN = 128;             // channels of a block of the run-time layout (kernel/blocked.py)
constexpr int kBlockCodeBytes = 8192;
constexpr int kConsumers = 2;            // warpgroups side by side along the channels
constexpr int kWarpgroup = 128;          // threads
constexpr int kMaxStages = 12;
constexpr int kWgmmaSharedBytes = 227 * 1024;  // of one block on sm_90

constexpr size_t kLargestPartialBytes = 256 * 128 * 4;  // FP32 of the largest tile: sizes the large workspace

// Bytes of a block of the layout: codes, `rows` rows of 128 scales of 16 bits, and (zeros) of 128 zero points of 8 bits.
constexpr int block_bytes(int rows, bool zeros) {
    return kBlockCodeBytes + rows * 256 + (zeros ? (rows > 0 ? rows : 1) * 128 : 0);
}

// `tile_m`: tokens; `row_tiles`: 64-channel tiles of each of the two consumers (so a block computes 128 * row_tiles
// channels); `pairs`: of consumers, which take the units of 128 k by turns and add up at the end; `groups`: where scales
// change; `zeros`: whether there are zero points.
template <DType kDtypeArg, int kTileMArg, int kRowTilesArg, int kPairsArg, Groups kGroupsArg, bool kZerosArg>
struct WgmmaConfig {
    static constexpr DType kDtype = kDtypeArg;
    static constexpr int kTileM = kTileMArg;
    static constexpr int kRowTiles = kRowTilesArg;
    static constexpr int kPairs = kPairsArg;
    static constexpr int kConsumerThreads = kPairs * kConsumers * kWarpgroup;
    static constexpr int kThreads = kConsumerThreads + kWarpgroup;  // the last warpgroup loads
    // Registers of a thread: of all at the start (as the compiler divides them), then of those that load and compute.
    static constexpr int kStartRegisters = kPairs == 1 ? 168 : 96;
    static constexpr int kLoadRegisters = kPairs == 1 ? 40 : 32;
    static constexpr int kComputeRegisters = kPairs == 1 ? 232 : 112;
    static_assert(kLoadRegisters + kPairs * kConsumers * kComputeRegisters <= kStartRegisters * kThreads / kWarpgroup);
    static constexpr Groups kGroups = kGroupsArg;
    static constexpr bool kZeros = kZerosArg;
    static constexpr int kBlocks = kRowTiles;  // of the layout side by side
    static constexpr int kTileN = kBlockN * kBlocks;
    static constexpr int kSums = kTileM / 2;   // accumulators of a thread in one 64-channel tile

    // Scales of groups of 128 multiply FP32 sums while tokens are few: kTileM / 2 multiplications instead of 32 for each 64
    // channels, and more exact. Otherwise they multiply the fragments, which saves waiting for the products of each group.
    static constexpr bool kScaleSums = kGroups == Groups::unit && kTileM <= 32;
    static constexpr bool kScaleFragments = kGroups != Groups::column && !kScaleSums;
    // Steps of 16 k whose products are issued together. Two such groups a unit, one for each buffer of fragments; with more
    // the compiler takes the buffers for one and serialises the products (its note C7513).
    static constexpr int kSteps = 4;

    // A stage of the ring: activations (two boxes of 64 k, kTileM rows of 128 bytes), then the blocks of weights.
    static constexpr int kBoxBytes = kTileM * kBoxK * 2;
    static constexpr int kActivationBytes = kTileK / kBoxK * kBoxBytes;
    static constexpr int kMaxRows = kGroups == Groups::column ? 0 : kGroups == Groups::unit ? 1 : kTileK / kMinGroupSize;
    static constexpr int kMaxBlockBytes = block_bytes(kMaxRows, kZeros);
    static constexpr int kStageBytes = (kActivationBytes + kBlocks * kMaxBlockBytes + 1023) / 1024 * 1024;

    // Behind the ring: the tile on its way out, kTileM rows of 128 bytes for each 64 channels; then the barriers.
    static constexpr int kOutBoxBytes = kTileM * 128;
    static constexpr int kOutBytes = kConsumers * kRowTiles * kOutBoxBytes;
    static constexpr int kPairBytes = (kPairs - 1) * kTileN * kTileM * 4;  // FP32 sums of the second pair
    static constexpr int kBarrierBytes = kMaxStages * 16 + 64;
    static constexpr int kTailBytes = kOutBytes + kPairBytes + kBarrierBytes;
    // Each stage is always of the same pair: a wait by parity must not be met by the phase before.
    static constexpr int kFittingStages = (kWgmmaSharedBytes - kTailBytes) / kStageBytes / kPairs * kPairs;
    static constexpr int kStages = kFittingStages < kMaxStages ? kFittingStages : kMaxStages;
    static constexpr int kSharedBytes = kStages * kStageBytes + kTailBytes;

    static_assert(kTileN * kTileM * 4 <= kLargestPartialBytes);
    static_assert(kTileM % 16 == 0 && kTileM <= 128);
    static_assert(kStages >= 2 * kPairs, "one stage computing, one landing");
    static_assert(kMaxStages % kPairs == 0 && kPairs <= 2);
};

}  // namespace marlin_gptq::sm90
