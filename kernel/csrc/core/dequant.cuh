// One packed word -> one m16 x k16 operand fragment of integers q - 8, exact in FP16 and BF16.
//
// The codes are put under the exponent of a constant whose last mantissa bit is worth 1 (or 16), so that OR builds the
// number and one subtraction removes the offset; nothing is rounded on the way. Scales do not belong here: they multiply
// FP32 accumulators.
#pragma once

#include "core/types.cuh"

namespace marlin_gptq {

// (x & mask) | bits in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
    return result;
}

template <DType kDtype>
__device__ __forceinline__ void dequantize(uint32_t word, uint32_t (&fragment)[4]);

template <>
__device__ __forceinline__ void dequantize<DType::f16>(uint32_t word, uint32_t (&fragment)[4]) {
    // FP16 has ten mantissa bits: low nibbles become 1024 + q, high nibbles 1024 + 16 q.
    const __half2 offset = __half2half2(__ushort_as_half(0x6408));          // 1024 + 8
    const __half2 sixteenth = __half2half2(__ushort_as_half(0x2c00));       // 1 / 16
    const __half2 high_offset = __half2half2(__ushort_as_half(0xd480));     // -(1024 / 16 + 8)
    auto low = [&](uint32_t bits) {
        const uint32_t raw = and_or(bits, 0x000f000f, 0x64006400);
        __half2 value;
        memcpy(&value, &raw, 4);
        value = __hsub2(value, offset);
        uint32_t result;
        memcpy(&result, &value, 4);
        return result;
    };
    auto high = [&](uint32_t bits) {
        const uint32_t raw = and_or(bits, 0x00f000f0, 0x64006400);
        __half2 value;
        memcpy(&value, &raw, 4);
        value = __hfma2(value, sixteenth, high_offset);
        uint32_t result;
        memcpy(&result, &value, 4);
        return result;
    };
    fragment[0] = low(word);
    fragment[2] = high(word);
    fragment[1] = low(word >> 8);
    fragment[3] = high(word >> 8);
}

template <>
__device__ __forceinline__ void dequantize<DType::bf16>(uint32_t word, uint32_t (&fragment)[4]) {
    // BF16 has seven mantissa bits: only 128 + q fits, so every pair is shifted down to the low nibble.
    const __nv_bfloat162 offset = __bfloat162bfloat162(__ushort_as_bfloat16(0x4308));  // 128 + 8
    auto low = [&](uint32_t bits) {
        const uint32_t raw = and_or(bits, 0x000f000f, 0x43004300);
        __nv_bfloat162 value;
        memcpy(&value, &raw, 4);
        value = __hsub2(value, offset);
        uint32_t result;
        memcpy(&result, &value, 4);
        return result;
    };
    fragment[0] = low(word);
    fragment[2] = low(word >> 4);
    fragment[1] = low(word >> 8);
    fragment[3] = low(word >> 12);
}

}  // namespace marlin_gptq
