// What the kernels need of the machine below them: CUDA's, or the CPU's emulation of it in tests. Elements and how they
// are converted, shared memory and its asynchronous copies, clusters, launches. Nothing here knows the op.

#ifndef TF_AGC_CC_CORE_CUDA_PRIMITIVES_H_
#define TF_AGC_CC_CORE_CUDA_PRIMITIVES_H_

#include <cstdint>

#if defined(TF_AGC_CUDA_EMULATION)
#include "cc/core/cuda/emulation/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#endif

#include "cc/core/types.h"

#define TF_AGC_DEVICE __device__ __forceinline__

namespace tf_agc {
namespace core {
namespace cuda {

// What T is computed in.
template <class T>
struct ComputeType {
  using Type = float;
};
template <>
struct ComputeType<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeType<T>::Type;

// What one access of a thread takes; aligned, so that it is one instruction, or several of 16 bytes.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize < 16 ? sizeof(T) * kSize : 16) Vector {
  T values[kSize];
};

TF_AGC_DEVICE float ToFloat(Half value) { return __half2float(__ushort_as_half(value.bits)); }
TF_AGC_DEVICE float ToFloat(Bfloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }

// Nearest, ties to even; NaN becomes the usual one.
TF_AGC_DEVICE void FromFloat(float value, Half* to) { to->bits = __half_as_ushort(__float2half_rn(value)); }
TF_AGC_DEVICE void FromFloat(float value, Bfloat16* to) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
// Two at once are one instruction.
TF_AGC_DEVICE void FromFloats(float first, float second, Half* to) {
  const __half2 both = __floats2half2_rn(first, second);
  to[0].bits = __half_as_ushort(both.x);
  to[1].bits = __half_as_ushort(both.y);
}
TF_AGC_DEVICE void FromFloats(float first, float second, Bfloat16* to) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  to[0].bits = __bfloat16_as_ushort(both.x);
  to[1].bits = __bfloat16_as_ushort(both.y);
}

#if defined(TF_AGC_CUDA_EMULATION)
using emulation::SharedMemory;
#else
TF_AGC_DEVICE unsigned char* SharedMemory() {
  extern __shared__ __align__(16) unsigned char tf_agc_shared_memory[];
  return tf_agc_shared_memory;
}
#endif

// Starts a copy of global into shared memory, past the registers on sm_80 and later, of a V of 4, 8 or 16 bytes. Only
// the thread that started it may read, after it has ended the batch of copies and waited for it.
template <class V>
TF_AGC_DEVICE void StartCopy(V* to, const V* from) {
  __pipeline_memcpy_async(to, from, sizeof(V));
}
TF_AGC_DEVICE void EndBatch() { __pipeline_commit(); }
// Waits for all batches but those that were ended last, `later` of them. The toolkit has no number above 7: then it
// waits for more.
TF_AGC_DEVICE void WaitForBatches(int later) {
  __pipeline_wait_prior(static_cast<size_t>(later < 7 ? later : 7));
  asm volatile("" ::: "memory");  // Not in the toolkit's: what is read next must not be read before.
}

// A hint: nothing is read.
TF_AGC_DEVICE void PrefetchToL2(const void* address) {
#if defined(TF_AGC_CUDA_EMULATION)
  (void)address;
#else
  asm volatile("prefetch.L2 [%0];" ::"l"(address));  // Of any memory, as pointers are.
#endif
}

// Clusters. Code compiled for less than 9.0 has none, nor has its plan: the other branches are never reached.
//
// Arrives at the cluster's barrier without publishing what was written before, but for barriers that PublishBarriers()
// was called for. Of a fence for all memory there is no need, and it would wait for all stores.
TF_AGC_DEVICE void ClusterArriveRelaxed() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#endif
}
// This block's. A register that is read again wherever it is needed, and not kept.
TF_AGC_DEVICE int ClusterRank() {
#if defined(TF_AGC_CUDA_EMULATION)
  return emulation::ClusterRank();
#elif __CUDA_ARCH__ >= 900
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
TF_AGC_DEVICE void ClusterWait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}

#if !defined(TF_AGC_CUDA_EMULATION)
TF_AGC_DEVICE uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
// The same address in the shared memory of another block of the cluster.
TF_AGC_DEVICE uint32_t SharedAddressOfRank(const void* shared, int rank) {
  uint32_t address = SharedAddress(shared);
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
#endif
  return address;
}
#endif

