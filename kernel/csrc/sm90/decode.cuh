// C[m, n] = A[m, k] W[k, n] with 4-bit W for few tokens (m <= kTileM): mma.sync fed by the copy engine, for sm_90.
//
// The unit of work is 128 k x kTileN channels: kWarpsN warps side by side, each 64 channels, and kWarpsK such rows of
// warps take turns with the units. A ring of slots holds one unit each; the copy engine fills them, weights and
// activations as boxes of tensors, and two mbarriers a slot hand it over and back, so that no barrier of the whole block
// is in the loop. Weights and scales are constant: the first slots fill before the previous grid has ended. Operands are
// swapped and scaled as in sm80/gemm.cuh: one packed word is one lane's fragment, q - 8 is exact, and the products of a
// group are scaled in FP32 as they join the totals.
//
// Blocks walk their share of the unit stream (core/scheduler.cuh). Where a tile is shared, the last of its blocks adds
// the parts in the order of the blocks; each warp does so for its own piece of the tile, with a ticket of its own.
#pragma once

#include "core/dequant.cuh"
#include "core/layout.cuh"
#include "core/params.h"
#include "core/scheduler.cuh"
#include "core/types.cuh"
#include "ptx/griddep.cuh"
#include "ptx/ldst.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "sm90/launch.h"

namespace marlin_gptq::sm90 {

template <class Cfg>
using Accumulators = float[4][Cfg::kTileM / 8][4];  // [16 channels][8 tokens][mma register]

// The slots and barriers of a block, as addresses in shared memory.
template <class Cfg>
struct Ring {
    uint32_t base, barriers;
    int slots;

    __device__ __forceinline__ uint32_t slot(int i) const { return base + i * Cfg::kSlotBytes; }
    __device__ __forceinline__ uint32_t full(int i) const { return barriers + 16 * i; }
    __device__ __forceinline__ uint32_t empty(int i) const { return barriers + 16 * i + 8; }

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
        : p_(params), maps_(maps), ring_(ring), k_tile_(k_tile), n0_(n_tile * Cfg::kTileN) {}

    // Also announces the bytes of the activations.
    __device__ __forceinline__ void load_constants(int slot, uint64_t policy) const {
        const uint32_t barrier = ring_.full(slot), to = ring_.slot(slot);
        const int width = min(Cfg::kTileN, p_.n - n0_) * 2;  // bytes of scales
        int scale_rows = 0;
        if constexpr (Cfg::kGroups == Groups::unit) scale_rows = 1;
        if constexpr (Cfg::kGroups == Groups::part) scale_rows = (kTileK / kMinGroupSize) >> p_.group_shift;
        ptx::mbarrier_arrive_expect(barrier, Cfg::kWeightBytes + Cfg::kActivationBytes + scale_rows * width);
#pragma unroll
        for (int box = 0; box < Cfg::kTileN / kBoxN; ++box)
            ptx::tensor_copy(to + box * Cfg::kWeightBoxBytes, &maps_.weights, (n0_ + box * kBoxN) * 2,
                             k_tile_ * (kTileK / 16), barrier, policy);
        if constexpr (Cfg::kGroups != Groups::column) {
            for (int row = 0; row < scale_rows; ++row) {
                // Groups past the end meet activations of zero: any finite scale will do.
                const int group = min(k_tile_ * scale_rows + row, p_.groups - 1);
                const auto* from = static_cast<const char*>(p_.scales) + (static_cast<int64_t>(group) * p_.n + n0_) * 2;
                ptx::bulk_copy(to + Cfg::kScaleOffset + row * Cfg::kScaleRowBytes, from, width, barrier, policy);
            }
        }
    }

    // Zeros past m and k: they silence whatever weights they meet.
    __device__ __forceinline__ void load_activations(int slot) const {
        const uint32_t to = ring_.slot(slot) + Cfg::kActivationOffset;
#pragma unroll
        for (int box = 0; box < kTileK / kBoxK; ++box)
            ptx::tensor_copy(to + box * Cfg::kActivationBoxBytes, &maps_.activations, k_tile_ * kTileK + box * kBoxK, 0,
                             ring_.full(slot));
    }

    __device__ __forceinline__ void advance(int step) {
        k_tile_ += step;
        while (k_tile_ >= p_.k_tiles) {
            k_tile_ -= p_.k_tiles;
            n0_ += Cfg::kTileN;
        }
    }

