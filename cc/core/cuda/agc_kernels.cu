// The CUDA kernels and their launchers.
//
// Why they look as they do:
// - Everything is bound by memory, so a map is read once where it fits on chip: the blocks of a cluster copy their
//   parts into shared memory, add, exchange their sums through distributed shared memory, and write from shared memory.
//   Where it does not fit, one launch adds and a second one reads again, from the L2 cache (plan.h has the rule).
// - Forward copies asynchronously (cp.async): a tile's loads are all in flight at once and take no registers, and those
//   that have come are added while others are on their way. Backward needs two or three tensors but holds only dz, so
//   its loads go through registers, four steps at a time; so do single elements of 16 bits, which cp.async does not
//   take.
// - What a map needs beside its sum, its parameters, is read before the barriers, which hide how long that takes.
// - One walk serves both layouts: a thread follows a column step by step (plan.h). In shared memory each thread holds
//   the slots that it filled itself, side by side with its neighbours': no bank conflicts, no barrier before reading.
// - Sums are in float over at most 64 terms, then in double. From there on they are added as one binary tree over the
//   lanes of a column, however the lanes lie in warps, then over blocks in order: no atomics, and the same bits
//   whatever the batch.
// - An output may be an input's memory (types.h): each element belongs to one thread, which reads all that it needs of
// it
//   before it writes, no pointer is __restrict__, and nothing is loaded through the read-only cache.
// - The activation is a switch around a loop, not a template argument of a kernel: a fifth of the code to compile.
// - What is added to z makes other kernels, whose registers those without it do not pay for: two forward and two
//   backward, and not four. Forward, a bias rides along with a shortcut, and whether there is one is asked where all
//   threads answer alike; backward, a bias has no work on elements, for its gradient sums dz, as the mean's does.
// - Forward, shortcuts are read where y is written. Backward, they are read for the sums alone, and dshortcut is the dz
//   that is held, or computed again, where dx is written.
//
// Not run on a GPU yet: the tests run this source on the CPU (emulation/emulation.h), and its speed is unknown.

#include <cstdint>
#include <mutex>
#include <type_traits>
#include <vector>

#include "cc/core/cuda/agc_cuda.h"
#include "cc/core/cuda/launchers.h"
#include "cc/core/cuda/plan.h"
#include "cc/core/cuda/primitives.h"
#include "cc/core/scheduling.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

// ---- Activations ----

#define TF_AGC_DEVICE __device__ __forceinline__

template <class V, class S>
TF_AGC_DEVICE V Broadcast(S value) {
  return value;
}
// max(z, 0); NaN stays.
template <class V>
TF_AGC_DEVICE V MaxZero(V z) {
  return z < V(0) ? V(0) : z;
}
TF_AGC_DEVICE float Expm1(float z) { return expm1f(z); }
TF_AGC_DEVICE double Expm1(double z) { return expm1(z); }
TF_AGC_DEVICE float Log1p(float t) { return log1pf(t); }
TF_AGC_DEVICE double Log1p(double t) { return log1p(t); }

#include "cc/core/activations_per_level.h"

template <class S, class Body>
TF_AGC_DEVICE void WithActivation(Activation activation, double alpha, const Body& body) {
  switch (activation) {
    case Activation::kRelu:
      return body(Relu<S, S>(alpha));
    case Activation::kRelu6:
      return body(Relu6<S, S>(alpha));
    case Activation::kLeakyRelu:
      return body(LeakyRelu<S, S>(alpha));
    case Activation::kElu:
      return body(Elu<S, S>(alpha));
    case Activation::kLinear:
      break;
  }
  body(Linear<S, S>(alpha));
}

// ---- One launch's work, and one thread's ----

template <class Args>
struct LaunchArgs {
  Args args;  // With the effective activation.
  Walk walk;
  int64_t first_tile;
  double* block_sums;   // [tiles of the launch][blocks of a tile][sums][maps of a tile].
  double* sample_sums;  // [ChannelGradients()][batch][channels]; null for one sample without a bias.
  double* dz_sums;      // [batch][channels], the last of these; null without a bias.
};

// What stands for the elements of an input that a kernel does not have.
struct Absent {};

constexpr int kUnroll = 4;  // Steps whose loads a thread has in flight at once: 64 bytes of each tensor.

template <int kVector_, Layout kLayout>
struct Thread {
  static constexpr int kVector = kVector_;
  static constexpr int kMaps = kLayout == Layout::kChannelsLast ? kVector : 1;  // That one step touches.

  int64_t tile;
  int block;  // Of the tile.
  int column;
  int lane;
  int64_t map;      // The first one, n * channels + c; -1 where the column is past the end.
  int64_t element;  // Of the first step.
  int64_t stride;   // Elements from one of the thread's steps to its next.
  int count;        // Of steps.

