// The emulation itself: what it must compute, and what it must not let pass.

#include "cc/core/cuda/emulation/emulation.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cc/core/agc_test_util.h"
#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

using emulation::SharedMemory;

struct KernelArgs {
  int* out;
};

cudaError_t Launch(void (*kernel)(KernelArgs), unsigned blocks, unsigned threads, unsigned cluster, size_t shared_bytes,
                   int* out) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, KernelArgs{out});
  cudaDeviceSynchronize();
  return error;
}

// Launches `first`, and `second` as one that depends on it, of one block each.
void LaunchDependent(void (*first)(KernelArgs), void (*second)(KernelArgs), int* out) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(32);
  config.attrs = &attribute;
  ASSERT_EQ(cudaLaunchKernelEx(&config, first, KernelArgs{out}), cudaSuccess);
  config.numAttrs = 1;
  ASSERT_EQ(cudaLaunchKernelEx(&config, second, KernelArgs{out}), cudaSuccess);
  cudaDeviceSynchronize();
}

int* SharedInts() { return reinterpret_cast<int*>(SharedMemory()); }

// ---- 16-bit floats ----

TEST(Half, EveryValueBecomesFloatAndBack) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float value = __half2float(__ushort_as_half(half));
    const double expected = HalfToDouble(half);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      ASSERT_EQ(__half_as_ushort(__float2half_rn(value)), 0x7fff);
    } else {
      ASSERT_EQ(static_cast<double>(value), expected) << bits;
      ASSERT_EQ(std::signbit(value), bits >= 0x8000) << bits;
      ASSERT_EQ(__half_as_ushort(__float2half_rn(value)), half);
    }
  }
}

// All values that are exact, all midpoints between them, and the floats beside each.
void ExpectNearest(uint16_t infinity, double (*decode)(uint16_t), uint16_t (*round)(float)) {
  const float inf = std::numeric_limits<float>::infinity();
  for (uint16_t bits = 0; bits < infinity; ++bits) {
    const double low = decode(bits);
    const double high = bits + 1 == infinity ? 2 * low - decode(static_cast<uint16_t>(bits - 1))
                                             : decode(static_cast<uint16_t>(bits + 1));
    for (const double near : {low, (low + high) / 2}) {
      const float value = static_cast<float>(near);
      for (const float f : {std::nextafter(value, -inf), value, std::nextafter(value, inf)}) {
        if (std::isinf(f)) continue;
        ASSERT_EQ(round(f), Nearest16(static_cast<double>(f), decode, infinity)) << f;
        ASSERT_EQ(round(-f), Nearest16(static_cast<double>(-f), decode, infinity)) << -f;
      }
    }
  }
  ASSERT_EQ(round(inf), infinity);
  ASSERT_EQ(round(-inf), infinity | 0x8000);
  ASSERT_EQ(round(std::numeric_limits<float>::quiet_NaN()), 0x7fff);
  ASSERT_EQ(round(__uint_as_float(0xffffffffu)), 0x7fff);
}

TEST(Half, IsNearest) {
  ExpectNearest(0x7c00, HalfToDouble, [](float f) { return __half_as_ushort(__float2half_rn(f)); });
}

TEST(Bfloat16, IsNearest) {
  ExpectNearest(0x7f80, Bfloat16ToDouble, [](float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); });
}

// ---- What it computes ----

TEST(Threads, AreAllRunOnce) {
  std::vector<int> out(6 * 64, -1);
  auto kernel = [](KernelArgs args) {
    args.out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(1000 * blockIdx.x + threadIdx.x);
  };
  ASSERT_EQ(Launch(kernel, 6, 64, 2, 0, out.data()), cudaSuccess);
  for (int i = 0; i < 6 * 64; ++i) EXPECT_EQ(out[static_cast<size_t>(i)], 1000 * (i / 64) + i % 64);
}

