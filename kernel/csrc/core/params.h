// What a launch hands to the kernel.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

namespace marlin_gptq {

struct GemmParams {
    const void* a;            // [m, k], row stride lda elements, 16-byte aligned
    const uint32_t* qweight;  // [k/16, 2n] words, or the blocks of sm90/decode_ring.cuh
    const void* scales;       // [groups, n]; for blocks: [n] in natural order, or unused
    const uint32_t* qzeros;   // [groups, n/8], or null for symmetric weights; for blocks: unused
    const void* bias;         // [n] or null
    void* c;                  // [m, n]
    float4* slots;            // workspace: 2 partial tiles per block
    unsigned* tickets;        // workspace: kTicketsPerBlock per block, zero between launches
    int64_t lda;
    int64_t units;
    int m, n, k;
    int m_tiles, k_tiles;
    int group_shift;          // log2(group_size / 32) when grouped
    int groups;               // rows of scales
    int asymmetric;           // there are zero points
    int ring_slots;           // sm90/decode.cuh: depth of the ring
    int shared_bytes;         // sm90/decode.cuh: of a block
    int cluster;              // sm90/decode.cuh: blocks of a cluster; more than 1: they share a tile, and no others do
    int block_bytes;          // sm90/decode.cuh: of a block of weights
    int overlap;              // sm90/decode.cuh: weights and scales may be read before the previous grid has ended
    int units_each, units_rest;  // sm90/decode.cuh: units == units_each * grid + units_rest
};

}  // namespace marlin_gptq
