// The host side of sm90/wgmma.cuh. Launchers are instantiated beside their kernels (wgmma_*.cu).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <vector_types.h>

#include "core/config.h"
#include "sm90/wgmma_config.h"
#include "sm90/wgmma_schedule.h"

namespace marlin_gptq::sm90 {

struct WgmmaParams {
    const char* blocks;   // the run-time layout: [n_blocks][k_blocks][block_bytes]
    const void* scales;   // [n] in natural order, or null where groups have theirs inside the blocks
    const void* bias;     // [n] or null
    float4* slots;        // workspace: 2 partial tiles per block
    unsigned* tickets;    // workspace: kTicketsPerBlock per block, zero between launches
    int n;
    int n_blocks, k_blocks;
    int block_bytes;
    int scale_rows;       // in a block: 0, 1, 2 or 4
    int group_shift;      // log2(group_size / 32) where groups are 32 or 64
    int overlap;          // blocks may be read before the previous grid has ended
    int weights_once;     // one m-tile: the L2 cache need not keep them
    Schedule schedule;
};

// How the copy engine sees activations [m, k], in boxes of tile_m x 64, and the output [m, n], in the same.
struct WgmmaMaps {
    CUtensorMap activations, output;
};

cudaError_t make_wgmma_maps(const void* a, void* c, int64_t m, int64_t n, int64_t k, int64_t lda, int tile_m, WgmmaMaps* maps);

// The grid may be started before the previous one has ended: it sets itself up, and where params.overlap says so reads
// weights, then waits.
template <class Cfg>
cudaError_t launch_wgmma(const WgmmaParams& params, const WgmmaMaps& maps, int grid, int device, cudaStream_t stream);

}  // namespace marlin_gptq::sm90
