// C[m, n] = A[m, k] W[k, n] with 4-bit W, by mma.sync: for sm_80 and newer.
//
// Operands are swapped: weights are the 16-row operand (one packed word is one lane's fragment, nothing is shuffled) and
// tokens the 8-column one, so that few tokens waste no tensor-core rows. A block of 8 warps computes tiles of 128
// channels x kTileM tokens: 2 warps side by side along n, 4 along k. Each stage of the shared-memory ring holds 128 k; a
// warp takes 32 of them. Fragments hold integers q - 8; where scales are per group, the products of each stage are
// scaled in FP32 as they join the totals.
//
//     stage   weights      8 rows of k16, each 2 x 512 B (64 channels; 16 B per lane)
//             activations  one row of 256 B per token, chunks swizzled
//             scales       up to 4 rows of 256 B (group_size 32)
//             zero points  up to 4 rows of 64 B
//
// Blocks are persistent and walk their share of the unit stream (core/scheduler.cuh); loading runs kStages - 1 units
// ahead, across tile boundaries.
#pragma once

#include "core/dequant.cuh"
#include "core/epilogue.cuh"
#include "core/layout.cuh"
#include "core/params.h"
#include "core/reduce.cuh"
#include "core/scheduler.cuh"
#include "core/zeros.cuh"
#include "ptx/ldst.cuh"
#include "ptx/mma.cuh"
#include "sm80/launch.h"

namespace marlin_gptq::sm80 {

// Brings units into shared memory. Every thread copies the same chunks of every stage, so it keeps its own addresses.
template <class Cfg>
class Loader {
  public:
    __device__ __forceinline__ Loader(const GemmParams& params, int64_t unit)
        : p_(params), cursor_(unit, params.m_tiles, params.k_tiles) {
        point_at_tile();
    }

    __device__ __forceinline__ void load(uint32_t stage) {
        load_weights(stage);
        load_activations(stage);
        if constexpr (Cfg::kGrouped) load_scales(stage);
        if (p_.asymmetric) load_zeros(stage);
        advance();
    }

  private:
    static constexpr int kRowsPerPass = kThreads / 16;  // activations: 16 chunks a row
    static constexpr int kPasses = (Cfg::kTileM + kRowsPerPass - 1) / kRowsPerPass;
    static constexpr int kFirstScaleThread = kThreads - 16 * kTileK / kMinGroupSize;

    const GemmParams& p_;
    TileCursor cursor_;
    const char* weights_;
    const char* activations_;
    const char* scales_;
    int m0_, n0_;

    __device__ __forceinline__ static int chunk16() { return threadIdx.x % 16; }
    __device__ __forceinline__ static int row16() { return threadIdx.x / 16; }
    __device__ __forceinline__ static int scale_row() { return (threadIdx.x - kFirstScaleThread) / 16; }
    __device__ __forceinline__ int64_t weight_row_bytes() const { return layout::words_per_row(p_.n) * 4; }
    __device__ __forceinline__ int groups_per_tile() const { return (kTileK / kMinGroupSize) >> p_.group_shift; }

    __device__ __forceinline__ void point_at_tile() {
        m0_ = cursor_.m_tile * Cfg::kTileM;
        n0_ = cursor_.n_tile * kTileN;
        const int64_t k0 = static_cast<int64_t>(cursor_.k_tile) * kTileK;
        weights_ = reinterpret_cast<const char*>(p_.qweight) +
                   (k0 / 16 + threadIdx.x / 64) * weight_row_bytes() + layout::block_word(n0_) * 4 +
                   (threadIdx.x % 64) * 16;
        activations_ = static_cast<const char*>(p_.a) + ((m0_ + row16()) * p_.lda + k0 + 8 * chunk16()) * 2;
        if constexpr (Cfg::kGrouped) {
            const int64_t group = static_cast<int64_t>(cursor_.k_tile) * groups_per_tile() + scale_row();
            scales_ = static_cast<const char*>(p_.scales) + (group * p_.n + n0_ + 8 * chunk16()) * 2;
        }
    }

