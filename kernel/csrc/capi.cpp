#include "capi.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <climits>

#include "capi_common.h"
#include "core/layout.cuh"
#include "dispatch/heuristics.h"
#include "dispatch/launch.h"
#include "dispatch/workspace.h"
#include "sm90/launch.h"

using namespace marlin_gptq;

namespace {

// Operands and what there is to say about them beside the problem.
struct Call {
    const void *a, *weights, *scales, *qzeros, *bias;
    void* c;
    int64_t lda;
    bool asymmetric;
    int32_t dtype, device;
    void* stream;
    int32_t grid, flags;
};

int run(const Problem& problem, const Call& call) {
    const bool blocks = problem.source == sm90::Source::blocks;
    if (const int error = check_problem(problem)) return error;
    if (call.dtype != 0 && call.dtype != 1) return MARLIN_GPTQ_BAD_DTYPE;
    if (problem.m == 0) return 0;
    if (call.lda < problem.k || call.lda % 8 != 0) return MARLIN_GPTQ_BAD_STRIDE;
    const bool needs_scales = !blocks || !is_grouped(problem);
    if (call.a == nullptr || call.weights == nullptr || (needs_scales && call.scales == nullptr) || call.c == nullptr ||
        !aligned(call.a, 16) || !aligned(call.weights, 16) || !aligned(call.scales, 16) ||
        !aligned(call.qzeros, 16) || !aligned(call.bias, 8) || !aligned(call.c, 8))
        return MARLIN_GPTQ_BAD_POINTER;

    DeviceInfo info;
    if (const cudaError_t error = device_info(call.device, &info)) return reported(error);
    if (info.compute_capability < 80) return MARLIN_GPTQ_OLD_DEVICE;
    const DeviceGuard guard(call.device);
    if (guard.error() != cudaSuccess) return reported(guard.error());

    const bool portable =
        (call.flags & MARLIN_GPTQ_PORTABLE) || info.compute_capability < 90 || !sm90::decode_compiled(call.device);
    Plan plan = choose_config(problem, {info.sms, info.shared_bytes_per_sm, portable ? 80 : info.compute_capability});
    if (plan.units == 0) return MARLIN_GPTQ_NO_BLOCKS;
    const auto stream = static_cast<cudaStream_t>(call.stream);
    Workspace workspace;
    if (const cudaError_t error = workspace_for(call.device, stream, &workspace)) return reported(error);
    const size_t most = std::min<size_t>(workspace.max_grid, workspace.slot_bytes / (2 * plan.partial_bytes));
    if (call.grid != 0) {
        if (call.grid < 0 || call.grid > plan.units || static_cast<size_t>(call.grid) > most) return MARLIN_GPTQ_BAD_GRID;
        plan.grid = call.grid;
        plan.cluster = 1;
    }
    if (plan.units / plan.grid >= INT_MAX) return MARLIN_GPTQ_BAD_SHAPE;

    GemmParams params{};
    params.a = call.a;
    params.qweight = static_cast<const uint32_t*>(call.weights);
    params.scales = call.scales;
    params.qzeros = static_cast<const uint32_t*>(call.qzeros);
    params.bias = call.bias;
    params.c = call.c;
    params.slots = workspace.slots;
    params.tickets = workspace.tickets;
    params.lda = call.lda;
    params.units = plan.units;
    params.m = static_cast<int>(problem.m);
    params.n = static_cast<int>(problem.n);
    params.k = static_cast<int>(problem.k);
    params.m_tiles = plan.m_tiles;
    params.k_tiles = plan.k_tiles;
    params.asymmetric = call.asymmetric;
    params.ring_slots = plan.stages;
    params.shared_bytes = static_cast<int>(plan.shared_bytes);
    params.overlap = (call.flags & MARLIN_GPTQ_OVERLAP) != 0;
    params.units_each = static_cast<int>(plan.units / plan.grid);
    params.units_rest = static_cast<int>(plan.units % plan.grid);
    if (plan.grouped) {
        params.group_shift = problem.group_size == 128 ? 2 : problem.group_size == 64 ? 1 : 0;
        params.groups = static_cast<int>(problem.k / problem.group_size);
    }
    const int scale_rows = plan.grouped ? kTileK / static_cast<int>(problem.group_size) : 0;
    params.cluster = plan.cluster;
    params.block_bytes = layout::block_bytes(scale_rows, call.asymmetric ? std::max(scale_rows, 1) : 0);
    return reported(launch(static_cast<DType>(call.dtype), plan, params, call.device, stream));
}

}  // namespace

