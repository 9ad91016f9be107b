// XLA kernels of both ops: validate, then emit a custom call to cc/core where that can run, else XLA's own operations.
// No arithmetic here.
//
// Loading this registers them, also in a process where XLA has already started.

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/log/log.h"
#include "cc/kernels/arguments.h"
#include "cc/xla/custom_call.h"
#include "cc/xla/hlo.h"
#include "tensorflow/compiler/tf2xla/shape_util.h"
#include "tensorflow/compiler/tf2xla/xla_compiler.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/kernel_def.pb.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
#include "xla/client/compile_only_client.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

namespace tf_agc {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::KernelDefBuilder;
using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;
using ::tensorflow::XlaOpRegistrar;
using ::tensorflow::XlaOpRegistrationBuilder;
using ::tensorflow::XlaOpRegistry;
using ::tensorflow::kernel_factory::OpKernelRegistrar;

// Whether the calls are known to XLA, on the CPU and on GPUs. Set once, while the library is loaded; tests of XLA's own
// operations take the second back.
bool custom_calls_registered = false;
std::atomic<bool> gpu_calls_registered{false};

// An op's inputs as XLA knows them.
struct Inputs {
  std::vector<xla::XlaOp> ops;
  std::vector<xla::Shape> shapes;
  std::vector<TensorShape> tensor_shapes;

  absl::Status Read(XlaOpKernelContext* context) {
    for (int i = 0; i < context->num_inputs(); ++i) {
      ops.push_back(context->Input(i));
      TF_ASSIGN_OR_RETURN(shapes.emplace_back(), context->InputXlaShape(i));
      TF_RETURN_IF_ERROR(tensorflow::XLAShapeToTensorShape(shapes.back(), &tensor_shapes.emplace_back()));
    }
    return absl::OkStatus();
  }
};

// Whether the program will run in a process that has our calls, with maps whose sizes are known.
bool CanCall(XlaOpKernelContext* context, const Inputs& inputs) {
  const auto& options = context->compiler()->options();
  const bool ahead_of_time = dynamic_cast<xla::CompileOnlyClient*>(options.client) != nullptr;
  const bool on_gpu = options.device_type.type_string() == tensorflow::DEVICE_GPU_XLA_JIT;
  const bool registered =
      on_gpu ? gpu_calls_registered.load() : custom_calls_registered && options.allow_cpu_custom_calls;
  return registered && !ahead_of_time &&
         absl::c_all_of(inputs.shapes, [](const xla::Shape& shape) { return shape.is_static(); });
}

xla::Shape RowMajor(xla::PrimitiveType type, absl::Span<const int64_t> sizes) {
  return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, sizes);
}

