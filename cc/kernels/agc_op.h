// Both OpKernels, for any device: validate, find or allocate buffers, call the device's arithmetic. None of it here.
//
// Eager execution runs no shape function, so everything is checked again.

#ifndef TF_AGC_CC_KERNELS_AGC_OP_H_
#define TF_AGC_CC_KERNELS_AGC_OP_H_

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "absl/types/span.h"
#include "cc/core/types.h"
#include "cc/kernels/arguments.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"

namespace tf_agc {

// Calls of either device, for tests.
enum Counter {
  kForward,
  kForwardInPlace,
  kBackward,
  kBackwardOverDy,
  kBackwardOverKept,
  kForwardOverShortcut,
  kShortcutGradientOverDy,
  kCounters,
};

inline std::atomic<int64_t> counters[kCounters];

inline void Count(Counter counter) { counters[counter].fetch_add(1, std::memory_order_relaxed); }

template <class T>
constexpr core::DataType DataTypeOf() {
  if constexpr (std::is_same_v<T, Eigen::half>) return core::DataType::kHalf;
  if constexpr (std::is_same_v<T, Eigen::bfloat16>) return core::DataType::kBfloat16;
  if constexpr (std::is_same_v<T, double>) return core::DataType::kDouble;
  return core::DataType::kFloat;
}

// A pointer to elements, also where there are none.
template <class T>
const T* Data(const tensorflow::Tensor& tensor) {
  return tensor.flat<T>().data();
}
template <class T>
T* Data(tensorflow::Tensor* tensor) {
  return tensor->flat<T>().data();
}

// The pointer of an optional input, null where it is absent.
template <class T>
const T* OptionalData(tensorflow::OpKernelContext* context, int input) {
  return input < 0 ? nullptr : Data<T>(context->input(input));
}

// The shape of an input, by its number.
inline auto ShapesOf(tensorflow::OpKernelContext* context) {
  return [context](int input) -> const tensorflow::TensorShape& { return context->input(input).shape(); };
}

// Device has two static functions,
//
//   absl::Status Forward(OpKernelContext*, const core::ForwardArgs&)
//   absl::Status Backward(OpKernelContext*, const core::BackwardArgs&)
//
// which may return before the results are there, as far as TensorFlow's kernels on that device may.
template <class Device, class T, class U>
class AgcOp : public tensorflow::OpKernel {
 public:
  explicit AgcOp(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    const tensorflow::Tensor& x = context->input(0);
    const tensorflow::Tensor& gain = context->input(1);
    const tensorflow::Tensor& mean_scale = context->input(2);
    core::Shape shape;
    OP_REQUIRES_OK(context, CheckForwardInputs(attributes_, ShapesOf(context), &shape));
    const Optional inputs(attributes_, 3);

    // x is dead after this op unless somebody else holds it, and so is shortcut; TensorFlow knows.
    const T* x_data = Data<T>(x);
    const U* bias_data = OptionalData<U>(context, inputs.bias);
    const T* shortcut_data = OptionalData<T>(context, inputs.shortcut);
    const tensorflow::TensorShape x_shape = x.shape();
    const int dead[] = {0, inputs.shortcut};
    tensorflow::Tensor* y = nullptr;
    tensorflow::Tensor* mean = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                absl::MakeConstSpan(dead, attributes_.has_shortcut ? 2 : 1), 0, x_shape, &y));
    OP_REQUIRES_OK(context, context->allocate_output(1, {shape.batch, shape.channels}, &mean));

    T* y_data = Data<T>(y);
    Count(kForward);
    if (y_data == x_data && shape.batch > 0) Count(kForwardInPlace);
    if (attributes_.has_shortcut && y_data == shortcut_data && shape.batch > 0) Count(kForwardOverShortcut);
    OP_REQUIRES_OK(context, Device::Forward(context, {shape, DataTypeOf<T>(), attributes_.activation, attributes_.alpha,
                                                      x_data, Data<U>(gain), Data<U>(mean_scale), y_data, Data<U>(mean),
                                                      bias_data, shortcut_data}));
  }

 private:
  Attributes attributes_;
};

