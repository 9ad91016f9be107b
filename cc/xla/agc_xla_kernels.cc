// XLA kernels of both ops: validate, then emit a custom call to cc/core where that can run, else XLA's own operations.
// No arithmetic here.
//
// Loading this registers them, also in a process where XLA has already started.

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
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

  auto ShapesOf() const {
    return [this](int input) -> const TensorShape& { return tensor_shapes[static_cast<size_t>(input)]; };
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

// A result of a call that is written over one of its operands. Where something else still needs the operand, XLA copies
// it before: choose one that is dead in nearly every network.
struct InPlace {
  int64_t result;
  int64_t operand;
};

// Emits the call `name` and returns its results.
std::vector<xla::XlaOp> Call(const char* name, const Attributes& attributes, const Inputs& inputs,
                             const std::vector<xla::Shape>& results, std::optional<InPlace> in_place) {
  std::vector<xla::Shape> operands;
  for (const xla::Shape& shape : inputs.shapes) operands.push_back(RowMajor(shape.element_type(), shape.dimensions()));
  std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>> aliases;
  if (in_place) aliases.push_back({{in_place->result}, {in_place->operand, {}}});
  const xla::XlaOp tuple = xla::CustomCallWithLayout(
      inputs.ops[0].builder(), name, inputs.ops, xla::ShapeUtil::MakeTupleShape(results), operands,
      xla_calls::FormatAttributes(attributes.activation, attributes.alpha, attributes.layout, attributes.has_bias),
      /*has_side_effect=*/false, aliases, /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
      xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
  std::vector<xla::XlaOp> elements;
  for (size_t i = 0; i < results.size(); ++i) {
    elements.push_back(xla::GetTupleElement(tuple, static_cast<int64_t>(i)));
  }
  return elements;
}

void SetOutputs(XlaOpKernelContext* context, const std::vector<xla::XlaOp>& outputs) {
  for (size_t i = 0; i < outputs.size(); ++i) context->SetOutput(static_cast<int>(i), outputs[i]);
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
    OP_REQUIRES_OK(context, CheckForwardInputs(attributes_, inputs.ShapesOf(), &shape));

    if (!CanCall(context, inputs)) {
      SetOutputs(context, hlo::Forward(attributes_, inputs.ops));
      return;
    }
    const auto maps_type = inputs.shapes[0].element_type(), parameter_type = inputs.shapes[1].element_type();
    std::optional<InPlace> in_place = InPlace{0, 0};
    // In training, the gradient of linear keeps x, and that of the convolution where a block begins keeps its shortcut.
    if (attributes_.activation == core::Activation::kLinear && attributes_.has_shortcut) in_place.reset();
    SetOutputs(context, Call(xla_calls::kForward, attributes_, inputs,
                             {RowMajor(maps_type, inputs.shapes[0].dimensions()),
                              RowMajor(parameter_type, {shape.batch, shape.channels})},
                             in_place));
  }

 private:
  Attributes attributes_;
};

class AgcGradXlaOp : public XlaOpKernel {
 public:
  explicit AgcGradXlaOp(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
    OP_REQUIRES_OK(
        context, CheckGradientShortcut(attributes_.activation == core::Activation::kLinear, attributes_.has_shortcut));
  }

  void Compile(XlaOpKernelContext* context) override {
    Inputs inputs;
    core::Shape shape;
    OP_REQUIRES_OK(context, inputs.Read(context));
    OP_REQUIRES_OK(context, CheckBackwardInputs(attributes_, inputs.ShapesOf(), &shape));

    if (!CanCall(context, inputs)) {
      SetOutputs(context, hlo::Backward(attributes_, inputs.ops));
      return;
    }
    const xla::Shape maps = RowMajor(inputs.shapes[2].element_type(), inputs.shapes[2].dimensions());
    const xla::Shape per_channel = RowMajor(inputs.shapes[4].element_type(), {shape.channels});
    std::vector<xla::Shape> results = {maps, per_channel, per_channel};
    if (attributes_.has_bias) results.push_back(per_channel);
    if (attributes_.has_shortcut) results.push_back(maps);
    // dy becomes dshortcut, or dx where there is none. With both, dx gets new memory: the gradients of the convolutions
    // that read kept and shortcut may run after this. A linear op keeps x, which nobody else reads as a rule, and its
    // dy may be the gradient of a shortcut as it is.
    InPlace in_place{0, 0};
    if (attributes_.has_shortcut) in_place.result = Optional(attributes_, 3).shortcut;
    if (attributes_.activation == core::Activation::kLinear) in_place.operand = 2;
    SetOutputs(context, Call(xla_calls::kBackward, attributes_, inputs, results, in_place));
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