// A barrier in shared memory (mbarrier): it waits for one thread, which says how many bytes to expect, and for these
// bytes. They may come before that thread does, but not before the barrier is initialised.
TF_AGC_DEVICE void InitBarrier(uint64_t* barrier) {
#if defined(TF_AGC_CUDA_EMULATION)
  emulation::InitBarrier(barrier, 1);
#elif __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
#endif
}
// Those that this thread has initialised, to all of the cluster that wait for its arrival at the cluster's barrier.
TF_AGC_DEVICE void PublishBarriers() {
#if defined(TF_AGC_CUDA_EMULATION)
  emulation::FenceBarrierInit();
#elif __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
TF_AGC_DEVICE void ExpectBytes(uint64_t* barrier, int bytes) {
#if defined(TF_AGC_CUDA_EMULATION)
  emulation::ArriveAndExpect(barrier, bytes);
#elif __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
#endif
}
// Stores into the shared memory of a block of the cluster, this one or another, and returns at once: its barrier counts
// the bytes when they have come. Both addresses are this block's.
template <class E>
TF_AGC_DEVICE void StoreToRank(E* to, int rank, E value, uint64_t* barrier) {
#if defined(TF_AGC_CUDA_EMULATION)
  emulation::StoreAsync(to, rank, &value, sizeof value, barrier);
#elif __CUDA_ARCH__ >= 900
  const uint32_t address = SharedAddressOfRank(to, rank), of_barrier = SharedAddressOfRank(barrier, rank);
  if constexpr (sizeof(E) == 8) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(address),
                 "l"(__double_as_longlong(value)), "r"(of_barrier)
                 : "memory");
  } else {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
                 "r"(__float_as_uint(value)), "r"(of_barrier)
                 : "memory");
  }
#endif
}
// Returns when all bytes have come, for a barrier of this block that nobody uses twice: what they are may be read then.
TF_AGC_DEVICE void WaitForBytes(uint64_t* barrier) {
#if defined(TF_AGC_CUDA_EMULATION)
  emulation::WaitForParity(barrier, 0);
#elif __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(SharedAddress(barrier))
        : "memory");
  } while (done == 0);
#endif
}

// Launches that depend on the one before. They start while it runs, once each of its blocks has let them or is done.
// Older code has none, nor is it launched so.
TF_AGC_DEVICE void LetDependentLaunchStart() {
#if __CUDA_ARCH__ >= 900 && !defined(TF_AGC_CUDA_EMULATION)
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Returns when the launch before is done and what it has written is visible. All threads must call it: otherwise the
// launch might be done before the one before is.
TF_AGC_DEVICE void WaitForLaunchBefore() {
#if defined(TF_AGC_CUDA_EMULATION)
  emulation::WaitForLaunchBefore();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Grid {
  int64_t blocks;
  int threads;                // Of each block.
  int cluster;                // So many neighbouring blocks form one.
  int64_t shared_bytes;       // Of each block.
  int64_t most_shared_bytes;  // That a block may opt into on this device.
  bool holds;                 // Shared memory is what the kernel wants most of.
  bool dependent;             // On the launch before, for which it waits itself: WaitForLaunchBefore().
};

// The error of a call, a cudaError_t. CUDA keeps the last one until somebody asks, and TensorFlow would take it for one
// of its own next call.
inline int Forgotten(int error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Starts a kernel. Returns a cudaError_t.
template <class Argument>
int Launch(void (*kernel)(Argument), const Grid& grid, void* stream, const Argument& argument) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (grid.holds) {
    // As many blocks as fit: what they load from elsewhere, they load once, and need no cache for. A hint.
    Forgotten(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  }
  if (grid.shared_bytes > kWithoutAsking) {
    // Always the same limit: it is the kernel's, not the launch's, and another thread may be about to launch it.
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(grid.most_shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (grid.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, argument));
}

// The logarithm of a power of two.
TF_AGC_DEVICE int Log2(int power) { return __popc(static_cast<unsigned>(power - 1)); }

TF_AGC_DEVICE float ToCompute(Half value) { return ToFloat(value); }
TF_AGC_DEVICE float ToCompute(Bfloat16 value) { return ToFloat(value); }
TF_AGC_DEVICE float ToCompute(float value) { return value; }
TF_AGC_DEVICE double ToCompute(double value) { return value; }

template <class T>
TF_AGC_DEVICE void FromCompute(float value, T* to) {
  FromFloat(value, to);
}
TF_AGC_DEVICE void FromCompute(float value, float* to) { *to = value; }
TF_AGC_DEVICE void FromCompute(double value, double* to) { *to = value; }

template <class T, int kSize>
TF_AGC_DEVICE Vector<T, kSize> FromCompute(const Compute<T> (&values)[kSize]) {
  Vector<T, kSize> vector;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) FromFloats(values[i], values[i + 1], &vector.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) FromCompute(values[i], &vector.values[i]);
  }
  return vector;
}

// The first `kSize` elements at an address that is aligned to all of them.
template <int kSize, class T>
TF_AGC_DEVICE Vector<T, kSize> Load(const T* from) {
  return *reinterpret_cast<const Vector<T, kSize>*>(from);
}
template <class T, int kSize>
TF_AGC_DEVICE void Store(T* to, const Vector<T, kSize>& vector) {
  *reinterpret_cast<Vector<T, kSize>*>(to) = vector;
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_PRIMITIVES_H_