  private:
    const GemmParams& p_;
    const Maps& maps_;
    const Ring<Cfg> ring_;
    int k_tile_, n0_;
};

template <class Cfg>
__device__ __forceinline__ void clear(Accumulators<Cfg>& acc) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int b = 0; b < Cfg::kTileM / 8; ++b)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[j][b][i] = 0.f;
}

// total += scale * products, the scales of this lane's channels read from shared memory.
template <class Cfg>
__device__ __forceinline__ void add_scaled(uint32_t scales, const Accumulators<Cfg>& products, Accumulators<Cfg>& total) {
    const uint4 loaded = ptx::load_shared_16(scales);
    const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float2 scale = unpack_pair<Cfg::kDtype>(pairs[j]);
#pragma unroll
        for (int b = 0; b < Cfg::kTileM / 8; ++b) {
            total[j][b][0] = fmaf(scale.x, products[j][b][0], total[j][b][0]);
            total[j][b][1] = fmaf(scale.x, products[j][b][1], total[j][b][1]);
            total[j][b][2] = fmaf(scale.y, products[j][b][2], total[j][b][2]);
            total[j][b][3] = fmaf(scale.y, products[j][b][3], total[j][b][3]);
        }
    }
}

// One unit into the totals of this warp: 64 channels x kTileM tokens x 128 k. Arrives at `empty` when all is read.
template <class Cfg>
__device__ __forceinline__ void multiply_unit(uint32_t slot, uint32_t empty, int group_shift, Accumulators<Cfg>& total) {
    constexpr DType kDtype = Cfg::kDtype;
    constexpr int kBlocks = Cfg::kTileM / 8;
    constexpr int kPairs = kTileK / 32;  // of k16 steps
    const int lane = threadIdx.x % 32, warp_n = threadIdx.x / 32 % Cfg::kWarpsN;
    const uint32_t weights = slot + warp_n / 2 * Cfg::kWeightBoxBytes + warp_n % 2 * 512 + lane * 16;
    const uint32_t activations = slot + Cfg::kActivationOffset + (lane % 8) * (kBoxK * 2);
    const uint32_t scales = slot + Cfg::kScaleOffset + warp_n * 128 + (lane / 4) * 16;
    const float zero[4] = {0.f, 0.f, 0.f, 0.f};

    Accumulators<Cfg> products;
    if constexpr (Cfg::kGroups == Groups::part) clear<Cfg>(products);
    // Read ahead of their use, as far as registers allow.
    constexpr int kAhead = kBlocks == 1 ? kPairs - 1 : 1;
    uint4 loaded[kPairs][2];
    uint32_t tokens_of[kPairs][kBlocks][4];
    const auto read = [&](int pair) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            loaded[pair][i] = ptx::load_shared_16(weights + (2 * pair + i) * Cfg::kWeightRowBytes);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
            ptx::ldmatrix_x4(tokens_of[pair][b], activations + pair / 2 * Cfg::kActivationBoxBytes + b * 8 * (kBoxK * 2) +
                                                     layout::swizzled_chunk(lane % 8, 4 * (pair % 2) + lane / 8) * 16);
    };
#pragma unroll
    for (int pair = 0; pair < kAhead; ++pair) read(pair);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
        if (pair + kAhead < kPairs) read(pair + kAhead);
        const uint4(&both)[2] = loaded[pair];
        const uint32_t words[2][4] = {{both[0].x, both[0].y, both[0].z, both[0].w},
                                      {both[1].x, both[1].y, both[1].z, both[1].w}};
        const auto& tokens = tokens_of[pair];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32_t first[4], second[4];
            dequantize<kDtype>(words[0][j], first);
            dequantize<kDtype>(words[1][j], second);
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                if constexpr (Cfg::kGroups == Groups::column) {
                    ptx::mma_m16n8k16<kDtype>(total[j][b], first, tokens[b][0], tokens[b][1], total[j][b]);
                } else if (Cfg::kGroups == Groups::unit && pair == 0) {
                    ptx::mma_m16n8k16<kDtype>(products[j][b], first, tokens[b][0], tokens[b][1], zero);
                } else {
                    ptx::mma_m16n8k16<kDtype>(products[j][b], first, tokens[b][0], tokens[b][1], products[j][b]);
                }
            }
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                auto& sum = Cfg::kGroups == Groups::column ? total[j][b] : products[j][b];
                ptx::mma_m16n8k16<kDtype>(sum, second, tokens[b][2], tokens[b][3], sum);
            }
        }
        if constexpr (Cfg::kGroups == Groups::part) {
            if (((pair + 1) & ((1 << group_shift) - 1)) == 0) {
                add_scaled<Cfg>(scales + (pair >> group_shift) * Cfg::kScaleRowBytes, products, total);
                clear<Cfg>(products);
            }
        }
    }
    if constexpr (Cfg::kGroups == Groups::unit) add_scaled<Cfg>(scales, products, total);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty);
}

