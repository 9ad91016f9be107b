// One thread's way through the maps, as the plan laid it out, in steps whose loads come several at a time.

#ifndef TF_AGC_CC_CORE_CUDA_WALK_H_
#define TF_AGC_CC_CORE_CUDA_WALK_H_

#include <cstdint>
#include <type_traits>

#include "cc/core/cuda/plan.h"
#include "cc/core/cuda/primitives.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {

constexpr int kUnroll = 4;  // Steps whose loads a thread has in flight at once: 64 bytes of each tensor.

template <int kVector_, Layout kLayout>
struct Thread {
  static constexpr int kVector = kVector_;
  static constexpr int kMaps = kLayout == Layout::kChannelsLast ? kVector : 1;  // That one step touches.
  // channels_first, a thread passes at most one step of every other thread of its block: an int holds that.
  using Stride = std::conditional_t<kLayout == Layout::kChannelsLast, int64_t, int>;

  int64_t tile;
  int block;  // Of the tile.
  int column;
  int lane;
  int64_t map;      // The first one, n * channels + c; -1 where the column is past the end.
  int64_t element;  // Of the first step.
  Stride stride;    // Elements from one of the thread's steps to its next.
  int count;        // Of steps.

  TF_AGC_DEVICE explicit Thread(Walk walk, int64_t first_tile) {
    walk.layout = kLayout;  // As it is: now nvcc knows it.
    const int thread = static_cast<int>(threadIdx.x);
    const unsigned in_launch = blockIdx.x / static_cast<unsigned>(walk.blocks);
    tile = first_tile + in_launch;
    block = static_cast<int>(blockIdx.x - in_launch * static_cast<unsigned>(walk.blocks));
    if (kLayout == Layout::kChannelsLast) {
      lane = thread >> Log2(walk.columns);
      column = thread & (walk.columns - 1);
    } else {
      column = thread >> Log2(walk.lanes);
      lane = thread & (walk.lanes - 1);
    }
    map = MapOf(walk, tile, column * kMaps);
    const int64_t first = block * walk.block_steps + lane;
    const int64_t block_end = (block + 1) * walk.block_steps;
    const int64_t end = block_end < walk.steps ? block_end : walk.steps;
    count = map < 0 || first >= end
                ? 0
                : static_cast<int>(((static_cast<uint32_t>(end - first) - 1) >> Log2(walk.lanes)) + 1);
    element = map < 0 ? 0 : FirstElement(walk, map) + first * StepElements(walk);
    stride = static_cast<Stride>(walk.lanes * StepElements(walk));
  }

  TF_AGC_DEVICE int64_t Element(int step) const { return element + int64_t{step} * stride; }
};

// Reads as many steps as inputs has, from `step` on: load(step) reads one.
template <class Inputs, int kCount, class Load>
TF_AGC_DEVICE void LoadEach(int step, const Load& load, Inputs (&inputs)[kCount]) {
#pragma unroll
  for (int u = 0; u < kCount; ++u) inputs[u] = load(step + u);
}

// Whether the steps of a map can be copied into shared memory asynchronously: single elements of 16 bits cannot.
template <class T, int kVector>
constexpr bool kCanCopy = sizeof(Vector<T, kVector>) >= 4;

// Starts copies of all steps that a thread takes of a map, in batches of kUnroll, each to where slot(step) points.
template <class ThreadType, class T, class Slot>
TF_AGC_DEVICE void StartCopies(const ThreadType& thread, const T* from, const Slot& slot) {
  using Step = Vector<T, ThreadType::kVector>;
  for (int step = 0; step < thread.count; ++step) {
    StartCopy(slot(step), reinterpret_cast<const Step*>(from + thread.Element(step)));
    if ((step + 1) % kUnroll == 0) EndBatch();
  }
  EndBatch();
}
// Returns when that step and those of its batch have come.
template <class ThreadType>
TF_AGC_DEVICE void WaitForStep(const ThreadType& thread, int step) {
  WaitForBatches(thread.count / kUnroll - step / kUnroll);
}

// Asks for all steps that a thread takes of a map to come to the L2 cache.
template <class ThreadType, class T>
TF_AGC_DEVICE void PrefetchSteps(const ThreadType& thread, const T* from) {
  for (int step = 0; step < thread.count; ++step) PrefetchToL2(from + thread.Element(step));
}

// Calls write(step, inputs) for every step of a thread; the loads of several steps come before their writes.
template <class Load, class Write>
TF_AGC_DEVICE void WriteSteps(int count, const Load& load, const Write& write) {
  using Inputs = decltype(load(0));
  int step = 0;
  for (; step + kUnroll <= count; step += kUnroll) {
    Inputs inputs[kUnroll];
    LoadEach(step, load, inputs);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) write(step + u, inputs[u]);
  }
#pragma unroll 1  // The last few: nvcc would unroll them, and run out of registers.
  for (; step < count; ++step) write(step, load(step));
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_WALK_H_