int marlin_gptq_abi_version(void) { return MARLIN_GPTQ_ABI_VERSION; }

const char* marlin_gptq_error_string(int code) {
    switch (code) {
        case 0: return "success";
        case MARLIN_GPTQ_BAD_SHAPE: return "shape: needs m >= 0, n a multiple of 64, k a multiple of 16";
        case MARLIN_GPTQ_BAD_GROUP_SIZE: return "group_size: needs -1, k, or 32, 64 or 128 dividing k";
        case MARLIN_GPTQ_BAD_DTYPE: return "dtype: needs 0 (float16) or 1 (bfloat16)";
        case MARLIN_GPTQ_BAD_POINTER:
            return "pointer: a, qweight or blocks, scales and qzeros need 16-byte alignment, bias and c 8-byte alignment";
        case MARLIN_GPTQ_BAD_STRIDE: return "lda: needs at least k, and a multiple of 8";
        case MARLIN_GPTQ_BAD_GRID: return "grid: needs 1 to min(units of work, 2 blocks per multiprocessor)";
        case MARLIN_GPTQ_OLD_DEVICE: return "device: needs compute capability 8.0 or newer";
        case MARLIN_GPTQ_NO_BLOCKS: return "blocks: need compute capability 9.0 and at most 32 tokens";
        case MARLIN_GPTQ_NOT_HOPPER: return "device: blocks need compute capability 9.0 and kernels compiled for sm_90a";
        case MARLIN_GPTQ_BAD_CHOICE: return "choice: no such variant, or the work does not divide like that";
        default: return code > 0 ? cudaGetErrorString(static_cast<cudaError_t>(code)) : "unknown error code";
    }
}

int marlin_gptq_plan(int64_t m, int64_t n, int64_t k, int64_t group_size, int32_t sms, int32_t shared_bytes_per_sm,
                     int32_t compute_capability, struct marlin_gptq_plan_t* plan) {
    const Problem problem{m, n, k, group_size};
    if (const int error = check_problem(problem)) return error;
    if (m == 0 || sms <= 0) return MARLIN_GPTQ_BAD_SHAPE;
    const Plan chosen = choose_config(problem, {sms, shared_bytes_per_sm, compute_capability});
    plan->family = static_cast<int32_t>(chosen.family);
    plan->tile_m = chosen.tile_m;
    plan->tile_n = chosen.tile_n;
    plan->tile_k = kTileK;
    plan->stages = chosen.stages;
    plan->grouped = chosen.grouped;
    plan->ctas_per_sm = chosen.ctas_per_sm;
    plan->grid = chosen.grid;
    plan->cluster = chosen.cluster;
    plan->threads = chosen.threads;
    plan->m_tiles = chosen.m_tiles;
    plan->n_tiles = chosen.n_tiles;
    plan->k_tiles = chosen.k_tiles;
    plan->shared_bytes = static_cast<int32_t>(chosen.shared_bytes);
    plan->units = chosen.units;
    plan->reason = chosen.reason;
    return 0;
}

int marlin_gptq_gemm(const void* a, const void* qweight, const void* scales, const void* qzeros, const void* bias,
                     void* c, int64_t m, int64_t n, int64_t k, int64_t lda, int64_t group_size, int32_t dtype,
                     int32_t device, void* stream, int32_t grid, int32_t flags) {
    return run({m, n, k, group_size}, {a, qweight, scales, qzeros, bias, c, lda, qzeros != nullptr, dtype, device, stream,
                                       grid, flags});
}

int marlin_gptq_decode_blocks(const void* a, const void* blocks, const void* scales, const void* bias, void* c, int64_t m,
                              int64_t n, int64_t k, int64_t lda, int64_t group_size, int32_t asymmetric, int32_t dtype,
                              int32_t device, void* stream, int32_t grid, int32_t flags) {
    return run({m, n, k, group_size, sm90::Source::blocks},
               {a, blocks, scales, nullptr, bias, c, lda, asymmetric != 0, dtype, device, stream, grid, flags});
}

int marlin_gptq_dirty_tickets(int32_t device, int64_t* dirty, int32_t* workspaces) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return guard.error();
    long long count = 0;
    const cudaError_t error = count_dirty_tickets(device, &count, workspaces);
    *dirty = count;
    return error;
}
