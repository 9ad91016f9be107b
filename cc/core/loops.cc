// The arithmetic of both passes, compiled once per instruction-set level (TF_AGC_ISA_LEVEL is the namespace).
//
// Nothing from the standard library may be called here (see simd_per_level.h), and nothing here knows of threads or
// caches: agc.cc decides who does what.
//
// Why the loops look as they do:
// - Everything is bound by memory, so each pass touches each element once and does all it can with it.
// - A column sum adds up to eight rows as a tree, then up to eight such sums in the compute type, then goes on in
//   double: the error of a mean stays at a few units in the last place for any number of positions.
// - Sums sit in a small array in the first-level cache and not in registers: rows are then walked whole, as memory
//   lies. How many of them at once is up to their length (SumRows): on one thread, at [16,112,112,64] forward takes
//   half as long, at [128,14,14,256] backward 0.6 times, as with eight and four.
// - The second pass walks the chunks backwards: what the first one read last is still in the nearest cache (about 7 %
//   at [16,112,112,64] on a core with 1 MiB of second-level cache, nothing where a sample fits it).
// - The end of a row is one vector that overlaps its neighbour. It is loaded before and stored after the row, so that
//   writing over the input is safe.

#include "cc/core/loops.h"

#include "cc/core/simd_per_level.h"

namespace tf_agc {
namespace core {
namespace TF_AGC_ISA_LEVEL {
namespace {

constexpr int64_t kBlockSteps = 8;  // Sums in the compute type between two flushes to double.

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

#include "cc/core/activations_per_level.h"

// ---- Terms of the sums and maps of the elements ----
//
// All four read vectors at an element of the sample and at a column, which selects the parameters: channels_last maps
// pass the column of the row, channels_first maps, with one set of parameters, pass 0.

// Forward sums: x.
template <class T>
struct ForwardTerms {
  using V = typename Compute<T>::Vector;
  static constexpr int kSums = 1;
  static constexpr int kTree = kTreeRows;
  const T* x;

  void Get(int64_t element, int64_t, V* sums) const { sums[0] = Load(x + element); }
  void GetPartial(int64_t element, int64_t count, V* sums) const { sums[0] = LoadPartial(x + element, count); }
};

// Backward sums: dz and the gain's term.
template <class T, class Act, bool kShortcut>
struct BackwardTerms {
  using S = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  static constexpr int kSums = 2;
  static constexpr int kTree = 4;
  const T* kept;
  const T* dy;
  const T* shortcut;  // Read only where there is one.
  const S* offset;    // mean_scale * mean of a column; read only where the input is kept.
  Act act;

  void Get(int64_t element, int64_t column, V* sums) const {
    V o{}, s{};
    if constexpr (Act::kKeepsInput) o = Load(offset + column);
    if constexpr (kShortcut) s = Load(shortcut + element);
    Put(Load(kept + element), Load(dy + element), o, s, sums);
  }
  void GetPartial(int64_t element, int64_t count, V* sums) const {
    V o{}, s{};
    if constexpr (Act::kKeepsInput) o = LoadPartial(offset, count);
    if constexpr (kShortcut) s = LoadPartial(shortcut + element, count);
    Put(LoadPartial(kept + element, count), LoadPartial(dy + element, count), o, s, sums);
  }
  void Put(V k, V d, V o, V s, V* sums) const {
    sums[0] = d * act.Slope(k);
    sums[1] = act.template GainTerm<kShortcut>(k, d, sums[0], o, s);
  }
};

// y = act(gain * (x - offset) + bias + shortcut). The difference comes first: where the mean is large against the
// deviation, gain * x - gain * offset would lose the digits that the sum was careful to keep.
template <class T, class Act, Addends kAddends>
struct ForwardMap {
  using V = typename Compute<T>::Vector;
  static constexpr int kParameters = kAddends == Addends::kNone ? 2 : 3;
  static constexpr int kOutputs = 1;
  const T* x;
  const T* shortcut;  // Read only where there is one.
  T* out[kOutputs];
  bool stream;
  Act act;

