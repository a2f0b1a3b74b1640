// The C functions for the run-time layout of Hopper GPUs.
#include <cuda_runtime_api.h>

#include "capi.h"
#include "capi_common.h"
#include "dispatch/blocked_launch.h"
#include "dispatch/blocked_plan.h"
#include "dispatch/workspace.h"
#include "sm90/launch.h"

using namespace marlin_gptq;

namespace {

// Whether the library has code for sm_90a; the kernels have no body for anything else.
#if defined(MARLIN_GPTQ_SM90A)
constexpr bool kCompiled = true;
#else
constexpr bool kCompiled = false;
#endif

BlockedChoice choice_of(const marlin_gptq_blocked_choice_t* choice) {
    return choice == nullptr ? BlockedChoice{} : BlockedChoice{choice->variant, choice->split_tiles, choice->split_blocks};
}

}  // namespace

int marlin_gptq_plan_blocked(int64_t m, int64_t n, int64_t k, int64_t group_size, int32_t asymmetric, int32_t sms,
                             const struct marlin_gptq_blocked_choice_t* choice, struct marlin_gptq_blocked_plan_t* plan) {
    const Problem problem{m, n, k, group_size};
    if (const int error = check_problem(problem)) return error;
    if (m == 0 || sms <= 0) return MARLIN_GPTQ_BAD_SHAPE;
    BlockedPlan chosen;
    if (!plan_blocked(problem, asymmetric != 0, sms, choice_of(choice), &chosen))
        return choice == nullptr ? MARLIN_GPTQ_BAD_SHAPE : MARLIN_GPTQ_BAD_CHOICE;
    plan->variant = chosen.variant;
    plan->tile_m = chosen.tile_m;
    plan->tile_n = chosen.row_tiles * sm90::kBlockN;
    plan->grid = chosen.grid;
    plan->m_tiles = chosen.schedule.m_tiles;
    plan->n_tiles = chosen.schedule.n_tiles;
    plan->k_tiles = chosen.schedule.k_tiles;
    plan->split_tiles = chosen.schedule.split_tiles;
    plan->split_blocks = chosen.schedule.shares.grid;
    plan->slot_bytes = static_cast<int64_t>(chosen.slot_bytes);
    plan->microseconds = chosen.microseconds;
    plan->reason = chosen.reason;
    return 0;
}

int marlin_gptq_gemm_blocked(const void* a, const void* blocks, const void* scales, const void* bias, void* c, int64_t m,
                             int64_t n, int64_t k, int64_t lda, int64_t group_size, int32_t asymmetric, int32_t dtype,
                             int32_t device, void* stream_handle, int32_t flags,
                             const struct marlin_gptq_blocked_choice_t* choice) {
    const Problem problem{m, n, k, group_size};
    if (const int error = check_problem(problem)) return error;
    if (dtype != 0 && dtype != 1) return MARLIN_GPTQ_BAD_DTYPE;
    if (m == 0) return 0;
    if (lda < k || lda % 8 != 0) return MARLIN_GPTQ_BAD_STRIDE;
    if (a == nullptr || blocks == nullptr || c == nullptr || (scales == nullptr) != is_grouped(problem) || !aligned(a, 16) ||
        !aligned(blocks, 16) || !aligned(scales, 2) || !aligned(bias, 2) || !aligned(c, 16))
        return MARLIN_GPTQ_BAD_POINTER;

    DeviceInfo info;
    if (const cudaError_t error = device_info(device, &info)) return reported(error);
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return reported(guard.error());
    if (!kCompiled || info.compute_capability != 90 || !sm90::decode_compiled(device)) return MARLIN_GPTQ_NOT_HOPPER;

    BlockedPlan plan;
    if (!plan_blocked(problem, asymmetric != 0, info.sms, choice_of(choice), &plan))
        return choice == nullptr ? MARLIN_GPTQ_BAD_SHAPE : MARLIN_GPTQ_BAD_CHOICE;
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    sm90::WgmmaParams params{};
    if (plan.schedule.split_tiles > 0) {
        Workspace workspace;
        if (const cudaError_t error = workspace_for(device, stream, &workspace, plan.slot_bytes)) return reported(error);
        params.slots = workspace.slots;
        params.tickets = workspace.tickets;
    }
    params.blocks = static_cast<const char*>(blocks);
    params.scales = scales;
    params.bias = bias;
    params.n = static_cast<int>(n);
    params.n_blocks = static_cast<int>((n + sm90::kBlockN - 1) / sm90::kBlockN);
    params.k_blocks = plan.schedule.k_tiles;
    params.block_bytes = plan.block_bytes;
    params.scale_rows = plan.scale_rows;
    params.group_shift = plan.group_shift;
    params.overlap = (flags & MARLIN_GPTQ_OVERLAP) != 0;
    params.weights_once = plan.schedule.m_tiles == 1;
    params.schedule = plan.schedule;
    sm90::WgmmaMaps maps;
    if (const cudaError_t error = sm90::make_wgmma_maps(a, c, m, n, k, lda, plan.tile_m, &maps)) return reported(error);
    return reported(launch_blocked(static_cast<DType>(dtype), asymmetric != 0, plan, params, maps, device, stream));
}
