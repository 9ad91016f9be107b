// The forward pass: what it sums and writes, and its launcher.

#include <cstdint>
#include <type_traits>

#include "cc/core/cuda/activations.h"
#include "cc/core/cuda/kernels.h"
#include "cc/core/cuda/launch_pass.h"
#include "cc/core/cuda/launchers.h"
#include "cc/core/cuda/plan.h"
#include "cc/core/cuda/primitives.h"
#include "cc/core/cuda/sums.h"
#include "cc/core/cuda/walk.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

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

template <class T>
int RunForward(const ForwardArgs& args, const Device& device, void* workspace, void* stream) {
  const Plan plan = PlanOf(args, device);
  if (workspace == nullptr && WorkspaceBytes(plan) > 0) return kInvalidValue;
  const LaunchArgs<ForwardArgs> launch = MakeLaunchArgs(args, plan, workspace);
  const bool addends = args.bias != nullptr || args.shortcut != nullptr;
  return addends ? LaunchPass<ForwardPass<T, true>>(plan, device, launch, stream)
                 : LaunchPass<ForwardPass<T, false>>(plan, device, launch, stream);
}

}  // namespace

int Forward(const ForwardArgs& args, const Device& device, void* workspace, void* stream) {
  if (args.shape.batch == 0 || args.shape.channels == 0) return 0;
  return WithElementType(args.data_type,
                         [&](auto element) { return RunForward<decltype(element)>(args, device, workspace, stream); });
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
