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

// Adds the column sums of `rows` rows of `width` columns, `stride` elements apart, to totals[kSums][kMaxColumns]:
// kTogether rows as a tree, up to kBlockSteps such sums in the compute type, the rest in double.
template <int kTogether, class T, class Terms>
void SumRowsTogether(const Terms& terms, int64_t element, int64_t rows, int64_t stride, int64_t width,
                     double (*totals)[kMaxColumns]) {
  using V = typename Compute<T>::Vector;
  constexpr int kLanes = Compute<T>::kLanes;
  const int64_t tail = width / kLanes * kLanes;
  BlockSums<T> block[Terms::kSums];
  V sums[Terms::kSums];
  auto put = [&](int64_t slot, bool first) {
    for (int s = 0; s < Terms::kSums; ++s) block[s].Put(slot, sums[s], first);
  };
  while (rows > 0) {
    const int64_t block_rows = Min(rows, kBlockSteps * kTogether);
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
    rows -= block_rows;
  }
}

// Rows together are fewer loads and stores of the block's sums, but memory is then read in several places of a page at
// once, which the prefetchers follow only where these are within half a KiB: two rows of 512 bytes, out of the caches,
// take twice as long as one by one. Rows of a page and more are pages of their own.
template <class T, class Terms>
void SumRows(const Terms& terms, int64_t element, int64_t rows, int64_t stride, int64_t width,
             double (*totals)[kMaxColumns]) {
  constexpr int64_t kPageBytes = 4096, kTogetherBytes = 512;
  const int64_t row_bytes = stride * int64_t{sizeof(T)};
  if (row_bytes >= kPageBytes) {
    SumRowsTogether<Terms::kTree, T>(terms, element, rows, stride, width, totals);
  } else if (4 * row_bytes <= kTogetherBytes) {
    SumRowsTogether<4, T>(terms, element, rows, stride, width, totals);
  } else if (2 * row_bytes <= kTogetherBytes) {
    SumRowsTogether<2, T>(terms, element, rows, stride, width, totals);
  } else {
    SumRowsTogether<1, T>(terms, element, rows, stride, width, totals);
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

template <int kRows, bool kPerColumn, class T, class Map>
inline void ApplySomeRows(const Map& map, const Parameters<T, Map::kParameters>& parameters, int64_t element,
                          int64_t stride, int64_t width, bool stream) {
  using V = typename Compute<T>::Vector;
  constexpr int kLanes = Compute<T>::kLanes;
  const int64_t tail = width / kLanes * kLanes;
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
void ApplyRows(const Map& map, const Parameters<T, Map::kParameters>& parameters, int64_t element, int64_t rows,
               int64_t stride, int64_t width) {
  using V = typename Compute<T>::Vector;
  if (width < Compute<T>::kLanes) {
    V p[Map::kParameters], values[Map::kOutputs];
    parameters.Get(0, p);
    for (int64_t row = 0; row < rows; ++row, element += stride) {
      map.Values(p, map.ReadPartial(element, width), values);
      for (int o = 0; o < Map::kOutputs; ++o) StorePartial(map.out[o] + element, width, values[o]);
    }
    return;
  }
  const int64_t first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.out[0] + element));
  // Whole rows only: where an ordinary store finishes a line, what was streamed of it takes far longer than it saves.
  const int64_t offsets = first | stride * int64_t{sizeof(T)} | width * int64_t{sizeof(T)};
  const bool stream = map.stream && offsets % kStreamBytes<T> == 0;
  // Four rows share one load of the parameters.
  for (; rows >= 4; rows -= 4, element += 4 * stride) {
    ApplySomeRows<4, kPerColumn>(map, parameters, element, stride, width, stream);
  }
  for (; rows > 0; --rows, element += stride) {
    ApplySomeRows<1, kPerColumn>(map, parameters, element, stride, width, stream);
  }
  if (stream) StreamFence();
}

// ---- Chunks of a sample, in both layouts ----

// One chunk of a part, whose sample's elements count from 0.
struct Chunk {
  const Shape& shape;
  const Chunking& chunking;
  const Part& part;
  int64_t first;  // Position.
  int64_t count;  // Of positions.

  Chunk(const Shape& s, const Chunking& p, const Part& c)
      : shape(s), chunking(p), part(c), first(c.chunk * p.chunk), count(Min(p.chunk, s.positions - first)) {}

  int64_t channels() const { return part.end - part.begin; }
  // channels_last: whole rows, and what is left of the positions as one shorter row.
  int64_t element() const { return first * shape.channels + part.begin; }
  int64_t rows() const { return count / chunking.fold; }
  int64_t stride() const { return chunking.fold * shape.channels; }
  int64_t width() const { return chunking.fold * channels(); }
  int64_t last_element() const { return element() + rows() * stride(); }
  int64_t last_width() const { return count % chunking.fold * channels(); }
  // channels_first; `channel` counts from the part's first.
  int64_t map_element(int64_t channel) const { return (part.begin + channel) * shape.positions + first; }
};

// Repeats what stands for each channel for the further positions of a row.
template <class S>
void Unfold(const Chunk& chunk, S* columns) {
  const int64_t channels = chunk.channels();
  for (int64_t i = channels; i < chunk.width(); ++i) columns[i] = columns[i - channels];
}

// The sums of a chunk, sums[kSums][channels]. `terms_of(channel)` makes the terms of one map (channels_first) or of the
// row that starts with that channel.
template <class T, class TermsOf>
void SumChunk(const TermsOf& terms_of, const Chunk& chunk, double* sums) {
  using Terms = decltype(terms_of(int64_t{0}));
  const int64_t channels = chunk.channels();
  if (chunk.shape.layout == Layout::kChannelsFirst) {
    for (int64_t c = 0; c < channels; ++c) {
      double totals[Terms::kSums];
      SumMap<T>(terms_of(c), chunk.map_element(c), chunk.count, totals);
      for (int s = 0; s < Terms::kSums; ++s) sums[s * channels + c] = totals[s];
    }
    return;
  }
  double totals[Terms::kSums][kMaxColumns];
  for (int s = 0; s < Terms::kSums; ++s) {
    for (int64_t i = 0; i < chunk.width(); ++i) totals[s][i] = 0;
  }
  const Terms terms = terms_of(0);
  SumRows<T>(terms, chunk.element(), chunk.rows(), chunk.stride(), chunk.width(), totals);
  if (chunk.last_width() > 0) SumRows<T>(terms, chunk.last_element(), 1, chunk.stride(), chunk.last_width(), totals);
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
    for (int64_t c = 0; c < chunk.channels(); ++c) {
      Parameters<T, Map::kParameters> one;
      for (int k = 0; k < Map::kParameters; ++k) {
        for (int l = 0; l < Compute<T>::kLanes; ++l) one.values[k][l] = parameters->values[k][c];
      }
      ApplyRows<false>(map, one, chunk.map_element(c), 1, 0, chunk.count);
    }
    return;
  }
  for (int k = 0; k < Map::kParameters; ++k) Unfold(chunk, parameters->values[k]);
  ApplyRows<true>(map, *parameters, chunk.element(), chunk.rows(), chunk.stride(), chunk.width());
  if (chunk.last_width() > 0) ApplyRows<true>(map, *parameters, chunk.last_element(), 1, 0, chunk.last_width());
}

