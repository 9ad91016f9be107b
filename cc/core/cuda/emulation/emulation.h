// CUDA on the CPU, for tests: as much of it as primitives.h and the kernels use, so that g++ compiles their source as
// C++ and a test without a GPU runs it. Nothing here knows the op.
//
// Every thread of a kernel is a fiber; one real thread runs them all. A seed decides in which order blocks start and
// threads go on, so that a missing barrier changes results, and the same seed does it again. A few clusters are alive
// at once, each with all its blocks. What real hardware leaves undefined is made to show:
// - shared memory is allocated at its exact size, is NaN at first, and NaN again when its block has ended;
// - an asynchronous copy arrives when its batch is waited for, never before;
// - an asynchronous store into another block's shared memory arrives at a time that the seed decides, or when nothing
//   else can go on;
// - a barrier that not all threads reach, a copy that nobody waits for, a shuffle of half a warp, a misaligned copy end
//   the process with a message, and so do a store to a barrier that is not initialised or a block that has ended, and
//   bytes that a barrier waits for in vain or has not been told of;
// - a launch runs when the next one comes, or when it is waited for; before the next one, but that one's threads, where
//   it is a dependent one, come to their wait first: what they read before it is as if the launch had never been;
// - a launch that a device would refuse is refused.
// Under ThreadSanitizer each fiber is a thread of its own, and nothing but barriers and launches orders them. Under
// AddressSanitizer an access beyond shared memory or after its block's end is an error.
//
// Not emulated: that threads of a warp run together, textures, streams but for one, speed.

#ifndef TF_AGC_CC_CORE_CUDA_EMULATION_EMULATION_H_
#define TF_AGC_CC_CORE_CUDA_EMULATION_EMULATION_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

// ---- The language ----

#define __CUDA_ARCH__ 900
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim;

void __syncthreads();
double __shfl_xor_sync(unsigned mask, double value, int lane_mask);

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

void __cluster_barrier_arrive();
void __cluster_barrier_arrive_relaxed();  // Orders no memory, but that what was read may go after the others' wait.
void __cluster_barrier_wait();
void* __cluster_map_shared_rank(const void* shared, unsigned rank);

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes);
void __pipeline_commit();
void __pipeline_wait_prior(size_t batches);  // At most 7: beyond, CUDA does as for 8.

// ---- 16-bit floats ----

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

float __half2float(__half value);
__half __float2half_rn(float value);  // Nearest, ties to even; NaN becomes 0x7fff, as on the device.
__nv_bfloat16 __float2bfloat16_rn(float value);
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// ---- The runtime ----

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout  // A hint.
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization  // A dependent launch.
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaDeviceSynchronize();  // Before anyone looks at what a launch has done, or takes its memory away.

namespace tf_agc {
namespace core {
namespace cuda {
namespace emulation {

// The running block's dynamic shared memory, which CUDA declares as an array.
unsigned char* SharedMemory();

int ClusterRank();

// Barriers in shared memory that count bytes which are stored asynchronously (mbarrier, st.async). A fence makes those
// known to the cluster that a thread has initialised, once others wait at the cluster's barrier.
void InitBarrier(uint64_t* barrier, int arrivals);
void FenceBarrierInit();
void ArriveAndExpect(uint64_t* barrier, int64_t bytes);
// Both addresses are the running block's, and meant in the block of that rank.
void StoreAsync(void* to, int rank, const void* value, size_t bytes, uint64_t* barrier);
void WaitForParity(uint64_t* barrier, int parity);  // A barrier of the running block.

// griddepcontrol.wait: until the launch before is done, and its memory there.
void WaitForLaunchBefore();

// How all launches from here on run.
struct Schedule {
  uint32_t seed = 0;
  // Leaves out this barrier: the one of this number among those that a thread comes to, counted from 0 in each kernel;
  // an arrival at a cluster's barrier and the wait for it are one, and a wait for bytes or for the launch before is one
  // as well. A test that plants this bug expects to find it.
  int missing_barrier = -1;
  int missing_launch = -1;  // Leaves it out in this launch alone, counted from 0 since SetSchedule(); -1: in all.
};
void SetSchedule(const Schedule& schedule);

// What has been launched since the last call of this, up to cudaDeviceSynchronize().
struct Statistics {
  int64_t launches = 0;
  int64_t dependent_launches = 0;
  std::vector<int> barriers;  // Of each launch, those of the thread that came to most.
};
Statistics TakeStatistics();

// `run` is what each thread does.
cudaError_t LaunchKernel(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> run);

}  // namespace emulation
}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

template <class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument), const Argument& argument) {
  return tf_agc::core::cuda::emulation::LaunchKernel(*config, reinterpret_cast<const void*>(kernel),
                                                     [kernel, argument] { kernel(argument); });
}

#endif  // TF_AGC_CC_CORE_CUDA_EMULATION_EMULATION_H_
