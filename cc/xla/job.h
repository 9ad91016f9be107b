// One call's tasks, shared by the thread that needs them and those of a pool. No XLA here: it is tested alone.

#ifndef TF_AGC_CC_XLA_JOB_H_
#define TF_AGC_CC_XLA_JOB_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace tf_agc {
namespace xla_calls {

// Tasks that threads take from, until none are left.
class Job {
 public:
  Job(int64_t tasks, void (*task)(const void*, int64_t), const void* context)
      : tasks_(tasks), task_(task), context_(context) {}

  // Takes and runs tasks. A thread that comes too late touches nothing but this object.
  void Help() {
    int64_t run = 0;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_; ++run) task_(context_, i);
    if (run == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    done_ += run;
    if (done_ == tasks_) all_done_.notify_all();
  }

  // Waits for the tasks that other threads took.
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == tasks_; });
  }

 private:
  const int64_t tasks_;
  void (*const task_)(const void*, int64_t);
  const void* const context_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
  int64_t done_ = 0;
};

}  // namespace xla_calls
}  // namespace tf_agc

#endif  // TF_AGC_CC_XLA_JOB_H_