// Emits the call `name`, whose first result is written over its first operand: XLA copies the operand before, where
// something else still needs it.
xla::XlaOp Call(const char* name, const Attributes& attributes, const Inputs& inputs, std::vector<xla::Shape> results) {
  std::vector<xla::Shape> operands;
  for (const xla::Shape& shape : inputs.shapes) operands.push_back(RowMajor(shape.element_type(), shape.dimensions()));
  // Result {0} over the whole of operand 0.
  std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>> aliases(1);
  aliases[0].first.push_back(0);
  return xla::CustomCallWithLayout(
      inputs.ops[0].builder(), name, inputs.ops, xla::ShapeUtil::MakeTupleShape(results), operands,
      xla_calls::FormatAttributes(attributes.activation, attributes.alpha, attributes.layout),
      /*has_side_effect=*/false, aliases, /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
      xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
}

class AgcXlaOp : public XlaOpKernel {
 public:
  explicit AgcXlaOp(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
  }

  void Compile(XlaOpKernelContext* context) override {
    Inputs inputs;
    core::Shape shape;
    OP_REQUIRES_OK(context, inputs.Read(context));
    OP_REQUIRES_OK(context, ReadShape(inputs.tensor_shapes[0], attributes_.layout, &shape));
    OP_REQUIRES_OK(context, CheckPerChannel("gain", inputs.tensor_shapes[1], shape));
    OP_REQUIRES_OK(context, CheckPerChannel("mean_scale", inputs.tensor_shapes[2], shape));

    if (!CanCall(context, inputs)) {
      const hlo::ForwardResults results = hlo::Forward(attributes_, inputs.ops[0], inputs.ops[1], inputs.ops[2]);
      context->SetOutput(0, results.y);
      context->SetOutput(1, results.mean);
      return;
    }
    const auto maps_type = inputs.shapes[0].element_type(), parameter_type = inputs.shapes[1].element_type();
    const xla::XlaOp results = Call(
        xla_calls::kForward, attributes_, inputs,
        {RowMajor(maps_type, inputs.shapes[0].dimensions()), RowMajor(parameter_type, {shape.batch, shape.channels})});
    for (int i = 0; i < 2; ++i) context->SetOutput(i, xla::GetTupleElement(results, i));
  }

 private:
  Attributes attributes_;
};

class AgcGradXlaOp : public XlaOpKernel {
 public:
  explicit AgcGradXlaOp(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
  }

  void Compile(XlaOpKernelContext* context) override {
    Inputs inputs;
    core::Shape shape;
    OP_REQUIRES_OK(context, inputs.Read(context));
    const TensorShape& kept = inputs.tensor_shapes[2];
    OP_REQUIRES_OK(context, ReadShape(kept, attributes_.layout, &shape));
    OP_REQUIRES_OK(context, CheckDy(inputs.tensor_shapes[0], kept));
    OP_REQUIRES_OK(context, CheckPerMap("dmean", inputs.tensor_shapes[1], shape));
    OP_REQUIRES_OK(context, CheckPerMap("mean", inputs.tensor_shapes[3], shape));
    OP_REQUIRES_OK(context, CheckPerChannel("gain", inputs.tensor_shapes[4], shape));
    OP_REQUIRES_OK(context, CheckPerChannel("mean_scale", inputs.tensor_shapes[5], shape));

    if (!CanCall(context, inputs)) {
      const auto& ops = inputs.ops;
      const hlo::BackwardResults results = hlo::Backward(attributes_, ops[0], ops[1], ops[2], ops[3], ops[4], ops[5]);
      context->SetOutput(0, results.dx);
      context->SetOutput(1, results.dgain);
      context->SetOutput(2, results.dmean_scale);
      return;
    }
    const auto maps_type = inputs.shapes[2].element_type(), parameter_type = inputs.shapes[4].element_type();
    const xla::XlaOp results =
        Call(xla_calls::kBackward, attributes_, inputs,
             {RowMajor(maps_type, inputs.shapes[2].dimensions()), RowMajor(parameter_type, {shape.channels}),
              RowMajor(parameter_type, {shape.channels})});
    for (int i = 0; i < 3; ++i) context->SetOutput(i, xla::GetTupleElement(results, i));
  }

 private:
  Attributes attributes_;
};

// ---- Registration ----

template <class Kernel>
OpKernel* Create(OpKernelConstruction* context) {
  return new Kernel(context);
}

bool HasXlaKernel(const char* op) {
  const tensorflow::KernelList kernels = tensorflow::GetRegisteredKernelsForOp(op);
  return absl::c_any_of(kernels.kernel(), [](const tensorflow::KernelDef& kernel) {
    return kernel.device_type() == tensorflow::DEVICE_CPU_XLA_JIT;
  });
}

void RegisterOp(const char* op, OpKernel* (*create)(OpKernelConstruction*)) {
  XlaOpRegistrar registrar(XlaOpRegistrationBuilder::Name(op).Build(create));
  // XLA reads its registry once, when the first program of a process is compiled, and makes a TensorFlow kernel of
  // every entry for every backend. Where that has happened, as a stock op shows, it is left to us.
  if (!HasXlaKernel("AddV2") || HasXlaKernel(op)) return;
  for (const std::string& backend : XlaOpRegistry::BackendNames()) {
    const std::vector<DataType> types = {tensorflow::DT_HALF, tensorflow::DT_BFLOAT16, tensorflow::DT_FLOAT,
                                         tensorflow::DT_DOUBLE};
    OpKernelRegistrar late(KernelDefBuilder(op).Device(backend.c_str()).TypeConstraint("T", types).Build(), op, create);
  }
}

bool Register() {
  // A second copy of this library in the same process: XLA would abort it.
  if (absl::c_linear_search(XlaOpRegistry::GetAllRegisteredOps(), "TfAgc>Agc")) return false;
  const std::string error = xla_calls::Register();
  custom_calls_registered = error.empty();
  if (!error.empty()) LOG(WARNING) << "tf_agc computes in XLA's own operations, its kernels are refused: " << error;
  gpu_calls_registered = xla_calls::RegisterOnGpu().empty();
  RegisterOp("TfAgc>Agc", Create<AgcXlaOp>);
  RegisterOp("TfAgc>AgcGrad", Create<AgcGradXlaOp>);
  return true;
}

const bool registered = Register();

}  // namespace
}  // namespace tf_agc

// ---- For tests, through ctypes ----

// Whether programs for GPUs make our calls from now on; where they cannot, they never do. Returns whether they did.
extern "C" int TfAgcXlaUseGpuCalls(int use) {
  static const bool can = tf_agc::gpu_calls_registered.load();
  return tf_agc::gpu_calls_registered.exchange(use != 0 && can);
}
