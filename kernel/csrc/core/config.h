// The compile-time choices of one kernel variant, and the tile sizes all variants share. Host code includes this.
#pragma once

#include <cstddef>
#include <cstdint>

namespace marlin_gptq {

enum class DType : int { f16 = 0, bf16 = 1 };

constexpr int kThreads = 256;      // 8 warps: kWarpsN side by side along n, kWarpsK along k
constexpr int kWarpsN = 2;         // each owns 64 output channels: one 16-byte weight load per lane and k16
constexpr int kWarpsK = 4;         // each owns 32 consecutive k of every stage
constexpr int kTileN = 128;        // output channels of a tile
constexpr int kTileK = 128;        // k of a stage (one unit of work)
constexpr int kMaxTileM = 32;      // tokens of the largest tile: sizes the workspace (a wider tile: fewer blocks)
constexpr int kMaxCtasPerSm = 2;   // of any variant: sizes the workspace
constexpr int kTicketsPerBlock = 16;  // of the workspace: one per computing warp
constexpr int kMinGroupSize = 32;  // so that the 32 k of a warp never straddle two groups

constexpr size_t kMaxSharedBytes = 99 * 1024;  // what one block may use on sm_86, 89 and 120

// A variant. `m_tile`: tokens per tile; `stages`: depth of the shared-memory ring; `grouped`: scales per group of k
// (applied to accumulators every stage) or one per column (applied at the end); `ctas_per_sm`: blocks the register
// budget must leave room for.
template <DType kDtypeArg, int kTileMArg, int kStagesArg, bool kGroupedArg, int kCtasPerSmArg>
struct Config {
    static constexpr DType kDtype = kDtypeArg;
    static constexpr int kTileM = kTileMArg;
    static constexpr int kStages = kStagesArg;
    static constexpr bool kGrouped = kGroupedArg;
    static constexpr int kCtasPerSm = kCtasPerSmArg;

    // One stage of the ring: weights, activations, scales, zero points.
    static constexpr int kWeightBytes = kTileN * kTileK / 2;
    static constexpr int kActivationBytes = kTileM * kTileK * 2;
    static constexpr int kScaleRows = kGrouped ? kTileK / kMinGroupSize : 0;
    static constexpr int kScaleRowBytes = kTileN * 2;
    static constexpr int kZeroRows = kGrouped ? kScaleRows : 1;
    static constexpr int kZeroRowBytes = kTileN / 2;
    static constexpr int kActivationOffset = kWeightBytes;
    static constexpr int kScaleOffset = kWeightBytes + kActivationBytes;
    static constexpr int kZeroOffset = kScaleOffset + kScaleRows * kScaleRowBytes;
    static constexpr int kStageBytes = kZeroOffset + kZeroRows * kZeroRowBytes;

    // Behind the ring, so that prefetching goes on during a reduction: FP32 partials of 8 tokens x 128 channels from
    // each of the k-warps. Rows are padded by 4 floats, which makes both the fragment writes and the row reads free of
    // bank conflicts.
    static constexpr int kReduceRow = kTileN + 4;
    static constexpr int kReduceOffset = kStages * kStageBytes;
    static constexpr int kReduceBytes = kWarpsK * 8 * kReduceRow * 4;
    static constexpr int kFlagOffset = kReduceOffset + kReduceBytes;
    static constexpr size_t kSharedBytes = kFlagOffset + 16;

    static_assert(kTileM % 8 == 0 && kTileM <= kMaxTileM);
    static_assert(kStages >= 3, "one stage computing, one landing, one in flight");
    static_assert(kCtasPerSm <= kMaxCtasPerSm);
    static_assert(kSharedBytes <= kMaxSharedBytes);
};

}  // namespace marlin_gptq