  struct Input {
    V x, shortcut;
  };
  Input Read(int64_t element) const {
    if constexpr (kAddends == Addends::kShortcut) return {Load(x + element), Load(shortcut + element)};
    return {Load(x + element), V{}};
  }
  Input ReadPartial(int64_t element, int64_t count) const {
    if constexpr (kAddends == Addends::kShortcut) {
      return {LoadPartial(x + element, count), LoadPartial(shortcut + element, count)};
    }
    return {LoadPartial(x + element, count), V{}};
  }
  void Values(const V* p, const Input& in, V* values) const {
    V z = (in.x - p[1]) * p[0];
    if constexpr (kAddends != Addends::kNone) z += p[2];
    if constexpr (kAddends == Addends::kShortcut) z += in.shortcut;
    values[0] = act.Forward(z);
  }
};

// dx = gain * (dz - offset) + shift and, where there is a shortcut, dshortcut = dz.
template <class T, class Act, bool kShortcut>
struct BackwardMap {
  using V = typename Compute<T>::Vector;
  static constexpr int kParameters = 3;
  static constexpr int kOutputs = kShortcut ? 2 : 1;
  const T* kept;
  const T* dy;
  T* out[kOutputs];
  bool stream;
  Act act;

  struct Input {
    V k, d;
  };
  Input Read(int64_t element) const { return {Load(kept + element), Load(dy + element)}; }
  Input ReadPartial(int64_t element, int64_t count) const {
    return {LoadPartial(kept + element, count), LoadPartial(dy + element, count)};
  }
  void Values(const V* p, const Input& in, V* values) const {
    const V dz = in.d * act.Slope(in.k);
    values[0] = (dz - p[1]) * p[0] + p[2];
    if constexpr (kShortcut) values[1] = dz;
  }
};

// Rows of `width` elements, `stride` apart.
struct Rows {
  int64_t element;  // The first one.
  int64_t count;    // Of rows.
  int64_t stride;
  int64_t width;
};

// ---- Pass one: sums ----

// Adds kCount terms, `step` elements apart, as a balanced tree.
template <int kCount, class Terms, class V>
inline void AddTree(const Terms& terms, int64_t element, int64_t step, int64_t column, V* sums) {
  if constexpr (kCount == 1) {
    terms.Get(element, column, sums);
  } else {
    V other[Terms::kSums];
    AddTree<kCount / 2>(terms, element, step, column, sums);
    AddTree<kCount / 2>(terms, element + kCount / 2 * step, step, column, other);
    for (int s = 0; s < Terms::kSums; ++s) sums[s] += other[s];
  }
}

// The column sums of a block of rows, before they go to double. Behind the whole vectors of a row there is room for the
// vector that overlaps the last one.
template <class T>
struct BlockSums {
  using S = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  static constexpr int kLanes = Compute<T>::kLanes;

  S values[kMaxColumns + kLanes];

  void Put(int64_t slot, V v, bool first) { Store(values + slot, first ? v : Load(values + slot) + v); }

