// What cc/core asks of whoever has threads. Plain data.

#ifndef TF_AGC_CC_CORE_PARALLEL_H_
#define TF_AGC_CC_CORE_PARALLEL_H_

#include <cstdint>

namespace tf_agc {
namespace core {

// Independent tasks: task(context, i), once for every i in [0, tasks), on any threads. `cycles` estimates one of them.
struct Phase {
  int64_t tasks;
  int64_t cycles;
  void (*task)(const void* context, int64_t index);
  const void* context;
};

// A call has at most this many phases.
constexpr int kMaxPhases = 3;

// How to run tasks at once. `run` has all tasks of phases[0] done, then all those of phases[1], and so on to
// phases[count - 1], and returns when the last one is done: what a phase writes, the next one may read.
struct Parallel {
  int threads;
  void* pool;
  void (*run)(void* pool, const Phase* phases, int count);
  int64_t cycles_per_thread = 0;  // Below this, `run` leaves out a thread: threads then share no map.
};

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_PARALLEL_H_
