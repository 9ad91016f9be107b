// Who does what: cuts a call into tasks for the threads, chooses the instruction-set level, and adds up the parameter
// gradients. Every sum has an order that depends on the shape and the type alone. No vector code here.

#include "cc/core/agc.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <vector>

#include "cc/core/cpu.h"
#include "cc/core/loops.h"
#include "cc/core/scheduling.h"

namespace tf_agc {
namespace core {
namespace {

// Elements in a chunk: small enough to share one map of a single image between threads, large enough to hide a task's
// cost.
constexpr int64_t kChunkElements = 32768;

// Rows shorter than this are folded: several positions make one row.
constexpr int64_t kMinColumns = 64;

// Folded rows are no longer than this: a map would have too few of them for what is done once a column.
constexpr int64_t kMaxFoldedColumns = 640;
static_assert(kMaxFoldedColumns <= kMaxColumns);

constexpr int64_t kCacheLine = 64;

// Channels of one task, at most. The last task of a sample may take up to twice as many.
constexpr int64_t kMaxTaskChannels = kMaxColumns / 2;

// Samples are added up in at most this many groups, which bounds the memory for partial parameter gradients.
constexpr int64_t kMaxGroups = 64;

// How many positions of `channels` make a row: so many that it is whole cache lines, which are whole packs at every
// level (simd_per_level.h), or at least whole halves of them.
int64_t Fold(int64_t channels, int64_t element_bytes) {
  for (int64_t multiple : {kCacheLine / element_bytes, kCacheLine / 2 / element_bytes}) {
    for (int64_t fold = 1; fold * channels <= kMaxFoldedColumns; ++fold) {
      if (fold * channels >= kMinColumns && fold * channels % multiple == 0) return fold;
    }
  }
  return 1;  // Long enough, and the end of each row is one overlapping pack.
}

Chunking MakeChunking(const Shape& shape, int64_t element_bytes) {
  Chunking chunking{1, 0, 0};
  if (shape.layout == Layout::kChannelsLast) {
    chunking.fold = Fold(shape.channels, element_bytes);
    // About a multiple of four, so that threads can share them evenly.
    const int64_t rows = CeilDiv(shape.positions, chunking.fold);
    const int64_t columns = std::min(chunking.fold * shape.channels, kMaxTaskChannels);
    const int64_t chunks = CeilDiv(rows * columns, kChunkElements);
    const int64_t chunk_rows = chunks == 1 ? rows : CeilDiv(rows, CeilDiv(chunks, 4) * 4);
    chunking.chunk = chunking.fold * CeilDiv(chunk_rows, kChunkRows) * kChunkRows;
  } else {
    chunking.chunk = kChunkElements;
  }
  chunking.chunks = CeilDiv(shape.positions, chunking.chunk);
  return chunking;
}

// How many channels one task takes. Sums do not depend on it: channels never meet.
int64_t ChannelsPerTask(const Shape& shape, const Chunking& chunking, int64_t element_bytes, int64_t tensors,
                        int threads) {
  if (chunking.fold > 1) return shape.channels;
  // Below a cache line, two tasks would share lines.
  const int64_t unit = shape.layout == Layout::kChannelsLast ? kCacheLine / element_bytes : 1;
  const int64_t most = std::min(CeilDiv(shape.channels, unit) * unit, kMaxTaskChannels);
  // The second pass should find in a cache what the first one read: best in the second level. But channels_last rows
  // are read at half the speed when they are not read whole, so a share of the third level is better than part of a
  // row.
  const int64_t share = shape.layout == Layout::kChannelsLast ? L3CacheBytes() / 2 / threads : 0;
  const int64_t cache = std::max(L2CacheBytes() / 2, share);
  const int64_t fitting = cache / (tensors * shape.positions * element_bytes) / unit * unit;
  int64_t channels = std::clamp(fitting, unit, most);
  // Enough tasks to keep every thread busy to the end; but threads that take different parts of the same rows disturb
  // each other.
  while (shape.layout == Layout::kChannelsFirst && channels > unit &&
         shape.batch * CeilDiv(shape.channels, channels) < 4 * int64_t{threads}) {
    channels = CeilDiv(channels / 2, unit) * unit;
  }
  return channels;
}

// The channels of a sample, cut into blocks of at least `least` (or all there are). The last block takes what is left
// over: a block narrower than a vector would be slow.
struct Blocks {
  int64_t all;
  int64_t count;
  int64_t channels;  // In every block but the last.

