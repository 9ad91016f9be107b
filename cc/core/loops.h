// The loops of one instruction-set level, as a table of function pointers.
//
// Only plain structs and declarations live here: loops.cc includes this file once per level, and any inline function
// here would become one weak symbol compiled for the highest level and called on every machine.

#ifndef TF_AGC_CC_CORE_LOOPS_H_
#define TF_AGC_CC_CORE_LOOPS_H_

#include <cstdint>

#include "cc/core/types.h"

namespace tf_agc {
namespace core {

// The most columns that one call of a loop takes: its sums and parameters live on the stack.
constexpr int64_t kMaxColumns = 2048;

// Chunks are whole numbers of so many rows.
constexpr int64_t kChunkRows = 8;

// How the positions of a map are walked. It depends on a sample's shape and its type alone, never on threads or on the
// batch, because it fixes the order of every sum.
//
// channels_last: `fold` positions are taken together as one row of fold * channels columns, so that short rows fill
// vectors. channels_first: a map is one row of `positions` elements, and fold is 1.
struct Chunking {
  int64_t fold;
  int64_t chunk;   // Positions in a chunk: the unit in which threads share a map, a multiple of fold.
  int64_t chunks;  // Chunks in a map; the last one may be shorter.
};

// What a loop works on: of a call, the channels [begin, end) of one sample, at most kMaxColumns. With chunking.fold > 1
// that is all of them, and begin is 0.
template <class Args>
struct Task {
  const Args& args;
  const Chunking& chunking;
  bool stream;  // Write a new y or dx past the caches, where it is too large to be found there later.
  int64_t sample;
  int64_t begin;
  int64_t end;
  int64_t chunk;  // Of the map, for those loops that take one.
};
using ForwardTask = Task<ForwardArgs>;
using BackwardTask = Task<BackwardArgs>;

// The sums over samples and positions that the parameters' gradients are made of, one for every channel of the call.
struct ParameterSums {
  double* gain;
  double* mean_scale;
  double* bias;  // Null where there is no bias.
};

// What is added before the activation: each has loops of its own, so that what is absent costs nothing.
enum class Addends { kNone, kBias, kShortcut };  // kShortcut: with or without a bias.

// Sums are in double.
struct Loops {
  // Both passes over whole maps. Backward adds the sample's share to the parameters' sums.
  void (*forward)(const ForwardTask&);
  void (*backward)(const BackwardTask&, const ParameterSums&);

  // The same in two steps, for maps that threads share. Step one writes the sums of one chunk; step two takes their
  // total over all chunks, and finishes one chunk. Chunk 0 adds the sample's share to the parameters' sums.
  void (*forward_sum)(const ForwardTask&, double* sums);
  void (*forward_apply)(const ForwardTask&, const double* totals);
  void (*backward_sum)(const BackwardTask&, double* sums);
  void (*backward_apply)(const BackwardTask&, const double* totals, const ParameterSums&);
};

// Doubles that one chunk's sums take for `channels` channels: one sum forward, two backward.
constexpr int64_t kForwardSums = 1;
constexpr int64_t kBackwardSums = 2;

#if defined(__x86_64__)
namespace v2 {
const Loops& FindLoops(DataType data_type, Activation activation, Addends addends);
}
namespace v3 {
const Loops& FindLoops(DataType data_type, Activation activation, Addends addends);
}
namespace v4 {
const Loops& FindLoops(DataType data_type, Activation activation, Addends addends);
}
#else
namespace baseline {
const Loops& FindLoops(DataType data_type, Activation activation, Addends addends);
}
#endif

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_LOOPS_H_
