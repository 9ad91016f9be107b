// One call's tasks, shared by the thread that needs them and those of a pool. Whose pool it is, is not known here.

#ifndef TF_AGC_CC_CORE_JOB_H_
#define TF_AGC_CC_CORE_JOB_H_

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace tf_agc {
namespace core {

// Tasks in equal shares of neighbours, one share for each of `threads` threads. Who is done with a share helps with the
// next one, until no task is left.
class Job {
 public:
  Job(int64_t tasks, int64_t threads, void (*task)(const void*, int64_t), const void* context)
      : tasks_(tasks), task_(task), context_(context), shares_(static_cast<size_t>(threads)) {
    for (int64_t i = 0; i < threads; ++i) {
      shares_[static_cast<size_t>(i)].next = tasks * i / threads;
      shares_[static_cast<size_t>(i)].end = tasks * (i + 1) / threads;
    }
  }

  ~Job() { pthread_cond_destroy(&all_done_); }

  // Takes and runs tasks, beginning with the share of thread `own`. A thread that comes too late touches nothing but
  // this object.
  void Help(int64_t own) {
    int64_t run = 0;
    for (size_t k = 0; k < shares_.size(); ++k) {
      Share& share = shares_[(static_cast<size_t>(own) + k) % shares_.size()];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end; ++run) task_(context_, i);
    }
    if (run == 0) return;
    if (done_.fetch_add(run, std::memory_order_acq_rel) + run < tasks_) return;
    // With the lock: or the waiting thread may miss it between its look at done_ and its sleep.
    const std::lock_guard<std::mutex> lock(mutex_);
    pthread_cond_signal(&all_done_);
  }

  // Waits for the tasks that other threads took.
  void Wait() {
    // They are running already and mostly end soon, and to be woken takes longer than that.
    for (int i = 0; i < kSpins; ++i) {
      if (Done()) return;
      Pause();
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!Done()) pthread_cond_wait(&all_done_, mutex_.native_handle());
  }

 private:
  static constexpr int kSpins = 1000;  // Some tens of microseconds at most.

  // On a cache line of its own, or taking a task would disturb the others.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  bool Done() const { return done_.load(std::memory_order_acquire) == tasks_; }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int64_t tasks_;
  void (*const task_)(const void*, int64_t);
  const void* const context_;
  std::vector<Share> shares_;
  std::atomic<int64_t> done_{0};
  std::mutex mutex_;
  // std::condition_variable::wait would need the C++ runtime of GCC 12.
  pthread_cond_t all_done_ = PTHREAD_COND_INITIALIZER;
};

// Runs all tasks, of about `cycles` each, on the calling thread and on those of a pool of `threads` that come to help:
// schedule(function) hands the pool a function without arguments. The caller may be one of the pool's own threads, and
// all others may be callers, too: so it takes every task that nobody else has, and waits only for those that are
// running.
template <class Schedule>
void RunTasks(int64_t tasks, int64_t cycles, int64_t threads, void (*task)(const void*, int64_t), const void* context,
              const Schedule& schedule) {
  constexpr int64_t kCyclesPerThread = 40000;  // Below this, waking a thread costs more than it saves.
  const int64_t worthwhile = std::min(tasks, tasks * cycles / kCyclesPerThread);
  const int64_t helpers = std::min(threads, worthwhile) - 1;
  std::shared_ptr<Job> job;
  if (helpers > 0) {
    try {
      job = std::make_shared<Job>(tasks, helpers + 1, task, context);
      for (int64_t i = 1; i <= helpers; ++i) schedule([job, i] { job->Help(i); });
    } catch (const std::bad_alloc&) {
      // Without memory for helpers, or for more of them, the caller does more of the work.
    }
  }
  if (job == nullptr) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i);
    return;
  }
  job->Help(0);
  job->Wait();
}

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_JOB_H_