  void AddTo(double* totals, int64_t width) const {
    const int64_t whole = width < kLanes ? width : width / kLanes * kLanes;
    for (int64_t i = 0; i < whole; ++i) totals[i] += static_cast<double>(values[i]);
    const S* end = values + whole + kLanes;
    for (int64_t i = whole; i < width; ++i) totals[i] += static_cast<double>(end[i - width]);
  }
};

// Adds the rows' column sums to totals[kSums][kMaxColumns]: kTogether rows as a tree, up to kBlockSteps such sums in
// the compute type, the rest in double.
template <int kTogether, class T, class Terms>
void SumRowsTogether(const Terms& terms, const Rows& rows, double (*totals)[kMaxColumns]) {
  using V = typename Compute<T>::Vector;
  constexpr int kLanes = Compute<T>::kLanes;
  const int64_t stride = rows.stride, width = rows.width, tail = width / kLanes * kLanes;
  BlockSums<T> block[Terms::kSums];
  V sums[Terms::kSums];
  auto put = [&](int64_t slot, bool first) {
    for (int s = 0; s < Terms::kSums; ++s) block[s].Put(slot, sums[s], first);
  };
  int64_t element = rows.element;
  for (int64_t left = rows.count; left > 0;) {
    const int64_t block_rows = Min(left, kBlockSteps * kTogether);
    int64_t row = 0;
    if (width < kLanes) {
      for (; row < block_rows; ++row) {
        terms.GetPartial(element + row * stride, width, sums);
        put(0, row == 0);
      }
    }
    for (; row + kTogether <= block_rows; row += kTogether) {
      const int64_t start = element + row * stride;
      for (int64_t i = 0; i < tail; i += kLanes) {
        AddTree<kTogether>(terms, start + i, stride, i, sums);
        put(i, row == 0);
      }
      if (tail < width) {
        AddTree<kTogether>(terms, start + width - kLanes, stride, width - kLanes, sums);
        put(tail, row == 0);
      }
    }
    for (; row < block_rows; ++row) {
      const int64_t start = element + row * stride;
      for (int64_t i = 0; i < tail; i += kLanes) {
        terms.Get(start + i, i, sums);
        put(i, row == 0);
      }
      if (tail < width) {
        terms.Get(start + width - kLanes, width - kLanes, sums);
        put(tail, row == 0);
      }
    }
    for (int s = 0; s < Terms::kSums; ++s) block[s].AddTo(totals[s], width);
    element += block_rows * stride;
    left -= block_rows;
  }
}

// Rows together are fewer loads and stores of the block's sums, but memory is then read in several places of a page at
// once, which the prefetchers follow only where these are within half a KiB: two rows of 512 bytes, out of the caches,
// take twice as long as one by one. Rows of a page and more are pages of their own.
template <class T, class Terms>
void SumRows(const Terms& terms, const Rows& rows, double (*totals)[kMaxColumns]) {
  constexpr int64_t kPageBytes = 4096, kTogetherBytes = 512;
  const int64_t row_bytes = rows.stride * int64_t{sizeof(T)};
  if (row_bytes >= kPageBytes) {
    SumRowsTogether<Terms::kTree, T>(terms, rows, totals);
  } else if (4 * row_bytes <= kTogetherBytes) {
    SumRowsTogether<4, T>(terms, rows, totals);
  } else if (2 * row_bytes <= kTogetherBytes) {
    SumRowsTogether<2, T>(terms, rows, totals);
  } else {
    SumRowsTogether<1, T>(terms, rows, totals);
  }
}

// Sums `count` elements that follow each other, lanes side by side: SumRows with vectors for rows. Writes
// totals[kSums].
template <class T, class Terms>
void SumMap(const Terms& terms, int64_t element, int64_t count, double* totals) {
  using V = typename Compute<T>::Vector;
  constexpr int kLanes = Compute<T>::kLanes;
  constexpr int kSums = Terms::kSums;
  constexpr int kDoubleVectors = kLanes / kDoubleLanes;
  DoubleVector lanes[kSums][kDoubleVectors] = {};
  V sums[kSums];
  while (count > 0) {
    const int64_t block_count = Min(count, kBlockSteps * Terms::kTree * kLanes);
    V block[kSums] = {};
    auto add = [&] {
      for (int s = 0; s < kSums; ++s) block[s] += sums[s];
    };
    int64_t i = 0;
    for (; i + Terms::kTree * kLanes <= block_count; i += Terms::kTree * kLanes) {
      AddTree<Terms::kTree>(terms, element + i, kLanes, 0, sums);
      add();
    }
    for (; i + kLanes <= block_count; i += kLanes) {
      terms.Get(element + i, 0, sums);
      add();
    }
    if (i < block_count) {
      terms.GetPartial(element + i, block_count - i, sums);
      add();
    }
    for (int s = 0; s < kSums; ++s) AddLanes(block[s], lanes[s]);
    element += block_count;
    count -= block_count;
  }
  for (int s = 0; s < kSums; ++s) {
    DoubleVector total = lanes[s][0];
    for (int i = 1; i < kDoubleVectors; ++i) total += lanes[s][i];
    totals[s] = SumLanes(total);
  }
}

// ---- Pass two: writing ----

// The parameters of a Map, column by column. A whole vector can be read at any column of the row, and at column 0.
template <class T, int kParameters>
struct Parameters {
  using S = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  S values[kParameters][kMaxColumns];

