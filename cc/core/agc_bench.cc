// The loops alone, without TensorFlow, for work on them: `bazel run //cc/core:bench -- --benchmark_filter=...`. Every
// shape has its copy of the same bytes beside it. Claims come from tools/benchmarks/bench.py, which measures the limit
// with more care.
//
// `bench --once NAME` runs one benchmark once on one thread and nothing else: what callgrind counts instructions of.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "benchmark/benchmark.h"
#include "cc/core/agc.h"
#include "cc/core/job.h"
#include "cc/core/scheduling.h"

namespace tf_agc {
namespace core {
namespace {

struct Size {
  int64_t batch, positions, channels;
};

constexpr Size kSizes[] = {{32, 32 * 32, 64},  {32, 56 * 56, 64}, {16, 112 * 112, 64}, {128, 14 * 14, 256},
                           {64, 28 * 28, 128}, {32, 7 * 7, 2048}, {128, 32 * 32, 16},  {1, 56 * 56, 64},
                           {1, 224 * 224, 32}, {8, 28 * 28, 513}};

// A pool as small as one can be, whose threads never sleep. For one caller at a time.
class Threads {
 public:
  explicit Threads(int threads) : workers_(static_cast<size_t>(threads - 1)) {
    for (Worker& worker : workers_) worker.thread = std::thread([this, &worker] { Work(&worker); });
  }
  ~Threads() {
    stop_ = true;
    for (Worker& worker : workers_) worker.thread.join();
  }
  Parallel parallel() {
    auto run = [](void* pool, const Phase* phases, int count) {
      auto* threads = static_cast<Threads*>(pool);
      auto worker = threads->workers_.begin();
      RunPhases(phases, count, threads->Count(), [&](auto help) {
        while (worker->busy) {  // It came too late for the call before.
        }
        worker->help = std::move(help);
        worker->busy = true;
        ++worker;
      });
    };
    return {Count(), this, run, kCyclesPerThread};
  }

 private:
  struct Worker {
    std::thread thread;
    std::function<void()> help;
    std::atomic<bool> busy{false};
  };

  int Count() const { return static_cast<int>(workers_.size()) + 1; }

  void Work(Worker* worker) {
    while (!stop_) {
      if (!worker->busy) continue;
      worker->help();
      worker->busy = false;
    }
  }

  std::vector<Worker> workers_;
  std::atomic<bool> stop_{false};
};

// Page-aligned memory whose pages are there.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096))) {
    std::memset(data_, 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  char* data() { return data_; }
  void FillFloats(int64_t count) {
    std::minstd_rand random;
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(data_)[i] = random() * 0x1p-30f - 1;
  }

 private:
  char* data_;
};

Threads& Pool() {
  static Threads threads(static_cast<int>(std::thread::hardware_concurrency()));
  return threads;
}

int64_t Elements(const Size& s) { return s.batch * s.positions * s.channels; }

// One call of Forward or Backward on memory of its own; of a junction with bias and shortcut, whose dshortcut lies over
// dy and dx over what was kept.
class Call {
 public:
  enum Kind { kForwardInPlace, kForwardFresh, kBackwardInPlace };

  Call(Kind kind, bool junction, Size size, Layout layout, DataType type)
      : kind_(kind),
        junction_(junction),
        size_(size),
        layout_(layout),
        type_(type),
        x_(Elements(size) * ElementBytes(type)),
        y_(Elements(size) * ElementBytes(type)),
        shortcut_(junction ? Elements(size) * ElementBytes(type) : 0),
        per_map_(size.batch * size.channels * 4),
        per_channel_(6 * size.channels * 4) {
    // Denormals and NaN would be other work; zeros of 16 bits are not.
    if (type == DataType::kFloat) {
      x_.FillFloats(Elements(size));
      y_.FillFloats(Elements(size));
      if (junction) shortcut_.FillFloats(Elements(size));
    }
  }

  void Run(const Parallel& parallel) {
    const Shape shape{size_.batch, size_.positions, size_.channels, layout_};
    char* gain = per_channel_.data();
    char* mean_scale = gain + 4 * size_.channels;
    char* dgain = mean_scale + 4 * size_.channels;
    char* dmean_scale = dgain + 4 * size_.channels;
    char* bias = junction_ ? dmean_scale + 4 * size_.channels : nullptr;
    char* dbias = junction_ ? bias + 4 * size_.channels : nullptr;
    char* shortcut = junction_ ? shortcut_.data() : nullptr;
    char* mean = per_map_.data();
    if (kind_ == kBackwardInPlace) {
      char *dy = x_.data(), *kept = y_.data();
      char* dx = junction_ ? kept : dy;
      char* dshortcut = junction_ ? dy : nullptr;
      Backward({shape, type_, Activation::kRelu, 0, dy, mean, kept, mean, gain, mean_scale, dx, dgain, dmean_scale,
                bias, shortcut, dbias, dshortcut},
               parallel);
    } else {
      char* y = kind_ == kForwardInPlace ? x_.data() : y_.data();
      Forward({shape, type_, Activation::kRelu, 0, x_.data(), gain, mean_scale, y, mean, bias, shortcut}, parallel);
    }
  }