TEST(Threads, ExchangeInWarpsBlocksAndClusters) {
  std::vector<int> out(4 * 64, -1);
  auto kernel = [](KernelArgs args) {
    const int thread = static_cast<int>(threadIdx.x);
    double sum = thread;
    for (int offset = 1; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    SharedInts()[thread] = static_cast<int>(sum);
    __syncthreads();
    const int of_both_warps = SharedInts()[thread] + SharedInts()[thread ^ 32];
    __syncthreads();
    SharedInts()[thread] = of_both_warps + static_cast<int>(blockIdx.x);
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    const unsigned other = (blockIdx.x + 1) % 4;
    args.out[blockIdx.x * 64 + threadIdx.x] =
        *static_cast<const int*>(__cluster_map_shared_rank(&SharedInts()[thread], other));
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  };
  ASSERT_EQ(Launch(kernel, 4, 64, 4, 64 * sizeof(int), out.data()), cudaSuccess);
  for (int i = 0; i < 4 * 64; ++i) EXPECT_EQ(out[static_cast<size_t>(i)], 63 * 64 / 2 + (i / 64 + 1) % 4);
}

// ---- What it makes show ----

TEST(SharedMemory, IsNanAtFirst) {
  int out = 0;
  ASSERT_EQ(Launch([](KernelArgs args) { *args.out = SharedInts()[0]; }, 1, 1, 1, sizeof(int), &out), cudaSuccess);
  EXPECT_EQ(out, -1);  // Every bit set.
}

TEST(AsynchronousCopy, ArrivesWhenItIsWaitedFor) {
  std::vector<int> out = {7, 0, 0};
  auto kernel = [](KernelArgs args) {
    __pipeline_memcpy_async(SharedInts(), &args.out[0], sizeof(int));
    args.out[1] = SharedInts()[0];
    __pipeline_commit();
    __pipeline_wait_prior(0);
    args.out[2] = SharedInts()[0];
  };
  ASSERT_EQ(Launch(kernel, 1, 1, 1, sizeof(int), out.data()), cudaSuccess);
  EXPECT_EQ(out, (std::vector<int>{7, -1, 7}));
}

TEST(AsynchronousCopy, ArrivesWithItsBatch) {
  std::vector<int> out = {7, 8, 0, 0, 0};
  auto kernel = [](KernelArgs args) {
    for (int i = 0; i < 2; ++i) {
      __pipeline_memcpy_async(SharedInts() + i, &args.out[i], sizeof(int));
      __pipeline_commit();
    }
    __pipeline_wait_prior(1);
    args.out[2] = SharedInts()[0];
    args.out[3] = SharedInts()[1];
    __pipeline_wait_prior(0);
    args.out[4] = SharedInts()[1];
  };
  ASSERT_EQ(Launch(kernel, 1, 1, 1, 2 * sizeof(int), out.data()), cudaSuccess);
  EXPECT_EQ(out, (std::vector<int>{7, 8, 7, -1, 8}));
}

// Block 0 stores a number of each of its threads in block 1, which has a barrier for them at the start of its memory.
void StoreToOther(KernelArgs args) {
  auto* barrier = reinterpret_cast<uint64_t*>(SharedMemory());
  int* numbers = SharedInts() + 4;
  if (threadIdx.x == 0) {
    emulation::InitBarrier(barrier, 1);
    emulation::FenceBarrierInit();
    emulation::ArriveAndExpect(barrier, blockIdx.x == 1 ? 32 * sizeof(int) : 0);
  }
  __cluster_barrier_arrive_relaxed();
  __cluster_barrier_wait();
  if (blockIdx.x == 0) {
    const int number = static_cast<int>(threadIdx.x);
    emulation::StoreAsync(&numbers[threadIdx.x], 1, &number, sizeof number, barrier);
    return;
  }
  if (threadIdx.x == 0) args.out[0] = numbers[31];
  emulation::WaitForParity(barrier, 0);
  args.out[1 + threadIdx.x] = numbers[31 - threadIdx.x];
}

TEST(AsynchronousStore, ArrivesOnceItIsWaitedFor) {
  int early = 0;
  for (uint32_t seed = 0; seed < 16; ++seed) {
    emulation::SetSchedule({seed});
    std::vector<int> out(33, 0);
    ASSERT_EQ(Launch(&StoreToOther, 2, 32, 2, 36 * sizeof(int), out.data()), cudaSuccess);
    for (int i = 0; i < 32; ++i) EXPECT_EQ(out[static_cast<size_t>(1 + i)], 31 - i);
    EXPECT_TRUE(out[0] == -1 || out[0] == 31);
    early += out[0] == 31;
  }
  emulation::SetSchedule({});
  EXPECT_TRUE(0 < early && early < 16) << early;  // The seed decides.
}

TEST(DependentLaunch, SeesMemoryOnceItHasWaited) {
  std::vector<int> out(2 + 2 * 32, 0);
  auto first = [](KernelArgs args) {
    if (threadIdx.x == 0) args.out[0] = 7;
  };
  auto second = [](KernelArgs args) {
    args.out[2 + threadIdx.x] = args.out[0];
    emulation::WaitForLaunchBefore();
    args.out[2 + 32 + threadIdx.x] = args.out[0];
  };
  LaunchDependent(first, second, out.data());
  for (size_t i = 2; i < 2 + 32; ++i) {
    EXPECT_EQ(out[i], 0);
    EXPECT_EQ(out[i + 32], 7);
  }
}

TEST(DependentLaunch, EndsWithoutHavingWaited) {
  std::vector<int> out = {0, 0};
  auto first = [](KernelArgs args) { args.out[0] = 7; };
  auto second = [](KernelArgs args) { args.out[1] = args.out[0] + 1; };
  LaunchDependent(first, second, out.data());
  EXPECT_EQ(out, (std::vector<int>{7, 1}));
}

TEST(Launch, RunsWhenItIsWaitedFor) {
  int out = 0;
  cudaLaunchConfig_t config = {};
  void (*kernel)(int*) = [](int* out) { *out = 1; };
  ASSERT_EQ(cudaLaunchKernelEx(&config, kernel, &out), cudaSuccess);
  EXPECT_EQ(out, 0);
  cudaDeviceSynchronize();
  EXPECT_EQ(out, 1);
}

TEST(Launch, RefusesWhatADeviceRefuses) {
  auto kernel = [](KernelArgs) {};
  EXPECT_EQ(Launch(kernel, 0, 32, 1, 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Launch(kernel, 1, 2048, 1, 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Launch(kernel, 3, 32, 2, 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Launch(kernel, 16, 32, 16, 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Launch(kernel, 1, 32, 1, 49 * 1024, nullptr), cudaErrorInvalidValue);
  cudaFuncSetAttribute(reinterpret_cast<const void*>(static_cast<void (*)(KernelArgs)>(kernel)),
                       cudaFuncAttributeMaxDynamicSharedMemorySize, 49 * 1024);
  EXPECT_EQ(Launch(kernel, 1, 32, 1, 49 * 1024, nullptr), cudaSuccess);
}

// ---- What it does not let pass ----

void RunKernel(void (*kernel)(KernelArgs)) {
  alignas(16) int out[8] = {};
  Launch(kernel, 2, 64, 2, 64, out);
}

TEST(DeathTest, BarriersThatNotAllReach) {
  EXPECT_DEATH(RunKernel([](KernelArgs) {
                 if (threadIdx.x != 5) __syncthreads();
               }),
               "CUDA emulation: a thread ended (while others of its block wait for it|before a barrier)");
  EXPECT_DEATH(RunKernel([](KernelArgs) {
                 if (threadIdx.x != 5) __syncthreads();
                 __cluster_barrier_arrive();
                 __cluster_barrier_wait();
               }),
               "every thread waits at a barrier that the others never reach");
  EXPECT_DEATH(RunKernel([](KernelArgs) {
                 __cluster_barrier_arrive();
                 __cluster_barrier_arrive();
               }),
               "a thread arrived twice");
}

uint64_t* SharedBarrier() { return reinterpret_cast<uint64_t*>(SharedMemory()); }

// Each block's first thread initialises its barrier, to expect that many bytes.
void PrepareBarrier(int64_t bytes, bool fence = true) {
  if (threadIdx.x == 0) {
    emulation::InitBarrier(SharedBarrier(), 1);
    if (fence) emulation::FenceBarrierInit();
    emulation::ArriveAndExpect(SharedBarrier(), bytes);
  }
  __cluster_barrier_arrive_relaxed();
  __cluster_barrier_wait();
}
// By one thread of each block to the other one.
void StoreInt(int rank) {
  const int number = 1;
  if (threadIdx.x == 0) emulation::StoreAsync(SharedInts() + 4, rank, &number, sizeof number, SharedBarrier());
}
int OtherRank() { return static_cast<int>(1 - blockIdx.x); }

TEST(DeathTest, StoresAndBarriersThatCountBytes) {
  EXPECT_DEATH(RunKernel([](KernelArgs) { StoreInt(OtherRank()); }), "a barrier is used before it is initialised");
  EXPECT_DEATH(RunKernel([](KernelArgs) { emulation::WaitForParity(SharedBarrier(), 0); }),
               "a barrier is used before it is initialised");
  EXPECT_DEATH(RunKernel([](KernelArgs) {
                 PrepareBarrier(4, /*fence=*/false);
                 StoreInt(OtherRank());
               }),
               "to a barrier that the cluster does not know of");
  EXPECT_DEATH(RunKernel([](KernelArgs) {
                 PrepareBarrier(4);
                 emulation::WaitForParity(SharedBarrier(), 0);
               }),
               "a thread waits for bytes that never come");
  EXPECT_DEATH(RunKernel([](KernelArgs) {
                 PrepareBarrier(4);
                 StoreInt(OtherRank());
                 StoreInt(OtherRank());
                 emulation::WaitForParity(SharedBarrier(), 0);
               }),
               "a block ended (before all came that is stored to it|while a barrier of its)");
  EXPECT_DEATH(RunKernel([](KernelArgs) {
                 PrepareBarrier(4);
                 StoreInt(OtherRank());
               }),
               "a block ended before all came that is stored to it");
  EXPECT_DEATH(RunKernel([](KernelArgs) { PrepareBarrier(4); }), "a block ended while a barrier of its");
  EXPECT_DEATH(RunKernel([](KernelArgs) {
                 PrepareBarrier(8);
                 const double number = 1;
                 emulation::StoreAsync(SharedInts() + 3, OtherRank(), &number, sizeof number, SharedBarrier());
               }),
               "a misaligned asynchronous store");
  EXPECT_DEATH(RunKernel([](KernelArgs) {
                 PrepareBarrier(4);
                 StoreInt(2);
               }),
               "no block of that rank");
  EXPECT_DEATH(RunKernel([](KernelArgs) { emulation::InitBarrier(SharedBarrier(), 1); }),
               "a barrier is initialised twice");
}

TEST(DeathTest, ShufflesAndCopies) {
  EXPECT_DEATH(RunKernel([](KernelArgs) { __shfl_xor_sync(0xffffu, 0.0, 1); }), "a shuffle of less than a warp");
  EXPECT_DEATH(RunKernel([](KernelArgs args) { __pipeline_memcpy_async(SharedMemory(), args.out, 4); }),
               "a thread ended without waiting for its copies");
  EXPECT_DEATH(RunKernel([](KernelArgs args) {
                 __pipeline_memcpy_async(SharedMemory(), args.out, 4);
                 __pipeline_wait_prior(0);  // Of what was never committed.
               }),
               "a thread ended without waiting for its copies");
  EXPECT_DEATH(RunKernel([](KernelArgs) { __pipeline_wait_prior(8); }), "all but more than 7 batches");
  EXPECT_DEATH(RunKernel([](KernelArgs args) { __pipeline_memcpy_async(SharedMemory() + 4, args.out, 8); }),
               "a misaligned asynchronous copy");
  EXPECT_DEATH(RunKernel([](KernelArgs args) { __pipeline_memcpy_async(SharedMemory(), args.out, 2); }),
               "takes 4, 8 or 16 bytes");
  EXPECT_DEATH(RunKernel([](KernelArgs) { __cluster_map_shared_rank(SharedMemory(), 2); }), "no block of that rank");
}

}  // namespace
}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
