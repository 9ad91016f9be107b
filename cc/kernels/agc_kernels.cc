// The CPU kernels: validate, find or allocate buffers, call cc/core. No arithmetic here.
//
// Eager execution runs no shape function, so everything is checked again.

#include <atomic>
#include <cmath>
#include <string>
#include <type_traits>

#include "cc/core/agc.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace tf_agc {
namespace {

using ::tensorflow::DEVICE_CPU;
using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

enum Counter {
  kForward,
  kForwardInPlace,
  kBackward,
  kBackwardOverDy,
  kBackwardOverKept,
  kCounters,
};

std::atomic<int64_t> counters[kCounters];

void Count(Counter counter) { counters[counter].fetch_add(1, std::memory_order_relaxed); }

template <class T>
constexpr core::DataType DataTypeOf() {
  if constexpr (std::is_same_v<T, Eigen::half>) return core::DataType::kHalf;
  if constexpr (std::is_same_v<T, Eigen::bfloat16>) return core::DataType::kBfloat16;
  if constexpr (std::is_same_v<T, double>) return core::DataType::kDouble;
  return core::DataType::kFloat;
}

// The attributes that both ops have.
struct Attributes {
  core::Activation activation = core::Activation::kLinear;
  float alpha = 0;
  core::Layout layout = core::Layout::kChannelsLast;

  absl::Status Read(OpKernelConstruction* context) {
    std::string name;
    TF_RETURN_IF_ERROR(context->GetAttr("activation", &name));
    if (name == "linear") {
      activation = core::Activation::kLinear;
    } else if (name == "relu") {
      activation = core::Activation::kRelu;
    } else if (name == "relu6") {
      activation = core::Activation::kRelu6;
    } else if (name == "leaky_relu") {
      activation = core::Activation::kLeakyRelu;
    } else if (name == "elu") {
      activation = core::Activation::kElu;
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("activation must be linear, relu, relu6, leaky_relu or elu, got ", name));
    }
    TF_RETURN_IF_ERROR(context->GetAttr("alpha", &alpha));
    if (!std::isfinite(alpha) || alpha < 0) {
      return absl::InvalidArgumentError(absl::StrCat("alpha must be finite and >= 0, got ", alpha));
    }
    TF_RETURN_IF_ERROR(context->GetAttr("data_format", &name));
    if (name != "N...C" && name != "NC...") {
      return absl::InvalidArgumentError(absl::StrCat("data_format must be N...C or NC..., got ", name));
    }
    layout = name == "N...C" ? core::Layout::kChannelsLast : core::Layout::kChannelsFirst;
    return absl::OkStatus();
  }
};

absl::Status ReadShape(const Tensor& maps, core::Layout layout, core::Shape* shape) {
  const int rank = maps.dims();
  if (rank < 3 || rank > 8) {
    return absl::InvalidArgumentError(absl::StrCat(
        "x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels), got shape ", maps.shape().DebugString()));
  }
  const int channel_axis = layout == core::Layout::kChannelsLast ? rank - 1 : 1;
  *shape = {maps.dim_size(0), 1, maps.dim_size(channel_axis), layout};
  for (int i = 1; i < rank; ++i) {
    if (i != channel_axis) shape->positions *= maps.dim_size(i);
  }
  if (shape->positions == 0 && shape->batch > 0) {
    return absl::InvalidArgumentError(absl::StrCat("x has no positions (a spatial size is 0) but a batch of ",
                                                   shape->batch, ": the mean of an empty map is undefined, got shape ",
                                                   maps.shape().DebugString()));
  }
  return absl::OkStatus();
}

absl::Status CheckPerChannel(const char* name, const Tensor& tensor, const core::Shape& shape) {
  if (tensor.dims() == 1 && tensor.dim_size(0) == shape.channels) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " must have shape [C] = [", shape.channels, "], got ", tensor.shape().DebugString()));
}

absl::Status CheckPerMap(const char* name, const Tensor& tensor, const core::Shape& shape) {
  if (tensor.dims() == 2 && tensor.dim_size(0) == shape.batch && tensor.dim_size(1) == shape.channels) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(name, " must have shape [N, C] = [", shape.batch, ",", shape.channels,
                                                 "], got ", tensor.shape().DebugString()));
}

// TensorFlow's own pool, behind the callback that cc/core knows.
core::Parallel ParallelOf(OpKernelContext* context) {
  const auto* workers = context->device()->tensorflow_cpu_worker_threads();
  auto run = [](void* pool, int64_t tasks, int64_t cycles, void (*task)(const void*, int64_t),
                const void* task_context) {
    using tensorflow::thread::ThreadPool;
    const auto by_cost = ThreadPool::SchedulingParams::Adaptive(cycles);
    static_cast<ThreadPool*>(pool)->ParallelFor(tasks, by_cost, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(task_context, i);
    });
  };
  return {workers->num_threads, workers->workers, run};
}

// A pointer to elements, also where there are none.
template <class T>
const T* Data(const Tensor& tensor) {
  return tensor.flat<T>().data();
}
template <class T>
T* Data(Tensor* tensor) {
  return tensor->flat<T>().data();
}