    __device__ __forceinline__ void advance() {
        if (cursor_.advance(p_.m_tiles, p_.k_tiles)) {
            point_at_tile();
            return;
        }
        weights_ += (kTileK / 16) * weight_row_bytes();
        activations_ += kTileK * 2;
        if constexpr (Cfg::kGrouped) scales_ += static_cast<int64_t>(groups_per_tile()) * p_.n * 2;
    }

    // Past the last k16 row or the last channel the stage gets zeros: codes of 0 are finite numbers.
    __device__ __forceinline__ void load_weights(uint32_t stage) const {
        const int row = cursor_.k_tile * (kTileK / 16) + threadIdx.x / 64;
        const bool inside = n0_ + 64 * ((threadIdx.x % 64) / 32) < p_.n;
        const int rows = p_.k / 16;
        ptx::cp_async_16(stage + threadIdx.x * 16, weights_, inside && row < rows);
        ptx::cp_async_16(stage + (threadIdx.x + kThreads) * 16, weights_ + 4 * weight_row_bytes(),
                         inside && row + 4 < rows);
    }

    // Tokens past m and k past the end are zeros: they silence whatever the weights hold there.
    __device__ __forceinline__ void load_activations(uint32_t stage) const {
        if (Cfg::kTileM < kRowsPerPass && row16() >= Cfg::kTileM) return;
        const bool inside = cursor_.k_tile * kTileK + 8 * chunk16() < p_.k;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int row = row16() + pass * kRowsPerPass;
            const uint32_t to = stage + Cfg::kActivationOffset + row * (kTileK * 2) +
                                layout::swizzled_chunk(row, chunk16()) * 16;
            ptx::cp_async_16(to, activations_ + pass * kRowsPerPass * p_.lda * 2, inside && m0_ + row < p_.m);
        }
    }

    // Groups past the end and channels past n get scales of zero.
    __device__ __forceinline__ void load_scales(uint32_t stage) const {
        if (threadIdx.x < kFirstScaleThread || scale_row() >= groups_per_tile()) return;
        const bool inside = cursor_.k_tile * groups_per_tile() + scale_row() < p_.groups && n0_ + 8 * chunk16() < p_.n;
        const uint32_t to = stage + Cfg::kScaleOffset + scale_row() * Cfg::kScaleRowBytes + chunk16() * 16;
        ptx::cp_async_16(to, scales_, inside);
    }

    // The same for zero points: 4 chunks a row, and one row for all k where scales are per column.
    __device__ __forceinline__ void load_zeros(uint32_t stage) const {
        int thread = threadIdx.x;
        asm volatile("" : "+r"(thread));  // as in add_zero_points
        const int row = thread / 4, chunk = thread % 4;
        const int rows = Cfg::kGrouped ? groups_per_tile() : 1;
        if (row >= rows) return;
        const int group = Cfg::kGrouped ? cursor_.k_tile * rows + row : 0;
        const bool inside = group < (Cfg::kGrouped ? p_.groups : 1) && n0_ + 32 * chunk < p_.n;
        const uint32_t* from = p_.qzeros + static_cast<int64_t>(group) * (p_.n / 8) + n0_ / 8 + 4 * chunk;
        ptx::cp_async_16(stage + Cfg::kZeroOffset + row * Cfg::kZeroRowBytes + chunk * 16, from, inside);
    }
};