  TF_AGC_DEVICE explicit Thread(const Walk& walk, int64_t first_tile) {
    const unsigned thread = threadIdx.x;
    const unsigned in_launch = blockIdx.x / static_cast<unsigned>(walk.blocks);
    tile = first_tile + in_launch;
    block = static_cast<int>(blockIdx.x - in_launch * static_cast<unsigned>(walk.blocks));
    if (kLayout == Layout::kChannelsLast) {
      lane = static_cast<int>(thread / static_cast<unsigned>(walk.columns));
      column = static_cast<int>(thread) - lane * walk.columns;
    } else {
      column = static_cast<int>(thread / static_cast<unsigned>(walk.lanes));
      lane = static_cast<int>(thread) - column * walk.lanes;
    }
    map = MapOf(walk, tile, column * kMaps);
    const int64_t first = block * walk.block_steps + lane;
    const int64_t block_end = (block + 1) * walk.block_steps;
    const int64_t end = block_end < walk.steps ? block_end : walk.steps;
    count = map < 0 || first >= end
                ? 0
                : static_cast<int>((static_cast<uint32_t>(end - first) - 1) / static_cast<unsigned>(walk.lanes) + 1);
    element = map < 0 ? 0 : FirstElement(walk, map) + first * StepElements(walk);
    stride = walk.lanes * StepElements(walk);
  }

  TF_AGC_DEVICE int64_t Element(int step) const { return element + step * stride; }
};

// ---- Sums ----

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

// Adds kCount steps to sums[kSums][kMaps]. terms(inputs, i, out) gives the kSums terms of the i-th element of a step.
template <int kCount, int kVector, int kSums, int kMaps, class S, class Inputs, class Terms>
TF_AGC_DEVICE void AddSteps(Inputs (&inputs)[kCount], const Terms& terms, S (&sums)[kSums][kMaps]) {
  S of_step[kSums][kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    S of_element[kSums][kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      S out[kSums];
      terms(inputs[u], i, out);
#pragma unroll
      for (int s = 0; s < kSums; ++s) of_element[s][u] = out[s];
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) of_step[s][i] = AddTree<kCount>(of_element[s]);
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    if constexpr (kMaps == kVector) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[s][i] += of_step[s][i];
    } else {
      sums[s][0] += AddTree<kVector>(of_step[s]);
    }
  }
}

// Adds the steps [begin, end), kUnroll at a time. wait_for(step) returns when that step and those that are loaded with
// it can be; load(step) reads a step's inputs; after its terms are taken, keep(step, inputs).
template <int kVector, int kSums, int kMaps, class S, class WaitFor, class Load, class Terms, class Keep>
TF_AGC_DEVICE void SumSteps(int begin, int end, const WaitFor& wait_for, const Load& load, const Terms& terms,
                            const Keep& keep, S (&sums)[kSums][kMaps]) {
  using Inputs = decltype(load(0));
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kMaps; ++i) sums[s][i] = S(0);
  }
  int step = begin;
  for (; step + kUnroll <= end; step += kUnroll) {
    wait_for(step);
    Inputs inputs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) inputs[u] = load(step + u);
    AddSteps<kUnroll, kVector>(inputs, terms, sums);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) keep(step + u, inputs[u]);
  }
  for (; step < end; ++step) {
    wait_for(step);
    Inputs inputs[1] = {load(step)};
    AddSteps<1, kVector>(inputs, terms, sums);
    keep(step, inputs[0]);
  }
}

// Adds all steps of a thread, in S over kFloatTerms of them and then in double.
template <class S, class ThreadType, int kSums, class Load, class Terms>
TF_AGC_DEVICE void SumAll(const ThreadType& thread, const Load& load, const Terms& terms,
                          double (&totals)[kSums][ThreadType::kMaps]) {
  constexpr int kMaps = ThreadType::kMaps;
  auto wait_for = [](int) {};
  auto forget = [](int, const auto&) {};
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kMaps; ++i) totals[s][i] = 0;
  }
  for (int begin = 0; begin < thread.count; begin += kFloatTerms) {
    const int rest = thread.count - begin;
    S sums[kSums][kMaps];
    const int end = begin + (rest < kFloatTerms ? rest : kFloatTerms);
    SumSteps<ThreadType::kVector>(begin, end, wait_for, load, terms, forget, sums);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kMaps; ++i) totals[s][i] += static_cast<double>(sums[s][i]);
    }
  }
}

// Adds what the threads of each column have: tile_sums[kSums][maps of the tile]. Before others read it, a barrier.
template <class ThreadType, int kSums, class S>
TF_AGC_DEVICE void AddThreads(const Walk& walk, const ThreadType& thread, const S (&sums)[kSums][ThreadType::kMaps],
                              double* warp_sums, double* tile_sums) {
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
  const int maps = TileMaps(walk), warp = thread.lane / lanes;
  if (thread.lane == warp * lanes) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kMaps; ++i) warp_sums[(warp * kSums + s) * maps + thread.column * kMaps + i] = values[s][i];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kSums * maps; i += static_cast<int>(blockDim.x)) {
    tile_sums[i] = AddWarps(warp_sums + i, kSums * maps, WarpsPerColumn(walk));
  }
}

// ---- Writing ----

// Calls write(step, inputs) for every step of a thread; the loads of several steps come before their writes.
template <class Load, class Write>
TF_AGC_DEVICE void WriteSteps(int count, const Load& load, const Write& write) {
  using Inputs = decltype(load(0));
  int step = 0;
  for (; step + kUnroll <= count; step += kUnroll) {
    Inputs inputs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) inputs[u] = load(step + u);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) write(step + u, inputs[u]);
  }
  for (; step < count; ++step) write(step, load(step));
}

