// The ring of slots that the copy engine fills with units of weights and activations, and who fills it.
#pragma once

#include "core/layout.cuh"
#include "core/params.h"
#include "ptx/mbarrier.cuh"
#include "sm90/config.h"
#include "sm90/launch.h"

namespace marlin_gptq::sm90 {

// The slots and barriers of a block, as addresses in shared memory.
template <class Cfg>
struct Ring {
    uint32_t base, barriers;
    int slots;

    __device__ __forceinline__ Ring(uint32_t shared, int count)
        : base(shared), barriers(shared + count * Cfg::kSlotBytes + Cfg::kReduceBytes), slots(count) {}

    __device__ __forceinline__ uint32_t activations(int i) const { return base + i * Cfg::kActivationBytes; }
    __device__ __forceinline__ uint32_t weights(int i) const {
        return base + slots * Cfg::kActivationBytes + i * Cfg::kWeightBytes;
    }
    __device__ __forceinline__ uint32_t full(int i) const { return barriers + 16 * i; }
    __device__ __forceinline__ uint32_t empty(int i) const { return barriers + 16 * i + 8; }
    __device__ __forceinline__ uint32_t cluster_sums() const { return barriers + Cfg::kBarrierBytes; }
    __device__ __forceinline__ uint32_t cluster_full() const { return barriers + kMaxSlots * 16; }

    // By one thread of every warp: the hardware takes the barriers of one warp one by one.
    __device__ __forceinline__ void init() const {
        for (int i = threadIdx.x / 32; i < slots; i += Cfg::kWarps) {
            ptx::mbarrier_init(full(i), 1);
            ptx::mbarrier_init(empty(i), Cfg::kWarpsN);
        }
        ptx::mbarrier_init_fence();
    }
};

// Brings units into slots, by one thread. Its position moves on by `step` units a call.
template <class Cfg>
class Loader {
  public:
    __device__ __forceinline__ Loader(const GemmParams& params, const Maps& maps, const Ring<Cfg>& ring, int n_tile, int k_tile)
        : p_(params), maps_(maps), ring_(ring), n_tile_(n_tile), k_tile_(k_tile) {}

    // Weights, scales and zero points. Also announces the bytes of the activations.
    __device__ __forceinline__ void load_constants(int slot, uint64_t policy) const {
        if constexpr (Cfg::kSource == Source::blocks) {
            load_block(slot, policy);
        } else {
            load_marlin(slot, policy);
        }
    }

    // Zeros past m and k: they silence whatever weights they meet.
    __device__ __forceinline__ void load_activations(int slot) const {
        const uint32_t to = ring_.activations(slot);
#pragma unroll
        for (int box = 0; box < kTileK / kBoxK; ++box)
            ptx::tensor_copy(to + box * Cfg::kActivationBoxBytes, &maps_.activations, k_tile_ * kTileK + box * kBoxK, 0,
                             ring_.full(slot));
    }

    __device__ __forceinline__ void advance(int step) {
        k_tile_ += step;
        while (k_tile_ >= p_.k_tiles) {
            k_tile_ -= p_.k_tiles;
            ++n_tile_;
        }
    }

  private:
    const GemmParams& p_;
    const Maps& maps_;
    const Ring<Cfg> ring_;
    int n_tile_, k_tile_;

    __device__ __forceinline__ void load_block(int slot, uint64_t policy) const {
        const uint32_t barrier = ring_.full(slot);
        const int64_t block = static_cast<int64_t>(n_tile_) * p_.k_tiles + k_tile_;
        ptx::mbarrier_arrive_expect(barrier, p_.block_bytes + Cfg::kActivationBytes);
        ptx::bulk_copy(ring_.weights(slot), reinterpret_cast<const char*>(p_.qweight) + block * p_.block_bytes,
                       p_.block_bytes, barrier, policy);
    }

    __device__ __forceinline__ void load_marlin(int slot, uint64_t policy) const {
        const uint32_t barrier = ring_.full(slot), to = ring_.weights(slot);
        const int n0 = n_tile_ * Cfg::kTileN, channels = min(Cfg::kTileN, p_.n - n0);
        int scale_rows = 0;
        if constexpr (Cfg::kGroups == Groups::unit) scale_rows = 1;
        if constexpr (Cfg::kGroups == Groups::part) scale_rows = (kTileK / kMinGroupSize) >> p_.group_shift;
        const int zero_rows = p_.asymmetric ? Cfg::kGroups == Groups::column ? 1 : scale_rows : 0;
        ptx::mbarrier_arrive_expect(
            barrier, layout::kBlockCodeBytes + Cfg::kActivationBytes + scale_rows * channels * 2 + zero_rows * channels / 2);
        ptx::tensor_copy(to, &maps_.weights, n0 * 2, k_tile_ * (kTileK / 16), barrier, policy);
        // Groups past the end meet activations of zero: those of the last one will do.
        const auto group = [&](int row) {
            return Cfg::kGroups == Groups::column ? 0 : min(k_tile_ * scale_rows + row, p_.groups - 1);
        };
        for (int row = 0; row < scale_rows; ++row) {
            const auto* from = static_cast<const char*>(p_.scales) + (static_cast<int64_t>(group(row)) * p_.n + n0) * 2;
            ptx::bulk_copy(to + Cfg::kScaleOffset + row * layout::kBlockScaleRowBytes, from, channels * 2, barrier, policy);
        }
        for (int row = 0; row < zero_rows; ++row) {
            const uint32_t* from = p_.qzeros + (static_cast<int64_t>(group(row)) * p_.n + n0) / 8;
            ptx::bulk_copy(to + Cfg::kZeroOffset + row * layout::kBlockZeroRowBytes, from, channels / 2, barrier, policy);
        }
    }
};

}  // namespace marlin_gptq::sm90