  Blocks(int64_t all_channels, int64_t least)
      : all(all_channels), count(std::max<int64_t>(all / least, 1)), channels(all / count / least * least) {}
  int64_t Begin(int64_t block) const { return block * channels; }
  int64_t End(int64_t block) const { return block == count - 1 ? all : Begin(block) + channels; }
  int64_t Widest() const { return all - Begin(count - 1); }
};

// Cycles for `elements` elements of `tensors` tensors in the second-level cache, on x86-64-v3 and higher. Where memory
// is slower, there are more than enough of them for all threads.
int64_t Cycles(int64_t elements, int64_t tensors, DataType data_type, Activation activation) {
  const double of_type = data_type == DataType::kDouble ? 0.2 : 0.1;
  const double of_activation = activation == Activation::kElu ? 8 : 1;
  return 1 + static_cast<int64_t>(static_cast<double>(elements * tensors) * of_type * of_activation);
}

// How many threads `parallel` gives to that work.
int ThreadsFor(int64_t cycles, const Parallel& parallel) {
  if (parallel.cycles_per_thread == 0) return parallel.threads;
  return static_cast<int>(std::clamp<int64_t>(cycles / parallel.cycles_per_thread, 1, parallel.threads));
}

// body(i) for i in [0, tasks), with denormals kept. `body` has to outlive the phase: a temporary is refused.
template <class Body>
Phase MakePhase(int64_t tasks, int64_t cycles, Body& body) {
  auto task = [](const void* context, int64_t index) {
    const ScopedKeepDenormals keep;
    (*static_cast<const Body*>(context))(index);
  };
  return {tasks, cycles, task, &body};
}

// `count` zeros, or false where there is no memory for them.
bool Allocate(int64_t count, std::vector<double>* sums) {
  try {
    sums->resize(static_cast<size_t>(count));
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

// The sums of maps that threads share: some per channel for every chunk of every block of every sample.
class ChunkSums {
 public:
  ChunkSums(const Chunking& chunking, const Blocks& blocks, int64_t samples, int64_t sums_per_channel)
      : chunking_(chunking), blocks_(blocks), samples_(samples), sums_per_channel_(sums_per_channel) {}

  bool Allocate() {
    return core::Allocate(samples_ * blocks_.count * chunking_.chunks * blocks_.Widest() * sums_per_channel_, &sums_);
  }

  // Calls sum(sample, block, chunk, sums of the chunk) for every chunk, adds the chunks of each map in their order, and
  // calls apply(sample, block, chunk, sums of the map) for every chunk. `cycles`: of one such call.
  template <class Sum, class Apply>
  void Run(const Parallel& parallel, int64_t cycles, const Sum& sum, const Apply& apply) {
    const int64_t maps = samples_ * blocks_.count;
    auto sum_chunk = [&](int64_t task) {
      const int64_t map = task / chunking_.chunks, chunk = task % chunking_.chunks;
      sum(map / blocks_.count, map % blocks_.count, chunk, OfMap(map) + chunk * Count(map % blocks_.count));
    };
    auto add_up = [&](int64_t map) {
      const int64_t count = Count(map % blocks_.count);
      double* totals = OfMap(map);
      for (int64_t chunk = 1; chunk < chunking_.chunks; ++chunk) {
        for (int64_t i = 0; i < count; ++i) totals[i] += totals[chunk * count + i];
      }
    };
    auto apply_chunk = [&](int64_t task) {
      const int64_t map = task / chunking_.chunks, chunk = task % chunking_.chunks;
      apply(map / blocks_.count, map % blocks_.count, chunk, OfMap(map));
    };
    const Phase phases[] = {MakePhase(maps * chunking_.chunks, cycles, sum_chunk), MakePhase(maps, 0, add_up),
                            MakePhase(maps * chunking_.chunks, cycles, apply_chunk)};
    static_assert(std::size(phases) <= kMaxPhases);
    parallel.run(parallel.pool, phases, std::size(phases));
  }

 private:
  // How many a chunk has, and where those of a block of a sample begin: the first chunk's, later the map's.
  int64_t Count(int64_t block) const { return (blocks_.End(block) - blocks_.Begin(block)) * sums_per_channel_; }
  double* OfMap(int64_t map) { return sums_.data() + map * chunking_.chunks * blocks_.Widest() * sums_per_channel_; }

  const Chunking& chunking_;
  const Blocks& blocks_;
  const int64_t samples_;
  const int64_t sums_per_channel_;
  std::vector<double> sums_;
};

// Turns the sums over samples into the gradients of the parameters.
template <class U>
void FinishParameterGradients(const BackwardArgs& args, Activation activation, const ParameterSums& sums) {
  const U* gain = static_cast<const U*>(args.gain);
  U* dgain = static_cast<U*>(args.dgain);
  U* dmean_scale = static_cast<U*>(args.dmean_scale);
  U* dbias = static_cast<U*>(args.dbias);
  for (int64_t c = 0; c < args.shape.channels; ++c) {
    const double g = static_cast<double>(gain[c]);
    if (activation == Activation::kLinear) {
      dgain[c] = static_cast<U>(sums.gain[c]);
    } else {
      // The sum is gain * dgain. At gain 0 what it came from is lost: 0, or NaN where something was not finite.
      dgain[c] = static_cast<U>(g == 0 ? sums.gain[c] * 0 : sums.gain[c] / g);
    }
    dmean_scale[c] = static_cast<U>(-g * sums.mean_scale[c]);
    if (dbias != nullptr) dbias[c] = static_cast<U>(sums.bias[c]);
  }
}

// What the arguments of either pass have besides those that are always there.
template <class Args>
Addends AddendsOf(const Args& args) {
  if (args.shortcut != nullptr) return Addends::kShortcut;
  return args.bias != nullptr ? Addends::kBias : Addends::kNone;
}

// Whether a new tensor should be written past the caches. In place, the lines to write are in them already. It should
// be left there for its reader where it and the other `tensors` of the pass fit half of the last one: past the caches,
// bfloat16 at [128,14,14,256] takes 0.6 times as long, and a reader behind it no longer.
bool Stream(const Shape& shape, int64_t tensors, int64_t element_bytes) {
  const int64_t last_cache = std::max(L3CacheBytes(), L2CacheBytes());
  return tensors * shape.batch * shape.positions * shape.channels * element_bytes > last_cache / 2;
}

const Loops& FindLoops(InstructionSet level, DataType data_type, Activation activation, Addends addends) {
#if defined(__x86_64__)
  switch (level) {
    case InstructionSet::kX86_64_V4:
      return v4::FindLoops(data_type, activation, addends);
    case InstructionSet::kX86_64_V3:
      return v3::FindLoops(data_type, activation, addends);
    default:
      return v2::FindLoops(data_type, activation, addends);
  }
#else
  (void)level;
  return baseline::FindLoops(data_type, activation, addends);
#endif
}

}  // namespace

Parallel Serial() {
  auto run = [](void*, const Phase* phases, int count) {
    for (const Phase* phase = phases; phase < phases + count; ++phase) {
      for (int64_t i = 0; i < phase->tasks; ++i) phase->task(phase->context, i);
    }
  };
  return {1, nullptr, run};
}

bool Forward(const ForwardArgs& args, const Parallel& parallel, InstructionSet level) {
  const Shape& shape = args.shape;
  if (shape.batch == 0 || shape.channels == 0) return true;
  const Activation activation = Effective(args.activation, args.alpha);
  const Loops& loops = FindLoops(level, args.data_type, activation, AddendsOf(args));
  const int64_t bytes = ElementBytes(args.data_type);
  const int64_t tensors = args.shortcut == nullptr ? 2 : 3;
  const Chunking chunking = MakeChunking(shape, bytes);
  const bool stream = args.y != args.x && args.y != args.shortcut && Stream(shape, tensors, bytes);
  auto cycles = [&](int64_t elements, int64_t of_tensors) {
    return Cycles(elements, of_tensors, args.data_type, activation);
  };
  const int threads = ThreadsFor(cycles(shape.batch * shape.positions * shape.channels, tensors), parallel);
  const Blocks blocks(shape.channels, ChannelsPerTask(shape, chunking, bytes, 1, threads));
  auto task_of = [&](int64_t sample, int64_t block, int64_t chunk) -> ForwardTask {
    return {args, chunking, stream, sample, blocks.Begin(block), blocks.End(block), chunk};
  };
  const int64_t whole_maps = shape.batch * blocks.count;
  if (whole_maps >= threads || chunking.chunks == 1) {
    auto forward = [&](int64_t task) { loops.forward(task_of(task / blocks.count, task % blocks.count, 0)); };
    const Phase phase = MakePhase(whole_maps, cycles(shape.positions * blocks.Widest(), tensors), forward);
    parallel.run(parallel.pool, &phase, 1);
    return true;
  }
  // Fewer maps than threads: the threads share them, chunk by chunk, once to add and once to write.
  ChunkSums sums(chunking, blocks, shape.batch, kForwardSums);
  if (!sums.Allocate()) return false;
  sums.Run(
      parallel, cycles(CeilDiv(shape.positions, chunking.chunks) * blocks.Widest(), 1),
      [&](int64_t sample, int64_t block, int64_t chunk, double* of_chunk) {
        loops.forward_sum(task_of(sample, block, chunk), of_chunk);
      },
      [&](int64_t sample, int64_t block, int64_t chunk, const double* of_map) {
        loops.forward_apply(task_of(sample, block, chunk), of_map);
      });
  return true;
}

bool Backward(const BackwardArgs& args, const Parallel& parallel, InstructionSet level) {
  const ScopedKeepDenormals keep;  // A gain may be one, and the calling thread divides by it.
  const Shape& shape = args.shape;
  const Activation activation = Effective(args.activation, args.alpha);
  const int64_t bytes = ElementBytes(args.data_type);
  // Partial sums for dgain, behind them those for dmean_scale and, with a bias, for dbias: so many rows for each group
  // of samples.
  const int64_t rows = args.dbias == nullptr ? 2 : 3;
  const int64_t group_samples = std::max<int64_t>(CeilDiv(shape.batch, kMaxGroups), 1);
  const int64_t groups = CeilDiv(shape.batch, group_samples);
  std::vector<double> partial;
  if (!Allocate(std::max<int64_t>(groups, 1) * rows * shape.channels, &partial)) return false;
  auto sums_of = [&](int64_t group) -> ParameterSums {
    double* first = partial.data() + group * rows * shape.channels;
    return {first, first + shape.channels, rows == 2 ? nullptr : first + 2 * shape.channels};
  };

  if (shape.batch > 0 && shape.channels > 0) {
    const Loops& loops = FindLoops(level, args.data_type, activation, AddendsOf(args));
    const int64_t inputs = args.shortcut == nullptr ? 2 : 3, outputs = inputs - 1;
    const Chunking chunking = MakeChunking(shape, bytes);
    // Without a shortcut dx lies where dy or the kept tensor was, as a rule. With one, dshortcut lies there.
    const bool stream = args.shortcut != nullptr && args.dx != args.shortcut && args.dx != args.kept &&
                        Stream(shape, inputs + outputs, bytes);
    auto cycles = [&](int64_t elements, int64_t of_tensors) {
      return Cycles(elements, of_tensors, args.data_type, activation);
    };
    const int threads = ThreadsFor(cycles(shape.batch * shape.positions * shape.channels, inputs + outputs), parallel);
    const Blocks blocks(shape.channels, ChannelsPerTask(shape, chunking, bytes, inputs, threads));
    auto task_of = [&](int64_t sample, int64_t block, int64_t chunk) -> BackwardTask {
      return {args, chunking, stream, sample, blocks.Begin(block), blocks.End(block), chunk};
    };
    const int64_t whole_maps = groups * blocks.count;
    // Threads share maps only where each sample is a group of its own: the samples of one are added one by one.
    if (whole_maps >= threads || chunking.chunks == 1 || group_samples > 1) {
      auto backward = [&](int64_t task) {
        const int64_t block = task % blocks.count, group = task / blocks.count;
        const int64_t last = std::min((group + 1) * group_samples, shape.batch);
        for (int64_t sample = group * group_samples; sample < last; ++sample) {
          loops.backward(task_of(sample, block, 0), sums_of(group));
        }
      };
      const Phase phase =
          MakePhase(whole_maps, cycles(group_samples * shape.positions * blocks.Widest(), inputs + outputs), backward);
      parallel.run(parallel.pool, &phase, 1);
    } else {
      ChunkSums sums(chunking, blocks, shape.batch, kBackwardSums);
      if (!sums.Allocate()) return false;
      sums.Run(
          parallel, cycles(CeilDiv(shape.positions, chunking.chunks) * blocks.Widest(), inputs),
          [&](int64_t sample, int64_t block, int64_t chunk, double* of_chunk) {
            loops.backward_sum(task_of(sample, block, chunk), of_chunk);
          },
          [&](int64_t sample, int64_t block, int64_t chunk, const double* of_map) {
            loops.backward_apply(task_of(sample, block, chunk), of_map, sums_of(sample));
          });
    }
    double* first = partial.data();
    for (int64_t group = 1; group < groups; ++group) {
      const double* next = first + group * rows * shape.channels;
      for (int64_t i = 0; i < rows * shape.channels; ++i) first[i] += next[i];
    }
  }
  if (args.data_type == DataType::kDouble) {
    FinishParameterGradients<double>(args, activation, sums_of(0));
  } else {
    FinishParameterGradients<float>(args, activation, sums_of(0));
  }
  return true;
}

}  // namespace core
}  // namespace tf_agc