// ---- The two passes ----

// Pointers to one sample, and to the values of a part's channels; null stays null.
template <class E>
E* Sample(E* base, const Shape& shape, const Part& part) {
  return base == nullptr ? nullptr : base + part.sample * shape.positions * shape.channels;
}
template <class S>
const S* OfChannels(const void* values, const Part& part) {
  return values == nullptr ? nullptr : static_cast<const S*>(values) + part.begin;
}

template <class T, template <class, class> class ActivationOf, Addends kAddends>
struct ForwardPass {
  using S = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  using Act = ActivationOf<V, S>;
  using Map = ForwardMap<T, Act, kAddends>;
  using MapParameters = Parameters<T, Map::kParameters>;

  static void Sum(const ForwardArgs& args, const Chunking& chunking, const Part& part, double* sums) {
    const ForwardTerms<T> terms{Sample(static_cast<const T*>(args.x), args.shape, part)};
    SumChunk<T>([&](int64_t) { return terms; }, Chunk(args.shape, chunking, part), sums);
  }

  // Turns sums into means and parameters. Every chunk of a map does this for itself; the first one writes the means.
  static void MakeParameters(const ForwardArgs& args, const Part& part, const double* totals,
                             MapParameters* parameters) {
    const S* gain = OfChannels<S>(args.gain, part);
    const S* mean_scale = OfChannels<S>(args.mean_scale, part);
    const S* bias = OfChannels<S>(args.bias, part);
    S* mean = static_cast<S*>(args.mean) + part.sample * args.shape.channels + part.begin;
    for (int64_t c = 0; c < part.end - part.begin; ++c) {
      const S m = static_cast<S>(totals[c] / static_cast<double>(args.shape.positions));
      if (part.chunk == 0) mean[c] = m;
      parameters->values[0][c] = QuietNan(gain[c]);
      parameters->values[1][c] = QuietNan(mean_scale[c] * m);
      if constexpr (kAddends != Addends::kNone)
        parameters->values[2][c] = bias == nullptr ? S(-0.0) : QuietNan(bias[c]);
    }
  }

