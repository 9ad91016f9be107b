// Threads that come early, late and not at all. Built with ThreadSanitizer too (tools/sanitize.sh).

#include "cc/core/job.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "cc/core/parallel.h"
#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace {

// What a task writes has no lock of its own: the end of a phase must be enough for the reader.
struct Written {
  explicit Written(int64_t tasks) : times(static_cast<size_t>(tasks)) {}
  static void Task(const void* context, int64_t index) {
    ++(*static_cast<std::vector<int>*>(const_cast<void*>(context)))[static_cast<size_t>(index)];
  }
  Phase phase(int64_t cycles = 0) const { return {static_cast<int64_t>(times.size()), cycles, Task, &times}; }
  void ExpectOnce() const {
    for (int count : times) EXPECT_EQ(count, 1);
  }
  std::vector<int> times;
};

TEST(Job, EachTaskOnceWhoeverComes) {
  for (int64_t tasks : {0, 1, 2, 7, 1000}) {
    for (int others : {0, 1, 3, 8}) {
      Written written(tasks);
      const Phase phase = written.phase();
      const auto job = std::make_shared<Job>(&phase, 1, 9);
      std::vector<std::thread> pool;
      for (int i = 1; i <= others; ++i) pool.emplace_back([job, i] { job->Help(i); });
      job->Run();
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
    const Phase phases[] = {written->phase(), written->phase(), written->phase()};
    const auto job = std::make_shared<Job>(phases, 3, 2);
    late = [job] { job->Help(1); };
    job->Run();
    EXPECT_EQ(written->times, std::vector<int>(5, 3));
  }
  // The tasks' memory is gone, and the phases: AddressSanitizer would see a use of it.
  std::thread(late).join();
}

TEST(Job, CallersThatAreThePool) {
  // Every thread has a job of its own and helps with all others, as XLA's threads may.
  constexpr int kThreads = 8;
  std::vector<std::unique_ptr<Written>> written;
  std::vector<std::shared_ptr<Job>> jobs;
  for (int i = 0; i < kThreads; ++i) {
    written.push_back(std::make_unique<Written>(200));
    const Phase phase = written.back()->phase();
    jobs.push_back(std::make_shared<Job>(&phase, 1, kThreads));
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int other = 1; other < kThreads; ++other) jobs[static_cast<size_t>((i + other) % kThreads)]->Help(other);
      jobs[static_cast<size_t>(i)]->Run();
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
  const Phase phases[] = {{7, 0, Order::Task, &order.indices}, {3, 0, Order::Task, &order.indices}};
  Job job(phases, 2, 3);
  job.Help(1);
  EXPECT_EQ(order.indices, (std::vector<int64_t>{2, 3, 4, 5, 6, 0, 1, 1, 2, 0}));
}

// Numbers that one phase writes, their sum, and what the last one makes of it: each phase sees all of the one before.
struct Sums {
  std::vector<int64_t> numbers = std::vector<int64_t>(100), results = std::vector<int64_t>(100);
  int64_t sum = 0;

  static Sums* Of(const void* context) { return static_cast<Sums*>(const_cast<void*>(context)); }
  static void Write(const void* context, int64_t index) { Of(context)->numbers[static_cast<size_t>(index)] = index; }
  static void Add(const void* context, int64_t) {
    for (int64_t number : Of(context)->numbers) Of(context)->sum += number;
  }
  static void Use(const void* context, int64_t index) {
    Of(context)->results[static_cast<size_t>(index)] = Of(context)->sum + index;
  }
  std::array<Phase, 3> phases(int64_t cycles) const {
    return {{{100, cycles, Write, this}, {1, 0, Add, this}, {100, cycles, Use, this}}};
  }
  void Check() const {
    for (int64_t i = 0; i < 100; ++i) EXPECT_EQ(results[static_cast<size_t>(i)], 4950 + i);
  }
};

TEST(Job, PhasesFollowEachOther) {
  for (int others : {0, 1, 3, 8}) {
    Sums sums;
    const auto job = std::make_shared<Job>(sums.phases(0).data(), 3, 4);
    std::vector<std::thread> pool;
    for (int i = 1; i <= others; ++i) pool.emplace_back([job, i] { job->Help(i); });
    job->Run();
    sums.Check();
    for (std::thread& thread : pool) thread.join();
  }
}

TEST(Job, PhasesWithoutTasks) {
  Written written(10), none(0);
  const Phase phases[] = {none.phase(), written.phase(), none.phase()};
  Job(phases, 3, 2).Run();
  written.ExpectOnce();
}

// A phase that takes long: the caller's task ends only when the other thread has left.
TEST(Job, WhoHelpsLeavesRatherThanWait) {
  struct Data {
    std::promise<void> taken, left;
    static Data* Of(const void* context) { return static_cast<Data*>(const_cast<void*>(context)); }
    static void WaitForTheOther(const void* context, int64_t) {
      Of(context)->taken.set_value();
      Of(context)->left.get_future().wait();
    }
  } data;
  Written written(10);
  const Phase phases[] = {{1, 0, Data::WaitForTheOther, &data}, written.phase()};
  const auto job = std::make_shared<Job>(phases, 2, 2);
  std::thread other([&] {
    data.taken.get_future().wait();
    job->Help(1);
    data.left.set_value();
  });
  job->Run();
  written.ExpectOnce();
  other.join();
}

// In the first and the last phase the other thread's task ends long after the caller has begun to wait: the caller's
// own one waits until the other has been taken.
TEST(Job, TheCallerSleepsUntilItIsWoken) {
  struct Slow {
    std::promise<void> taken;
    Written written{2};

    static void Task(const void* context, int64_t index) {
      auto* slow = static_cast<Slow*>(const_cast<void*>(context));
      if (index == 0) {
        slow->taken.get_future().wait();
      } else {
        slow->taken.set_value();
        volatile int left = 20000000;
        while (left > 0) left = left - 1;
      }
      Written::Task(&slow->written.times, index);
    }
  } first, last;
  const auto read = [](const void* context, int64_t) { static_cast<const Written*>(context)->ExpectOnce(); };
  const Phase phases[] = {{2, 0, Slow::Task, &first}, {1, 0, read, &first.written}, {2, 0, Slow::Task, &last}};
  const auto job = std::make_shared<Job>(phases, 3, 2);
  std::atomic<bool> over{false};
  std::thread other([&] {
    while (!over) job->Help(1);
  });
  job->Run();
  first.written.ExpectOnce();
  last.written.ExpectOnce();
  over = true;
  other.join();
}

TEST(RunPhases, WhateverBecomesOfTheHelpers) {
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
    const Phase phase = written.phase(1000000);
    RunPhases(&phase, 1, 4, pool);
    written.ExpectOnce();
    for (const Function& help : late) help();
    written.ExpectOnce();
    late.clear();
  }
}

