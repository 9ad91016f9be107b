// The backward pass's launcher, and its sums over samples.

#include <cstdint>

#include "cc/core/cuda/backward_pass.h"
#include "cc/core/cuda/kernels.h"
#include "cc/core/cuda/launch_pass.h"
#include "cc/core/cuda/launchers.h"
#include "cc/core/cuda/plan.h"
#include "cc/core/cuda/primitives.h"
#include "cc/core/scheduling.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

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
  WaitForLaunchBefore();
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

template <class T, bool kShortcut>
int LaunchBackward(bool relu, const Plan& plan, const Device& device, const LaunchArgs<BackwardArgs>& launch,
                   void* stream) {
  return relu ? LaunchPass<BackwardPass<T, kShortcut, true>>(plan, device, launch, stream)
              : LaunchPass<BackwardPass<T, kShortcut, false>>(plan, device, launch, stream);
}

template <class T>
int RunBackward(const BackwardArgs& args, const Device& device, void* workspace, void* stream) {
  Plan plan{};
  if (args.shape.batch > 0) {
    plan = PlanOf(args, device);
    if (workspace == nullptr && WorkspaceBytes(plan) > 0) return kInvalidValue;
    const LaunchArgs<BackwardArgs> launch = MakeLaunchArgs(args, plan, workspace);
    const bool relu = launch.args.activation == Activation::kRelu;
    const int error = args.shortcut != nullptr ? LaunchBackward<T, true>(relu, plan, device, launch, stream)
                                               : LaunchBackward<T, false>(relu, plan, device, launch, stream);
    if (error != 0 || plan.sample_sums == 0) return error;
  }
  const bool bias = args.bias != nullptr;
  const Grid grid{CeilDiv(args.shape.channels, kGradientChannels),
                  kMaxThreads,
                  1,
                  ChannelGradients(bias) * kMaxThreads * int64_t{sizeof(double)},
                  device.shared_bytes_per_block,
                  /*holds=*/false,
                  /*dependent=*/device.dependent_launches && args.shape.batch > 0};  // Else nothing of ours is before.
  return Launch(bias ? &AddSamples<T, true> : &AddSamples<T, false>, grid, stream,
                MakeLaunchArgs(args, plan, workspace));
}

}  // namespace

int Backward(const BackwardArgs& args, const Device& device, void* workspace, void* stream) {
  if (args.shape.channels == 0) return 0;
  return WithElementType(args.data_type,
                         [&](auto element) { return RunBackward<decltype(element)>(args, device, workspace, stream); });
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
