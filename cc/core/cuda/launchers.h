// The launchers behind agc_cuda.h with the device's description as an argument: what tests call.

#ifndef TF_AGC_CC_CORE_CUDA_LAUNCHERS_H_
#define TF_AGC_CC_CORE_CUDA_LAUNCHERS_H_

#include <cstdint>

#include "cc/core/cuda/plan.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {

// Bytes, as in agc_cuda.h.
int64_t WorkspaceBytes(const ForwardArgs& args, const Device& device);
int64_t WorkspaceBytes(const BackwardArgs& args, const Device& device);

// Return a cudaError_t, as in agc_cuda.h.
int Forward(const ForwardArgs& args, const Device& device, void* workspace, void* stream);
int Backward(const BackwardArgs& args, const Device& device, void* workspace, void* stream);

// The plan of a call that is not empty.
Plan PlanOf(const ForwardArgs& args, const Device& device);
Plan PlanOf(const BackwardArgs& args, const Device& device);

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_LAUNCHERS_H_
