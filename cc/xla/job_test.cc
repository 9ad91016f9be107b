// Threads that come early, late and not at all. Built with ThreadSanitizer too (tools/sanitize.sh).

#include "cc/xla/job.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace tf_agc {
namespace xla_calls {
namespace {

// What a task writes has no lock of its own: Wait must be enough for the reader.
struct Written {
  explicit Written(int64_t tasks) : times(static_cast<size_t>(tasks)) {}
  static void Task(const void* context, int64_t index) {
    ++(*static_cast<std::vector<int>*>(const_cast<void*>(context)))[static_cast<size_t>(index)];
  }
  void ExpectOnce() const {
    for (int count : times) EXPECT_EQ(count, 1);
  }
  std::vector<int> times;
};

TEST(Job, EachTaskOnceWhateverTheThreads) {
  for (int64_t tasks : {0, 1, 2, 7, 1000}) {
    for (int threads : {0, 1, 3, 8}) {
      Written written(tasks);
      const auto job = std::make_shared<Job>(tasks, Written::Task, &written.times);
      std::vector<std::thread> pool;
      for (int i = 0; i < threads; ++i) pool.emplace_back([job] { job->Help(); });
      job->Help();
      job->Wait();
      written.ExpectOnce();
      for (std::thread& thread : pool) thread.join();
      written.ExpectOnce();
    }
  }
}

TEST(Job, WhoComesAfterTheEndTouchesNothingElse) {
  std::function<void()> late;
  {
    const auto written = std::make_unique<Written>(5);
    const auto job = std::make_shared<Job>(5, Written::Task, &written->times);
    late = [job] { job->Help(); };
    job->Help();
    job->Wait();
    written->ExpectOnce();
  }
  // The tasks' memory is gone: AddressSanitizer would see a use of it.
  std::thread(late).join();
}

TEST(Job, CallersThatAreThePool) {
  // Every thread has a job of its own and helps with all others, as XLA's threads may.
  constexpr int kThreads = 8;
  std::vector<std::unique_ptr<Written>> written;
  std::vector<std::shared_ptr<Job>> jobs;
  for (int i = 0; i < kThreads; ++i) {
    written.push_back(std::make_unique<Written>(200));
    jobs.push_back(std::make_shared<Job>(200, Written::Task, &written.back()->times));
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int other = 1; other < kThreads; ++other) jobs[static_cast<size_t>((i + other) % kThreads)]->Help();
      jobs[static_cast<size_t>(i)]->Help();
      jobs[static_cast<size_t>(i)]->Wait();
      written[static_cast<size_t>(i)]->ExpectOnce();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace xla_calls
}  // namespace tf_agc
