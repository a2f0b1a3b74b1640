// Reduction workspaces, owned by the library: one per (device, stream), and one per (graph capture, stream) that lives as
// long as the graph. Two launches that may overlap never share one. Thread-safe.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

namespace marlin_gptq {

struct Workspace {
    unsigned* tickets = nullptr;  // kTicketsPerBlock per block; zero between launches, every launch leaves them so
    float4* slots = nullptr;      // two partial tiles per block
    size_t slot_bytes = 0;        // of all slots together
    int max_grid = 0;
};

struct DeviceInfo {
    int compute_capability = 0;  // 10 * major + minor
    int sms = 0;
    int shared_bytes_per_sm = 0;
};

constexpr int kMaxDevices = 64;

cudaError_t device_info(int device, DeviceInfo* info);

// The workspace for a launch on `stream` of the current device `device`, with at least `slot_bytes` for partial tiles.
// Allocates at the first use of a stream, also while the stream is being captured, and once more for the first launch whose
// partial tiles need a large one.
cudaError_t workspace_for(int device, cudaStream_t stream, Workspace* workspace, size_t slot_bytes = 0);

// For tests: the number of tickets of all workspaces of `device` that are not zero. Synchronizes the device.
cudaError_t count_dirty_tickets(int device, long long* dirty, int* workspaces);

}  // namespace marlin_gptq
