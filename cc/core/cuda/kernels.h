// The kernels that both passes are made of.
//
// The simplest kernel that is right, for maps that are channels_first, gives each map a block of 256 threads:
//
//   __global__ void Forward(const float* x, const float* gain, const float* mean_scale, float* y, float* mean,
//                           int positions, int channels) {
//     __shared__ double sums[256];
//     const int map = blockIdx.x, thread = threadIdx.x;
//     double sum = 0;
//     for (int p = thread; p < positions; p += 256) sum += x[map * positions + p];
//     sums[thread] = sum;
//     for (int half = 128; half > 0; half /= 2) {
//       __syncthreads();
//       if (thread < half) sums[thread] += sums[thread + half];
//     }
//     __syncthreads();
//     const float m = sums[0] / positions, offset = mean_scale[map % channels] * m;
//     if (thread == 0) mean[map] = m;
//     for (int p = thread; p < positions; p += 256) {
//       y[map * positions + p] = max(gain[map % channels] * (x[map * positions + p] - offset), 0.0f);
//     }
//   }
//
// Sum, share the sum, write: those below do the same, and differ in where a map waits between the two loops and in
// which elements are whose.
//
// Why they look as they do:
// - Everything is bound by memory, so a map is read once where it fits on chip: the blocks of a cluster copy their
//   parts into shared memory, add, send each map's sums to the block that finishes it, and write from their own. Where
//   it does not fit, one launch adds and a second one reads again, from the L2 cache (plan.h has the rule).
// - x forward and dy backward are copied asynchronously (cp.async): a tile's loads are all in flight at once and take
//   no registers, and those that have come are added while others are on their way. dz is held where dy came to.
//   Backward, what was kept and the shortcut have no place of their own in shared memory: they go through registers, 64
//   bytes of them at a time, and so do single elements of 16 bits, which cp.async does not take.
// - What a map needs beside its sum, its parameters, is read before the barriers, which hide how long that takes.
// - One walk serves both layouts: a thread follows a column step by step (plan.h). In shared memory each thread holds
//   the slots that it filled itself, side by side with its neighbours': no bank conflicts, no barrier before reading.
// - Sums are in float over at most 64 steps, then in double. From there on they are added as one binary tree over the
//   lanes of a column, however the lanes lie in warps, then over blocks in order: no atomics, and the same bits
//   whatever the batch.
// - An output may be an input's memory (types.h): each element belongs to one thread, which reads all that it needs of
//   it before it writes, no pointer is __restrict__, and nothing is loaded through the read-only cache.
// - The activation is a switch around a loop, not a template argument of a kernel: a fifth of the code to compile. But
//   backward, relu has kernels of its own: it needs fewer registers than the others, so that three blocks instead of
//   two share a multiprocessor.
// - What is added to z makes other kernels, whose registers those without it do not pay for: two forward and two
//   backward (twice, for relu), and not four. Forward, a bias rides along with a shortcut, and whether there is one is
//   asked where all threads answer alike; backward, a bias has no work on elements, for its gradient sums dz, as the
//   mean's does.
// - Forward, shortcuts are read where y is written. Backward, they are read for the sums alone, and dshortcut is the dz
//   that is held, or computed again, where dx is written.
// - Backward, AddSamples is a dependent launch where code of 9.0 runs: it starts while the last blocks of the kernel
//   before write, and waits for that one's memory before it reads.
//
// Not run on a GPU yet: the tests run this source on the CPU (emulation/emulation.h), and its speed is unknown.

#ifndef TF_AGC_CC_CORE_CUDA_KERNELS_H_
#define TF_AGC_CC_CORE_CUDA_KERNELS_H_

#include <cstdint>

#include "cc/core/cuda/plan.h"
#include "cc/core/cuda/primitives.h"
#include "cc/core/cuda/sums.h"
#include "cc/core/cuda/walk.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {

// What a kernel is launched with.
template <class Args>
struct LaunchArgs {
  Args args;  // With the effective activation.
  Walk walk;
  // What kernels could compute, they would divide for, and keep in registers: here it is a constant.
  SharedLayout layout;
  int block_maps;  // MapsOfBlock().
  int64_t first_tile;
  double* block_sums;   // [tiles of the launch][blocks of a tile][sums][maps of a tile].
  double* sample_sums;  // [ChannelGradients()][batch][channels]; null for one sample without a bias.
  double* dz_sums;      // [batch][channels], the last of these; null without a bias.
  bool prefetch;        // Plan's.
};

// Backward, when a block's sums are where AddSamples finds them. What is left to the last blocks is to write maps,
// which takes longer than a launch. An earlier place would gain nothing: all blocks must have come to it, and so have
// started.
template <class PassType>
TF_AGC_DEVICE void LetAddSamplesStart() {
  if constexpr (PassType::kPass == Pass::kBackward) LetDependentLaunchStart();
}

// What stands for the elements of an input that a kernel does not have.
struct Absent {};