// One stage into the totals of this warp: 64 channels x kTileM tokens x 32 k.
template <class Cfg>
__device__ __forceinline__ void multiply_stage(uint32_t stage, int group_shift, Accumulators<Cfg>& total) {
    constexpr DType kDtype = Cfg::kDtype;
    constexpr int kBlocks = Cfg::kTileM / 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_n = warp % kWarpsN, warp_k = warp / kWarpsN;

    // Weights: words[i] are this lane's four fragments (16 channels each) of k16 step i.
    const uint32_t weights = stage + warp_k * 2 * 1024 + warp_n * 512 + lane * 16;
    const uint4 loaded[2] = {ptx::load_shared_16(weights), ptx::load_shared_16(weights + 1024)};
    const uint32_t words[2][4] = {{loaded[0].x, loaded[0].y, loaded[0].z, loaded[0].w},
                                  {loaded[1].x, loaded[1].y, loaded[1].z, loaded[1].w}};

    // Activations: tokens[b] are the operand registers of 8 tokens for both k16 steps.
    const int row = lane % 8, chunk = warp_k * 4 + lane / 8;
    const uint32_t activations =
        stage + Cfg::kActivationOffset + row * (kTileK * 2) + layout::swizzled_chunk(row, chunk) * 16;
    uint32_t tokens[kBlocks][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) ptx::ldmatrix_x4(tokens[b], activations + b * 8 * (kTileK * 2));

    uint32_t scale_pairs[4] = {};  // scale_pairs[j]: channels 16j + lane/4 and 8 more
    if constexpr (Cfg::kGrouped) {
        const uint32_t scales = stage + Cfg::kScaleOffset + (warp_k >> group_shift) * Cfg::kScaleRowBytes +
                                warp_n * 128 + (lane / 4) * 16;
        const uint4 pairs = ptx::load_shared_16(scales);
        scale_pairs[0] = pairs.x;
        scale_pairs[1] = pairs.y;
        scale_pairs[2] = pairs.z;
        scale_pairs[3] = pairs.w;
    }

#pragma unroll
    for (int j = 0; j < 4; ++j) {
        uint32_t first[4], second[4];
        dequantize<kDtype>(words[0][j], first);
        dequantize<kDtype>(words[1][j], second);
        if constexpr (Cfg::kGrouped) {
            const float2 scale = unpack_pair<kDtype>(scale_pairs[j]);
            const float zero[4] = {0.f, 0.f, 0.f, 0.f};
            float products[kBlocks][4];
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
                ptx::mma_m16n8k16<kDtype>(products[b], first, tokens[b][0], tokens[b][1], zero);
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
                ptx::mma_m16n8k16<kDtype>(products[b], second, tokens[b][2], tokens[b][3], products[b]);
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                total[j][b][0] = fmaf(scale.x, products[b][0], total[j][b][0]);
                total[j][b][1] = fmaf(scale.x, products[b][1], total[j][b][1]);
                total[j][b][2] = fmaf(scale.y, products[b][2], total[j][b][2]);
                total[j][b][3] = fmaf(scale.y, products[b][3], total[j][b][3]);
            }
        } else {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
                ptx::mma_m16n8k16<kDtype>(total[j][b], first, tokens[b][0], tokens[b][1], total[j][b]);
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
                ptx::mma_m16n8k16<kDtype>(total[j][b], second, tokens[b][2], tokens[b][3], total[j][b]);
        }
    }
}

// What zero points other than 8 add to the totals of this warp over one stage (core/zeros.cuh).
template <class Cfg>
__device__ __forceinline__ void add_zero_points(uint32_t stage, int group_shift, Accumulators<Cfg>& total) {
    constexpr DType kDtype = Cfg::kDtype;
    constexpr int kBlocks = Cfg::kTileM / 8;
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // what follows from it is computed here: kept over the loop, it would spill
    const int lane = thread % 32, warp = thread / 32;
    const int warp_n = warp % kWarpsN, warp_k = warp / kWarpsN;
    const int group = Cfg::kGrouped ? warp_k >> group_shift : 0;

    const int row = lane % 8, chunk = warp_k * 4 + lane / 8;
    const uint32_t activations =
        stage + Cfg::kActivationOffset + row * (kTileK * 2) + layout::swizzled_chunk(row, chunk) * 16;
    const uint32_t zeros = stage + Cfg::kZeroOffset + group * Cfg::kZeroRowBytes + warp_n * 32 + lane / 4 * 4;
    const uint32_t scales = stage + Cfg::kScaleOffset + group * Cfg::kScaleRowBytes + warp_n * 128 + lane / 4 * 16;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        uint32_t tokens[4];
        ptx::ldmatrix_x4(tokens, activations + b * 8 * (kTileK * 2));
        float sums[4] = {0.f, 0.f, 0.f, 0.f};
        add_tokens<kDtype>(tokens, sums);
        const uint32_t word = ptx::load_shared_4(zeros);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float2 offset = zero_offsets(word, j);
            if constexpr (Cfg::kGrouped) {
                const float2 scale = unpack_pair<kDtype>(ptx::load_shared_4(scales + 4 * j));
                offset = {offset.x * scale.x, offset.y * scale.y};  // exact: 11 bits times 4
            }
            add_offsets(offset, sums, total[j][b]);
        }
    }
}