  static void Write(const ForwardArgs& args, const Chunking& chunking, const Part& part, MapParameters* parameters) {
    const Map map{Sample(static_cast<const T*>(args.x), args.shape, part),
                  Sample(static_cast<const T*>(args.shortcut), args.shape, part),
                  {Sample(static_cast<T*>(args.y), args.shape, part)},
                  chunking.stream,
                  Act(args.alpha)};
    ApplyChunk<T>(map, parameters, Chunk(args.shape, chunking, part));
  }

  static void Apply(const ForwardArgs& args, const Chunking& chunking, const Part& part, const double* totals) {
    MapParameters parameters;
    MakeParameters(args, part, totals, &parameters);
    Write(args, chunking, part, &parameters);
  }

  static void Run(const ForwardArgs& args, const Chunking& chunking, const Part& whole) {
    double totals[kForwardSums * kMaxColumns], sums[kForwardSums * kMaxColumns];
    Part part = whole;
    part.chunk = 0;
    Sum(args, chunking, part, totals);
    for (part.chunk = 1; part.chunk < chunking.chunks; ++part.chunk) {
      Sum(args, chunking, part, sums);
      for (int64_t i = 0; i < kForwardSums * (part.end - part.begin); ++i) totals[i] += sums[i];
    }
    MapParameters parameters;
    part.chunk = 0;
    MakeParameters(args, part, totals, &parameters);
    for (part.chunk = chunking.chunks - 1; part.chunk >= 0; --part.chunk) Write(args, chunking, part, &parameters);
  }
};

template <class T, template <class, class> class ActivationOf, bool kShortcut>
struct BackwardPass {
  using S = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  using Act = ActivationOf<V, S>;
  using Map = BackwardMap<T, Act, kShortcut>;
  using MapParameters = Parameters<T, Map::kParameters>;

  static const S* Means(const BackwardArgs& args, const Part& part) {
    return static_cast<const S*>(args.mean) + part.sample * args.shape.channels + part.begin;
  }

  static void Sum(const BackwardArgs& args, const Chunking& chunking, const Part& part, double* sums) {
    const Chunk chunk(args.shape, chunking, part);
    const S* mean = Means(args, part);
    const S* mean_scale = OfChannels<S>(args.mean_scale, part);
    S offset[kMaxColumns];
    const bool one_map = args.shape.layout == Layout::kChannelsFirst;
    if (Act::kKeepsInput && !one_map) {
      for (int64_t c = 0; c < chunk.channels(); ++c) offset[c] = mean_scale[c] * mean[c];
      Unfold(chunk, offset);
    }
    const BackwardTerms<T, Act, kShortcut> terms{Sample(static_cast<const T*>(args.kept), args.shape, part),
                                                 Sample(static_cast<const T*>(args.dy), args.shape, part),
                                                 Sample(static_cast<const T*>(args.shortcut), args.shape, part), offset,
                                                 Act(args.alpha)};
    auto terms_of = [&](int64_t c) {
      if (Act::kKeepsInput && one_map) {
        for (int l = 0; l < Compute<T>::kLanes; ++l) offset[l] = mean_scale[c] * mean[c];
      }
      return terms;
    };
    SumChunk<T>(terms_of, chunk, sums);
  }

  // totals[0..channels) are the sums of dz, the rest those of the gain's terms.
  static void MakeParameters(const BackwardArgs& args, const Part& part, const double* totals,
                             MapParameters* parameters) {
    const S* gain = OfChannels<S>(args.gain, part);
    const S* mean_scale = OfChannels<S>(args.mean_scale, part);
    const S* dmean = static_cast<const S*>(args.dmean) + part.sample * args.shape.channels + part.begin;
    const double positions = static_cast<double>(args.shape.positions);
    for (int64_t c = 0; c < part.end - part.begin; ++c) {
      parameters->values[0][c] = QuietNan(gain[c]);
      parameters->values[1][c] = QuietNan(static_cast<S>(static_cast<double>(mean_scale[c]) * totals[c] / positions));
      parameters->values[2][c] = QuietNan(static_cast<S>(static_cast<double>(dmean[c]) / positions));
    }
  }

