// The C interface, which alone asks for a real device.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>
#include <vector>

#include "cc/core/cuda/agc_cuda.h"
#include "cc/core/cuda/driver.h"
#include "cc/core/cuda/launchers.h"
#include "cc/core/cuda/plan.h"
#include "cc/core/cuda/primitives.h"
#include "cc/core/types.h"

namespace {

using tf_agc::core::cuda::Forgotten;
using tf_agc::core::cuda::kMaxThreads;

// As large as the largest blocks of the kernels.
__global__ void __launch_bounds__(kMaxThreads) Nothing() {}

// The largest cluster of blocks of which each has a multiprocessor for itself that the current device holds: on a part
// of a GPU, fewer multiprocessors may be near each other than on all of it.
int LargestCluster(int capability_of_code, int shared_bytes_per_block) {
  constexpr int kPortable = 8;  // More is not for every device.
  if (capability_of_code < 90) return 1;
  Forgotten(cudaFuncSetAttribute(Nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_per_block));
  for (int cluster = kPortable; cluster > 1; cluster /= 2) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(cluster));
    config.blockDim = dim3(kMaxThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes_per_block);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    const int error = Forgotten(cudaOccupancyMaxActiveClusters(&clusters, Nothing, &config));
    if (error == cudaSuccess && clusters > 0) return cluster;
  }
  return 1;
}

thread_local tf_agc::core::cuda::Trial trial = {};

// The current device. A device's properties never change, and asking takes longer than a small kernel.
int CurrentDevice(tf_agc::core::cuda::Device* device) {
  struct Known {
    bool known = false;
    tf_agc::core::cuda::Device device;
  };
  static std::mutex* mutex = new std::mutex;
  static std::vector<Known>* devices = new std::vector<Known>;
  int ordinal;
  if (const int error = Forgotten(cudaGetDevice(&ordinal)); error != cudaSuccess) return error;
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
      const int error = Forgotten(cudaDeviceGetAttribute(&values[i], attributes[i], ordinal));
      if (error != cudaSuccess) return error;
    }
    // nvcc lists what it compiles for as __CUDA_ARCH__ counts: 900 for 9.0.
    std::vector<int> compiled = {__CUDA_ARCH_LIST__};
    for (int& capability : compiled) capability /= 10;
    const int capability = tf_agc::core::cuda::CapabilityOfCode(compiled, values[0] * 10 + values[1]);
    entry.device = {
        LargestCluster(capability, values[3]), values[2], values[3], values[4], values[5], capability >= 90};
    entry.known = true;
  }
  *device = entry.device;
  device->trial = trial;
  return 0;
}

template <class Args>
int64_t WorkspaceBytes(const Args& args) {
  tf_agc::core::cuda::Device device;
  return CurrentDevice(&device) == 0 ? tf_agc::core::cuda::WorkspaceBytes(args, device) : -1;
}

template <class Args>
void Describe(const Args& args, char* text, int64_t size) {
  tf_agc::core::cuda::Device device;
  const int error = CurrentDevice(&device);
  std::snprintf(text, static_cast<size_t>(size), "%s",
                error != 0 ? cudaGetErrorString(static_cast<cudaError_t>(error))
                           : tf_agc::core::cuda::Describe(PlanOf(args, device), args.data_type).c_str());
}

}  // namespace

extern "C" {

int64_t TfAgcCudaForwardWorkspaceBytes(const tf_agc::core::ForwardArgs* args) { return WorkspaceBytes(*args); }
int64_t TfAgcCudaBackwardWorkspaceBytes(const tf_agc::core::BackwardArgs* args) { return WorkspaceBytes(*args); }

int TfAgcCudaForward(const tf_agc::core::ForwardArgs* args, void* workspace, void* stream) {
  tf_agc::core::cuda::Device device;
  const int error = CurrentDevice(&device);
  return error != 0 ? error : Forgotten(tf_agc::core::cuda::Forward(*args, device, workspace, stream));
}
int TfAgcCudaBackward(const tf_agc::core::BackwardArgs* args, void* workspace, void* stream) {
  tf_agc::core::cuda::Device device;
  const int error = CurrentDevice(&device);
  return error != 0 ? error : Forgotten(tf_agc::core::cuda::Backward(*args, device, workspace, stream));
}

const char* TfAgcCudaProblem() {
  using tf_agc::core::cuda::DriverProblem;
  static const std::string* problem =
      new std::string(DriverProblem(tf_agc::core::cuda::DriverVersion("libcuda.so.1"), CUDART_VERSION));
  return problem->c_str();
}

void TfAgcCudaTry(int segment_bytes, int cluster, int sharing, int prefetch) {
  trial = {segment_bytes, cluster, sharing, prefetch};
}
void TfAgcCudaDescribeForward(const tf_agc::core::ForwardArgs* args, char* text, int64_t size) {
  Describe(*args, text, size);
}
void TfAgcCudaDescribeBackward(const tf_agc::core::BackwardArgs* args, char* text, int64_t size) {
  Describe(*args, text, size);
}

const char* TfAgcCudaErrorString(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