  void Get(int64_t column, V* out) const {
    for (int k = 0; k < kParameters; ++k) out[k] = Load(values[k] + column);
  }
};

// The first kRows of the rows.
template <int kRows, bool kPerColumn, class T, class Map>
inline void ApplySomeRows(const Map& map, const Parameters<T, Map::kParameters>& parameters, const Rows& rows,
                          bool stream) {
  using V = typename Compute<T>::Vector;
  constexpr int kLanes = Compute<T>::kLanes;
  const int64_t element = rows.element, stride = rows.stride, width = rows.width, tail = width / kLanes * kLanes;
  typename Map::Input in[kRows], last[kRows] = {};
  V p[Map::kParameters], values[Map::kOutputs];
  if (tail < width) {
    // The last vector overlaps the one before it: read it while its input is still there.
    for (int r = 0; r < kRows; ++r) last[r] = map.Read(element + r * stride + width - kLanes);
  }
  for (int64_t i = 0; i < tail; i += kLanes) {
    parameters.Get(kPerColumn ? i : 0, p);
    for (int r = 0; r < kRows; ++r) in[r] = map.Read(element + r * stride + i);
    for (int r = 0; r < kRows; ++r) {
      const int64_t to = element + r * stride + i;
      map.Values(p, in[r], values);
      stream ? StoreStreaming(map.out[0] + to, values[0]) : Store(map.out[0] + to, values[0]);
      for (int o = 1; o < Map::kOutputs; ++o) Store(map.out[o] + to, values[o]);
    }
  }
  if (tail < width) {
    parameters.Get(kPerColumn ? width - kLanes : 0, p);
    for (int r = 0; r < kRows; ++r) {
      map.Values(p, last[r], values);
      for (int o = 0; o < Map::kOutputs; ++o) Store(map.out[o] + element + r * stride + width - kLanes, values[o]);
    }
  }
}

template <bool kPerColumn, class T, class Map>
void ApplyRows(const Map& map, const Parameters<T, Map::kParameters>& parameters, Rows rows) {
  using V = typename Compute<T>::Vector;
  if (rows.width < Compute<T>::kLanes) {
    V p[Map::kParameters], values[Map::kOutputs];
    parameters.Get(0, p);
    for (; rows.count > 0; --rows.count, rows.element += rows.stride) {
      map.Values(p, map.ReadPartial(rows.element, rows.width), values);
      for (int o = 0; o < Map::kOutputs; ++o) StorePartial(map.out[o] + rows.element, rows.width, values[o]);
    }
    return;
  }
  const int64_t first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.out[0] + rows.element));
  // Whole rows only: where an ordinary store finishes a line, what was streamed of it takes far longer than it saves.
  const int64_t offsets = first | rows.stride * int64_t{sizeof(T)} | rows.width * int64_t{sizeof(T)};
  const bool stream = map.stream && offsets % kStreamBytes<T> == 0;
  // Four rows share one load of the parameters.
  for (; rows.count >= 4; rows.count -= 4, rows.element += 4 * rows.stride) {
    ApplySomeRows<4, kPerColumn>(map, parameters, rows, stream);
  }
  for (; rows.count > 0; --rows.count, rows.element += rows.stride) {
    ApplySomeRows<1, kPerColumn>(map, parameters, rows, stream);
  }
  if (stream) StreamFence();
}

// ---- Chunks of a sample, in both layouts ----

// The chunk of a task. Elements count from the sample's first.
struct Chunk {
  Shape shape;
  int64_t fold;
  int64_t begin;     // Channel.
  int64_t channels;  // Their number.
  int64_t first;     // Position.
  int64_t count;     // Of positions.

  template <class Args>
  explicit Chunk(const Task<Args>& task)
      : shape(task.args.shape),
        fold(task.chunking.fold),
        begin(task.begin),
        channels(task.end - task.begin),
        first(task.chunk * task.chunking.chunk),
        count(Min(task.chunking.chunk, shape.positions - first)) {}

