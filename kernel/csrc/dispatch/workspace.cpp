#include "dispatch/workspace.h"

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "core/config.h"
#include "sm90/wgmma_config.h"

namespace marlin_gptq {
namespace {

// capture id, stream handle (captured) or id (otherwise), whether it is a large one
using Key = std::tuple<unsigned long long, unsigned long long, bool>;

struct Pool;

// Held by a graph (as a CUDA user object) for each workspace its kernels use.
struct Lease {
    Pool* pool;
    Key key;
};

struct Pool {
    std::mutex mutex;
    DeviceInfo info;
    bool known = false;
    std::map<Key, Workspace> eager;  // by stream id, which is unique in a process's life; the capture id is 0
    std::map<Key, Workspace> captured;
    std::vector<Workspace> spare[2];  // given back by destroyed graphs: small ones, large ones

    // A lock of its own, never held across a CUDA call: CUDA's threads take it when a graph dies.
    std::mutex returned_mutex;
    std::vector<Key> returned;
};

// Never destroyed: graphs may give workspaces back while the process ends.
Pool* pool_of(int device) {
    static Pool* pools = new Pool[kMaxDevices];
    return device >= 0 && device < kMaxDevices ? &pools[device] : nullptr;
}

// Lets this thread allocate and synchronize private streams while it, or another thread, captures a graph.
class RelaxedCapture {
  public:
    RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Partial tiles of the kernels with few tokens a tile; of wgmma's largest.
size_t slot_bytes_of(const DeviceInfo& info, bool large) {
    if (large) return static_cast<size_t>(info.sms) * 2 * sm90::kLargestPartialBytes;
    return static_cast<size_t>(info.sms) * kMaxCtasPerSm * 2 * kTileN * kMaxTileM * sizeof(float);
}

cudaError_t allocate(const DeviceInfo& info, bool large, Workspace* workspace) {
    const int max_grid = info.sms * kMaxCtasPerSm;
    const size_t ticket_bytes = (static_cast<size_t>(max_grid) * kTicketsPerBlock * sizeof(unsigned) + 1023) / 1024 * 1024;
    const size_t slot_bytes = slot_bytes_of(info, large);
    RelaxedCapture relaxed;
    char* base = nullptr;
    cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&base), ticket_bytes + slot_bytes);
    if (error != cudaSuccess) return error;
    cudaStream_t stream = nullptr;
    error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) {
        error = cudaMemsetAsync(base, 0, ticket_bytes, stream);
        if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
        cudaStreamDestroy(stream);
    }
    if (error != cudaSuccess) {
        cudaFree(base);
        return error;
    }
    workspace->tickets = reinterpret_cast<unsigned*>(base);
    workspace->slots = reinterpret_cast<float4*>(base + ticket_bytes);
    workspace->slot_bytes = slot_bytes;
    workspace->max_grid = max_grid;
    return cudaSuccess;
}

// Runs on a thread of CUDA's when the last graph that holds the lease is gone. No CUDA calls allowed here.
void CUDART_CB end_lease(void* pointer) {
    const std::unique_ptr<Lease> lease(static_cast<Lease*>(pointer));
    const std::lock_guard<std::mutex> lock(lease->pool->returned_mutex);
    lease->pool->returned.push_back(lease->key);
}

void collect_returned(Pool& pool) {
    const std::lock_guard<std::mutex> lock(pool.returned_mutex);
    for (const Key& key : pool.returned) {
        const auto found = pool.captured.find(key);
        if (found == pool.captured.end()) continue;
        pool.spare[std::get<2>(key)].push_back(found->second);
        pool.captured.erase(found);
    }
    pool.returned.clear();
}