TEST(RunPhases, PhasesFollowEachOther) {
  for (int64_t cycles : {0, 1000000}) {
    Sums sums;
    std::vector<std::thread> pool;
    RunPhases(sums.phases(cycles).data(), 3, 4, [&](auto help) { pool.emplace_back(std::move(help)); });
    sums.Check();
    EXPECT_EQ(pool.size(), cycles == 0 ? 0u : 3u);
    for (std::thread& thread : pool) thread.join();
  }
}

// The cycles of all phases count, and the tasks of the phase that has most.
TEST(RunPhases, AsksOnceForAllPhases) {
  struct {
    int64_t tasks, cycles, helpers;
  } const cases[] = {{4, 20000, 3}, {100, 1000, 3}, {100, 400, 1}, {2, 1000000, 1}};
  for (const auto& c : cases) {
    Written first(c.tasks), between(1), last(c.tasks);
    const Phase phases[] = {first.phase(c.cycles), between.phase(), last.phase(c.cycles)};
    int64_t helpers = 0;
    RunPhases(phases, 3, 4, [&](const auto&) { ++helpers; });
    for (const Written* written : {&first, &between, &last}) written->ExpectOnce();
    EXPECT_EQ(helpers, c.helpers) << c.tasks << " tasks of " << c.cycles << " cycles";
  }
}

TEST(RunPhases, AsksForAsManyThreadsAsAreWorthIt) {
  constexpr int64_t kPool = 4, kMany = 1000000;
  struct {
    int64_t tasks, cycles, helpers;
  } const cases[] = {{0, kMany, 0}, {1, kMany, 0}, {2, kMany, 1}, {100, kMany, 3}, {100, 1, 0}, {3, 40000, 2}};
  for (const auto& c : cases) {
    Written written(c.tasks);
    std::vector<std::thread> pool;
    const Phase phase = written.phase(c.cycles);
    RunPhases(&phase, 1, kPool, [&](auto help) { pool.emplace_back(std::move(help)); });
    written.ExpectOnce();
    EXPECT_EQ(pool.size(), static_cast<size_t>(c.helpers)) << c.tasks << " tasks of " << c.cycles << " cycles";
    for (std::thread& thread : pool) thread.join();
    written.ExpectOnce();
  }
}

}  // namespace
}  // namespace core
}  // namespace tf_agc
