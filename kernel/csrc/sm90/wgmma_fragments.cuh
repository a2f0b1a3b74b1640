// Packed words -> register operands of wgmma, with what a lane must know of its two channels (rows r and r + 8 of a
// 16-channel tile): their zero points, and where scales multiply fragments, those.
#pragma once

#include "core/dequant.cuh"
#include "core/types.cuh"
#include "ptx/ldst.cuh"
#include "sm90/wgmma_config.h"

namespace marlin_gptq::sm90 {

template <DType kDtype>
using Pair = typename Scalar<kDtype>::Pair;

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// Of one channel: what turns the raw numbers of core/dequant.cuh into code - zero (exact), and its scale, as pairs.
template <DType kDtype>
struct Channel {
    uint32_t offset;       // 1024 + zero (FP16) or 128 + zero (BF16)
    uint32_t high_offset;  // FP16: -(64 + zero), for codes in the upper nibble, which count 16-fold
    uint32_t scale;

    __device__ __forceinline__ void set_zero(uint32_t zero) {
        if constexpr (kDtype == DType::f16) {
            offset = 0x64006400 | zero * 0x00010001;
            high_offset = 0xd400d400 | zero * 0x00100010;  // 1/16 is worth one bit between 64 and 128
        } else {
            offset = 0x43004300 | zero * 0x00010001;
            high_offset = 0;
        }
    }
};

template <class Cfg>
struct Channels {
    Channel<Cfg::kDtype> row[2];  // r and r + 8
};

// `position`: of this lane's channels in the rows of the block, in pairs.
template <class Cfg>
__device__ __forceinline__ void load_zeros(uint32_t zero_row, int position, Channels<Cfg>& channels) {
    if constexpr (Cfg::kZeros) {
        const uint32_t both = ptx::load_shared_2(zero_row + position * 2);
        channels.row[0].set_zero(both & 0xff);
        channels.row[1].set_zero(both >> 8);
    } else {
        channels.row[0].set_zero(8);
        channels.row[1].set_zero(8);
    }
}

template <class Cfg>
__device__ __forceinline__ void load_scales(uint32_t scale_row, int position, Channels<Cfg>& channels) {
    const uint32_t both = ptx::load_shared_4(scale_row + position * 4);
    channels.row[0].scale = __byte_perm(both, both, 0x1010);
    channels.row[1].scale = __byte_perm(both, both, 0x3232);
}

// `raw`: a pair of codes under the exponent, in the low (kHigh: the high) nibble.
template <class Cfg, bool kHigh>
__device__ __forceinline__ uint32_t finish(uint32_t raw, const Channel<Cfg::kDtype>& channel) {
    constexpr DType kDtype = Cfg::kDtype;
    auto value = bits_as<Pair<kDtype>>(raw);
    if constexpr (kHigh) {
        value = __hfma2(value, bits_as<Pair<kDtype>>(0x2c002c00u), bits_as<Pair<kDtype>>(channel.high_offset));  // 1/16
    } else {
        value = __hsub2(value, bits_as<Pair<kDtype>>(channel.offset));
    }
    if constexpr (Cfg::kScaleFragments) value = __hmul2(value, bits_as<Pair<kDtype>>(channel.scale));
    return bits_as<uint32_t>(value);
}

// One word: 16 channels x 16 k, this lane's eight of them.
template <class Cfg>
__device__ __forceinline__ void unpack(uint32_t word, const Channels<Cfg>& channels, uint32_t (&fragment)[4]) {
    if constexpr (Cfg::kDtype == DType::f16) {
        const auto low = [](uint32_t bits) { return and_or(bits, 0x000f000f, 0x64006400); };
        const auto high = [](uint32_t bits) { return and_or(bits, 0x00f000f0, 0x64006400); };
        fragment[0] = finish<Cfg, false>(low(word), channels.row[0]);
        fragment[2] = finish<Cfg, true>(high(word), channels.row[0]);
        fragment[1] = finish<Cfg, false>(low(word >> 8), channels.row[1]);
        fragment[3] = finish<Cfg, true>(high(word >> 8), channels.row[1]);
    } else {
        const auto low = [](uint32_t bits) { return and_or(bits, 0x000f000f, 0x43004300); };
        fragment[0] = finish<Cfg, false>(low(word), channels.row[0]);
        fragment[2] = finish<Cfg, false>(low(word >> 4), channels.row[0]);
        fragment[1] = finish<Cfg, false>(low(word >> 8), channels.row[1]);
        fragment[3] = finish<Cfg, false>(low(word >> 12), channels.row[1]);
    }
}

}  // namespace marlin_gptq::sm90
