// The CPU kernels: TensorFlow's thread pool behind the callback that cc/core knows. No arithmetic here.

#include <atomic>
#include <cstdint>
#include <utility>

#include "cc/core/agc.h"
#include "cc/core/job.h"
#include "cc/kernels/agc_op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace tf_agc {
namespace {

// Not the pool's own ParallelFor: where tasks outnumber threads, it has all of them done by the pool, and the calling
// thread sleeps and must be woken.
core::Parallel ParallelOf(tensorflow::OpKernelContext* context) {
  const auto* workers = context->device()->tensorflow_cpu_worker_threads();
  auto run = [](void* pool, const core::Phase* phases, int count) {
    auto* threads = static_cast<tensorflow::thread::ThreadPool*>(pool);
    core::RunPhases(phases, count, threads->NumThreads(), [&](auto help) { threads->Schedule(std::move(help)); });
  };
  return {workers->num_threads, workers->workers, run, core::kCyclesPerThread};
}

struct Cpu {
  static absl::Status Forward(tensorflow::OpKernelContext* context, const core::ForwardArgs& args) {
    return StatusOf(core::Forward(args, ParallelOf(context)));
  }

  static absl::Status Backward(tensorflow::OpKernelContext* context, const core::BackwardArgs& args) {
    return StatusOf(core::Backward(args, ParallelOf(context)));
  }

 private:
  static absl::Status StatusOf(bool computed) {
    if (computed) return absl::OkStatus();
    return absl::ResourceExhaustedError("tf_agc got no memory for its sums");
  }
};

TF_AGC_REGISTER(tensorflow::DEVICE_CPU, Cpu);

}  // namespace
}  // namespace tf_agc

// ---- For tests and `python -m tf_agc`, through ctypes ----

extern "C" {

// Writes the first n of: forward calls, those that wrote over x, backward calls, those that wrote dx over dy, over what
// was kept, forward calls that wrote over shortcut, backward calls that wrote dshortcut over dy. Returns how many there
// are.
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