template <class T, class U>
class AgcOp : public OpKernel {
 public:
  explicit AgcOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    const Tensor& gain = context->input(1);
    const Tensor& mean_scale = context->input(2);
    core::Shape shape;
    OP_REQUIRES_OK(context, ReadShape(x, attributes_.layout, &shape));
    OP_REQUIRES_OK(context, CheckPerChannel("gain", gain, shape));
    OP_REQUIRES_OK(context, CheckPerChannel("mean_scale", mean_scale, shape));

    // x is dead after this op unless somebody else holds it, and TensorFlow knows.
    const T* x_data = Data<T>(x);
    const TensorShape x_shape = x.shape();
    Tensor* y = nullptr;
    Tensor* mean = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, x_shape, &y));
    OP_REQUIRES_OK(context, context->allocate_output(1, TensorShape({shape.batch, shape.channels}), &mean));

    T* y_data = Data<T>(y);
    Count(kForward);
    if (y_data == x_data && shape.batch > 0) Count(kForwardInPlace);
    core::Forward({shape, DataTypeOf<T>(), attributes_.activation, attributes_.alpha, x_data, Data<U>(gain),
                   Data<U>(mean_scale), y_data, Data<U>(mean)},
                  ParallelOf(context));
  }

 private:
  Attributes attributes_;
};

template <class T, class U>
class AgcGradOp : public OpKernel {
 public:
  explicit AgcGradOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& dy = context->input(0);
    const Tensor& dmean = context->input(1);
    const Tensor& kept = context->input(2);
    const Tensor& mean = context->input(3);
    const Tensor& gain = context->input(4);
    const Tensor& mean_scale = context->input(5);
    core::Shape shape;
    OP_REQUIRES_OK(context, ReadShape(kept, attributes_.layout, &shape));
    OP_REQUIRES(context, dy.shape() == kept.shape(),
                absl::InvalidArgumentError(absl::StrCat("dy must have the shape of kept ", kept.shape().DebugString(),
                                                        ", got ", dy.shape().DebugString())));
    OP_REQUIRES_OK(context, CheckPerMap("dmean", dmean, shape));
    OP_REQUIRES_OK(context, CheckPerMap("mean", mean, shape));
    OP_REQUIRES_OK(context, CheckPerChannel("gain", gain, shape));
    OP_REQUIRES_OK(context, CheckPerChannel("mean_scale", mean_scale, shape));

    const T* dy_data = Data<T>(dy);
    const T* kept_data = Data<T>(kept);
    const TensorShape maps_shape = kept.shape();
    Tensor* dx = nullptr;
    Tensor* dgain = nullptr;
    Tensor* dmean_scale = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0, 2}, 0, maps_shape, &dx));
    OP_REQUIRES_OK(context, context->allocate_output(1, TensorShape({shape.channels}), &dgain));
    OP_REQUIRES_OK(context, context->allocate_output(2, TensorShape({shape.channels}), &dmean_scale));

    T* dx_data = Data<T>(dx);
    Count(kBackward);
    if (dx_data == dy_data && shape.batch > 0) Count(kBackwardOverDy);
    if (dx_data == kept_data && shape.batch > 0) Count(kBackwardOverKept);
    core::Backward(
        {shape, DataTypeOf<T>(), attributes_.activation, attributes_.alpha, dy_data, Data<U>(dmean), kept_data,
         Data<U>(mean), Data<U>(gain), Data<U>(mean_scale), dx_data, Data<U>(dgain), Data<U>(dmean_scale)},
        ParallelOf(context));
  }

 private:
  Attributes attributes_;
};

#define TF_AGC_REGISTER(T, U)                                                                                     \
  REGISTER_KERNEL_BUILDER(Name("TfAgc>Agc").Device(DEVICE_CPU).TypeConstraint<T>("T").TypeConstraint<U>("U"),     \
                          AgcOp<T, U>);                                                                           \
  REGISTER_KERNEL_BUILDER(Name("TfAgc>AgcGrad").Device(DEVICE_CPU).TypeConstraint<T>("T").TypeConstraint<U>("U"), \
                          AgcGradOp<T, U>)

TF_AGC_REGISTER(Eigen::half, float);
TF_AGC_REGISTER(Eigen::bfloat16, float);
TF_AGC_REGISTER(float, float);
TF_AGC_REGISTER(double, double);
#undef TF_AGC_REGISTER

}  // namespace
}  // namespace tf_agc

// ---- For tests and `python -m tf_agc`, through ctypes ----

extern "C" {

// Writes the first n of: forward calls, those that wrote over x, backward calls, those that wrote over dy, over what
// was kept. Returns how many there are.
int TfAgcCounters(int64_t* values, int n) {
  for (int i = 0; i < n && i < tf_agc::kCounters; ++i) values[i] = tf_agc::counters[i].load(std::memory_order_relaxed);
  return tf_agc::kCounters;
}

void TfAgcResetCounters() {
  for (auto& counter : tf_agc::counters) counter.store(0, std::memory_order_relaxed);
}

// The instruction-set level in use, "x86-64-v4" for one.
const char* TfAgcInstructionSet() { return tf_agc::core::InstructionSetName(tf_agc::core::BestInstructionSet()); }
}
