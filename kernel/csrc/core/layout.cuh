// The Marlin layout as formulas: the only place with bit arithmetic on positions. Plain C++17, usable on the host.
//
// Codes q(k, n) of 4 bits lie in int32 words of shape [K/16, 2N]. A block of 16 k x 64 n is 128 consecutive words, and
// lane L of a warp owns words 4L..4L+3 of it (one 16-byte load); word j of the four holds the channels 16j..16j+15,
// of which the lane has rows g = L/4 and g+8 and, with t = L%4, the k 2t, 2t+1, 2t+8, 2t+9:
//
//     bit   31..28    27..24     23..20    19..16     15..12    11..8      7..4      3..0
//     k      2t+9      2t+1       2t+9      2t+1       2t+8      2t         2t+8      2t
//     n      g+8       g+8        g         g          g+8       g+8        g         g
//
// Nibbles i and i+4 are a pair (k even, k odd) in the two halves of the word: pair 0, 1, 2, 3 = registers a0, a2, a1, a3
// of the m16 x k16 operand of mma.m16n8k16 whose rows are output channels.
#pragma once

#if defined(__CUDACC__)
#define MARLIN_GPTQ_HD __host__ __device__ __forceinline__
#else
#define MARLIN_GPTQ_HD inline
#endif

#include <cstdint>

namespace marlin_gptq::layout {

// ---- weights ----
MARLIN_GPTQ_HD constexpr int64_t words_per_row(int64_t n_total) { return 2 * n_total; }
MARLIN_GPTQ_HD constexpr int weight_row(int k) { return k >> 4; }
MARLIN_GPTQ_HD constexpr int weight_word(int k, int n) {
    return 128 * (n >> 6) + 16 * (n & 7) + 4 * ((k >> 1) & 3) + ((n >> 4) & 3);
}
MARLIN_GPTQ_HD constexpr int weight_nibble(int k, int n) {
    return 4 * (k & 1) + 2 * ((n >> 3) & 1) + ((k >> 3) & 1);
}
MARLIN_GPTQ_HD constexpr int weight_k(int row, int word, int nibble) {
    return 16 * row + 8 * (nibble & 1) + 2 * ((word >> 2) & 3) + (nibble >> 2);
}
MARLIN_GPTQ_HD constexpr int weight_n(int word, int nibble) {
    return 64 * (word >> 7) + 16 * (word & 3) + 8 * ((nibble >> 1) & 1) + ((word >> 4) & 7);
}
// First word, within its row, of the block of channels that starts at n (a multiple of 64).
MARLIN_GPTQ_HD constexpr int64_t block_word(int64_t n) { return 2 * n; }

// ---- scales: the stored column of channel n ----
// Grouped: an 8 x 8 transpose of each 64 channels, so that one 16-byte load gives a lane its 8 scales (n = g mod 8).
MARLIN_GPTQ_HD constexpr int scale_column_grouped(int n) { return 64 * (n >> 6) + 8 * (n & 7) + ((n >> 3) & 7); }
// One scale per column (group_size -1 or K): pairs of neighbours stay together.
MARLIN_GPTQ_HD constexpr int scale_column_per_channel(int n) {
    return 32 * (n >> 5) + 8 * ((n >> 1) & 3) + 2 * ((n >> 3) & 3) + (n & 1);
}

// ---- zero points: int32 words of shape [K/group, N/8] ----
MARLIN_GPTQ_HD constexpr int zero_word(int n) { return 8 * (n >> 6) + (n & 7); }
MARLIN_GPTQ_HD constexpr int zero_nibble(int n) { return 4 * ((n >> 3) & 1) + 2 * ((n >> 5) & 1) + ((n >> 4) & 1); }

// ---- blocks of 128 channels x 128 k (kernel/blocked.py), the run-time layout of sm_90: bytes within a block ----
// The same words in another order: lane L owns 16 bytes at 16 L of every part, and a part is 16 channels x 64 k, so that a
// load brings four k16 steps of one channel tile. Behind the codes, for each group: scales as pairs (channel r, r + 8)
// of each tile of 16, zero points likewise with one byte each.
constexpr int kBlockCodeBytes = 8192, kBlockScaleRowBytes = 256, kBlockZeroRowBytes = 128;
MARLIN_GPTQ_HD constexpr int block_bytes(int scale_rows, int zero_rows) {
    return kBlockCodeBytes + scale_rows * kBlockScaleRowBytes + zero_rows * kBlockZeroRowBytes;
}
MARLIN_GPTQ_HD constexpr int block_part_bytes(int step, int tile) { return 512 * (8 * (step >> 2) + tile); }

// ---- shared memory: activations, one row of 16 chunks of 16 bytes per token ----
// Chunk c of row r lies at c ^ (r mod 8): the 8 rows of an ldmatrix and the 8 chunks of a cp.async quarter-warp each
// meet 8 different groups of banks.
MARLIN_GPTQ_HD constexpr int swizzled_chunk(int row, int chunk) { return chunk ^ (row & 7); }

}  // namespace marlin_gptq::layout
