// The arithmetic of both passes, compiled once per instruction-set level (TF_AGC_ISA_LEVEL is the namespace).
//
// Nothing from the standard library may be called here (see simd.h), and nothing here knows of threads or caches:
// agc.cc decides who does what.
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

#include "cc/core/simd.h"

namespace tf_agc {
namespace core {
namespace TF_AGC_ISA_LEVEL {
namespace {

constexpr int64_t kBlockSteps = 8;  // Sums in the compute type between two flushes to double.

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

#include "cc/core/activations.h"

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
template <class T, class Act>
struct BackwardTerms {
  using S = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  static constexpr int kSums = 2;
  static constexpr int kTree = 4;
  const T* kept;
  const T* dy;
  const S* offset;  // mean_scale * mean of a column; read only where the input is kept.
  Act act;

  void Get(int64_t element, int64_t column, V* sums) const {
    V o{};
    if constexpr (Act::kKeepsInput) o = Load(offset + column);
    Put(Load(kept + element), Load(dy + element), o, sums);
  }
  void GetPartial(int64_t element, int64_t count, V* sums) const {
    V o{};
    if constexpr (Act::kKeepsInput) o = LoadPartial(offset, count);
    Put(LoadPartial(kept + element, count), LoadPartial(dy + element, count), o, sums);
  }
  void Put(V k, V d, V o, V* sums) const {
    sums[0] = d * act.Slope(k);
    sums[1] = act.GainTerm(k, d, sums[0], o);
  }
};

// y = act(gain * (x - offset)). The difference comes first: where the mean is large against the deviation,
// gain * x - gain * offset would lose the digits that the sum was careful to keep.
template <class T, class Act>
struct ForwardMap {
  using V = typename Compute<T>::Vector;
  static constexpr int kParameters = 2;
  const T* x;
  T* out;
  bool stream;
  Act act;

  struct Input {
    V x;
  };
  Input Read(int64_t element) const { return {Load(x + element)}; }
  Input ReadPartial(int64_t element, int64_t count) const { return {LoadPartial(x + element, count)}; }
  V Value(const V* p, const Input& in) const { return act.Forward((in.x - p[1]) * p[0]); }
};

// dx = gain * (dz - offset) + shift.
template <class T, class Act>
struct BackwardMap {
  using V = typename Compute<T>::Vector;
  static constexpr int kParameters = 3;
  static constexpr bool stream = false;  // dx lies where dy or the kept tensor was, in the cache.
  const T* kept;
  const T* dy;
  T* out;
  Act act;

  struct Input {
    V k, d;
  };
  Input Read(int64_t element) const { return {Load(kept + element), Load(dy + element)}; }
  Input ReadPartial(int64_t element, int64_t count) const {
    return {LoadPartial(kept + element, count), LoadPartial(dy + element, count)};
  }
  V Value(const V* p, const Input& in) const { return (in.d * act.Slope(in.k) - p[1]) * p[0] + p[2]; }
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
  V p[Map::kParameters];
  if (tail < width) {
    // The last vector overlaps the one before it: read it while its input is still there.
    for (int r = 0; r < kRows; ++r) last[r] = map.Read(element + r * stride + width - kLanes);
  }
  for (int64_t i = 0; i < tail; i += kLanes) {
    parameters.Get(kPerColumn ? i : 0, p);
    for (int r = 0; r < kRows; ++r) in[r] = map.Read(element + r * stride + i);
    for (int r = 0; r < kRows; ++r) {
      T* to = map.out + element + r * stride + i;
      stream ? StoreStreaming(to, map.Value(p, in[r])) : Store(to, map.Value(p, in[r]));
    }
  }
  if (tail < width) {
    parameters.Get(kPerColumn ? width - kLanes : 0, p);
    for (int r = 0; r < kRows; ++r) Store(map.out + element + r * stride + width - kLanes, map.Value(p, last[r]));
  }
}

template <bool kPerColumn, class T, class Map>
void ApplyRows(const Map& map, const Parameters<T, Map::kParameters>& parameters, int64_t element, int64_t rows,
               int64_t stride, int64_t width) {
  using V = typename Compute<T>::Vector;
  if (width < Compute<T>::kLanes) {
    V p[Map::kParameters];
    parameters.Get(0, p);
    for (int64_t row = 0; row < rows; ++row, element += stride) {
      StorePartial(map.out + element, width, map.Value(p, map.ReadPartial(element, width)));
    }
    return;
  }
  const int64_t first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.out + element));
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

// One chunk of the channels [begin, end) of a sample, whose own elements count from 0.
struct Chunk {
  const Shape& shape;
  const Plan& plan;
  int64_t begin;
  int64_t end;
  int64_t first;  // Position.
  int64_t count;  // Of positions.

  Chunk(const Shape& s, const Plan& p, int64_t b, int64_t e, int64_t index)
      : shape(s), plan(p), begin(b), end(e), first(index * p.chunk), count(Min(p.chunk, s.positions - first)) {}