template <class Device, class T, class U>
class AgcGradOp : public tensorflow::OpKernel {
 public:
  explicit AgcGradOp(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
    OP_REQUIRES_OK(
        context, CheckGradientShortcut(attributes_.activation == core::Activation::kLinear, attributes_.has_shortcut));
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    const tensorflow::Tensor& dy = context->input(0);
    const tensorflow::Tensor& dmean = context->input(1);
    const tensorflow::Tensor& kept = context->input(2);
    const tensorflow::Tensor& mean = context->input(3);
    const tensorflow::Tensor& gain = context->input(4);
    const tensorflow::Tensor& mean_scale = context->input(5);
    core::Shape shape;
    OP_REQUIRES_OK(context, CheckBackwardInputs(attributes_, ShapesOf(context), &shape));
    const Optional inputs(attributes_, 6), outputs(attributes_, 3);

    const T* dy_data = Data<T>(dy);
    const T* kept_data = Data<T>(kept);
    const U* bias_data = OptionalData<U>(context, inputs.bias);
    const T* shortcut_data = OptionalData<T>(context, inputs.shortcut);
    const tensorflow::TensorShape maps_shape = kept.shape();
    tensorflow::Tensor* dx = nullptr;
    tensorflow::Tensor* dgain = nullptr;
    tensorflow::Tensor* dmean_scale = nullptr;
    tensorflow::Tensor* dbias = nullptr;
    tensorflow::Tensor* dshortcut = nullptr;
    int dead[] = {0, 2};
    if (attributes_.has_shortcut) {
      // dy becomes dshortcut, which it is but for where the activation is flat; that leaves shortcut and kept for dx.
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, outputs.shortcut, maps_shape, &dshortcut));
      dead[0] = inputs.shortcut;
    }
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(dead, 0, maps_shape, &dx));
    if (attributes_.has_bias) {
      OP_REQUIRES_OK(context, context->allocate_output(outputs.bias, {shape.channels}, &dbias));
    }
    OP_REQUIRES_OK(context, context->allocate_output(1, {shape.channels}, &dgain));
    OP_REQUIRES_OK(context, context->allocate_output(2, {shape.channels}, &dmean_scale));

    T* dx_data = Data<T>(dx);
    Count(kBackward);
    if (dx_data == dy_data && shape.batch > 0) Count(kBackwardOverDy);
    if (dx_data == kept_data && shape.batch > 0) Count(kBackwardOverKept);
    T* dshortcut_data = dshortcut == nullptr ? nullptr : Data<T>(dshortcut);
    if (attributes_.has_shortcut && dshortcut_data == dy_data && shape.batch > 0) Count(kShortcutGradientOverDy);
    OP_REQUIRES_OK(context, Device::Backward(
                                context, {shape, DataTypeOf<T>(), attributes_.activation, attributes_.alpha, dy_data,
                                          Data<U>(dmean), kept_data, Data<U>(mean), Data<U>(gain), Data<U>(mean_scale),
                                          dx_data, Data<U>(dgain), Data<U>(dmean_scale), bias_data, shortcut_data,
                                          dbias == nullptr ? nullptr : Data<U>(dbias), dshortcut_data}));
  }

 private:
  Attributes attributes_;
};

}  // namespace tf_agc

#define TF_AGC_REGISTER_TYPE(DEVICE_TYPE, Kernels, T, U)                                                           \
  REGISTER_KERNEL_BUILDER(Name("TfAgc>Agc").Device(DEVICE_TYPE).TypeConstraint<T>("T").TypeConstraint<U>("U"),     \
                          ::tf_agc::AgcOp<Kernels, T, U>);                                                         \
  REGISTER_KERNEL_BUILDER(Name("TfAgc>AgcGrad").Device(DEVICE_TYPE).TypeConstraint<T>("T").TypeConstraint<U>("U"), \
                          ::tf_agc::AgcGradOp<Kernels, T, U>)

// Both ops for every type, the same ones on every device: soft placement must never move an op for its type.
#define TF_AGC_REGISTER(DEVICE_TYPE, Kernels)                         \
  TF_AGC_REGISTER_TYPE(DEVICE_TYPE, Kernels, Eigen::half, float);     \
  TF_AGC_REGISTER_TYPE(DEVICE_TYPE, Kernels, Eigen::bfloat16, float); \
  TF_AGC_REGISTER_TYPE(DEVICE_TYPE, Kernels, float, float);           \
  TF_AGC_REGISTER_TYPE(DEVICE_TYPE, Kernels, double, double)

#endif  // TF_AGC_CC_KERNELS_AGC_OP_H_