template <class Cfg>
__device__ __forceinline__ void clear(Accumulators<Cfg>& acc) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int b = 0; b < Cfg::kTileM / 8; ++b)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[j][b][i] = 0.f;
}

template <class Cfg>
__global__ void __launch_bounds__(kThreads, Cfg::kCtasPerSm) gemm_kernel(const __grid_constant__ GemmParams p) {
    extern __shared__ __align__(128) char shared[];
    const uint32_t ring = ptx::shared_address(shared);
    auto* reduce_buffer = reinterpret_cast<float*>(shared + Cfg::kReduceOffset);
    auto* flag = reinterpret_cast<volatile unsigned*>(shared + Cfg::kFlagOffset);

    const int64_t begin = first_unit(blockIdx.x, p.units, gridDim.x);
    const int64_t end = first_unit(blockIdx.x + 1, p.units, gridDim.x);
    const int count = static_cast<int>(end - begin);

    Loader<Cfg> loader(p, begin);
#pragma unroll 1
    for (int i = 0; i < Cfg::kStages - 1; ++i) {
        if (i < count) loader.load(ring + i * Cfg::kStageBytes);
        ptx::cp_async_commit();  // empty groups too, so that the count of groups is the count of stages
    }

    TileCursor cursor(begin, p.m_tiles, p.k_tiles);
    int segment = cursor.k_tile;  // the first k-tile of the current tile that this block computes
    uint32_t read = ring, write = ring + (Cfg::kStages - 1) * Cfg::kStageBytes;
    const auto next_stage = [&](uint32_t stage) {
        stage += Cfg::kStageBytes;
        return stage == ring + Cfg::kStages * Cfg::kStageBytes ? ring : stage;
    };

    Accumulators<Cfg> acc;
    clear<Cfg>(acc);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        ptx::cp_async_wait<Cfg::kStages - 2>();
        __syncthreads();  // this stage has landed for everybody, and everybody has left the one that is overwritten next
        if (i + Cfg::kStages - 1 < count) loader.load(write);
        ptx::cp_async_commit();
        multiply_stage<Cfg>(read, p.group_shift, acc);
        if (p.asymmetric) add_zero_points<Cfg>(read, p.group_shift, acc);
        read = next_stage(read);
        write = next_stage(write);

        const bool tile_done = cursor.k_tile == p.k_tiles - 1;
        if (tile_done || i == count - 1) {
            TileSums<Cfg> sums;
            reduce_warps<Cfg>(reduce_buffer, acc, sums);
            clear<Cfg>(acc);
            bool store = true;
            if (segment > 0 || !tile_done) {
                const int64_t tile = begin + i - cursor.k_tile;  // its first unit
                const int first = owner_of_unit(tile, p.units, gridDim.x);
                const int last = owner_of_unit(tile + p.k_tiles - 1, p.units, gridDim.x);
                store = reduce_blocks<Cfg>(p, first, last, flag, sums);
            }
            if (store) store_tile<Cfg>(p, cursor.m_tile * Cfg::kTileM, cursor.n_tile * kTileN, sums);
            segment = 0;
        }
        cursor.advance(p.m_tiles, p.k_tiles);
    }
    ptx::cp_async_wait<0>();
}

template <class Cfg>
cudaError_t launch_gemm(const GemmParams& params, int grid, int device, cudaStream_t stream) {
    // More than 48 KB of shared memory has to be asked for, once per device.
    static std::atomic<uint64_t> asked{0};
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device >= 64 || !(asked.load(std::memory_order_acquire) & bit)) {
        const cudaError_t error = cudaFuncSetAttribute(gemm_kernel<Cfg>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(Cfg::kSharedBytes));
        if (error != cudaSuccess) return error;
        asked.fetch_or(bit, std::memory_order_release);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = Cfg::kSharedBytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, gemm_kernel<Cfg>, params);
}

}  // namespace marlin_gptq::sm80