  // channels_last: whole rows, and what is left of the positions as one shorter row, or one of width 0.
  int64_t width() const { return fold * channels; }
  Rows rows() const { return {first * shape.channels + begin, count / fold, fold * shape.channels, width()}; }
  Rows last_row() const {
    const Rows whole = rows();
    return {whole.element + whole.count * whole.stride, 1, whole.stride, count % fold * channels};
  }
  // channels_first: a map as one row; `channel` counts from the task's first.
  Rows map(int64_t channel) const { return {(begin + channel) * shape.positions + first, 1, 0, count}; }
};

// Repeats what stands for each channel for the further positions of a row.
template <class S>
void Unfold(const Chunk& chunk, S* columns) {
  for (int64_t i = chunk.channels; i < chunk.width(); ++i) columns[i] = columns[i - chunk.channels];
}

// The sums of a chunk, sums[kSums][channels]. `terms_of(channel)` makes the terms of one map (channels_first) or of the
// row that starts with that channel.
template <class T, class TermsOf>
void SumChunk(const TermsOf& terms_of, const Chunk& chunk, double* sums) {
  using Terms = decltype(terms_of(int64_t{0}));
  const int64_t channels = chunk.channels;
  if (chunk.shape.layout == Layout::kChannelsFirst) {
    for (int64_t c = 0; c < channels; ++c) {
      double totals[Terms::kSums];
      SumMap<T>(terms_of(c), chunk.map(c).element, chunk.count, totals);
      for (int s = 0; s < Terms::kSums; ++s) sums[s * channels + c] = totals[s];
    }
    return;
  }
  double totals[Terms::kSums][kMaxColumns];
  for (int s = 0; s < Terms::kSums; ++s) {
    for (int64_t i = 0; i < chunk.width(); ++i) totals[s][i] = 0;
  }
  const Terms terms = terms_of(0);
  SumRows<T>(terms, chunk.rows(), totals);
  if (const Rows last = chunk.last_row(); last.width > 0) SumRows<T>(terms, last, totals);
  for (int s = 0; s < Terms::kSums; ++s) {
    for (int64_t i = channels; i < chunk.width(); i += channels) {
      for (int64_t c = 0; c < channels; ++c) totals[s][c] += totals[s][i + c];
    }
    for (int64_t c = 0; c < channels; ++c) sums[s * channels + c] = totals[s][c];
  }
}

// Writes a chunk. `parameters` holds one column per channel and is unfolded here.
template <class T, class Map>
void ApplyChunk(const Map& map, Parameters<T, Map::kParameters>* parameters, const Chunk& chunk) {
  if (chunk.shape.layout == Layout::kChannelsFirst) {
    for (int64_t c = 0; c < chunk.channels; ++c) {
      Parameters<T, Map::kParameters> one;
      for (int k = 0; k < Map::kParameters; ++k) {
        for (int l = 0; l < Compute<T>::kLanes; ++l) one.values[k][l] = parameters->values[k][c];
      }
      ApplyRows<false>(map, one, chunk.map(c));
    }
    return;
  }
  for (int k = 0; k < Map::kParameters; ++k) Unfold(chunk, parameters->values[k]);
  ApplyRows<true>(map, *parameters, chunk.rows());
  if (const Rows last = chunk.last_row(); last.width > 0) ApplyRows<true>(map, *parameters, last);
}

// ---- The two passes ----

// Pointers to the sample of a task, and to the values of its channels; null stays null.
template <class E, class Args>
E* Sample(E* base, const Task<Args>& task) {
  const Shape& shape = task.args.shape;
  return base == nullptr ? nullptr : base + task.sample * shape.positions * shape.channels;
}
template <class S, class Args>
const S* OfChannels(const void* values, const Task<Args>& task) {
  return values == nullptr ? nullptr : static_cast<const S*>(values) + task.begin;
}
template <class E, class Args>
E* OfMaps(E* values, const Task<Args>& task) {
  return values + task.sample * task.args.shape.channels + task.begin;
}

// A pass has three steps: Sum() adds what one chunk has, Finish() makes parameters of the sums of all chunks, and where
// task.chunk is 0 also what there is once for each map, and Write() writes one chunk.
template <class T, class Act, Addends kAddends>
struct ForwardPass {
  using Args = ForwardArgs;
  using S = typename Compute<T>::Scalar;
  using Map = ForwardMap<T, Act, kAddends>;
  using MapParameters = Parameters<T, Map::kParameters>;
  static constexpr int64_t kSums = kForwardSums;

  static void Sum(const ForwardTask& task, double* sums) {
    const ForwardTerms<T> terms{Sample(static_cast<const T*>(task.args.x), task)};
    SumChunk<T>([&](int64_t) { return terms; }, Chunk(task), sums);
  }