cudaError_t captured_workspace(Pool& pool, const Key& key, cudaGraph_t graph, Workspace* workspace) {
    const auto found = pool.captured.find(key);
    if (found != pool.captured.end()) {
        *workspace = found->second;
        return cudaSuccess;
    }
    collect_returned(pool);
    const bool large = std::get<2>(key);
    std::vector<Workspace>& spare = pool.spare[large];
    if (!spare.empty()) {
        *workspace = spare.back();
        spare.pop_back();
    } else {
        const cudaError_t error = allocate(pool.info, large, workspace);
        if (error != cudaSuccess) return error;
    }
    pool.captured.emplace(key, *workspace);
    auto lease = std::make_unique<Lease>(Lease{&pool, key});
    cudaUserObject_t object = nullptr;
    cudaError_t error = cudaUserObjectCreate(&object, lease.get(), end_lease, 1, cudaUserObjectNoDestructorSync);
    if (error != cudaSuccess) {
        pool.captured.erase(key);
        spare.push_back(*workspace);
        return error;
    }
    lease.release();  // the user object's now
    error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
    if (error != cudaSuccess) cudaUserObjectRelease(object, 1);  // ends the lease
    return error;
}

cudaError_t load_info(Pool& pool, int device) {
    if (pool.known) return cudaSuccess;
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&pool.info.sms, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&pool.info.shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                       device);
    pool.info.compute_capability = 10 * major + minor;
    pool.known = error == cudaSuccess;
    return error;
}

}  // namespace

cudaError_t device_info(int device, DeviceInfo* info) {
    Pool* pool = pool_of(device);
    if (pool == nullptr) return cudaErrorInvalidDevice;
    const std::lock_guard<std::mutex> lock(pool->mutex);
    const cudaError_t error = load_info(*pool, device);
    *info = pool->info;
    return error;
}

cudaError_t workspace_for(int device, cudaStream_t stream, Workspace* workspace, size_t slot_bytes) {
    Pool* pool = pool_of(device);
    if (pool == nullptr) return cudaErrorInvalidDevice;

    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0, id = 0;
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture, &graph, nullptr, nullptr, nullptr);
    if (error != cudaSuccess) return error;
    if (status == cudaStreamCaptureStatusInvalidated) return cudaErrorStreamCaptureInvalidated;

    const std::lock_guard<std::mutex> lock(pool->mutex);
    error = load_info(*pool, device);
    if (error != cudaSuccess) return error;
    const bool large = slot_bytes > slot_bytes_of(pool->info, false);
    if (status == cudaStreamCaptureStatusActive) {
        // The handle will do: a stream cannot be destroyed and its handle used again within the capture it is part of.
        id = reinterpret_cast<uintptr_t>(stream);
        return captured_workspace(*pool, {capture, id, large}, graph, workspace);
    }

    error = cudaStreamGetId(stream, &id);
    if (error != cudaSuccess) return error;
    const Key key{0, id, large};
    const auto found = pool->eager.find(key);
    if (found != pool->eager.end()) {
        *workspace = found->second;
        return cudaSuccess;
    }
    error = allocate(pool->info, large, workspace);
    if (error == cudaSuccess) pool->eager.emplace(key, *workspace);
    return error;
}

cudaError_t count_dirty_tickets(int device, long long* dirty, int* workspaces) {
    Pool* pool = pool_of(device);
    if (pool == nullptr) return cudaErrorInvalidDevice;
    cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> lock(pool->mutex);
    std::vector<Workspace> all = pool->spare[0];
    all.insert(all.end(), pool->spare[1].begin(), pool->spare[1].end());
    for (const auto& entry : pool->eager) all.push_back(entry.second);
    for (const auto& entry : pool->captured) all.push_back(entry.second);
    *dirty = 0;
    *workspaces = static_cast<int>(all.size());
    for (const Workspace& workspace : all) {
        std::vector<unsigned> tickets(static_cast<size_t>(workspace.max_grid) * kTicketsPerBlock);
        error = cudaMemcpy(tickets.data(), workspace.tickets, tickets.size() * sizeof(unsigned), cudaMemcpyDeviceToHost);
        if (error != cudaSuccess) return error;
        for (const unsigned ticket : tickets) *dirty += ticket != 0;
    }
    return cudaSuccess;
}

}  // namespace marlin_gptq