  // Bytes that have to move between memory and the core.
  int64_t Traffic() const {
    const int passes = kind_ == kBackwardInPlace ? (junction_ ? 5 : 3) : (junction_ ? 3 : 2);
    return passes * Elements(size_) * ElementBytes(type_);
  }

 private:
  const Kind kind_;
  const bool junction_;
  const Size size_;
  const Layout layout_;
  const DataType type_;
  Buffer x_, y_, shortcut_, per_map_, per_channel_;
};

void BenchCopy(benchmark::State& state, Size size, DataType type) {
  const int64_t bytes = Elements(size) * ElementBytes(type);
  Buffer from(bytes), to(bytes);
  struct Context {
    char *from, *to;
    int64_t bytes, chunk;
  } context{from.data(), to.data(), bytes, std::max<int64_t>(bytes / 64, 4096)};
  const Parallel parallel = Pool().parallel();
  for (auto _ : state) {
    auto task = [](const void* c, int64_t i) {
      const Context& copy = *static_cast<const Context*>(c);
      const int64_t begin = i * copy.chunk;
      std::memcpy(copy.to + begin, copy.from + begin, std::min(copy.chunk, copy.bytes - begin));
    };
    const Phase phase{(bytes + context.chunk - 1) / context.chunk, context.chunk, task, &context};
    parallel.run(parallel.pool, &phase, 1);
  }
  state.SetBytesProcessed(state.iterations() * 2 * bytes);
}

std::string Name(const char* what, const Size& s, const char* layout, DataType type) {
  const char* types[] = {"half", "bfloat16", "float"};
  return std::string(what) + "/" + types[static_cast<int>(type)] + "/" + layout + "/" + std::to_string(s.batch) + "x" +
         std::to_string(s.positions) + "x" + std::to_string(s.channels);
}

// Calls visit(name, arguments of Call's constructor) for every benchmark of the op.
template <class Visit>
void ForEachCall(Visit visit) {
  for (DataType type : {DataType::kFloat, DataType::kBfloat16, DataType::kHalf}) {
    for (const Size& size : kSizes) {
      for (Layout layout : {Layout::kChannelsLast, Layout::kChannelsFirst}) {
        const char* layout_name = layout == Layout::kChannelsLast ? "channels_last" : "channels_first";
        for (bool junction : {false, true}) {
          const auto name = [&](const char* what) {
            return (junction ? "junction_" : "") + Name(what, size, layout_name, type);
          };
          visit(name("forward_in_place"), Call::kForwardInPlace, junction, size, layout, type);
          visit(name("forward_fresh"), Call::kForwardFresh, junction, size, layout, type);
          visit(name("backward_in_place"), Call::kBackwardInPlace, junction, size, layout, type);
        }
      }
    }
  }
}

int RunOnce(const std::string& wanted) {
  bool found = false;
  ForEachCall([&](const std::string& name, auto... arguments) {
    if (name != wanted) return;
    found = true;
    Call(arguments...).Run(Serial());
  });
  if (!found) std::fprintf(stderr, "there is no benchmark named %s\n", wanted.c_str());
  return found ? 0 : 1;
}

void RegisterAll() {
  auto finish = [](benchmark::internal::Benchmark* b) { b->UseRealTime()->Unit(benchmark::kMicrosecond); };
  ForEachCall([&](const std::string& name, auto... arguments) {
    finish(benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
      Call call(arguments...);
      for (auto _ : state) call.Run(Pool().parallel());
      state.SetBytesProcessed(state.iterations() * call.Traffic());
    }));
  });
  for (DataType type : {DataType::kFloat, DataType::kHalf}) {
    for (const Size& size : kSizes) {
      finish(benchmark::RegisterBenchmark(Name("copy", size, "any", type).c_str(),
                                          [=](benchmark::State& state) { BenchCopy(state, size, type); }));
    }
  }
}

}  // namespace
}  // namespace core
}  // namespace tf_agc

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--once") == 0) return tf_agc::core::RunOnce(argv[2]);
  tf_agc::core::RegisterAll();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