  static void AddToParameterSums(const BackwardArgs& args, const Part& part, const double* totals,
                                 const ParameterSums& sums) {
    const int64_t channels = part.end - part.begin;
    const S* mean = Means(args, part);
    const S* bias = OfChannels<S>(args.bias, part);
    for (int64_t c = 0; c < channels; ++c) {
      sums.gain[part.begin + c] += totals[channels + c];
      sums.mean_scale[part.begin + c] += static_cast<double>(mean[c]) * totals[c];
      if (bias == nullptr) continue;
      // What was kept of z has the bias in it: it is taken off once for each map, and not for each element. Not where
      // dz adds up to 0, as it does where the activation is flat: an infinite bias does not count there.
      if (!Act::kKeepsInput && totals[c] != 0) {
        sums.gain[part.begin + c] -= static_cast<double>(bias[c]) * totals[c];
      }
      sums.bias[part.begin + c] += totals[c];
    }
  }

  static void Write(const BackwardArgs& args, const Chunking& chunking, const Part& part, MapParameters* parameters) {
    Map map{Sample(static_cast<const T*>(args.kept), args.shape, part),
            Sample(static_cast<const T*>(args.dy), args.shape, part),
            {Sample(static_cast<T*>(args.dx), args.shape, part)},
            chunking.stream,
            Act(args.alpha)};
    if constexpr (kShortcut) map.out[1] = Sample(static_cast<T*>(args.dshortcut), args.shape, part);
    ApplyChunk<T>(map, parameters, Chunk(args.shape, chunking, part));
  }

  static void Apply(const BackwardArgs& args, const Chunking& chunking, const Part& part, const double* totals,
                    const ParameterSums& sums) {
    if (part.chunk == 0) AddToParameterSums(args, part, totals, sums);
    MapParameters parameters;
    MakeParameters(args, part, totals, &parameters);
    Write(args, chunking, part, &parameters);
  }

  static void Run(const BackwardArgs& args, const Chunking& chunking, const Part& whole,
                  const ParameterSums& parameter_sums) {
    double totals[kBackwardSums * kMaxColumns], sums[kBackwardSums * kMaxColumns];
    Part part = whole;
    part.chunk = 0;
    Sum(args, chunking, part, totals);
    for (part.chunk = 1; part.chunk < chunking.chunks; ++part.chunk) {
      Sum(args, chunking, part, sums);
      for (int64_t i = 0; i < kBackwardSums * (part.end - part.begin); ++i) totals[i] += sums[i];
    }
    AddToParameterSums(args, part, totals, parameter_sums);
    MapParameters parameters;
    MakeParameters(args, part, totals, &parameters);
    for (part.chunk = chunking.chunks - 1; part.chunk >= 0; --part.chunk) Write(args, chunking, part, &parameters);
  }
};

template <class T, template <class, class> class ActivationOf, Addends kAddends>
const Loops& LoopsOf() {
  using Forward = ForwardPass<T, ActivationOf, kAddends>;
  // What keeps the input has no shortcut backward (types.h).
  constexpr bool kKeepsInput = ActivationOf<typename Compute<T>::Vector, typename Compute<T>::Scalar>::kKeepsInput;
  using Backward = BackwardPass<T, ActivationOf, kAddends == Addends::kShortcut && !kKeepsInput>;
  static constexpr Loops kLoops = {Forward::Run,   Backward::Run, Forward::Sum,
                                   Forward::Apply, Backward::Sum, Backward::Apply};
  return kLoops;
}

template <class T, template <class, class> class ActivationOf>
const Loops& FindLoopsOf(Addends addends) {
  switch (addends) {
    case Addends::kBias:
      return LoopsOf<T, ActivationOf, Addends::kBias>();
    case Addends::kShortcut:
      return LoopsOf<T, ActivationOf, Addends::kShortcut>();
    case Addends::kNone:
      break;
  }
  return LoopsOf<T, ActivationOf, Addends::kNone>();
}

template <class T>
const Loops& FindLoopsOf(Activation activation, Addends addends) {
  switch (activation) {
    case Activation::kRelu:
      return FindLoopsOf<T, Relu>(addends);
    case Activation::kRelu6:
      return FindLoopsOf<T, Relu6>(addends);
    case Activation::kLeakyRelu:
      return FindLoopsOf<T, LeakyRelu>(addends);
    case Activation::kElu:
      return FindLoopsOf<T, Elu>(addends);
    case Activation::kLinear:
      break;
  }
  return FindLoopsOf<T, Linear>(addends);
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