  // Once for each map: its mean.
  static void Finish(const ForwardTask& task, const double* totals, MapParameters* parameters) {
    const ForwardArgs& args = task.args;
    const S* gain = OfChannels<S>(args.gain, task);
    const S* mean_scale = OfChannels<S>(args.mean_scale, task);
    const S* bias = OfChannels<S>(args.bias, task);
    S* mean = OfMaps(static_cast<S*>(args.mean), task);
    for (int64_t c = 0; c < task.end - task.begin; ++c) {
      const S m = static_cast<S>(totals[c] / static_cast<double>(args.shape.positions));
      if (task.chunk == 0) mean[c] = m;
      parameters->values[0][c] = QuietNan(gain[c]);
      parameters->values[1][c] = QuietNan(mean_scale[c] * m);
      if constexpr (kAddends != Addends::kNone)
        parameters->values[2][c] = bias == nullptr ? S(-0.0) : QuietNan(bias[c]);
    }
  }

  static void Write(const ForwardTask& task, MapParameters* parameters) {
    const ForwardArgs& args = task.args;
    const Map map{Sample(static_cast<const T*>(args.x), task),
                  Sample(static_cast<const T*>(args.shortcut), task),
                  {Sample(static_cast<T*>(args.y), task)},
                  task.stream,
                  Act(args.alpha)};
    ApplyChunk<T>(map, parameters, Chunk(task));
  }
};

template <class T, class Act, bool kShortcut>
struct BackwardPass {
  using Args = BackwardArgs;
  using S = typename Compute<T>::Scalar;
  using Map = BackwardMap<T, Act, kShortcut>;
  using MapParameters = Parameters<T, Map::kParameters>;
  static constexpr int64_t kSums = kBackwardSums;

  // sums[0..channels) are those of dz, the rest those of the gain's terms.
  static void Sum(const BackwardTask& task, double* sums) {
    const BackwardArgs& args = task.args;
    const Chunk chunk(task);
    const S* mean = OfMaps(static_cast<const S*>(args.mean), task);
    const S* mean_scale = OfChannels<S>(args.mean_scale, task);
    S offset[kMaxColumns];
    const bool one_map = args.shape.layout == Layout::kChannelsFirst;
    if (Act::kKeepsInput && !one_map) {
      for (int64_t c = 0; c < chunk.channels; ++c) offset[c] = mean_scale[c] * mean[c];
      Unfold(chunk, offset);
    }
    const BackwardTerms<T, Act, kShortcut> terms{
        Sample(static_cast<const T*>(args.kept), task), Sample(static_cast<const T*>(args.dy), task),
        Sample(static_cast<const T*>(args.shortcut), task), offset, Act(args.alpha)};
    auto terms_of = [&](int64_t c) {
      if (Act::kKeepsInput && one_map) {
        for (int l = 0; l < Compute<T>::kLanes; ++l) offset[l] = mean_scale[c] * mean[c];
      }
      return terms;
    };
    SumChunk<T>(terms_of, chunk, sums);
  }

  // Once for each map: its share of the parameters' sums.
  static void Finish(const BackwardTask& task, const double* totals, MapParameters* parameters,
                     const ParameterSums& sums) {
    if (task.chunk == 0) AddToParameterSums(task, totals, sums);
    const BackwardArgs& args = task.args;
    const S* gain = OfChannels<S>(args.gain, task);
    const S* mean_scale = OfChannels<S>(args.mean_scale, task);
    const S* dmean = OfMaps(static_cast<const S*>(args.dmean), task);
    const double positions = static_cast<double>(args.shape.positions);
    for (int64_t c = 0; c < task.end - task.begin; ++c) {
      parameters->values[0][c] = QuietNan(gain[c]);
      parameters->values[1][c] = QuietNan(static_cast<S>(static_cast<double>(mean_scale[c]) * totals[c] / positions));
      parameters->values[2][c] = QuietNan(static_cast<S>(static_cast<double>(dmean[c]) / positions));
    }
  }

