// One call's tasks, shared by the thread that needs them and those of a pool. Whose pool it is, is not known here.
//
// A pool's own parallel-for may leave all tasks to the pool and put the caller to sleep, and is called anew for every
// phase: on small tensors that was most of the time. Here the caller works too, threads are called once for all phases
// of a call, and nobody waits for a task that has not begun, so that callers may be the pool's own threads.

#ifndef TF_AGC_CC_CORE_JOB_H_
#define TF_AGC_CC_CORE_JOB_H_

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cc/core/parallel.h"

namespace tf_agc {
namespace core {

// Phases, each with its tasks in equal shares of neighbours, one share for each of `threads` threads. Who is done with
// a share helps with the next one, until no task of the phase is left. Phases without tasks are left out.
//
// A thread has the same share in every phase: where phases have the same tasks, it finds what its cache still holds.
class Job {
 public:
  // At most kMaxPhases, which are copied.
  Job(const Phase* phases, int count, int64_t threads) : threads_(static_cast<size_t>(threads)) {
    assert(count <= kMaxPhases);
    for (const Phase* phase = phases; phase < phases + count; ++phase) {
      if (phase->tasks > 0) phases_[count_++] = *phase;
    }
    shares_ = std::vector<Share>(static_cast<size_t>(count_) * threads_);
    for (int phase = 0; phase < count_; ++phase) {
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = ShareOf(phase, static_cast<size_t>(i));
        share.next = phases_[phase].tasks * i / threads;
        share.end = phases_[phase].tasks * (i + 1) / threads;
      }
    }
  }

  ~Job() { pthread_cond_destroy(&ended_changed_); }

  // Has all phases done, with those who help, as thread 0.
  void Run() {
    for (int phase = 0; phase < count_; ++phase) {
      TakeTasks(phase, 0);
      if (!EndsSoon(phase)) WaitForEnd(phase);
    }
  }

  // Takes and runs tasks, beginning with the shares of thread `own`, and leaves rather than wait for long. A thread
  // that comes too late touches nothing but this object.
  void Help(int64_t own) {
    for (int phase = 0; phase < count_ && (phase == 0 || EndsSoon(phase - 1)); ++phase) {
      TakeTasks(phase, static_cast<size_t>(own));
    }
  }

 private:
  // A few times what a chunk takes where many threads share the memory's bandwidth.
  static constexpr std::chrono::microseconds kSoon{100};

  // On a cache line of its own, or taking a task would disturb the others.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  Share& ShareOf(int phase, size_t thread) { return shares_[static_cast<size_t>(phase) * threads_ + thread]; }

  void TakeTasks(int phase, size_t own) {
    const Phase& work = phases_[phase];
    int64_t run = 0;
    for (size_t k = 0; k < threads_; ++k) {
      Share& share = ShareOf(phase, (own + k) % threads_);
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;  // Leaves the cache line where it is.
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end; ++run) {
        work.task(work.context, i);
      }
    }
    if (run == 0) return;
    if (done_[phase].fetch_add(run, std::memory_order_acq_rel) + run < work.tasks) return;
    // With the lock: or the waiting thread may miss it between its look at ended_ and its sleep.
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_.store(phase + 1, std::memory_order_release);
    pthread_cond_signal(&ended_changed_);
  }

  bool Ended(int phase) const { return ended_.load(std::memory_order_acquire) > phase; }

  // Waits for the tasks that other threads took, but not for long: they are running already and mostly end soon, and to
  // be woken takes longer than that.
  bool EndsSoon(int phase) const {
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < 16; ++i) {
        if (Ended(phase)) return true;
        Pause();
      }
    } while (std::chrono::steady_clock::now() - start < kSoon);
    return false;
  }

  void WaitForEnd(int phase) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!Ended(phase)) pthread_cond_wait(&ended_changed_, mutex_.native_handle());
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const size_t threads_;
  Phase phases_[kMaxPhases];
  int count_ = 0;
  std::vector<Share> shares_;  // [phases][threads].
  std::atomic<int64_t> done_[kMaxPhases] = {};
  std::atomic<int> ended_{0};  // How many phases have.
  std::mutex mutex_;
  // std::condition_variable::wait would need the C++ runtime of GCC 12.
  pthread_cond_t ended_changed_ = PTHREAD_COND_INITIALIZER;
};

// Below this, waking a thread costs more than it saves.
constexpr int64_t kCyclesPerThread = 40000;

// Parallel::run on the calling thread and on those of a pool of `threads` that come to help: schedule(function) hands
// the pool a function without arguments. The caller may be one of the pool's own threads, and all others may be
// callers, too: so it takes every task that nobody else has, and waits only for those that are running. Tasks do not
// throw, and schedule() nothing but std::bad_alloc.
template <class Schedule>
void RunPhases(const Phase* phases, int count, int64_t threads, const Schedule& schedule) {
  int64_t tasks = 0, cycles = 0;
  for (const Phase* phase = phases; phase < phases + count; ++phase) {
    tasks = std::max(tasks, phase->tasks);
    cycles += phase->tasks * phase->cycles;
  }
  const int64_t helpers = std::min({threads, tasks, cycles / kCyclesPerThread}) - 1;
  std::shared_ptr<Job> job;
  if (helpers > 0) {
    try {
      job = std::make_shared<Job>(phases, count, helpers + 1);
      for (int64_t i = 1; i <= helpers; ++i) schedule([job, i] { job->Help(i); });
    } catch (const std::bad_alloc&) {
      // Without memory for helpers, or for more of them, the caller does more of the work.
    }
  }
  if (job != nullptr) return job->Run();
  for (const Phase* phase = phases; phase < phases + count; ++phase) {
    for (int64_t i = 0; i < phase->tasks; ++i) phase->task(phase->context, i);
  }
}

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_JOB_H_