// Which piece of a tile a consumer thread sums and stores: for every 8 tokens, kPieces times 4 channels of one token.
template <class Cfg>
struct Piece {
    static constexpr int kRow = Cfg::kTileN / 4;  // float4s in a row
    static constexpr int kPieces = (8 * kRow + Cfg::kThreads - 1) / Cfg::kThreads;
    static constexpr int kAll = Cfg::kTileM / 8 * kPieces;
    static constexpr int64_t kSlot = static_cast<int64_t>(kAll) * Cfg::kThreads;  // float4s of a partial tile

    __device__ __forceinline__ static int at(int piece) { return piece * Cfg::kThreads + threadIdx.x; }
    __device__ __forceinline__ static int token(int i) {
        return i / kPieces * 8 + at(i % kPieces) / kRow;
    }
    __device__ __forceinline__ static int channel(int i) { return at(i % kPieces) % kRow * 4; }
    __device__ __forceinline__ static bool valid(int i, int m) { return at(i % kPieces) < 8 * kRow && token(i) < m; }
    // Whether this warp has anything to sum.
    __device__ __forceinline__ static bool any(int m) {
        const int from = threadIdx.x / 32 * 32;
        return from < 8 * kRow && from / kRow < m;
    }
};

template <class Cfg>
using Sums = float4[Piece<Cfg>::kAll];

__device__ __forceinline__ void accumulate(float4& sum, const float4& term) {
    sum.x += term.x;
    sum.y += term.y;
    sum.z += term.z;
    sum.w += term.w;
}