// PassType is a pass (forward_pass.h, backward_pass.h): what is summed and written, apart from where its inputs and
// sums lie. Its Finish() turns the totals of one map into its parameters; with `first`, once for each map, it also
// writes what the map has for others.

// The maps of a tile that a block finishes, and how many blocks take what comes of it: a power of two.
struct Share {
  int first;
  int maps;
  int takers;
};
// On chip. What is past the tile's end is nobody's.
template <class Args>
TF_AGC_DEVICE Share ShareOfRank(const LaunchArgs<Args>& launch) {
  const int first = ClusterRank() * launch.block_maps;
  return {first, first < TileMaps(launch.walk) ? launch.block_maps : 0, launch.walk.blocks};
}

// What the first map that a thread finishes needs beside its sums.
template <class PassType>
TF_AGC_DEVICE typename PassType::OfMap ReadFirst(const LaunchArgs<typename PassType::Args>& launch, int64_t tile,
                                                 const Share& share) {
  const int i = static_cast<int>(threadIdx.x);
  const int64_t map =
      i < share.maps * share.takers ? MapOf(launch.walk, tile, share.first + (i >> Log2(share.takers))) : -1;
  return map < 0 ? typename PassType::OfMap{} : PassType::Read(launch, map);
}

// Turns the sums of a share's maps, sums[blocks][kSums][maps of the share], into parameters, once for each taker: calls
// give(taker, k, map, parameter) for each, also past the tile's end. of_first comes from ReadFirst().
template <class PassType, class Give>
TF_AGC_DEVICE void FinishMaps(const LaunchArgs<typename PassType::Args>& launch, int64_t tile, const Share& share,
                              const typename PassType::OfMap& of_first, bool first, const double* sums,
                              const Give& give) {
  constexpr int kSums = PassType::kSums, kParameters = PassType::kParameters;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < share.maps * share.takers; i += static_cast<int>(blockDim.x)) {
    const int taker = i & (share.takers - 1), in_share = i >> Log2(share.takers);
    const int64_t map = MapOf(launch.walk, tile, share.first + in_share);
    typename PassType::S out[kParameters] = {};
    if (map >= 0) {
      const typename PassType::OfMap of_map = i == thread ? of_first : PassType::Read(launch, map);
      double totals[kSums] = {};
#pragma unroll 4
      for (int block = 0; block < launch.walk.blocks; ++block) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) totals[s] += sums[(block * kSums + s) * share.maps + in_share];
      }
      PassType::Finish(launch, map, of_map, totals, first && taker == 0, out);
    }
#pragma unroll
    for (int k = 0; k < kParameters; ++k) give(taker, k, share.first + in_share, out[k]);
  }
}

// The parameters of a thread's own column.
template <class ThreadType, int kParameters, class S>
TF_AGC_DEVICE void ReadParameters(const Walk& walk, const ThreadType& thread, const S* parameters,
                                  S (&out)[kParameters][ThreadType::kMaps]) {
#pragma unroll
  for (int k = 0; k < kParameters; ++k) {
#pragma unroll
    for (int i = 0; i < ThreadType::kMaps; ++i) {
      out[k][i] = parameters[k * TileMaps(walk) + thread.column * ThreadType::kMaps + i];
    }
  }
}

// The exchange of a cluster, in shared memory: each block sends its sums of a map to the one that finishes it, and that
// one the parameters to all. So a tile needs no more room for sums than a block that is alone. All sums to all blocks
// would cross the cluster once and not twice, but 64x64 maps in 16 bits would lose the third block of a multiprocessor.
//
// A barrier of each block counts the sums that come to it, a second one the parameters; how many bytes each gets is
// known from the start. A block ends when it has both, which is when everything has come that others send to it: so it
// may end while they go on.
template <class PassType>
struct Exchange {
  using Launch = LaunchArgs<typename PassType::Args>;

  uint64_t* barriers;  // Of sums, of parameters.
  double* sums;        // [blocks][kSums][MapsOfBlock()].
  typename PassType::S* parameters;

  // Others may send when they have waited for the cluster.
  TF_AGC_DEVICE void Start(const Launch& launch) const {
    if (threadIdx.x == 0) {
      InitBarrier(&barriers[0]);
      InitBarrier(&barriers[1]);
      PublishBarriers();
      const Share share = ShareOfRank(launch);
      ExpectBytes(&barriers[0], share.takers * PassType::kSums * share.maps * static_cast<int>(sizeof(double)));
      ExpectBytes(&barriers[1], PassType::kParameters * TileMaps(launch.walk) * static_cast<int>(sizeof *parameters));
    }
    ClusterArriveRelaxed();
  }
  TF_AGC_DEVICE void SendSum(const Launch& launch, int sum, int map, double value) const {
    const int maps = launch.block_maps;
    double* to = &sums[(ClusterRank() * PassType::kSums + sum) * maps + (map & (maps - 1))];
    StoreToRank(to, map >> Log2(maps), value, &barriers[0]);
  }
  TF_AGC_DEVICE void SendParameter(const Launch& launch, int taker, int k, int map, typename PassType::S value) const {
    StoreToRank(&parameters[k * TileMaps(launch.walk) + map], taker, value, &barriers[1]);
  }
};

