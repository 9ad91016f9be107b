// The CPU kernels: validate, find or allocate buffers, call cc/core. No arithmetic here.
//
// Eager execution runs no shape function, so everything is checked again.

#include <atomic>
#include <type_traits>

#include "cc/core/agc.h"
#include "cc/kernels/arguments.h"
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
    OP_REQUIRES_OK(context, ReadShape(x.shape(), attributes_.layout, &shape));
    OP_REQUIRES_OK(context, CheckPerChannel("gain", gain.shape(), shape));
    OP_REQUIRES_OK(context, CheckPerChannel("mean_scale", mean_scale.shape(), shape));

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
    OP_REQUIRES_OK(context, ReadShape(kept.shape(), attributes_.layout, &shape));
    OP_REQUIRES_OK(context, CheckDy(dy.shape(), kept.shape()));
    OP_REQUIRES_OK(context, CheckPerMap("dmean", dmean.shape(), shape));
    OP_REQUIRES_OK(context, CheckPerMap("mean", mean.shape(), shape));
    OP_REQUIRES_OK(context, CheckPerChannel("gain", gain.shape(), shape));
    OP_REQUIRES_OK(context, CheckPerChannel("mean_scale", mean_scale.shape(), shape));

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
