// The host side of sm90/decode.cuh. Launchers are instantiated beside their kernels (decode_f16.cu, decode_bf16.cu).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>

#include "core/params.h"
#include "sm90/config.h"

namespace marlin_gptq::sm90 {

// How the copy engine sees the operands: weights in the Marlin layout as [k/16, 2n] words in boxes of 8 x 256 (blocks need
// no map), activations as [m, k] in boxes of tile_m x 64, swizzled by 128 bytes. Past the edges it delivers zeros.
struct Maps {
    CUtensorMap weights, activations;
};

// Whether this library has decode kernels for the current device `device`, of compute capability 9.0.
bool decode_compiled(int device);

cudaError_t make_maps(const GemmParams& params, Source source, int tile_m, Maps* maps);

// The grid may be started before the previous one has ended: it sets itself up, and where params.overlap says so reads
// weights and scales, then waits.
template <class Cfg>
cudaError_t launch_decode(const GemmParams& params, const Maps& maps, int grid, int device, cudaStream_t stream);

}  // namespace marlin_gptq::sm90
