// What the forward pass sums and writes: a PassType of kernels.h.

#ifndef TF_AGC_CC_CORE_CUDA_FORWARD_PASS_H_
#define TF_AGC_CC_CORE_CUDA_FORWARD_PASS_H_

#include <cstdint>
#include <type_traits>

#include "cc/core/cuda/activations.h"
#include "cc/core/cuda/kernels.h"
#include "cc/core/cuda/plan.h"
#include "cc/core/cuda/primitives.h"
#include "cc/core/cuda/sums.h"
#include "cc/core/cuda/walk.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {

// With kAddends there is a bias, a shortcut or both.
template <class T, bool kAddends>
struct ForwardPass {
  using Args = ForwardArgs;
  using Element = T;
  using S = Compute<T>;
  static constexpr Pass kPass = Pass::kForward;
  static constexpr bool kLean = !kAddends;
  static constexpr int kSums = Sums(kPass);
  static constexpr int kParameters = Parameters(kPass, kAddends);

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
    if constexpr (kCanCopy<T, kVector>) {
      StartCopies(thread, x, [&](int step) { return &slots[step * threads]; });
      auto load = [&](int step, auto& in) {
        WaitForStep(thread, step);
        LoadEach(step, [&](int each) { return slots[each * threads]; }, in);
      };
      SumSteps<Input, kUnroll, kVector>(0, thread.count, load, Terms<kVector>, sums);
    } else {
      auto load = [&](int step, auto& in) {
        LoadEach(step, [&](int each) { return Load<kVector>(x + thread.Element(each)); }, in);
      };
      auto hold_terms = [&](int step, const Input& in, S(&out)[kSums][kVector]) {
        slots[step * threads] = in;
        Terms(step, in, out);
      };
      SumSteps<Input, kUnroll, kVector>(0, thread.count, load, hold_terms, sums);
    }
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void Sum(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                double (&totals)[kSums][ThreadType::kMaps]) {
    constexpr int kVector = ThreadType::kVector;
    const T* x = static_cast<const T*>(launch.args.x);
    auto load = [&](int step) { return Load<kVector>(x + thread.Element(step)); };
    SumAll<S, kUnroll>(thread, load, Terms<kVector>, totals);
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

  template <int kVector>
  static TF_AGC_DEVICE void Terms(int, const Vector<T, kVector>& x, S (&out)[kSums][kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[0][i] = ToCompute(x.values[i]);
  }

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
    WithActivation<S, S>(launch.args.activation, launch.args.alpha, [&](auto act) {
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

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_FORWARD_PASS_H_
