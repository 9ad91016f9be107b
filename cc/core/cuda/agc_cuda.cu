// The C interface, which alone asks for a real device.

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "cc/core/cuda/agc_cuda.h"
#include "cc/core/cuda/launchers.h"
#include "cc/core/cuda/plan.h"
#include "cc/core/types.h"

namespace {

// The current device. A device's properties never change, and asking takes longer than a small kernel.
int CurrentDevice(tf_agc::core::cuda::Device* device) {
  struct Known {
    bool known = false;
    tf_agc::core::cuda::Device device;
  };
  static std::mutex* mutex = new std::mutex;
  static std::vector<Known>* devices = new std::vector<Known>;
  int ordinal;
  if (const cudaError_t error = cudaGetDevice(&ordinal); error != cudaSuccess) return static_cast<int>(error);
  const std::lock_guard<std::mutex> lock(*mutex);
  if (devices->size() <= static_cast<size_t>(ordinal)) devices->resize(static_cast<size_t>(ordinal) + 1);
  Known& entry = (*devices)[static_cast<size_t>(ordinal)];
  if (!entry.known) {
    int values[6];
    const cudaDeviceAttr attributes[] = {cudaDevAttrComputeCapabilityMajor,
                                         cudaDevAttrComputeCapabilityMinor,
                                         cudaDevAttrMultiProcessorCount,
                                         cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                         cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                         cudaDevAttrL2CacheSize};
    for (int i = 0; i < 6; ++i) {
      const cudaError_t error = cudaDeviceGetAttribute(&values[i], attributes[i], ordinal);
      if (error != cudaSuccess) return static_cast<int>(error);
    }
    // nvcc lists what it compiles for as __CUDA_ARCH__ counts: 900 for 9.0.
    std::vector<int> compiled = {__CUDA_ARCH_LIST__};
    for (int& capability : compiled) capability /= 10;
    entry.device = {tf_agc::core::cuda::CapabilityOfCode(compiled, values[0] * 10 + values[1]), values[2], values[3],
                    values[4], values[5]};
    entry.known = true;
  }
  *device = entry.device;
  return 0;
}

template <class Args>
int64_t WorkspaceBytes(const Args& args) {
  tf_agc::core::cuda::Device device;
  return CurrentDevice(&device) == 0 ? tf_agc::core::cuda::WorkspaceBytes(args, device) : -1;
}

}  // namespace

extern "C" {

int64_t TfAgcCudaForwardWorkspaceBytes(const tf_agc::core::ForwardArgs* args) { return WorkspaceBytes(*args); }
int64_t TfAgcCudaBackwardWorkspaceBytes(const tf_agc::core::BackwardArgs* args) { return WorkspaceBytes(*args); }

int TfAgcCudaForward(const tf_agc::core::ForwardArgs* args, void* workspace, void* stream) {
  tf_agc::core::cuda::Device device;
  const int error = CurrentDevice(&device);
  return error != 0 ? error : tf_agc::core::cuda::Forward(*args, device, workspace, stream);
}
int TfAgcCudaBackward(const tf_agc::core::BackwardArgs* args, void* workspace, void* stream) {
  tf_agc::core::cuda::Device device;
  const int error = CurrentDevice(&device);
  return error != 0 ? error : tf_agc::core::cuda::Backward(*args, device, workspace, stream);
}

const char* TfAgcCudaErrorString(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