  static void AddToParameterSums(const BackwardTask& task, const double* totals, const ParameterSums& sums) {
    const int64_t channels = task.end - task.begin;
    const S* mean = OfMaps(static_cast<const S*>(task.args.mean), task);
    const S* bias = OfChannels<S>(task.args.bias, task);
    for (int64_t c = 0; c < channels; ++c) {
      sums.gain[task.begin + c] += totals[channels + c];
      sums.mean_scale[task.begin + c] += static_cast<double>(mean[c]) * totals[c];
      if (bias == nullptr) continue;
      // What was kept of z has the bias in it: it is taken off once for each map, and not for each element. Not where
      // dz adds up to 0, as it does where the activation is flat: an infinite bias does not count there.
      if (!Act::kKeepsInput && totals[c] != 0) {
        sums.gain[task.begin + c] -= static_cast<double>(bias[c]) * totals[c];
      }
      sums.bias[task.begin + c] += totals[c];
    }
  }

  static void Write(const BackwardTask& task, MapParameters* parameters) {
    const BackwardArgs& args = task.args;
    Map map{Sample(static_cast<const T*>(args.kept), task),
            Sample(static_cast<const T*>(args.dy), task),
            {Sample(static_cast<T*>(args.dx), task)},
            task.stream,
            Act(args.alpha)};
    if constexpr (kShortcut) map.out[1] = Sample(static_cast<T*>(args.dshortcut), task);
    ApplyChunk<T>(map, parameters, Chunk(task));
  }
};

// ---- The loops of both passes ----

// One chunk of a map whose sums are known. Every chunk makes the parameters for itself.
template <class Pass, class... Sums>
void Apply(const Task<typename Pass::Args>& task, const double* totals, const Sums&... parameter_sums) {
  typename Pass::MapParameters parameters;
  Pass::Finish(task, totals, &parameters, parameter_sums...);
  Pass::Write(task, &parameters);
}

// Whole maps.
template <class Pass, class... Sums>
void Run(const Task<typename Pass::Args>& whole, const Sums&... parameter_sums) {
  double totals[Pass::kSums * kMaxColumns], sums[Pass::kSums * kMaxColumns];
  Task<typename Pass::Args> task = whole;
  task.chunk = 0;
  Pass::Sum(task, totals);
  for (task.chunk = 1; task.chunk < task.chunking.chunks; ++task.chunk) {
    Pass::Sum(task, sums);
    for (int64_t i = 0; i < Pass::kSums * (task.end - task.begin); ++i) totals[i] += sums[i];
  }
  typename Pass::MapParameters parameters;
  task.chunk = 0;
  Pass::Finish(task, totals, &parameters, parameter_sums...);
  for (task.chunk = task.chunking.chunks - 1; task.chunk >= 0; --task.chunk) Pass::Write(task, &parameters);
}

template <class T, class Act, Addends kAddends>
const Loops& LoopsOf() {
  using Forward = ForwardPass<T, Act, kAddends>;
  // What keeps the input has no shortcut backward (types.h).
  using Backward = BackwardPass<T, Act, kAddends == Addends::kShortcut && !Act::kKeepsInput>;
  static constexpr Loops kLoops = {Run<Forward>,  Run<Backward, ParameterSums>,  Forward::Sum, Apply<Forward>,
                                   Backward::Sum, Apply<Backward, ParameterSums>};
  return kLoops;
}

template <class T>
const Loops& FindLoopsOf(Activation activation, Addends addends) {
  using V = typename Compute<T>::Vector;
  using S = typename Compute<T>::Scalar;
  return WithActivation<V, S>(activation, /*alpha=*/0, [&](auto act) -> const Loops& {
    using Act = decltype(act);
    switch (addends) {
      case Addends::kBias:
        return LoopsOf<T, Act, Addends::kBias>();
      case Addends::kShortcut:
        return LoopsOf<T, Act, Addends::kShortcut>();
      case Addends::kNone:
        break;
    }
    return LoopsOf<T, Act, Addends::kNone>();
  });
}

}  // namespace

const Loops& FindLoops(DataType data_type, Activation activation, Addends addends) {
  switch (data_type) {
    case DataType::kHalf:
      return FindLoopsOf<Half>(activation, addends);
    case DataType::kBfloat16:
      return FindLoopsOf<Bfloat16>(activation, addends);
    case DataType::kDouble:
      return FindLoopsOf<double>(activation, addends);
    case DataType::kFloat:
      break;
  }
  return FindLoopsOf<float>(activation, addends);
}

}  // namespace TF_AGC_ISA_LEVEL
}  // namespace core
}  // namespace tf_agc
