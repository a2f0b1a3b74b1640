#include "sm90/wgmma.cuh"
#include "sm90/wgmma_variants.h"

namespace marlin_gptq::sm90 {

#define MARLIN_GPTQ_INSTANTIATE(tile_m, row_tiles, pairs, zeros)                                                   \
    template cudaError_t launch_wgmma<WgmmaConfig<DType::bf16, tile_m, row_tiles, pairs, Groups::unit, zeros>>( \
        const WgmmaParams&, const WgmmaMaps&, int, int, cudaStream_t);
MARLIN_GPTQ_WGMMA_TILES(MARLIN_GPTQ_INSTANTIATE, false)
MARLIN_GPTQ_WGMMA_TILES(MARLIN_GPTQ_INSTANTIATE, true)
#undef MARLIN_GPTQ_INSTANTIATE

}  // namespace marlin_gptq::sm90
