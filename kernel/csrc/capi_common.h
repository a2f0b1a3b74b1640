// What the C functions share.
#pragma once

#include <cuda_runtime_api.h>

#include <climits>
#include <cstdint>

#include "capi.h"
#include "dispatch/heuristics.h"

namespace marlin_gptq {

// The current device for the length of a call.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) : wanted_(device) {
        error_ = cudaGetDevice(&previous_);
        if (error_ == cudaSuccess && previous_ != wanted_) error_ = cudaSetDevice(wanted_);
    }
    ~DeviceGuard() {
        if (error_ == cudaSuccess && previous_ != wanted_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t error() const { return error_; }

  private:
    int wanted_;
    int previous_ = 0;
    cudaError_t error_;
};

// An error that the caller is told must not be found again by whoever next asks CUDA for its last one.
inline int reported(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline int check_problem(const Problem& p) {
    if (p.m < 0 || p.n <= 0 || p.k <= 0 || p.n % 64 != 0 || p.k % 16 != 0) return MARLIN_GPTQ_BAD_SHAPE;
    if (p.m > INT_MAX - 256 || p.n > INT_MAX / 2 || p.k > INT_MAX / 2) return MARLIN_GPTQ_BAD_SHAPE;
    if (!is_grouped(p)) return p.group_size == -1 || p.group_size == p.k ? 0 : MARLIN_GPTQ_BAD_GROUP_SIZE;
    const bool known = p.group_size == 32 || p.group_size == 64 || p.group_size == 128;
    return known && p.k % p.group_size == 0 ? 0 : MARLIN_GPTQ_BAD_GROUP_SIZE;
}

}  // namespace marlin_gptq
