// The forward pass's launcher.

#include <cstdint>

#include "cc/core/cuda/forward_pass.h"
#include "cc/core/cuda/kernels.h"
#include "cc/core/cuda/launch_pass.h"
#include "cc/core/cuda/launchers.h"
#include "cc/core/cuda/plan.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

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
