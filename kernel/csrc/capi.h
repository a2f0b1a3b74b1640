/* The C ABI of libmarlin_gptq: plain C types, no framework. Every function returns 0, a cudaError_t (positive) or one of
 * the codes below (negative); marlin_gptq_error_string explains all of them.
 *
 * A change of any signature or meaning raises MARLIN_GPTQ_ABI_VERSION; the Python side refuses another number. */
#pragma once

#include <stdint.h>

#define MARLIN_GPTQ_ABI_VERSION 3

#if defined(__cplusplus)
#define MARLIN_GPTQ_API extern "C" __attribute__((visibility("default")))
#else
#define MARLIN_GPTQ_API __attribute__((visibility("default")))
#endif

enum {
    MARLIN_GPTQ_BAD_SHAPE = -1,
    MARLIN_GPTQ_BAD_GROUP_SIZE = -2,
    MARLIN_GPTQ_BAD_DTYPE = -3,
    MARLIN_GPTQ_BAD_POINTER = -4,
    MARLIN_GPTQ_BAD_STRIDE = -5,
    MARLIN_GPTQ_BAD_GRID = -6,
    MARLIN_GPTQ_OLD_DEVICE = -7,
    MARLIN_GPTQ_NOT_HOPPER = -8,
    MARLIN_GPTQ_BAD_CHOICE = -9,
    MARLIN_GPTQ_NO_BLOCKS = -10,
};

/* dtype: 0 float16, 1 bfloat16. */

/* Flags of marlin_gptq_gemm. */
enum {
    /* A promise that nothing running or queued on the stream writes qweight or scales: the kernel may begin to read them
     * before the work in front of it has ended (programmatic dependent launch, compute capability 9.0 and newer). */
    MARLIN_GPTQ_OVERLAP = 1,
    /* For tests: the kernels that every device can run. */
    MARLIN_GPTQ_PORTABLE = 2,
};

struct marlin_gptq_plan_t {
    int32_t family; /* 0: sm80/gemm.cuh, 1: sm90/decode.cuh */
    int32_t tile_m, tile_n, tile_k, stages;
    int32_t grouped, ctas_per_sm, grid, cluster, threads; /* cluster: blocks of one, where as many fit on the device */
    int32_t m_tiles, n_tiles, k_tiles, shared_bytes;
    int64_t units;
    const char* reason;
};

MARLIN_GPTQ_API int marlin_gptq_abi_version(void);
MARLIN_GPTQ_API const char* marlin_gptq_error_string(int code);

/* What a problem would run as on a device of `sms` multiprocessors with `shared_bytes_per_sm` of shared memory each and
 * of this compute capability (10 * major + minor).
 * Touches no GPU. */
MARLIN_GPTQ_API int marlin_gptq_plan(int64_t m, int64_t n, int64_t k, int64_t group_size, int32_t sms,
                                     int32_t shared_bytes_per_sm, int32_t compute_capability, struct marlin_gptq_plan_t* plan);

/* c[m, n] = a[m, k] (row stride lda >= k) times the weight [k, n] packed in qweight [k/16, 2n] int32, with scales
 * [groups, n] and, unless null, zero points qzeros [groups, n/8] int32 (null: 8 everywhere) and bias [n]. All in device
 * memory of `device`; a, scales, bias and c are of `dtype`.
 * k % 16 == 0, n % 64 == 0, lda % 8 == 0; group_size -1 or k (one scale per column), 32, 64 or 128 (dividing k); a,
 * qweight, scales, qzeros aligned to 16 bytes, c and bias to 8. Returns once the work is queued on `stream`. Deterministic.
 * grid: 0, or a number of blocks to force (for tests).
 * flags: 0 or a sum of the two below. */
MARLIN_GPTQ_API int marlin_gptq_gemm(const void* a, const void* qweight, const void* scales, const void* qzeros,
                                     const void* bias, void* c, int64_t m, int64_t n, int64_t k, int64_t lda, int64_t group_size,
                                     int32_t dtype, int32_t device, void* stream, int32_t grid, int32_t flags);

/* The same for at most 32 tokens and weights in blocks of 128 channels x 128 k (kernel/blocked.py), on compute capability
 * 9.0 alone: blocks [ceil(n/128), ceil(k/128)] of 8192 bytes of codes, then, unless there is one scale per column, scales,
 * then, where asymmetric is not 0, zero points. scales: [n] in natural order where there is one per column, else null.
 * blocks aligned to 16 bytes. MARLIN_GPTQ_NO_BLOCKS: not for this device or this m. */
MARLIN_GPTQ_API int marlin_gptq_decode_blocks(const void* a, const void* blocks, const void* scales, const void* bias,
                                              void* c, int64_t m, int64_t n, int64_t k, int64_t lda, int64_t group_size,
                                              int32_t asymmetric, int32_t dtype, int32_t device, void* stream,
                                              int32_t grid, int32_t flags);

/* How a problem in the run-time layout of Hopper GPUs is cut (sm90/wgmma_schedule.h). */
struct marlin_gptq_blocked_plan_t {
    int32_t variant; /* row of sm90/wgmma_variants.h */
    int32_t tile_m, tile_n, grid;
    int32_t m_tiles, n_tiles, k_tiles;
    int32_t split_tiles, split_blocks; /* tiles shared out in units of k, and the blocks that have some */
    int64_t slot_bytes;
    double microseconds; /* estimated, for an H200 */
    const char* reason;
};

/* For tests and tuning: -1 leaves each to the plan. */
struct marlin_gptq_blocked_choice_t {
    int32_t variant, split_tiles, split_blocks;
};

/* What marlin_gptq_gemm_blocked would do on a GPU of compute capability 9.0 with `sms` multiprocessors. Touches no GPU.
 * choice: null, or what to force. */
MARLIN_GPTQ_API int marlin_gptq_plan_blocked(int64_t m, int64_t n, int64_t k, int64_t group_size, int32_t asymmetric,
                                             int32_t sms, const struct marlin_gptq_blocked_choice_t* choice,
                                             struct marlin_gptq_blocked_plan_t* plan);

/* As marlin_gptq_gemm, for a weight in the run-time layout of Hopper GPUs (kernel/blocked.py), on those alone. blocks
 * [ceil(n/128), ceil(k/128), bytes of a block] aligned to 16 bytes, with the scales of groups and, where asymmetric is not
 * 0, zero points inside; scales [n] in natural order for group_size -1 or k, else null. a and c aligned to 16 bytes.
 * flags: 0 or MARLIN_GPTQ_OVERLAP. choice: null, or what to force. */
MARLIN_GPTQ_API int marlin_gptq_gemm_blocked(const void* a, const void* blocks, const void* scales, const void* bias, void* c,
                                             int64_t m, int64_t n, int64_t k, int64_t lda, int64_t group_size,
                                             int32_t asymmetric, int32_t dtype, int32_t device, void* stream, int32_t flags,
                                             const struct marlin_gptq_blocked_choice_t* choice);

/* For tests: how many reduction tickets of `device` are not zero (0 when nothing is running), over how many workspaces.
 * Synchronizes the device. */
MARLIN_GPTQ_API int marlin_gptq_dirty_tickets(int32_t device, int64_t* dirty, int32_t* workspaces);