// Adds up the k-warps' totals, in their order.
template <class Cfg>
__device__ __forceinline__ void reduce_warps(float* buffer, int m, const Accumulators<Cfg>& acc, Sums<Cfg>& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_n = warp % Cfg::kWarpsN, warp_k = warp / Cfg::kWarpsN;
    float* mine = buffer + warp_k % Cfg::kPartials * 8 * Cfg::kReduceRow + 64 * warp_n;
    const int token = 2 * (lane % 4), channel = lane / 4;

#pragma unroll
    for (int block = 0; block < Cfg::kTileM / 8; ++block) {
        if (block > 0 && 8 * block >= m) break;
#pragma unroll
        for (int round = 0; round < Cfg::kWarpsK / Cfg::kPartials; ++round) {
            __syncthreads();  // the buffer has been read, or written by the round before
            if (warp_k / Cfg::kPartials != round) continue;
            const auto put = [&](float* at, float x) { *at = round == 0 ? x : *at + x; };
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float* at = mine + token * Cfg::kReduceRow + 16 * j + channel;
                if (8 * block + token < m) {
                    put(at, acc[j][block][0]);
                    put(at + 8, acc[j][block][2]);
                }
                if (8 * block + token + 1 < m) {
                    put(at + Cfg::kReduceRow, acc[j][block][1]);
                    put(at + Cfg::kReduceRow + 8, acc[j][block][3]);
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int piece = 0; piece < Piece<Cfg>::kPieces; ++piece) {
            const int i = block * Piece<Cfg>::kPieces + piece;
            if (!Piece<Cfg>::valid(i, m)) continue;
            const float* row = buffer + (Piece<Cfg>::token(i) - 8 * block) * Cfg::kReduceRow + Piece<Cfg>::channel(i);
            float4 sum = *reinterpret_cast<const float4*>(row);
#pragma unroll
            for (int other = 1; other < Cfg::kPartials; ++other)
                accumulate(sum, *reinterpret_cast<const float4*>(row + other * 8 * Cfg::kReduceRow));
            sums[i] = sum;
        }
    }
}

// Adds up a tile shared by the blocks first..last (see core/reduce.cuh), each warp its own piece: true in the warp that
// came last, which holds the sums then.
template <class Cfg>
__device__ __forceinline__ bool reduce_blocks(const GemmParams& p, int first, int last, Sums<Cfg>& sums) {
    using P = Piece<Cfg>;
    const int me = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto slot_of = [&](int64_t slot) { return p.slots + slot * P::kSlot + threadIdx.x; };
    float4* mine = slot_of(2 * static_cast<int64_t>(me) + (me == first));
#pragma unroll
    for (int i = 0; i < P::kAll; ++i)
        if (P::valid(i, p.m)) __stcg(mine + i * Cfg::kThreads, sums[i]);

    __syncwarp();
    unsigned* ticket = p.tickets + first * kTicketsPerBlock + warp;
    unsigned drawn = 0;
    if (lane == 0) drawn = ptx::count_one(ticket);
    drawn = __shfl_sync(0xffffffff, drawn, 0);
    __syncwarp();  // a shuffle orders no memory: what lane 0 acquired, all lanes may now read
    if (drawn != static_cast<unsigned>(last - first)) return false;

    const float4* from = slot_of(2 * static_cast<int64_t>(first) + 1);
#pragma unroll
    for (int i = 0; i < P::kAll; ++i)
        if (P::valid(i, p.m)) sums[i] = __ldcg(from + i * Cfg::kThreads);
#pragma unroll 4
    for (int block = first + 1; block <= last; ++block) {
        from = slot_of(2 * static_cast<int64_t>(block));
#pragma unroll
        for (int i = 0; i < P::kAll; ++i)
            if (P::valid(i, p.m)) accumulate(sums[i], __ldcg(from + i * Cfg::kThreads));
    }
    if (lane == 0) *ticket = 0;  // clean for the next launch
    return true;
}

// FP32 sums -> C: the scale of the column (where there is one per column), the bias, one rounding.
template <class Cfg>
__device__ __forceinline__ void store(const GemmParams& p, int n0, const Sums<Cfg>& sums) {
    constexpr DType kDtype = Cfg::kDtype;
    using P = Piece<Cfg>;
#pragma unroll
    for (int i = 0; i < P::kAll; ++i) {
        const int n = n0 + P::channel(i);
        if (!P::valid(i, p.m) || n >= p.n) continue;
        float4 scale = {1.f, 1.f, 1.f, 1.f}, bias = {0.f, 0.f, 0.f, 0.f};
        const auto pairs = [](const void* at, int low, int high) {
            const auto pair = [&](int column) {
                return unpack_pair<kDtype>(
                    *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(at) + column));
            };
            const float2 x = pair(low), y = pair(high);
            return float4{x.x, x.y, y.x, y.y};
        };
        if constexpr (Cfg::kGroups == Groups::column)
            scale = pairs(p.scales, layout::scale_column_per_channel(n), layout::scale_column_per_channel(n + 2));
        if (p.bias != nullptr) bias = pairs(p.bias, n, n + 2);
        uint2 bits;
        bits.x = pack_pair<kDtype>(fmaf(sums[i].x, scale.x, bias.x), fmaf(sums[i].y, scale.y, bias.y));
        bits.y = pack_pair<kDtype>(fmaf(sums[i].z, scale.z, bias.z), fmaf(sums[i].w, scale.w, bias.w));
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.c) + static_cast<int64_t>(P::token(i)) * p.n + n) = bits;
    }
}

