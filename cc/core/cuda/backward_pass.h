// What the backward pass sums and writes: a PassType of kernels.h.

#ifndef TF_AGC_CC_CORE_CUDA_BACKWARD_PASS_H_
#define TF_AGC_CC_CORE_CUDA_BACKWARD_PASS_H_

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

// kRelu is for that activation alone: the others' registers are not its.
template <class T, bool kShortcut, bool kRelu>
struct BackwardPass {
  using Args = BackwardArgs;
  using Element = T;
  using S = Compute<T>;
  static constexpr Pass kPass = Pass::kBackward;
  static constexpr bool kLean = kRelu;
  static constexpr int kSums = Sums(kPass);
  static constexpr int kParameters = Parameters(kPass, kShortcut);

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
    WithTerms(launch, thread, [&](auto terms, auto act) {
      using Held = std::conditional_t<decltype(act)::kSlopeIsZeroOrOne, T, S>;
      constexpr bool kCopies = kCanCopy<T, kVector>;
      constexpr int kLoads = kShortcut ? kUnroll / 2 : kUnroll;  // 64 bytes together, without dy.
      auto* slots = reinterpret_cast<Vector<Held, kVector>*>(held) + threadIdx.x;
      // dy comes to where its dz will be held, which is no smaller.
      auto dy_of = [&](int step) { return reinterpret_cast<Vector<T, kVector>*>(&slots[step * threads]); };
      if constexpr (kCopies) StartCopies(thread, static_cast<const T*>(launch.args.dy), dy_of);
      if (launch.prefetch) PrefetchSteps(thread, static_cast<const T*>(launch.args.kept));
      if (kShortcut && launch.prefetch) PrefetchSteps(thread, static_cast<const T*>(launch.args.shortcut));
      auto load = LoadInputs</*kForSums=*/true, /*kDy=*/!kCopies>(launch, thread);
      auto load_steps = [&](int step, auto& in) {
        LoadEach(step, load, in);
        if constexpr (kCopies) WaitForStep(thread, step);
      };
      auto hold_terms = [&](int step, Inputs<kVector, true> in, S(&out)[kSums][kVector]) {
        if constexpr (kCopies) in.dy = *dy_of(step);
        terms(step, in, out);
        slots[step * threads] = FromCompute<Held>(out[0]);
      };
      SumSteps<Inputs<kVector, true>, kLoads, kVector>(0, thread.count, load_steps, hold_terms, sums);
    });
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void Sum(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                double (&totals)[kSums][ThreadType::kMaps]) {
    // Three inputs in 16 bits, and their sums in double besides: four steps of them would leave room for one block.
    constexpr int kLoads = kShortcut && !kRelu && ThreadType::kVector == 8 ? kUnroll / 2 : kUnroll;
    auto load = LoadInputs</*kForSums=*/true>(launch, thread);
    WithTerms(launch, thread, [&](auto terms, auto) { SumAll<S, kLoads>(thread, load, terms, totals); });
  }

  template <class ThreadType>
  static TF_AGC_DEVICE void WriteHeld(const LaunchArgs<Args>& launch, const ThreadType& thread,
                                      const unsigned char* held,
                                      const S (&parameters)[kParameters][ThreadType::kMaps]) {
    if (kRelu || HoldsDzInT(launch.args.activation)) {
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

  // Without kDy, dy comes from elsewhere.
  template <bool kForSums, bool kDy = true, class ThreadType>
  static TF_AGC_DEVICE auto LoadInputs(const LaunchArgs<Args>& launch, const ThreadType& thread) {
    constexpr int kVector = ThreadType::kVector;
    const T* dy = static_cast<const T*>(launch.args.dy);
    const T* kept = static_cast<const T*>(launch.args.kept);
    const T* shortcut = static_cast<const T*>(launch.args.shortcut);
    return [=, &thread](int step) {
      const int64_t element = thread.Element(step);
      Inputs<kVector, kForSums> in{};
      if constexpr (kDy) in.dy = Load<kVector>(dy + element);
      in.kept = Load<kVector>(kept + element);
      if constexpr (kForSums && kShortcut) in.shortcut = Load<kVector>(shortcut + element);
      return in;
    };
  }

  // WithActivation, but for kLinear where there is a shortcut: types.h has no such call.
  template <class Body>
  static TF_AGC_DEVICE void WithActivationOf(const LaunchArgs<Args>& launch, const Body& body) {
    if constexpr (kRelu) {
      body(Relu<S, S>(launch.args.alpha));
    } else {
      WithActivation<S, S>(launch.args.activation, launch.args.alpha, [&](auto act) {
        using Act = decltype(act);
        if constexpr (!std::is_same_v<Act, Relu<S, S>> && !(kShortcut && Act::kKeepsInput)) body(act);
      });
    }
  }

  // Calls body(terms, act).
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
      // dz is the first of them.
      auto terms = [&](int, const Inputs<kVector, true>& in, S(&out)[kSums][kVector]) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const S dy = ToCompute(in.dy.values[i]), kept = ToCompute(in.kept.values[i]);
          S shortcut = S(0);
          if constexpr (kShortcut) shortcut = ToCompute(in.shortcut.values[i]);
          out[0][i] = dy * act.Slope(kept);
          out[1][i] = act.template GainTerm<kShortcut>(kept, dy, out[0][i], offset[i % kMaps], shortcut);
        }
      };
      body(terms, act);
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

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_BACKWARD_PASS_H_
