// The plan of a call, and the memory that it needs. The launches themselves are in launch_pass.h.

#include "cc/core/cuda/launchers.h"

#include <cstdint>

#include "cc/core/cuda/plan.h"
#include "cc/core/scheduling.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
bool Aligned(const ForwardArgs& args) { return Aligned(args.x) && Aligned(args.y) && Aligned(args.shortcut); }
bool Aligned(const BackwardArgs& args) {
  return Aligned(args.dy) && Aligned(args.kept) && Aligned(args.dx) && Aligned(args.shortcut) &&
         Aligned(args.dshortcut);
}

bool Empty(const Shape& shape) { return shape.batch == 0 || shape.channels == 0; }

template <class Args>
Call CallOf(Pass pass, const Args& args) {
  return {pass,          args.shape,           args.data_type,          Effective(args.activation, args.alpha),
          Aligned(args), args.bias != nullptr, args.shortcut != nullptr};
}

}  // namespace

Plan PlanOf(const ForwardArgs& args, const Device& device) { return MakePlan(CallOf(Pass::kForward, args), device); }
Plan PlanOf(const BackwardArgs& args, const Device& device) { return MakePlan(CallOf(Pass::kBackward, args), device); }

int64_t WorkspaceBytes(const ForwardArgs& args, const Device& device) {
  return Empty(args.shape) ? 0 : WorkspaceBytes(PlanOf(args, device));
}
int64_t WorkspaceBytes(const BackwardArgs& args, const Device& device) {
  return Empty(args.shape) ? 0 : WorkspaceBytes(PlanOf(args, device));
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