// ---- The two passes over the maps ----
//
// What a pass sums and writes, apart from where its inputs and sums lie. `Finish` turns the totals of one map into its
// parameters; with `first`, once for each map, it also writes what the map has for others.

// With kAddends there is a bias, a shortcut or both.
template <class T, bool kAddends>
struct ForwardPass {
  using Args = ForwardArgs;
  using Element = T;
  using S = Compute<T>;
  static constexpr int kSums = Sums(Pass::kForward);
  static constexpr int kParameters = Parameters(Pass::kForward, kAddends);

  struct OfMap {
    S gain;
    S mean_scale;
    S bias;
  };
  static TF_AGC_DEVICE OfMap Read(const LaunchArgs<Args>& launch, int64_t map) {
    const int64_t channel = Remainder(map, launch.walk.channels);
    // A shortcut alone: adding -0 changes nothing, not even the sign of a zero.
    const S bias = kAddends && launch.args.bias != nullptr ? static_cast<const S*>(launch.args.bias)[channel] : S(-0.0);
    return {static_cast<const S*>(launch.args.gain)[channel], static_cast<const S*>(launch.args.mean_scale)[channel],
            bias};
  }

  static TF_AGC_DEVICE void Finish(const LaunchArgs<Args>& launch, int64_t map, const OfMap& of_map,
                                   const double* totals, bool first, S* parameters) {
    const S mean = static_cast<S>(totals[0] / static_cast<double>(launch.walk.positions));
    if (first) static_cast<S*>(launch.args.mean)[map] = mean;
    parameters[0] = of_map.gain;
    parameters[1] = of_map.mean_scale * mean;
    if constexpr (kAddends) parameters[2] = of_map.bias;
  }