// One launch for tiles that fit on chip: a cluster (or a block alone) sums, exchanges, writes.
template <class PassType, int kVector, Layout kLayout>
__global__ void __launch_bounds__(kMaxThreads, MostSharing(PassType::kPass, PassType::kLean, kVector))
    OnChip(const __grid_constant__ LaunchArgs<typename PassType::Args> launch) {
  using ThreadType = Thread<kVector, kLayout>;
  using S = typename PassType::S;
  constexpr int kSums = PassType::kSums, kParameters = PassType::kParameters, kMaps = ThreadType::kMaps;
  const Walk& walk = launch.walk;
  unsigned char* shared = SharedMemory();
  const SharedLayout& layout = launch.layout;
  double* tile_sums = reinterpret_cast<double*>(shared + layout.sums);
  S* parameters = reinterpret_cast<S*>(shared + layout.parameters);
  const ThreadType thread(walk, launch.first_tile);
  const Exchange<PassType> exchange{reinterpret_cast<uint64_t*>(shared), tile_sums, parameters};
  const bool alone = walk.blocks == 1;
  if (!alone) exchange.Start(launch);  // The loads hide how long it takes.

  S sums[kSums][kMaps];
  PassType::SumAndHold(launch, thread, shared + layout.held, sums);
  const Share share = ShareOfRank(launch);
  const typename PassType::OfMap of_first = ReadFirst<PassType>(launch, thread.tile, share);
  if (!alone) ClusterWait();
  AddThreads<ThreadType, kSums>(walk, thread, sums, reinterpret_cast<double*>(shared + layout.warp_sums),
                                [&](int sum, int map, double value) {
                                  if (alone) {
                                    tile_sums[sum * TileMaps(walk) + map] = value;
                                  } else {
                                    exchange.SendSum(launch, sum, map, value);
                                  }
                                });
  alone ? __syncthreads() : WaitForBytes(&exchange.barriers[0]);
  FinishMaps<PassType>(launch, thread.tile, share, of_first, true, tile_sums, [&](int taker, int k, int map, S value) {
    if (alone) {
      parameters[k * TileMaps(walk) + map] = value;
    } else {
      exchange.SendParameter(launch, taker, k, map, value);
    }
  });
  LetAddSamplesStart<PassType>();
  alone ? __syncthreads() : WaitForBytes(&exchange.barriers[1]);
  S own[kParameters][kMaps];
  ReadParameters(walk, thread, parameters, own);
  PassType::WriteHeld(launch, thread, shared + layout.held, own);
}

// Two launches for all others. The first one sums.
template <class PassType, int kVector, Layout kLayout>
__global__ void __launch_bounds__(kMaxThreads)
    SumTiles(const __grid_constant__ LaunchArgs<typename PassType::Args> launch) {
  using ThreadType = Thread<kVector, kLayout>;
  constexpr int kSums = PassType::kSums;
  double* warp_sums = reinterpret_cast<double*>(SharedMemory() + launch.layout.warp_sums);
  const ThreadType thread(launch.walk, launch.first_tile);
  double totals[kSums][ThreadType::kMaps];
  PassType::Sum(launch, thread, totals);
  const int maps = TileMaps(launch.walk);
  double* sums = launch.block_sums + int64_t{blockIdx.x} * kSums * maps;
  AddThreads<ThreadType, kSums>(launch.walk, thread, totals, warp_sums,
                                [&](int sum, int map, double value) { sums[sum * maps + map] = value; });
}

// The second one reads again and writes.
template <class PassType, int kVector, Layout kLayout>
__global__ void __launch_bounds__(kMaxThreads)
    WriteTiles(const __grid_constant__ LaunchArgs<typename PassType::Args> launch) {
  using ThreadType = Thread<kVector, kLayout>;
  using S = typename PassType::S;
  constexpr int kSums = PassType::kSums, kParameters = PassType::kParameters;
  const Walk& walk = launch.walk;
  S* parameters = reinterpret_cast<S*>(SharedMemory() + launch.layout.parameters);
  const ThreadType thread(walk, launch.first_tile);
  const int maps = TileMaps(walk);
  const Share all{0, maps, 1};
  const typename PassType::OfMap of_first = ReadFirst<PassType>(launch, thread.tile, all);
  const double* sums = launch.block_sums + (thread.tile - launch.first_tile) * walk.blocks * kSums * maps;
  FinishMaps<PassType>(launch, thread.tile, all, of_first, thread.block == 0, sums,
                       [&](int, int k, int map, S value) { parameters[k * maps + map] = value; });
  __syncthreads();
  LetAddSamplesStart<PassType>();
  S own[kParameters][ThreadType::kMaps];
  ReadParameters(walk, thread, parameters, own);
  PassType::WriteAgain(launch, thread, own);
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_KERNELS_H_