// Computes the block's `count` units, tile by tile, and keeps the ring full: of the warps side by side the first fetches,
// once all of them have left a slot, what comes into it next.
template <class Cfg>
__device__ __forceinline__ void compute(const GemmParams& p, const Shares& shares, const Ring<Cfg>& ring,
                                        Loader<Cfg>& loader, float* buffer, int n_tile, int k_tile, int count) {
    const bool leads = threadIdx.x % 32 == 0 && threadIdx.x / 32 % Cfg::kWarpsN == 0;
    const uint64_t policy = ptx::evict_first_policy();
    int next = threadIdx.x / 32 / Cfg::kWarpsN;  // this warp's next unit
    int slot = next, left_slot = -1;             // its slot; the slot to be filled again
    uint32_t parity = 0, left_parity = 0;
    const auto refill = [&] {
        if (!leads || left_slot < 0) return;
        ptx::mbarrier_wait(ring.empty(left_slot), left_parity);
        loader.load_constants(left_slot, policy);
        loader.load_activations(left_slot);
        loader.advance(Cfg::kWarpsK);
        left_slot = -1;
    };

    for (int done = 0; done < count;) {
        const int left = p.k_tiles - k_tile;
        const int until = min(count, done + left);
        const bool shared_tile = k_tile > 0 || until - done < left;
        int first_block = 0, last_block = 0;
        if (shared_tile) {
            first_block = shares.owner(n_tile * p.k_tiles);
            last_block = shares.owner((n_tile + 1) * p.k_tiles - 1);
        }
        Accumulators<Cfg> acc;
        clear<Cfg>(acc);
#pragma unroll 1
        for (; next < until; next += Cfg::kWarpsK) {
            ptx::mbarrier_wait(ring.full(slot), parity);
            refill();
            multiply_unit<Cfg>(ring.slot(slot), ring.empty(slot), p.group_shift, acc);
            if (next + ring.slots < count) {
                left_slot = slot;
                left_parity = parity;
            }
            slot += Cfg::kWarpsK;
            if (slot >= ring.slots) {
                slot -= ring.slots;
                parity ^= 1;
            }
        }
        refill();
        Sums<Cfg> sums;
        reduce_warps<Cfg>(buffer, p.m, acc, sums);
        if (Piece<Cfg>::any(p.m)) {
            bool last = true;
            if (shared_tile) last = reduce_blocks<Cfg>(p, first_block, last_block, sums);
            if (last) store<Cfg>(p, n_tile * Cfg::kTileN, sums);
        }
        done = until;
        k_tile = 0;
        ++n_tile;
    }
}

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    decode_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ Maps maps) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    extern __shared__ __align__(1024) char shared[];
    const Ring<Cfg> ring{ptx::shared_address(shared),
                         ptx::shared_address(shared) + p.ring_slots * Cfg::kSlotBytes + Cfg::kReduceBytes, p.ring_slots};
    auto* buffer = reinterpret_cast<float*>(shared + p.ring_slots * Cfg::kSlotBytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) {
        if (warp == Cfg::kWarps - 1) ptx::prefetch_map(&maps.weights);
        if (warp == Cfg::kWarps - 2) ptx::prefetch_map(&maps.activations);
        ring.init();
    }
    const Shares shares{static_cast<int>(p.units), static_cast<int>(gridDim.x), p.units_each, p.units_rest};
    const int begin = shares.first(blockIdx.x);
    const int count = shares.first(blockIdx.x + 1) - begin;
    const int n_tile = begin / p.k_tiles, k_tile = begin % p.k_tiles;
    const int first = min(count, ring.slots);
    __syncthreads();
    ptx::let_next_grid_start();
    if (!p.overlap) ptx::wait_for_previous_grid();
    // All warps share in filling the ring for the first time.
    Loader<Cfg> loader(p, maps, ring, n_tile, k_tile);
    if (lane == 0) {
        Loader<Cfg> filler = loader;
        filler.advance(warp);
        const uint64_t policy = ptx::evict_first_policy();
        for (int i = warp; i < first; i += Cfg::kWarps, filler.advance(Cfg::kWarps)) filler.load_constants(i, policy);
    }
    ptx::wait_for_previous_grid();  // from here on its results are read, and memory it may read is written
    if (lane == 0) {
        Loader<Cfg> filler = loader;
        filler.advance(warp);
        for (int i = warp; i < first; i += Cfg::kWarps, filler.advance(Cfg::kWarps)) filler.load_activations(i);
    }
    __syncwarp();
    loader.advance(warp / Cfg::kWarpsN + ring.slots);
    compute<Cfg>(p, shares, ring, loader, buffer, n_tile, k_tile, count);
#endif
}

// Whether the code that this device would run has a body: PTX of an older architecture has none.
template <class Cfg>
bool compiled() {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, decode_kernel<Cfg>) == cudaSuccess && attributes.ptxVersion >= 90;
}

template <class Cfg>
cudaError_t launch_decode(const GemmParams& params, const Maps& maps, int grid, int device, cudaStream_t stream) {
    const int shared_bytes = params.shared_bytes;
    // More than 48 KB of shared memory has to be asked for, once per device and size.
    static std::atomic<int> asked[64];
    if (device >= 64 || asked[device].load(std::memory_order_acquire) < shared_bytes) {
        const cudaError_t error = cudaFuncSetAttribute(decode_kernel<Cfg>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       shared_bytes);
        if (error != cudaSuccess) return error;
        if (device < 64) asked[device].store(shared_bytes, std::memory_order_release);
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(Cfg::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, decode_kernel<Cfg>, params, maps);
}

}  // namespace marlin_gptq::sm90