  // Sums x on the way to shared memory.
  template <class ThreadType>
  static TF_AGC_DEVICE void SumAndHold(const LaunchArgs<Args>& launch, const ThreadType& thread, unsigned char* held,
                                       S (&sums)[kSums][ThreadType::kMaps]) {
    constexpr int kVector = ThreadType::kVector;
    using Input = Vector<T, kVector>;
    const T* x = static_cast<const T*>(launch.args.x);
    auto* slots = reinterpret_cast<Input*>(held) + threadIdx.x;
    const int threads = static_cast<int>(blockDim.x);
    auto terms = [](const Input& in, int i, S* out) { out[0] = ToCompute(in.values[i]); };
    if constexpr (sizeof(Input) < 4) {
      auto load = [&](int step) { return Load<kVector>(x + thread.Element(step)); };
      auto hold = [&](int step, const Input& in) { slots[step * threads] = in; };
      SumSteps<kVector>(0, thread.count, [](int) {}, load, terms, hold, sums);
    } else {
      for (int step = 0; step < thread.count; ++step) {
        StartCopy(&slots[step * threads], reinterpret_cast<const Input*>(x + thread.Element(step)));
        if ((step + 1) % kUnroll == 0) EndBatch();
      }
      EndBatch();
      auto wait_for = [&](int step) { WaitForBatches(thread.count / kUnroll - step / kUnroll); };
      auto load = [&](int step) { return slots[step * threads]; };
      SumSteps<kVector>(0, thread.count, wait_for, load, terms, [](int, const Input&) {}, sums);
    }
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void Sum(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                double (&totals)[kSums][ThreadType::kMaps]) {
    constexpr int kVector = ThreadType::kVector;
    const T* x = static_cast<const T*>(launch.args.x);
    auto load = [&](int step) { return Load<kVector>(x + thread.Element(step)); };
    auto terms = [](const Vector<T, kVector>& in, int i, S* out) { out[0] = ToCompute(in.values[i]); };
    SumAll<S>(thread, load, terms, totals);
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void WriteHeld(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                      const unsigned char* held,
                                      const S (&parameters)[kParameters][ThreadType::kMaps]) {
    auto* slots = reinterpret_cast<const Vector<T, ThreadType::kVector>*>(held) + threadIdx.x;
    const int threads = static_cast<int>(blockDim.x);
    Write(launch, thread, [&](int step) { return slots[step * threads]; }, parameters);
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void WriteAgain(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                       const S (&parameters)[kParameters][ThreadType::kMaps]) {
    const T* x = static_cast<const T*>(launch.args.x);
    Write(launch, thread, [&](int step) { return Load<ThreadType::kVector>(x + thread.Element(step)); }, parameters);
  }

 private:
  template <int kVector>
  struct Inputs {
    Vector<T, kVector> x;
    std::conditional_t<kAddends, Vector<T, kVector>, Absent> shortcut;
  };

  // y = act(gain * (x - offset) + bias + shortcut). The difference comes first: where the mean is large against the
  // deviation, gain * x - gain * offset would lose the digits that the sum was careful to keep.
  template <class ThreadType, class LoadX>
  static TF_AGC_DEVICE void Write(const LaunchArgs<Args>& launch, const ThreadType& thread, const LoadX& load_x,
                                  const S (&parameters)[kParameters][ThreadType::kMaps]) {
    constexpr int kVector = ThreadType::kVector, kMaps = ThreadType::kMaps;
    const T* shortcut = static_cast<const T*>(launch.args.shortcut);
    T* y = static_cast<T*>(launch.args.y);
    auto load = [&](int step) {
      Inputs<kVector> in{load_x(step), {}};
      if constexpr (kAddends) {
        if (shortcut != nullptr) in.shortcut = Load<kVector>(shortcut + thread.Element(step));
      }
      return in;
    };
    WithActivation<S>(launch.args.activation, launch.args.alpha, [&](auto act) {
      WriteSteps(thread.count, load, [&](int step, const Inputs<kVector>& in) {
        S out[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          S z = (ToCompute(in.x.values[i]) - parameters[1][i % kMaps]) * parameters[0][i % kMaps];
          if constexpr (kAddends) {
            z += parameters[2][i % kMaps];
            if (shortcut != nullptr) z += ToCompute(in.shortcut.values[i]);
          }
          out[i] = act.Forward(z);
        }
        Store(y + thread.Element(step), FromCompute<T>(out));
      });
    });
  }
};

template <class T>
TF_AGC_DEVICE void WriteParameterGradients(const BackwardArgs& args, int64_t channel, double gain_sum,
                                           double mean_scale_sum) {
  using S = Compute<T>;
  const double gain = static_cast<double>(static_cast<const S*>(args.gain)[channel]);
  // But for kLinear, the sum is gain * dgain. At gain 0 what it came from is lost: 0, or NaN where something was not
  // finite.
  const double dgain = args.activation == Activation::kLinear ? gain_sum : gain == 0 ? gain_sum * 0 : gain_sum / gain;
  static_cast<S*>(args.dgain)[channel] = static_cast<S>(dgain);
  static_cast<S*>(args.dmean_scale)[channel] = static_cast<S>(-gain * mean_scale_sum);
}

template <class T, bool kShortcut>
struct BackwardPass {
  using Args = BackwardArgs;
  using Element = T;
  using S = Compute<T>;
  static constexpr int kSums = Sums(Pass::kBackward);
  static constexpr int kParameters = Parameters(Pass::kBackward, kShortcut);

  struct OfMap {
    S gain;
    S mean_scale;
    S dmean;
    S mean;
  };
  static TF_AGC_DEVICE OfMap Read(const LaunchArgs<Args>& launch, int64_t map) {
    const int64_t channel = Remainder(map, launch.walk.channels);
    return {static_cast<const S*>(launch.args.gain)[channel], static_cast<const S*>(launch.args.mean_scale)[channel],
            static_cast<const S*>(launch.args.dmean)[map], static_cast<const S*>(launch.args.mean)[map]};
  }

  static TF_AGC_DEVICE void Finish(const LaunchArgs<Args>& launch, int64_t map, const OfMap& of_map,
                                   const double* totals, bool first, S* parameters) {
    const double positions = static_cast<double>(launch.walk.positions);
    parameters[0] = of_map.gain;
    parameters[1] = static_cast<S>(static_cast<double>(of_map.mean_scale) * totals[0] / positions);
    parameters[2] = static_cast<S>(static_cast<double>(of_map.dmean) / positions);
    if (!first) return;
    if (launch.dz_sums != nullptr) launch.dz_sums[map] = totals[0];
    const double gain_term = totals[1];
    const double mean_scale_term = static_cast<double>(of_map.mean) * totals[0];
    if (launch.sample_sums != nullptr) {
      launch.sample_sums[map] = gain_term;
      launch.sample_sums[launch.walk.batch * launch.walk.channels + map] = mean_scale_term;
    } else {
      WriteParameterGradients<T>(launch.args, map, gain_term, mean_scale_term);  // Of one sample, a map is a channel.
    }
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void SumAndHold(const LaunchArgs<Args>& launch, const ThreadType& thread, unsigned char* held,
                                       S (&sums)[kSums][ThreadType::kMaps]) {
    constexpr int kVector = ThreadType::kVector;
    const int threads = static_cast<int>(blockDim.x);
    WithTerms(launch, thread, [&](auto load, auto terms, auto act) {
      using Held = std::conditional_t<decltype(act)::kSlopeIsZeroOrOne, T, S>;
      auto* slots = reinterpret_cast<Vector<Held, kVector>*>(held) + threadIdx.x;
      using WithHeld = InputsWithHeld<Held, kVector>;
      auto load_to_hold = [&](int step) { return WithHeld{load(step), {}}; };
      auto hold_terms = [&](WithHeld& in, int i, S* out) {
        terms(in.inputs, i, out);
        FromCompute(out[0], &in.dz.values[i]);
      };
      auto hold = [&](int step, const WithHeld& in) { slots[step * threads] = in.dz; };
      SumSteps<kVector>(0, thread.count, [](int) {}, load_to_hold, hold_terms, hold, sums);
    });
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void Sum(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                double (&totals)[kSums][ThreadType::kMaps]) {
    WithTerms(launch, thread, [&](auto load, auto terms, auto) { SumAll<S>(thread, load, terms, totals); });
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void WriteHeld(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                      const unsigned char* held,
                                      const S (&parameters)[kParameters][ThreadType::kMaps]) {
    if (HoldsDzInT(launch.args.activation)) {
      WriteHeldAs<T>(launch, thread, held, parameters);
    } else {
      WriteHeldAs<S>(launch, thread, held, parameters);
    }
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void WriteAgain(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                       const S (&parameters)[kParameters][ThreadType::kMaps]) {
    constexpr int kVector = ThreadType::kVector;
    WithActivationOf(launch, [&](auto act) {
      auto load = LoadInputs</*kForSums=*/false>(launch, thread);
      WriteSteps(thread.count, load, [&](int step, const Inputs<kVector, false>& in) {
        S dz[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) dz[i] = ToCompute(in.dy.values[i]) * act.Slope(ToCompute(in.kept.values[i]));
        WriteMaps(launch, thread, step, dz, parameters);
      });
    });
  }

 private:
  template <int kVector, bool kForSums>
  struct Inputs {
    Vector<T, kVector> dy;
    Vector<T, kVector> kept;
    std::conditional_t<kForSums && kShortcut, Vector<T, kVector>, Absent> shortcut;
  };

  template <class Held, int kVector>
  struct InputsWithHeld {
    Inputs<kVector, true> inputs;
    Vector<Held, kVector> dz;
  };

  template <bool kForSums, class ThreadType>
  static TF_AGC_DEVICE auto LoadInputs(const LaunchArgs<Args>& launch, const ThreadType& thread) {
    constexpr int kVector = ThreadType::kVector;
    const T* dy = static_cast<const T*>(launch.args.dy);
    const T* kept = static_cast<const T*>(launch.args.kept);
    const T* shortcut = static_cast<const T*>(launch.args.shortcut);
    return [=, &thread](int step) {
      const int64_t element = thread.Element(step);
      Inputs<kVector, kForSums> in{Load<kVector>(dy + element), Load<kVector>(kept + element), {}};
      if constexpr (kForSums && kShortcut) in.shortcut = Load<kVector>(shortcut + element);
      return in;
    };
  }

  // WithActivation, but for kLinear where there is a shortcut: types.h has no such call.
  template <class Body>
  static TF_AGC_DEVICE void WithActivationOf(const LaunchArgs<Args>& launch, const Body& body) {
    WithActivation<S>(launch.args.activation, launch.args.alpha, [&](auto act) {
      if constexpr (!(kShortcut && decltype(act)::kKeepsInput)) body(act);
    });
  }

  // Calls body(load, terms, act).
  template <class ThreadType, class Body>
  static TF_AGC_DEVICE void WithTerms(const LaunchArgs<Args>& launch, const ThreadType& thread, const Body& body) {
    constexpr int kVector = ThreadType::kVector, kMaps = ThreadType::kMaps;
    WithActivationOf(launch, [&](auto act) {
      using Act = decltype(act);
      S offset[kMaps];
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        offset[i] = S(0);
        if (Act::kKeepsInput && thread.count > 0) {
          const int64_t map = thread.map + i;
          offset[i] = static_cast<const S*>(launch.args.mean_scale)[Remainder(map, launch.walk.channels)] *
                      static_cast<const S*>(launch.args.mean)[map];
        }
      }
      auto terms = [&](const Inputs<kVector, true>& in, int i, S* out) {
        const S dy = ToCompute(in.dy.values[i]), kept = ToCompute(in.kept.values[i]);
        S shortcut = S(0);
        if constexpr (kShortcut) shortcut = ToCompute(in.shortcut.values[i]);
        out[0] = dy * act.Slope(kept);
        out[1] = act.template GainTerm<kShortcut>(kept, dy, out[0], offset[i % kMaps], shortcut);
      };
      body(LoadInputs</*kForSums=*/true>(launch, thread), terms, act);
    });
  }

  template <class Held, class ThreadType>
  static TF_AGC_DEVICE void WriteHeldAs(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                        const unsigned char* held,
                                        const S (&parameters)[kParameters][ThreadType::kMaps]) {
    constexpr int kVector = ThreadType::kVector;
    auto* slots = reinterpret_cast<const Vector<Held, kVector>*>(held) + threadIdx.x;
    const int threads = static_cast<int>(blockDim.x);
    auto load = [&](int step) { return slots[step * threads]; };
    WriteSteps(thread.count, load, [&](int step, const Vector<Held, kVector>& in) {
      S dz[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) dz[i] = ToCompute(in.values[i]);
      WriteMaps(launch, thread, step, dz, parameters);
    });
  }

  // dx = gain * (dz - offset) + shift, and dshortcut = dz.
  template <class ThreadType, int kVector>
  static TF_AGC_DEVICE void WriteMaps(const LaunchArgs<Args>& launch, const ThreadType& thread, int step,
                                      const S (&dz)[kVector], const S (&parameters)[kParameters][ThreadType::kMaps]) {
    constexpr int kMaps = ThreadType::kMaps;
    if constexpr (kShortcut) Store(static_cast<T*>(launch.args.dshortcut) + thread.Element(step), FromCompute<T>(dz));
    S out[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      out[i] = (dz[i] - parameters[1][i % kMaps]) * parameters[0][i % kMaps] + parameters[2][i % kMaps];
    }
    Store(static_cast<T*>(launch.args.dx) + thread.Element(step), FromCompute<T>(out));
  }
};

// ---- Kernels ----

// What the first of the maps that a thread finishes needs beside its sums.
template <class PassType>
TF_AGC_DEVICE typename PassType::OfMap ReadFirst(const LaunchArgs<typename PassType::Args>& launch, int64_t tile) {
  const int i = static_cast<int>(threadIdx.x);
  const int64_t map = i < TileMaps(launch.walk) ? MapOf(launch.walk, tile, i) : -1;
  return map < 0 ? typename PassType::OfMap{} : PassType::Read(launch, map);
}

// Turns a tile's sums into parameters[kParameters][maps of the tile]: total(i) is the sum of all blocks, of_first comes
// from ReadFirst(). Ends with a barrier.
template <class PassType, class Total>
TF_AGC_DEVICE void FinishTile(const LaunchArgs<typename PassType::Args>& launch, int64_t tile,
                              const typename PassType::OfMap& of_first, bool first, const Total& total,
                              typename PassType::S* parameters) {
  constexpr int kSums = PassType::kSums, kParameters = PassType::kParameters;
  const int maps = TileMaps(launch.walk);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < maps; i += static_cast<int>(blockDim.x)) {
    const int64_t map = MapOf(launch.walk, tile, i);
    if (map < 0) continue;
    const typename PassType::OfMap of_map = i == thread ? of_first : PassType::Read(launch, map);
    double totals[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) totals[s] = total(s * maps + i);
    typename PassType::S out[kParameters];
    PassType::Finish(launch, map, of_map, totals, first, out);
#pragma unroll
    for (int k = 0; k < kParameters; ++k) parameters[k * maps + i] = out[k];
  }
  __syncthreads();
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

// One launch for tiles that fit on chip: a cluster (or a block alone) sums, exchanges, writes.
template <class PassType, int kVector, Layout kLayout>
__global__ void __launch_bounds__(kMaxThreads)
    OnChip(const __grid_constant__ LaunchArgs<typename PassType::Args> launch) {
  using ThreadType = Thread<kVector, kLayout>;
  using S = typename PassType::S;
  constexpr int kSums = PassType::kSums, kParameters = PassType::kParameters, kMaps = ThreadType::kMaps;
  const Walk& walk = launch.walk;
  unsigned char* shared = SharedMemory();
  const SharedLayout layout = MakeSharedLayout(walk, kSums, kParameters, 0);
  double* tile_sums = reinterpret_cast<double*>(shared);
  S* parameters = reinterpret_cast<S*>(shared + layout.parameters);
  const ThreadType thread(walk, launch.first_tile);

  S sums[kSums][kMaps];
  PassType::SumAndHold(launch, thread, shared + layout.held, sums);
  const typename PassType::OfMap of_first = ReadFirst<PassType>(launch, thread.tile);
  AddThreads<ThreadType, kSums>(walk, thread, sums, reinterpret_cast<double*>(shared + layout.warp_sums), tile_sums);
  if (walk.blocks == 1) {
    __syncthreads();
    FinishTile<PassType>(launch, thread.tile, of_first, true, [&](int i) { return tile_sums[i]; }, parameters);
  } else {
    ClusterArrive();
    ClusterWait();
    auto total = [&](int i) {
      double sum = 0;
#pragma unroll 4
      for (int rank = 0; rank < walk.blocks; ++rank) sum += OfRank(tile_sums, rank)[i];
      return sum;
    };
    FinishTile<PassType>(launch, thread.tile, of_first, thread.block == 0, total, parameters);
    ClusterArrive();  // This block has read what it needs of the others.
  }
  S own[kParameters][kMaps];
  ReadParameters(walk, thread, parameters, own);
  PassType::WriteHeld(launch, thread, shared + layout.held, own);
  if (walk.blocks > 1) ClusterWait();  // Shared memory must live until all others have read it.
}

// Two launches for all others. The first one sums.
template <class PassType, int kVector, Layout kLayout>
__global__ void __launch_bounds__(kMaxThreads)
    SumTiles(const __grid_constant__ LaunchArgs<typename PassType::Args> launch) {
  using ThreadType = Thread<kVector, kLayout>;
  constexpr int kSums = PassType::kSums;
  unsigned char* shared = SharedMemory();
  const SharedLayout layout = MakeSharedLayout(launch.walk, kSums, PassType::kParameters, 0);
  const ThreadType thread(launch.walk, launch.first_tile);
  double totals[kSums][ThreadType::kMaps];
  PassType::Sum(launch, thread, totals);
  AddThreads<ThreadType, kSums>(launch.walk, thread, totals, reinterpret_cast<double*>(shared + layout.warp_sums),
                                launch.block_sums + int64_t{blockIdx.x} * kSums * TileMaps(launch.walk));
}

// The second one reads again and writes.
template <class PassType, int kVector, Layout kLayout>
__global__ void __launch_bounds__(kMaxThreads)
    WriteTiles(const __grid_constant__ LaunchArgs<typename PassType::Args> launch) {
  using ThreadType = Thread<kVector, kLayout>;
  using S = typename PassType::S;
  constexpr int kSums = PassType::kSums, kParameters = PassType::kParameters;
  const Walk& walk = launch.walk;
  const SharedLayout layout = MakeSharedLayout(walk, kSums, kParameters, 0);
  S* parameters = reinterpret_cast<S*>(SharedMemory() + layout.parameters);
  const ThreadType thread(walk, launch.first_tile);
  const typename PassType::OfMap of_first = ReadFirst<PassType>(launch, thread.tile);
  const int tile_sums = kSums * TileMaps(walk);
  const double* sums = launch.block_sums + (thread.tile - launch.first_tile) * walk.blocks * tile_sums;
  auto total = [&](int i) {
    double sum = 0;
    for (int block = 0; block < walk.blocks; ++block) sum += sums[block * tile_sums + i];
    return sum;
  };
  FinishTile<PassType>(launch, thread.tile, of_first, thread.block == 0, total, parameters);
  S own[kParameters][ThreadType::kMaps];
  ReadParameters(walk, thread, parameters, own);
  PassType::WriteAgain(launch, thread, own);
}

// Adds the terms of all samples, and of one where there is a bias, so that the kernels above need not know of it: for
// kGradientChannels channels in a block, the samples in kGradientLanes interleaved runs, then the runs in order.
constexpr int kGradientChannels = 8;  // 64 bytes of doubles.
constexpr int kGradientLanes = kMaxThreads / kGradientChannels;

template <class T, bool kBias>
__global__ void __launch_bounds__(kMaxThreads) AddSamples(const __grid_constant__ LaunchArgs<BackwardArgs> launch) {
  constexpr int kGradients = ChannelGradients(kBias);
  double* lane_sums = reinterpret_cast<double*>(SharedMemory());  // [kGradients][kGradientLanes][kGradientChannels]
  const Shape& shape = launch.args.shape;
  const int in_block = static_cast<int>(threadIdx.x) % kGradientChannels;
  const int lane = static_cast<int>(threadIdx.x) / kGradientChannels;
  const int64_t channel = int64_t{blockIdx.x} * kGradientChannels + in_block;
  if (channel < shape.channels) {
    double sums[kGradients] = {};
#pragma unroll 4
    for (int64_t n = lane; n < shape.batch; n += kGradientLanes) {
#pragma unroll
      for (int g = 0; g < kGradients; ++g)
        sums[g] += launch.sample_sums[(g * shape.batch + n) * shape.channels + channel];
    }
#pragma unroll
    for (int g = 0; g < kGradients; ++g) lane_sums[g * kMaxThreads + threadIdx.x] = sums[g];
  }
  __syncthreads();
  if (lane != 0 || channel >= shape.channels) return;
  double sums[kGradients] = {};
  for (int l = 0; l < kGradientLanes; ++l) {
#pragma unroll
    for (int g = 0; g < kGradients; ++g) sums[g] += lane_sums[g * kMaxThreads + l * kGradientChannels + in_block];
  }
  if constexpr (kBias) {
    using S = Compute<T>;
    static_cast<S*>(launch.args.dbias)[channel] = static_cast<S>(sums[2]);
    // What is kept of z has the bias in it, the same one all over the channel; kLinear keeps x. Where dz adds up to 0,
    // as where the activation is flat, an infinite bias does not count.
    if (launch.args.activation != Activation::kLinear && sums[2] != 0) {
      sums[0] -= static_cast<double>(static_cast<const S*>(launch.args.bias)[channel]) * sums[2];
    }
  }
  WriteParameterGradients<T>(launch.args, channel, sums[0], sums[1]);
}

// ---- Launchers ----

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue.

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
bool Aligned(const ForwardArgs& args) { return Aligned(args.x) && Aligned(args.y) && Aligned(args.shortcut); }
bool Aligned(const BackwardArgs& args) {
  return Aligned(args.dy) && Aligned(args.kept) && Aligned(args.dx) && Aligned(args.shortcut) &&
         Aligned(args.dshortcut);
}

bool Empty(const Shape& shape) { return shape.batch == 0 || shape.channels == 0; }

template <class PassType, int kVector, Layout kLayout>
int LaunchWalk(const Plan& plan, const Device& device, LaunchArgs<typename PassType::Args> launch, void* stream) {
  const int threads = plan.walk.columns * plan.walk.lanes;
  for (int64_t tile = 0; tile < plan.walk.tiles; tile += plan.tiles_per_launch) {
    const int64_t rest = plan.walk.tiles - tile;
    const int64_t blocks = (rest < plan.tiles_per_launch ? rest : plan.tiles_per_launch) * plan.walk.blocks;
    launch.first_tile = tile;
    int error;
    if (plan.on_chip) {
      error = Launch(&OnChip<PassType, kVector, kLayout>, blocks, threads, plan.walk.blocks, plan.shared_bytes,
                     device.shared_bytes_per_block, stream, launch);
    } else {
      error = Launch(&SumTiles<PassType, kVector, kLayout>, blocks, threads, 1, plan.shared_bytes,
                     device.shared_bytes_per_block, stream, launch);
      if (error == 0) {
        error = Launch(&WriteTiles<PassType, kVector, kLayout>, blocks, threads, 1, plan.shared_bytes,
                       device.shared_bytes_per_block, stream, launch);
      }
    }
    if (error != 0) return error;
  }
  return 0;
}

template <class PassType>
int LaunchPass(const Plan& plan, const Device& device, const LaunchArgs<typename PassType::Args>& launch,
               void* stream) {
  constexpr int kWide = 16 / sizeof(typename PassType::Element);
  if (plan.walk.layout == Layout::kChannelsLast) {
    return plan.walk.vector == 1 ? LaunchWalk<PassType, 1, Layout::kChannelsLast>(plan, device, launch, stream)
                                 : LaunchWalk<PassType, kWide, Layout::kChannelsLast>(plan, device, launch, stream);
  }
  return plan.walk.vector == 1 ? LaunchWalk<PassType, 1, Layout::kChannelsFirst>(plan, device, launch, stream)
                               : LaunchWalk<PassType, kWide, Layout::kChannelsFirst>(plan, device, launch, stream);
}

template <class Args>
Call CallOf(Pass pass, const Args& args) {
  return {pass,          args.shape,           args.data_type,          Effective(args.activation, args.alpha),
          Aligned(args), args.bias != nullptr, args.shortcut != nullptr};
}

template <class Args>
LaunchArgs<Args> MakeLaunchArgs(const Args& args, const Plan& plan, void* workspace) {
  LaunchArgs<Args> launch{args, plan.walk, 0, nullptr, nullptr, nullptr};
  launch.args.activation = Effective(args.activation, args.alpha);
  double* doubles = static_cast<double*>(workspace);
  if (plan.sample_sums > 0) launch.sample_sums = doubles;
  if (plan.sample_sums > 0 && args.bias != nullptr) {
    launch.dz_sums = doubles + ChannelGradients(false) * plan.walk.batch * plan.walk.channels;
  }
  if (plan.block_sums > 0) launch.block_sums = doubles + plan.sample_sums;
  return launch;
}

int64_t Bytes(const Plan& plan) { return (plan.block_sums + plan.sample_sums) * int64_t{sizeof(double)}; }

template <class T>
int RunForward(const ForwardArgs& args, const Device& device, void* workspace, void* stream) {
  const Plan plan = PlanOf(args, device);
  if (workspace == nullptr && Bytes(plan) > 0) return kInvalidValue;
  const LaunchArgs<ForwardArgs> launch = MakeLaunchArgs(args, plan, workspace);
  const bool addends = args.bias != nullptr || args.shortcut != nullptr;
  return addends ? LaunchPass<ForwardPass<T, true>>(plan, device, launch, stream)
                 : LaunchPass<ForwardPass<T, false>>(plan, device, launch, stream);
}

template <class T>
int RunBackward(const BackwardArgs& args, const Device& device, void* workspace, void* stream) {
  Plan plan{};
  if (args.shape.batch > 0) {
    plan = PlanOf(args, device);
    if (workspace == nullptr && Bytes(plan) > 0) return kInvalidValue;
    const LaunchArgs<BackwardArgs> launch = MakeLaunchArgs(args, plan, workspace);
    const int error = args.shortcut != nullptr ? LaunchPass<BackwardPass<T, true>>(plan, device, launch, stream)
                                               : LaunchPass<BackwardPass<T, false>>(plan, device, launch, stream);
    if (error != 0 || plan.sample_sums == 0) return error;
  }
  const bool bias = args.bias != nullptr;
  return Launch(bias ? &AddSamples<T, true> : &AddSamples<T, false>, CeilDiv(args.shape.channels, kGradientChannels),
                kMaxThreads, 1, ChannelGradients(bias) * kMaxThreads * int64_t{sizeof(double)},
                device.shared_bytes_per_block, stream, MakeLaunchArgs(args, plan, workspace));
}

}  // namespace

Plan PlanOf(const ForwardArgs& args, const Device& device) { return MakePlan(CallOf(Pass::kForward, args), device); }
Plan PlanOf(const BackwardArgs& args, const Device& device) { return MakePlan(CallOf(Pass::kBackward, args), device); }

int64_t WorkspaceBytes(const ForwardArgs& args, const Device& device) {
  return Empty(args.shape) ? 0 : Bytes(PlanOf(args, device));
}
int64_t WorkspaceBytes(const BackwardArgs& args, const Device& device) {
  return Empty(args.shape) ? 0 : Bytes(PlanOf(args, device));
}

int Forward(const ForwardArgs& args, const Device& device, void* workspace, void* stream) {
  if (Empty(args.shape)) return 0;
  switch (args.data_type) {
    case DataType::kHalf:
      return RunForward<Half>(args, device, workspace, stream);
    case DataType::kBfloat16:
      return RunForward<Bfloat16>(args, device, workspace, stream);
    case DataType::kDouble:
      return RunForward<double>(args, device, workspace, stream);
    case DataType::kFloat:
      break;
  }
  return RunForward<float>(args, device, workspace, stream);
}

int Backward(const BackwardArgs& args, const Device& device, void* workspace, void* stream) {
  if (args.shape.channels == 0) return 0;
  switch (args.data_type) {
    case DataType::kHalf:
      return RunBackward<Half>(args, device, workspace, stream);
    case DataType::kBfloat16:
      return RunBackward<Bfloat16>(args, device, workspace, stream);
    case DataType::kDouble:
      return RunBackward<double>(args, device, workspace, stream);
    case DataType::kFloat:
      break;
  }
  return RunBackward<float>(args, device, workspace, stream);
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

// ---- The C interface, which alone asks for a real device ----

#if !defined(TF_AGC_CUDA_EMULATION)

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

#endif  // !TF_AGC_CUDA_EMULATION
