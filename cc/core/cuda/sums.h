// Sums along a thread's column, then over the threads of a tile. Their order is fixed by the plan.

#ifndef TF_AGC_CC_CORE_CUDA_SUMS_H_
#define TF_AGC_CC_CORE_CUDA_SUMS_H_

#include <cstdint>

#include "cc/core/cuda/plan.h"
#include "cc/core/cuda/primitives.h"
#include "cc/core/cuda/walk.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {

// Adds neighbours, then neighbouring pairs, and so on.
template <int kCount, class S>
TF_AGC_DEVICE S AddTree(const S* terms, int stride = 1) {
  if constexpr (kCount == 1) {
    return terms[0];
  } else {
    return AddTree<kCount / 2>(terms, stride) + AddTree<kCount / 2>(terms + kCount / 2 * stride, stride);
  }
}

// The same for a power of two up to the warps of a block.
TF_AGC_DEVICE double AddWarps(const double* terms, int stride, int count) {
  static_assert(kMaxThreads / 32 == 8, "the cases below");
  switch (count) {
    case 1:
      return AddTree<1>(terms, stride);
    case 2:
      return AddTree<2>(terms, stride);
    case 4:
      return AddTree<4>(terms, stride);
    default:
      return AddTree<8>(terms, stride);
  }
}

// The terms of kCount steps, added up as by AddTree, one step after the other: what one needs besides is not the next
// one's. load(step, inputs) reads kLoads steps, or fewer where there are no more; terms(step, inputs, out) gives those
// of one, out[kSums][kVector].
template <class Inputs, int kCount, int kLoads, int kSums, int kVector, class S, class Load, class Terms>
TF_AGC_DEVICE void TermsOfSteps(int step, const Inputs* inputs, const Load& load, const Terms& terms,
                                S (&out)[kSums][kVector]) {
  constexpr int kHalf = kCount / 2;
  if constexpr (kCount == kLoads) {
    Inputs loaded[kLoads];
    load(step, loaded);
    TermsOfSteps<Inputs, kCount, 0>(step, loaded, load, terms, out);
  } else if constexpr (kCount == 1) {
    terms(step, *inputs, out);
  } else {
    S others[kSums][kVector];
    TermsOfSteps<Inputs, kHalf, kLoads>(step, inputs, load, terms, out);
    TermsOfSteps<Inputs, kHalf, kLoads>(step + kHalf, inputs == nullptr ? nullptr : inputs + kHalf, load, terms,
                                        others);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[s][i] += others[s][i];
    }
  }
}

// Adds kCount steps to sums[kSums][kMaps].
template <class Inputs, int kCount, int kLoads, int kVector, int kSums, int kMaps, class S, class Load, class Terms>
TF_AGC_DEVICE void AddSteps(int step, const Load& load, const Terms& terms, S (&sums)[kSums][kMaps]) {
  S of_steps[kSums][kVector];
  TermsOfSteps<Inputs, kCount, kLoads>(step, nullptr, load, terms, of_steps);
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    if constexpr (kMaps == kVector) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[s][i] += of_steps[s][i];
    } else {
      sums[s][0] += AddTree<kVector>(of_steps[s]);
    }
  }
}

// Adds the steps [begin, end), kUnroll at a time, of which kLoads are loaded together.
template <class Inputs, int kLoads, int kVector, int kSums, int kMaps, class S, class Load, class Terms>
TF_AGC_DEVICE void SumSteps(int begin, int end, const Load& load, const Terms& terms, S (&sums)[kSums][kMaps]) {
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kMaps; ++i) sums[s][i] = S(0);
  }
  int step = begin;
  for (; step + kUnroll <= end; step += kUnroll) AddSteps<Inputs, kUnroll, kLoads, kVector>(step, load, terms, sums);
  for (; step < end; ++step) AddSteps<Inputs, 1, 1, kVector>(step, load, terms, sums);
}

// Adds all steps of a thread, in S over kFloatSteps of them and then in double. load(step) reads one step's inputs, and
// kLoads steps are loaded together.
template <class S, int kLoads, class ThreadType, int kSums, class Load, class Terms>
TF_AGC_DEVICE void SumAll(const ThreadType& thread, const Load& load, const Terms& terms,
                          double (&totals)[kSums][ThreadType::kMaps]) {
  constexpr int kMaps = ThreadType::kMaps;
  using Inputs = decltype(load(0));
  auto load_steps = [&](int step, auto& inputs) { LoadEach(step, load, inputs); };
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kMaps; ++i) totals[s][i] = 0;
  }
  for (int begin = 0; begin < thread.count; begin += kFloatSteps) {
    const int rest = thread.count - begin;
    S sums[kSums][kMaps];
    const int end = begin + (rest < kFloatSteps ? rest : kFloatSteps);
    SumSteps<Inputs, kLoads, ThreadType::kVector>(begin, end, load_steps, terms, sums);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kMaps; ++i) totals[s][i] += static_cast<double>(sums[s][i]);
    }
  }
}

// Adds what the threads of each column have, and calls give(sum, map, value), each by one thread of the block, for all
// sums and all maps of the tile.
template <class ThreadType, int kSums, class S, class Give>
TF_AGC_DEVICE void AddThreads(const Walk& walk, const ThreadType& thread, const S (&sums)[kSums][ThreadType::kMaps],
                              double* warp_sums, const Give& give) {
  constexpr int kMaps = ThreadType::kMaps;
  double values[kSums][kMaps];
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kMaps; ++i) values[s][i] = static_cast<double>(sums[s][i]);
  }
  // Lanes of a column are next to each other, or `columns` threads apart.
  const int lanes = LanesPerWarp(walk);
  const int apart = walk.layout == Layout::kChannelsLast ? walk.columns : 1;
  for (int offset = apart; offset < lanes * apart; offset *= 2) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kMaps; ++i) values[s][i] += __shfl_xor_sync(0xffffffffu, values[s][i], offset);
    }
  }
  const int maps = TileMaps(walk), warp = thread.lane >> Log2(lanes);
  if (thread.lane == warp * lanes) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kMaps; ++i) warp_sums[(warp * kSums + s) * maps + thread.column * kMaps + i] = values[s][i];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kSums * maps; i += static_cast<int>(blockDim.x)) {
    int sum = 0, map = i;
#pragma unroll
    for (int s = 1; s < kSums; ++s) {
      if (i < s * maps) continue;
      sum = s;
      map = i - s * maps;
    }
    give(sum, map, AddWarps(warp_sums + i, kSums * maps, WarpsPerColumn(walk)));
  }
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_SUMS_H_