  int64_t channels() const { return end - begin; }
  // channels_last: whole rows, and what is left of the positions as one shorter row.
  int64_t element() const { return first * shape.channels + begin; }
  int64_t rows() const { return count / plan.fold; }
  int64_t stride() const { return plan.fold * shape.channels; }
  int64_t width() const { return plan.fold * channels(); }
  int64_t last_element() const { return element() + rows() * stride(); }
  int64_t last_width() const { return count % plan.fold * channels(); }
  // channels_first.
  int64_t map_element(int64_t channel) const { return channel * shape.positions + first; }
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
      SumMap<T>(terms_of(c), chunk.map_element(chunk.begin + c), chunk.count, totals);
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
      ApplyRows<false>(map, one, chunk.map_element(chunk.begin + c), 1, 0, chunk.count);
    }
    return;
  }
  for (int k = 0; k < Map::kParameters; ++k) Unfold(chunk, parameters->values[k]);
  ApplyRows<true>(map, *parameters, chunk.element(), chunk.rows(), chunk.stride(), chunk.width());
  if (chunk.last_width() > 0) ApplyRows<true>(map, *parameters, chunk.last_element(), 1, 0, chunk.last_width());
}

// ---- The two passes ----

template <class T, template <class, class> class ActivationOf>
struct Passes {
  using S = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  using Act = ActivationOf<V, S>;

  // Pointers to one sample.
  template <class E>
  static E* Sample(E* base, const Shape& shape, int64_t sample) {
    return base + sample * shape.positions * shape.channels;
  }

  static void ForwardSum(const ForwardArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t end,
                         int64_t chunk, double* sums) {
    const ForwardTerms<T> terms{Sample(static_cast<const T*>(args.x), args.shape, sample)};
    SumChunk<T>([&](int64_t) { return terms; }, Chunk(args.shape, plan, begin, end, chunk), sums);
  }

  // Turns sums into means and parameters. Every chunk of a map does this for itself; the first one writes the means.
  static void ForwardParameters(const ForwardArgs& args, int64_t sample, int64_t begin, int64_t end, int64_t chunk,
                                const double* totals, Parameters<T, 2>* parameters) {
    const S* gain = static_cast<const S*>(args.gain) + begin;
    const S* mean_scale = static_cast<const S*>(args.mean_scale) + begin;
    S* mean = static_cast<S*>(args.mean) + sample * args.shape.channels + begin;
    for (int64_t c = 0; c < end - begin; ++c) {
      const S m = static_cast<S>(totals[c] / static_cast<double>(args.shape.positions));
      if (chunk == 0) mean[c] = m;
      parameters->values[0][c] = QuietNan(gain[c]);
      parameters->values[1][c] = QuietNan(mean_scale[c] * m);
    }
  }

  static void ForwardWrite(const ForwardArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t end,
                           int64_t chunk, Parameters<T, 2>* parameters) {
    const ForwardMap<T, Act> map{Sample(static_cast<const T*>(args.x), args.shape, sample),
                                 Sample(static_cast<T*>(args.y), args.shape, sample), plan.stream, Act(args.alpha)};
    ApplyChunk<T>(map, parameters, Chunk(args.shape, plan, begin, end, chunk));
  }

  static void ForwardApply(const ForwardArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t end,
                           int64_t chunk, const double* totals) {
    Parameters<T, 2> parameters;
    ForwardParameters(args, sample, begin, end, chunk, totals, &parameters);
    ForwardWrite(args, plan, sample, begin, end, chunk, &parameters);
  }

  static void Forward(const ForwardArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t end) {
    double totals[kForwardSums * kMaxColumns], sums[kForwardSums * kMaxColumns];
    ForwardSum(args, plan, sample, begin, end, 0, totals);
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      ForwardSum(args, plan, sample, begin, end, chunk, sums);
      for (int64_t i = 0; i < kForwardSums * (end - begin); ++i) totals[i] += sums[i];
    }
    Parameters<T, 2> parameters;
    ForwardParameters(args, sample, begin, end, 0, totals, &parameters);
    for (int64_t chunk = plan.chunks - 1; chunk >= 0; --chunk) {
      ForwardWrite(args, plan, sample, begin, end, chunk, &parameters);
    }
  }

  static void BackwardSum(const BackwardArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t end,
                          int64_t chunk_index, double* sums) {
    const Chunk chunk(args.shape, plan, begin, end, chunk_index);
    const S* mean = static_cast<const S*>(args.mean) + sample * args.shape.channels + begin;
    const S* mean_scale = static_cast<const S*>(args.mean_scale) + begin;
    S offset[kMaxColumns];
    const bool one_map = args.shape.layout == Layout::kChannelsFirst;
    if (Act::kKeepsInput && !one_map) {
      for (int64_t c = 0; c < end - begin; ++c) offset[c] = mean_scale[c] * mean[c];
      Unfold(chunk, offset);
    }
    BackwardTerms<T, Act> terms{Sample(static_cast<const T*>(args.kept), args.shape, sample),
                                Sample(static_cast<const T*>(args.dy), args.shape, sample), offset, Act(args.alpha)};
    auto terms_of = [&](int64_t c) {
      if (Act::kKeepsInput && one_map) {
        for (int l = 0; l < Compute<T>::kLanes; ++l) offset[l] = mean_scale[c] * mean[c];
      }
      return terms;
    };
    SumChunk<T>(terms_of, chunk, sums);
  }

