// Element types of activations, scales, bias and output, and what the kernel needs to know of each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/config.h"

namespace marlin_gptq {

template <DType kDtype>
struct Scalar;

template <>
struct Scalar<DType::f16> {
    using Pair = __half2;
    static __device__ __forceinline__ Pair pack(float x, float y) { return __floats2half2_rn(x, y); }
    static __device__ __forceinline__ float2 unpack(Pair pair) { return __half22float2(pair); }
};

template <>
struct Scalar<DType::bf16> {
    using Pair = __nv_bfloat162;
    static __device__ __forceinline__ Pair pack(float x, float y) { return __floats2bfloat162_rn(x, y); }
    static __device__ __forceinline__ float2 unpack(Pair pair) { return __bfloat1622float2(pair); }
};

// Two elements in one 32-bit register, as two floats.
template <DType kDtype>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
    typename Scalar<kDtype>::Pair pair;
    static_assert(sizeof(pair) == sizeof(bits));
    memcpy(&pair, &bits, sizeof(bits));
    return Scalar<kDtype>::unpack(pair);
}

template <DType kDtype>
__device__ __forceinline__ uint32_t pack_pair(float x, float y) {
    typename Scalar<kDtype>::Pair pair = Scalar<kDtype>::pack(x, y);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

}  // namespace marlin_gptq
