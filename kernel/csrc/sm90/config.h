// The compile-time choices of one decode variant (sm90/decode.cuh). Host code includes this.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/config.h"

namespace marlin_gptq::sm90 {

// Where scales change: never (one per column), every unit of 128 k, or within a unit (groups of 32 or 64).
enum class Groups : int { column = 0, unit = 1, part = 2 };

constexpr int kMaxSlots = 24;
constexpr int kBoxN = 128;           // channels of one copy of weights: 256 words, as many as a copy takes
constexpr int kBoxK = 64;            // k of one copy of activations: the 128 bytes that are swizzled together

// `m_tile`: tokens; `warps_n`: warps side by side along n, each with 64 channels; `warps_k` rows of them share out the units.
template <DType kDtypeArg, int kTileMArg, int kWarpsNArg, int kWarpsKArg, Groups kGroupsArg>
struct DecodeConfig {
    static constexpr DType kDtype = kDtypeArg;
    static constexpr int kTileM = kTileMArg;
    static constexpr int kWarpsN = kWarpsNArg;
    static constexpr int kWarpsK = kWarpsKArg;
    static constexpr int kWarps = kWarpsN * kWarpsK;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kTileN = 64 * kWarpsN;
    static constexpr Groups kGroups = kGroupsArg;

    // One slot of the ring holds one unit: weights (boxes of 8 rows of k16), activations (boxes of kTileM rows), scales.
    static constexpr int kWeightRowBytes = 8 * kBoxN;
    static constexpr int kWeightBoxBytes = (kTileK / 16) * kWeightRowBytes;
    static constexpr int kWeightBytes = kTileN / kBoxN * kWeightBoxBytes;
    static constexpr int kActivationBoxBytes = kTileM * kBoxK * 2;
    static constexpr int kActivationBytes = kTileK / kBoxK * kActivationBoxBytes;
    static constexpr int kScaleRows = kGroups == Groups::column ? 0 : kGroups == Groups::unit ? 1 : kTileK / kMinGroupSize;
    static constexpr int kScaleRowBytes = kTileN * 2;
    static constexpr int kActivationOffset = kWeightBytes;
    static constexpr int kScaleOffset = kWeightBytes + kActivationBytes;
    static constexpr int kSlotBytes = (kScaleOffset + kScaleRows * kScaleRowBytes + 1023) / 1024 * 1024;  // swizzling

    // Behind the ring: FP32 partials of 8 tokens from up to four of the k-warps (others add to theirs), and the barriers.
    // Rows are padded by 4 floats against bank conflicts.
    static constexpr int kReduceRow = kTileN + 4;
    static constexpr int kPartials = kWarpsK < 4 ? kWarpsK : 4;
    static constexpr int kReduceBytes = kPartials * 8 * kReduceRow * 4;
    static constexpr int kTailBytes = kReduceBytes + kMaxSlots * 16;

    static constexpr size_t shared_bytes(int slots) { return static_cast<size_t>(slots) * kSlotBytes + kTailBytes; }

    static_assert(kTileM % 8 == 0 && kWarpsK % kPartials == 0 && kTileN % kBoxN == 0);
};

}  // namespace marlin_gptq::sm90
