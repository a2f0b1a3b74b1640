// FP32 sums -> C: the scale of the column (where there is one per column), the bias, one rounding, the store.
#pragma once

#include "core/layout.cuh"
#include "core/reduce.cuh"
#include "core/types.cuh"

namespace marlin_gptq {

// Each warp stores whole rows of 128 channels (256 contiguous bytes), 8 bytes a lane.
template <class Cfg>
__device__ __forceinline__ void store_tile(const GemmParams& p, int m0, int n0, const TileSums<Cfg>& sums) {
    constexpr DType kDtype = Cfg::kDtype;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int n = n0 + 4 * lane;
    if (n >= p.n) return;

    float4 scale = {1.f, 1.f, 1.f, 1.f}, bias = {0.f, 0.f, 0.f, 0.f};
    if constexpr (!Cfg::kGrouped) {
        const auto* row = static_cast<const uint16_t*>(p.scales);
        const auto pair = [&](int column) {
            return unpack_pair<kDtype>(*reinterpret_cast<const uint32_t*>(row + column));
        };
        const float2 low = pair(layout::scale_column_per_channel(n));
        const float2 high = pair(layout::scale_column_per_channel(n + 2));
        scale = {low.x, low.y, high.x, high.y};
    }
    if (p.bias != nullptr) {
        const auto* at = reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p.bias) + n);
        const float2 low = unpack_pair<kDtype>(at[0]), high = unpack_pair<kDtype>(at[1]);
        bias = {low.x, low.y, high.x, high.y};
    }
#pragma unroll
    for (int block = 0; block < Cfg::kTileM / 8; ++block) {
        const int m = m0 + 8 * block + warp;
        if (m >= p.m) break;
        const float4 sum = sums[block];
        uint2 bits;
        bits.x = pack_pair<kDtype>(fmaf(sum.x, scale.x, bias.x), fmaf(sum.y, scale.y, bias.y));
        bits.y = pack_pair<kDtype>(fmaf(sum.z, scale.z, bias.z), fmaf(sum.w, scale.w, bias.w));
        auto* c = static_cast<uint16_t*>(p.c) + static_cast<int64_t>(m) * p.n + n;
        *reinterpret_cast<uint2*>(c) = bits;
    }
}

}  // namespace marlin_gptq
