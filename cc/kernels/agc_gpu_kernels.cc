// The GPU kernels: stream, workspace and errors around the launchers of cc/core/cuda. No arithmetic here, and no CUDA
// header: the host compiler alone compiles this.

#include <cstdint>

#include "cc/core/cuda/agc_cuda.h"
#include "cc/core/types.h"
#include "cc/kernels/agc_op.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/stream_executor/stream.h"

namespace tf_agc {
namespace {

// Calls one of the launchers on the op's stream, with the workspace that it asks for.
template <class Args>
absl::Status Launch(tensorflow::OpKernelContext* context, const char* pass, const Args& args,
                    int64_t (*workspace_bytes)(const Args*), int (*launch)(const Args*, void*, void*)) {
  auto* device = context->op_device_context();
  auto* stream = device == nullptr ? nullptr : device->stream();
  if (stream == nullptr) return absl::InternalError(absl::StrCat("the ", pass, " pass has no GPU stream to run on"));

  // Given back when this returns, before the launch has run: TensorFlow hands it out again on the same stream only.
  // Where its size cannot be told (-1), the launch says why.
  tensorflow::Tensor workspace;
  const int64_t bytes = workspace_bytes(&args);
  if (bytes > 0) TF_RETURN_IF_ERROR(context->allocate_temp(tensorflow::DT_UINT8, {bytes}, &workspace));

  const int error = launch(&args, bytes > 0 ? workspace.data() : nullptr, stream->platform_specific_handle().stream);
  if (error == 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the ", pass, " pass could not be launched: ", TfAgcCudaErrorString(error),
                                          " (CUDA error ", error, ")"));
}

struct Gpu {
  static absl::Status Forward(tensorflow::OpKernelContext* context, const core::ForwardArgs& args) {
    return Launch(context, "forward", args, TfAgcCudaForwardWorkspaceBytes, TfAgcCudaForward);
  }

  static absl::Status Backward(tensorflow::OpKernelContext* context, const core::BackwardArgs& args) {
    return Launch(context, "backward", args, TfAgcCudaBackwardWorkspaceBytes, TfAgcCudaBackward);
  }
};

// Not with a driver that is too old for them: TensorFlow then leaves the ops on the CPU, and importing tf_agc warns.
[[maybe_unused]] const bool registered = [] {
  if (TfAgcCudaProblem()[0] != '\0') return false;
  TF_AGC_REGISTER(tensorflow::DEVICE_GPU, Gpu);
  return true;
}();

}  // namespace
}  // namespace tf_agc
