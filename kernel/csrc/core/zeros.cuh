// Zero points of asymmetric weights, as a correction of the totals. Fragments hold q - 8 whatever the zero point z is:
//
//     sum of (q - z) a  =  sum of (q - 8) a  +  (8 - z) * sum of a
//
// The sum of the activations of each token is one more mma, whose weights are all 1: it lies in the registers where the
// products of the same tokens lie. The inner loops do not know of zero points, and weights without them pay one branch a
// unit.
#pragma once

#include "core/dequant.cuh"
#include "core/layout.cuh"
#include "core/types.cuh"
#include "ptx/mma.cuh"

namespace marlin_gptq {

// sums += the activations of both k16 steps; all rows of the result are alike.
template <DType kDtype>
__device__ __forceinline__ void add_tokens(const uint32_t (&tokens)[4], float (&sums)[4]) {
    const uint32_t one = kDtype == DType::f16 ? 0x3c003c00 : 0x3f803f80;
    const uint32_t ones[4] = {one, one, one, one};
    ptx::mma_m16n8k16<kDtype>(sums, ones, tokens[0], tokens[1], sums);
    ptx::mma_m16n8k16<kDtype>(sums, ones, tokens[2], tokens[3], sums);
}

// 8 - z for a zero point in the low four bits of x.
__device__ __forceinline__ float zero_offset(uint32_t x) {
    // 2^23 + z, since the last bit of a float of this size is worth 1.
    return 8388616.f - __uint_as_float(and_or(x, 15, 0x4b000000));
}

// 8 - z of the channels 16 * tile + g and 8 more, from the word of a lane with lane / 4 == g.
__device__ __forceinline__ float2 zero_offsets(uint32_t word, int tile) {
    return {zero_offset(word >> 4 * layout::zero_nibble(16 * tile)),
            zero_offset(word >> 4 * layout::zero_nibble(16 * tile + 8))};
}

// total += offset * sums, the first for the channels of c0 and c1, the second for those of c2 and c3.
__device__ __forceinline__ void add_offsets(float2 offset, const float (&sums)[4], float (&total)[4]) {
    total[0] = fmaf(offset.x, sums[0], total[0]);
    total[1] = fmaf(offset.x, sums[1], total[1]);
    total[2] = fmaf(offset.y, sums[2], total[2]);
    total[3] = fmaf(offset.y, sums[3], total[3]);
}

}  // namespace marlin_gptq
