// Threads that come early, late and not at all. Built with ThreadSanitizer too (tools/sanitize.sh).

#include "cc/core/job.h"

#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
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

TEST(Job, EachTaskOnceWhoeverComes) {
  for (int64_t tasks : {0, 1, 2, 7, 1000}) {
    for (int others : {0, 1, 3, 8}) {
      Written written(tasks);
      const auto job = std::make_shared<Job>(tasks, 9, Written::Task, &written.times);
      std::vector<std::thread> pool;
      for (int i = 1; i <= others; ++i) pool.emplace_back([job, i] { job->Help(i); });
      job->Help(0);
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
    const auto job = std::make_shared<Job>(5, 2, Written::Task, &written->times);
    late = [job] { job->Help(1); };
    job->Help(0);
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
    jobs.push_back(std::make_shared<Job>(200, kThreads, Written::Task, &written.back()->times));
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int other = 1; other < kThreads; ++other) jobs[static_cast<size_t>((i + other) % kThreads)]->Help(other);
      jobs[static_cast<size_t>(i)]->Help(0);
      jobs[static_cast<size_t>(i)]->Wait();
      written[static_cast<size_t>(i)]->ExpectOnce();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(Job, AThreadBeginsWithItsOwnShare) {
  struct Order {
    static void Task(const void* context, int64_t index) {
      static_cast<std::vector<int64_t>*>(const_cast<void*>(context))->push_back(index);
    }
    std::vector<int64_t> indices;
  } order;
  Job job(7, 3, Order::Task, &order.indices);
  job.Help(1);
  job.Wait();
  EXPECT_EQ(order.indices, (std::vector<int64_t>{2, 3, 4, 5, 6, 0, 1}));
}

// The other thread's task ends long after the caller has begun to wait.
TEST(Job, TheCallerSleepsUntilItIsWoken) {
  struct Slow {
    static void Task(const void* context, int64_t index) {
      volatile int left = index == 1 ? 20000000 : 0;
      while (left > 0) left = left - 1;
      Written::Task(context, index);
    }
  };
  Written written(2);
  std::promise<void> taken;
  const auto job = std::make_shared<Job>(2, 2, Slow::Task, &written.times);
  std::thread other([&] {
    taken.set_value();
    job->Help(1);
  });
  taken.get_future().wait();
  job->Help(0);
  job->Wait();
  written.ExpectOnce();
  other.join();
}

TEST(RunTasks, WhateverBecomesOfTheHelpers) {
  using Function = std::function<void()>;
  std::vector<Function> late;
  const std::function<void(Function)> pools[] = {
      [](Function help) { help(); },                            // At once.
      [](Function) {},                                          // Never.
      [&](Function help) { late.push_back(std::move(help)); },  // After the end.
      [](Function) { throw std::bad_alloc(); },                 // There is no memory for them.
      [&, first = true](Function help) mutable {                // There is memory for one.
        if (!std::exchange(first, false)) throw std::bad_alloc();
        late.push_back(std::move(help));
      },
  };
  for (const auto& pool : pools) {
    Written written(10);
    RunTasks(10, 1000000, 4, Written::Task, &written.times, pool);
    written.ExpectOnce();
    for (const Function& help : late) help();
    written.ExpectOnce();
    late.clear();
  }
}

TEST(RunTasks, AsksForAsManyThreadsAsAreWorthIt) {
  constexpr int64_t kPool = 4, kMany = 1000000;
  struct {
    int64_t tasks, cycles, helpers;
  } const cases[] = {{0, kMany, 0}, {1, kMany, 0}, {2, kMany, 1}, {100, kMany, 3}, {100, 1, 0}, {3, 40000, 2}};
  for (const auto& c : cases) {
    Written written(c.tasks);
    std::vector<std::thread> pool;
    RunTasks(c.tasks, c.cycles, kPool, Written::Task, &written.times,
             [&](auto help) { pool.emplace_back(std::move(help)); });
    written.ExpectOnce();
    EXPECT_EQ(pool.size(), static_cast<size_t>(c.helpers)) << c.tasks << " tasks of " << c.cycles << " cycles";
    for (std::thread& thread : pool) thread.join();
    written.ExpectOnce();
  }
}

}  // namespace
}  // namespace core
}  // namespace tf_agc