  // totals[0..channels) are the sums of dz, the rest those of the gain's terms.
  static void BackwardParameters(const BackwardArgs& args, int64_t sample, int64_t begin, int64_t end,
                                 const double* totals, Parameters<T, 3>* parameters) {
    const int64_t row = sample * args.shape.channels + begin;
    const S* gain = static_cast<const S*>(args.gain) + begin;
    const S* mean_scale = static_cast<const S*>(args.mean_scale) + begin;
    const S* dmean = static_cast<const S*>(args.dmean) + row;
    const double positions = static_cast<double>(args.shape.positions);
    for (int64_t c = 0; c < end - begin; ++c) {
      parameters->values[0][c] = QuietNan(gain[c]);
      parameters->values[1][c] = QuietNan(static_cast<S>(static_cast<double>(mean_scale[c]) * totals[c] / positions));
      parameters->values[2][c] = QuietNan(static_cast<S>(static_cast<double>(dmean[c]) / positions));
    }
  }

  static void AddParameterGradients(const BackwardArgs& args, int64_t sample, int64_t begin, int64_t end,
                                    const double* totals, double* dgain_sum, double* dmean_scale_sum) {
    const int64_t channels = end - begin;
    const S* mean = static_cast<const S*>(args.mean) + sample * args.shape.channels + begin;
    for (int64_t c = 0; c < channels; ++c) {
      dgain_sum[begin + c] += totals[channels + c];
      dmean_scale_sum[begin + c] += static_cast<double>(mean[c]) * totals[c];
    }
  }

  static void BackwardWrite(const BackwardArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t end,
                            int64_t chunk, Parameters<T, 3>* parameters) {
    const BackwardMap<T, Act> map{Sample(static_cast<const T*>(args.kept), args.shape, sample),
                                  Sample(static_cast<const T*>(args.dy), args.shape, sample),
                                  Sample(static_cast<T*>(args.dx), args.shape, sample), Act(args.alpha)};
    ApplyChunk<T>(map, parameters, Chunk(args.shape, plan, begin, end, chunk));
  }

  static void BackwardApply(const BackwardArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t end,
                            int64_t chunk, const double* totals, double* dgain_sum, double* dmean_scale_sum) {
    if (chunk == 0) AddParameterGradients(args, sample, begin, end, totals, dgain_sum, dmean_scale_sum);
    Parameters<T, 3> parameters;
    BackwardParameters(args, sample, begin, end, totals, &parameters);
    BackwardWrite(args, plan, sample, begin, end, chunk, &parameters);
  }

  static void Backward(const BackwardArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t end,
                       double* dgain_sum, double* dmean_scale_sum) {
    double totals[kBackwardSums * kMaxColumns], sums[kBackwardSums * kMaxColumns];
    BackwardSum(args, plan, sample, begin, end, 0, totals);
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      BackwardSum(args, plan, sample, begin, end, chunk, sums);
      for (int64_t i = 0; i < kBackwardSums * (end - begin); ++i) totals[i] += sums[i];
    }
    AddParameterGradients(args, sample, begin, end, totals, dgain_sum, dmean_scale_sum);
    Parameters<T, 3> parameters;
    BackwardParameters(args, sample, begin, end, totals, &parameters);
    for (int64_t chunk = plan.chunks - 1; chunk >= 0; --chunk) {
      BackwardWrite(args, plan, sample, begin, end, chunk, &parameters);
    }
  }

  static constexpr Loops kLoops = {Forward, Backward, ForwardSum, ForwardApply, BackwardSum, BackwardApply};
};

template <class T>
const Loops& FindLoopsOf(Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return Passes<T, Relu>::kLoops;
    case Activation::kRelu6:
      return Passes<T, Relu6>::kLoops;
    case Activation::kLeakyRelu:
      return Passes<T, LeakyRelu>::kLoops;
    case Activation::kElu:
      return Passes<T, Elu>::kLoops;
    case Activation::kLinear:
      break;
  }
  return Passes<T, Linear>::kLoops;
}

}  // namespace

const Loops& FindLoops(DataType data_type, Activation activation) {
  switch (data_type) {
    case DataType::kHalf:
      return FindLoopsOf<Half>(activation);
    case DataType::kBfloat16:
      return FindLoopsOf<Bfloat16>(activation);
    case DataType::kDouble:
      return FindLoopsOf<double>(activation);
    case DataType::kFloat:
      break;
  }
  return FindLoopsOf<float>(activation);
}

}  // namespace TF_AGC_ISA_LEVEL
}  // namespace core
}  // namespace tf_agc
