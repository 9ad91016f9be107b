// The arithmetic of both passes, compiled once per instruction-set level (TF_AGC_ISA_LEVEL is the namespace).
//
// Nothing from the standard library may be called here (see simd_per_level.h), and nothing here knows of threads or
// caches: agc.cc decides who does what.
//
// Why the loops look as they do:
// - Out of the caches everything is bound by memory, so each pass touches each element once and does all it can there.
//   In them it is bound by instructions: sums and parameters of a strip of columns stay in registers while rows are
//   walked.
// - A strip is four vectors: of twice as many, the pieces of rows of 1 KiB and more that are read at once lie too far
//   apart for the prefetchers, and the sums of [128,14,14,256] out of the caches take twice as long.
// - A column sum adds four rows in a register, then up to eight such sums in the compute type, then goes on in double:
//   the error of a mean stays at a few units in the last place for any number of positions.
// - The second pass walks the chunks backwards: what the first one read last is still in the nearest cache (about 7 %
//   at [16,112,112,64] on a core with 1 MiB of second-level cache, nothing where a sample fits it).
// - The end of a row is one pack that overlaps its neighbour. It is loaded before and stored after the row, so that
//   writing over the input is safe.

#include "cc/core/loops.h"

#include "cc/core/simd_per_level.h"

namespace tf_agc {
namespace core {
namespace TF_AGC_ISA_LEVEL {
namespace {

constexpr int kStripVectors = 4;        // Of neighbouring columns, whose sums or parameters are in registers.
constexpr int64_t kStripRows = 4;       // That are added in registers.
constexpr int64_t kBlockSteps = 8;      // Sums in the compute type between two flushes to double.
constexpr int64_t kWriteBytes = 16384;  // Of rows that are written strip by strip.
constexpr int kLineBytes = 64;          // Of the caches.
constexpr int64_t kMaxWriteRows = 32, kMinWriteRows = 4;

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

#include "cc/core/activations_per_level.h"

// ---- Terms of the sums and maps of the elements ----
//
// All four read packs at an element of the sample and values of channels at a slot, which a strip of columns has in
// registers (see Slots).

// dz.
template <class Act, class V>
inline V GradientOfZ(const Act& act, V k, V d) {
  if constexpr (Act::kSlopeIsZeroOrOne) return TimesZeroOrOne(d, act.Slope(k));
  return d * act.Slope(k);
}

// Forward sums: x.
template <class T>
struct ForwardTerms {
  static constexpr int kSums = 1;
  const T* x;

  void Prefetch(int64_t element) const { __builtin_prefetch(x + element); }
  void Get(int64_t element, int64_t, Pack<T>* sums) const { sums[0] = LoadPack(x + element); }
  void Add(int64_t element, int64_t, Pack<T>* sums) const {
    const Pack<T> next = LoadPack(x + element);
    for (int v = 0; v < Pack<T>::kVectors; ++v) sums[0].v[v] += next.v[v];
  }
  void GetPartial(int64_t element, int64_t count, int64_t, Pack<T>* sums) const {
    sums[0] = LoadPartial(x + element, count);
  }
};

// Backward sums: dz and the gain's term.
template <class T, class Act, bool kShortcut>
struct BackwardTerms {
  using S = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  static constexpr int kSums = 2;
  const T* kept;
  const T* dy;
  const T* shortcut;  // Read only where there is one.
  const S* offset;    // mean_scale * mean, at a slot; read only where the input is kept.
  Act act;

  void Prefetch(int64_t element) const {
    __builtin_prefetch(kept + element);
    __builtin_prefetch(dy + element);
    if constexpr (kShortcut) __builtin_prefetch(shortcut + element);
  }
  void Get(int64_t element, int64_t slot, Pack<T>* sums) const { GetOrAdd<false>(element, slot, sums); }
  void Add(int64_t element, int64_t slot, Pack<T>* sums) const { GetOrAdd<true>(element, slot, sums); }
  template <bool kAdd>
  void GetOrAdd(int64_t element, int64_t slot, Pack<T>* sums) const {
    Pack<T> s{};
    if constexpr (kShortcut) s = LoadPack(shortcut + element);
    Put<kAdd>(LoadPack(kept + element), LoadPack(dy + element), s, slot, sums);
  }
  void GetPartial(int64_t element, int64_t count, int64_t slot, Pack<T>* sums) const {
    Pack<T> s{};
    if constexpr (kShortcut) s = LoadPartial(shortcut + element, count);
    Put<false>(LoadPartial(kept + element, count), LoadPartial(dy + element, count), s, slot, sums);
  }
  template <bool kAdd>
  void Put(const Pack<T>& k, const Pack<T>& d, const Pack<T>& s, int64_t slot, Pack<T>* sums) const {
    for (int v = 0; v < Pack<T>::kVectors; ++v) {
      V o{};
      if constexpr (Act::kKeepsInput) o = Load(offset + slot + v * Compute<T>::kLanes);
      const V dz = GradientOfZ(act, k.v[v], d.v[v]);
      const V of = Act::kGainTermOfD ? d.v[v] : dz, factor = act.template GainFactor<kShortcut>(k.v[v], o, s.v[v]);
      sums[0].v[v] = kAdd ? sums[0].v[v] + dz : dz;
      sums[1].v[v] = kAdd ? MultiplyAdd(of, factor, sums[1].v[v]) : of * factor;
    }
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
    Pack<T> x, shortcut;
  };
  Input Read(int64_t element) const {
    if constexpr (kAddends == Addends::kShortcut) return {LoadPack(x + element), LoadPack(shortcut + element)};
    return {LoadPack(x + element), {}};
  }
  Input ReadPartial(int64_t element, int64_t count) const {
    if constexpr (kAddends == Addends::kShortcut) {
      return {LoadPartial(x + element, count), LoadPartial(shortcut + element, count)};
    }
    return {LoadPartial(x + element, count), {}};
  }
  void Values(const Pack<T>* p, const Input& in, int v, Pack<T>* values) const {
    V z = in.x.v[v] - p[1].v[v];
    if constexpr (kAddends == Addends::kNone) z *= p[0].v[v];
    if constexpr (kAddends != Addends::kNone) z = MultiplyAdd(z, p[0].v[v], p[2].v[v]);
    if constexpr (kAddends == Addends::kShortcut) z += in.shortcut.v[v];
    values[0].v[v] = act.Forward(z);
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
    Pack<T> k, d;
  };
  Input Read(int64_t element) const { return {LoadPack(kept + element), LoadPack(dy + element)}; }
  Input ReadPartial(int64_t element, int64_t count) const {
    return {LoadPartial(kept + element, count), LoadPartial(dy + element, count)};
  }
  void Values(const Pack<T>* p, const Input& in, int v, Pack<T>* values) const {
    const V dz = GradientOfZ(act, in.k.v[v], in.d.v[v]);
    values[0].v[v] = MultiplyAdd(dz - p[1].v[v], p[0].v[v], p[2].v[v]);
    if constexpr (kShortcut) values[1].v[v] = dz;
  }
};

// ---- Slots: where what stands for each column of channels_last rows is kept ----
//
// A row is whole packs and, where its width is no multiple of theirs, a last pack that overlaps the one before it, or,
// of a row shorter than a pack, is not full. A column's parameters and sums lie as the vectors of its pack have them:
// those of whole packs first, pack behind pack. Last packs, of which a chunk may have two, have slots behind all
// others.

constexpr int kMaxPack = 32;  // Elements.
constexpr int64_t kRowTail = kMaxColumns, kLastRowTail = kRowTail + kMaxPack, kSlots = kLastRowTail + kMaxPack;

// Rows of `width` elements, `stride` apart.
struct Rows {
  int64_t element;  // The first one.
  int64_t count;    // Of rows.
  int64_t stride;
  int64_t width;
  int64_t tail;  // The slot of what is no whole pack.

  template <class T>
  int64_t Whole() const {
    return width / Pack<T>::kElements * Pack<T>::kElements;
  }
};

// Calls body(column, slot) for every column of the rows, once.
template <class T, class Body>
void ForEachColumn(const Rows& rows, const Body& body) {
  constexpr int kElements = Pack<T>::kElements;
  const int64_t whole = rows.Whole<T>();
  for (int64_t i = 0; i < whole; i += kElements) {
    for (int e = 0; e < kElements; ++e) body(i + e, i + SlotInPack<T>(e));
  }
  const int64_t skipped = whole == 0 ? 0 : kElements - (rows.width - whole);
  for (int64_t i = whole; i < rows.width; ++i) {
    body(i, rows.tail + SlotInPack<T>(static_cast<int>(i - whole + skipped)));
  }
}

// ---- Pass one: sums ----

// Column sums in the compute type, at their slots.
template <class T, int kSums>
struct BlockSums {
  using S = typename Compute<T>::Scalar;
  alignas(kVectorBytes) S values[kSums][kSlots];

  // Sets or adds those of a pack.
  void Put(int64_t slot, const Pack<T>* sums, bool first) {
    for (int s = 0; s < kSums; ++s) {
      for (int v = 0; v < Pack<T>::kVectors; ++v) {
        S* to = values[s] + slot + v * Compute<T>::kLanes;
        Store(to, first ? sums[s].v[v] : Load(to) + sums[s].v[v]);
      }
    }
  }

  void AddTo(double (*totals)[kSlots], int64_t slot, int64_t count, bool first) const {
    for (int s = 0; s < kSums; ++s) {
      const S* from = values[s] + slot;
      double* to = totals[s] + slot;
      if (first) {
        for (int64_t i = 0; i < count; ++i) to[i] = 0.0 + static_cast<double>(from[i]);  // -0 becomes 0.
      } else {
        for (int64_t i = 0; i < count; ++i) to[i] += static_cast<double>(from[i]);
      }
    }
  }
};

// Of kPacks neighbouring packs, adds `count` rows in registers, and puts their sum into the block's.
template <int kPacks, class T, class Terms>
inline void SumStrip(const Terms& terms, int64_t element, int64_t stride, int64_t count, int64_t slot, bool first,
                     BlockSums<T, Terms::kSums>* block) {
  constexpr int kElements = Pack<T>::kElements;
  Pack<T> sums[kPacks][Terms::kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kPacks; ++i) terms.Get(element + i * kElements, slot + i * kElements, sums[i]);
  for (int64_t row = 1; row < count; ++row) {
    element += stride;
#pragma GCC unroll 4
    for (int i = 0; i < kPacks; ++i) {
      terms.Add(element + i * kElements, slot + i * kElements, sums[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPacks; ++i) block->Put(slot + i * kElements, sums[i], first);
}

// As many strips of kPacks packs as there are from `column` on, then of half as many, and so on.
template <int kPacks, class T, class Terms>
inline void SumStrips(const Terms& terms, const Rows& rows, int64_t column, bool first,
                      BlockSums<T, Terms::kSums>* block) {
  constexpr int kColumns = kPacks * Pack<T>::kElements;
  for (; column + kColumns <= rows.width; column += kColumns) {
    SumStrip<kPacks, T>(terms, rows.element + column, rows.stride, rows.count, column, first, block);
  }
  if constexpr (kPacks > 1) SumStrips<kPacks / 2, T>(terms, rows, column, first, block);
}

// Column sums of the rows, at their slots: kStripRows rows are added in registers, up to kBlockSteps such sums in the
// compute type, the rest in double.
template <class T, class Terms>
void SumRows(const Terms& caller_terms, const Rows& all, double (*totals)[kSlots]) {
  const Terms terms = caller_terms;  // In registers: what is stored cannot change it.
  constexpr int kElements = Pack<T>::kElements;
  constexpr int kPacks = kStripVectors / Pack<T>::kVectors;
  const int64_t whole = all.Whole<T>();
  BlockSums<T, Terms::kSums> block;
  // A strip takes pieces of rows. The processor's prefetchers follow these in shorter rows, and in longer ones, which
  // are pages of their own, but not between.
  const int64_t row_bytes = all.stride * int64_t{sizeof(T)};
  const bool ask_ahead = 512 <= row_bytes && row_bytes < 4096;
  Rows rows = all;
  for (int64_t left = all.count; left > 0;) {
    const bool first_block = left == all.count;
    for (int64_t step = 0; step < kBlockSteps && left > 0; ++step) {
      rows.count = Min(left, kStripRows);
      if (ask_ahead && left > rows.count) {
        const int64_t next = rows.element + rows.count * rows.stride,
                      end = next + Min(left - rows.count, kStripRows) * rows.stride;
        for (int64_t i = next; i < end; i += kLineBytes / int64_t{sizeof(T)}) terms.Prefetch(i);
      }
      SumStrips<kPacks, T>(terms, rows, 0, step == 0, &block);
      if (whole == 0) {
        for (int64_t row = 0; row < rows.count; ++row) {
          Pack<T> sums[Terms::kSums];
          terms.GetPartial(rows.element + row * rows.stride, rows.width, rows.tail, sums);
          block.Put(rows.tail, sums, step == 0 && row == 0);
        }
      } else if (whole < rows.width) {
        const int64_t last_pack = rows.width - kElements;
        SumStrip<1, T>(terms, rows.element + last_pack, rows.stride, rows.count, rows.tail, step == 0, &block);
      }
      rows.element += rows.count * rows.stride;
      left -= rows.count;
    }
    block.AddTo(totals, 0, whole, first_block);
    if (whole < rows.width) block.AddTo(totals, rows.tail, kElements, first_block);
  }
}

// Adds kCount packs that follow each other as a balanced tree.
template <int kCount, class T, class Terms>
inline void AddTree(const Terms& terms, int64_t element, typename Compute<T>::Vector* sums) {
  constexpr int kElements = Pack<T>::kElements;
  if constexpr (kCount == 1) {
    Pack<T> packs[Terms::kSums];
    terms.Get(element, 0, packs);
    for (int s = 0; s < Terms::kSums; ++s) sums[s] = SumOfVectors(packs[s]);
  } else {
    typename Compute<T>::Vector other[Terms::kSums];
    AddTree<kCount / 2, T>(terms, element, sums);
    AddTree<kCount / 2, T>(terms, element + kCount / 2 * kElements, other);
    for (int s = 0; s < Terms::kSums; ++s) sums[s] += other[s];
  }
}

// Sums `count` elements that follow each other, lanes side by side. Writes totals[kSums].
template <class T, class Terms>
void SumMap(const Terms& terms, int64_t element, int64_t count, double* totals) {
  using V = typename Compute<T>::Vector;
  constexpr int kSums = Terms::kSums;
  constexpr int kTree = 8 / kSums / Pack<T>::kVectors;  // Packs.
  constexpr int kElements = Pack<T>::kElements, kDoubleVectors = Compute<T>::kLanes / kDoubleLanes;
  DoubleVector lanes[kSums][kDoubleVectors] = {};
  V sums[kSums];
  while (count > 0) {
    const int64_t block_count = Min(count, kBlockSteps * kTree * kElements);
    V block[kSums] = {};
    auto add = [&] {
      for (int s = 0; s < kSums; ++s) block[s] += sums[s];
    };
    int64_t i = 0;
    for (; i + kTree * kElements <= block_count; i += kTree * kElements) {
      AddTree<kTree, T>(terms, element + i, sums);
      add();
    }
    for (; i + kElements <= block_count; i += kElements) {
      AddTree<1, T>(terms, element + i, sums);
      add();
    }
    if (i < block_count) {
      Pack<T> packs[kSums];
      terms.GetPartial(element + i, block_count - i, 0, packs);
      for (int s = 0; s < kSums; ++s) sums[s] = SumOfVectors(packs[s]);
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

// One pack: its values are made and stored.
template <bool kStream, class T, class Map>
inline void WritePack(const Map& map, const Pack<T>* p, const typename Map::Input& in, int64_t element) {
  Pack<T> values[Map::kOutputs];
  for (int v = 0; v < Pack<T>::kVectors; ++v) map.Values(p, in, v, values);
  kStream ? StreamPack(map.out[0] + element, values[0]) : StorePack(map.out[0] + element, values[0]);
  for (int o = 1; o < Map::kOutputs; ++o) StorePack(map.out[o] + element, values[o]);
}

template <class T, class Map>
inline void WritePartial(const Map& map, const Pack<T>* p, int64_t element, int64_t count) {
  Pack<T> values[Map::kOutputs];
  const typename Map::Input in = map.ReadPartial(element, count);
  for (int v = 0; v < Pack<T>::kVectors; ++v) map.Values(p, in, v, values);
  for (int o = 0; o < Map::kOutputs; ++o) StorePartial(map.out[o] + element, count, values[o]);
}

// The parameters of a Map: at first of the channels, for channels_last rows later at the slots of their columns.
template <class T, int kParameters>
struct Parameters {
  using S = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  alignas(kVectorBytes) S values[kParameters][kSlots];

  // Of one pack.
  void Get(int64_t slot, Pack<T>* p) const {
    for (int k = 0; k < kParameters; ++k) {
      for (int v = 0; v < Pack<T>::kVectors; ++v) p[k].v[v] = Load(values[k] + slot + v * Compute<T>::kLanes);
    }
  }
  void GetAll(int64_t channel, Pack<T>* p) const {
    for (int k = 0; k < kParameters; ++k) {
      for (int v = 0; v < Pack<T>::kVectors; ++v) p[k].v[v] = Broadcast<V>(values[k][channel]);
    }
  }
};

// Of kPacks neighbouring packs, writes all rows, with the parameters in registers.
template <int kPacks, bool kStream, class T, class Map>
inline void WriteStrip(const Map& map, const Parameters<T, Map::kParameters>& parameters, const Rows& rows,
                       int64_t column) {
  constexpr int kElements = Pack<T>::kElements;
  Pack<T> p[kPacks][Map::kParameters];
#pragma GCC unroll 4
  for (int i = 0; i < kPacks; ++i) parameters.Get(column + i * kElements, p[i]);
  int64_t element = rows.element + column;
  for (int64_t row = 0; row < rows.count; ++row, element += rows.stride) {
#pragma GCC unroll 4
    for (int i = 0; i < kPacks; ++i) {
      WritePack<kStream, T>(map, p[i], map.Read(element + i * kElements), element + i * kElements);
    }
  }
}

template <int kPacks, bool kStream, class T, class Map>
inline void WriteStrips(const Map& map, const Parameters<T, Map::kParameters>& parameters, const Rows& rows,
                        int64_t column) {
  constexpr int kColumns = kPacks * Pack<T>::kElements;
  for (; column + kColumns <= rows.width; column += kColumns) {
    WriteStrip<kPacks, kStream, T>(map, parameters, rows, column);
  }
  if constexpr (kPacks > 1) WriteStrips<kPacks / 2, kStream, T>(map, parameters, rows, column);
}

template <bool kStream, class T, class Map>
void WriteRows(const Map& caller_map, const Parameters<T, Map::kParameters>& parameters, Rows rows) {
  const Map map = caller_map;  // In registers: what is stored cannot change it.
  constexpr int kElements = Pack<T>::kElements;
  const int64_t whole = rows.Whole<T>(), last_pack = rows.width - kElements;
  const int64_t fitting = kWriteBytes / (rows.width * int64_t{sizeof(T)});
  const int64_t block = fitting < kMinWriteRows ? kMinWriteRows : Min(fitting, kMaxWriteRows);
  Pack<T> p[Map::kParameters] = {};
  if (whole < rows.width) parameters.Get(rows.tail, p);
  int64_t left = rows.count;
  for (; left > 0; left -= rows.count, rows.element += rows.count * rows.stride) {
    rows.count = Min(left, block);
    typename Map::Input last[kMaxWriteRows];
    if (whole < rows.width) {
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t element = rows.element + r * rows.stride;
        if (whole == 0) {
          WritePartial<T>(map, p, element, rows.width);
        } else {
          // The last pack overlaps the one before it: read it while its input is still there.
          last[r] = map.Read(element + last_pack);
        }
      }
    }
    WriteStrips<kStripVectors / Pack<T>::kVectors, kStream, T>(map, parameters, rows, 0);
    for (int64_t r = 0; 0 < whole && whole < rows.width && r < rows.count; ++r) {
      WritePack</*kStream=*/false, T>(map, p, last[r], rows.element + r * rows.stride + last_pack);
    }
  }
}

// The elements of a map that follow each other, with parameters that are the same for all.
template <bool kStream, class T, class Map>
void WriteMap(const Map& caller_map, const Pack<T>* caller_p, int64_t element, int64_t count) {
  const Map map = caller_map;  // In registers: what is stored cannot change it.
  Pack<T> p[Map::kParameters];
  for (int k = 0; k < Map::kParameters; ++k) p[k] = caller_p[k];
  constexpr int kElements = Pack<T>::kElements;
  if (count < kElements) return WritePartial<T>(map, p, element, count);
  const int64_t last_pack = element + count - kElements, end = element + count;
  const typename Map::Input last = map.Read(last_pack);
  for (; element + 4 * kElements <= end; element += 4 * kElements) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      WritePack<kStream, T>(map, p, map.Read(element + i * kElements), element + i * kElements);
    }
  }
  for (; element + kElements <= end; element += kElements) {
    WritePack<kStream, T>(map, p, map.Read(element), element);
  }
  if (element < end) WritePack</*kStream=*/false, T>(map, p, last, last_pack);
}

// Whether rows are written past the caches. Whole ones only: where an ordinary store finishes a line, what was streamed
// of it takes far longer than it saves.
template <class T, class Map>
bool Streams(const Map& map, const Rows& rows) {
  const int64_t first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.out[0] + rows.element));
  const int64_t offsets = first | rows.stride * int64_t{sizeof(T)} | rows.width * int64_t{sizeof(T)};
  return map.stream && offsets % kStreamBytes<T> == 0;
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
  Rows rows() const { return {first * shape.channels + begin, count / fold, fold * shape.channels, width(), kRowTail}; }
  Rows last_row() const {
    const Rows whole = rows();
    return {whole.element + whole.count * whole.stride, 1, whole.stride, count % fold * channels, kLastRowTail};
  }
  // channels_first: a map as one row; `channel` counts from the task's first.
  Rows map(int64_t channel) const { return {(begin + channel) * shape.positions + first, 1, 0, count, 0}; }
};

// What stands for each channel goes to the slots of its columns: `values` has one for each channel, and then for each
// slot of all chunks of these channels.
template <class T, class S>
void ToSlots(const Chunk& chunk, S* values) {
  constexpr int kElements = Pack<T>::kElements;
  const int64_t width = chunk.width(), last_width = chunk.shape.positions % chunk.fold * chunk.channels;
  for (int64_t i = chunk.channels; i < width; ++i) values[i] = values[i - chunk.channels];
  auto put_tail = [&](int64_t row_width, int64_t tail) {
    const int64_t first = row_width < kElements ? 0 : row_width - kElements;
    for (int i = 0; i < kElements; ++i) {
      values[tail + SlotInPack<T>(i)] = first + i < row_width ? values[first + i] : S(0);
    }
  };
  if (width % kElements != 0) put_tail(width, kRowTail);
  if (last_width % kElements != 0) put_tail(last_width, kLastRowTail);
  if constexpr (Pack<T>::kVectors > 1) {
    constexpr int kVectors = Pack<T>::kVectors, kLanes = Compute<T>::kLanes;
    for (int64_t column = 0; column + kElements <= width; column += kElements) {
      S pack[kElements];
      for (int v = 0; v < kVectors; ++v) {
        for (int l = 0; l < kLanes; ++l) pack[v * kLanes + l] = values[column + l * kVectors + v];
      }
      __builtin_memcpy(values + column, pack, sizeof pack);
    }
  }
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
  const Terms terms = terms_of(0);
  alignas(kVectorBytes) double totals[Terms::kSums][kSlots], folded[kMaxColumns];
  const Rows whole_and_last[] = {chunk.rows(), chunk.last_row()};
  bool first = true;
  for (const Rows& rows : whole_and_last) {
    if (rows.count * rows.width == 0) continue;
    SumRows<T>(terms, rows, totals);
    for (int s = 0; s < Terms::kSums; ++s) {
      double* of_channels = sums + s * channels;
      double* columns = first && rows.width == channels ? of_channels : folded;
      ForEachColumn<T>(rows, [&](int64_t column, int64_t slot) { columns[column] = totals[s][slot]; });
      if (columns == of_channels) continue;
      for (int64_t i = 0; i < rows.width; i += channels) {
        for (int64_t c = 0; c < channels; ++c)
          of_channels[c] = first && i == 0 ? columns[c] : of_channels[c] + columns[i + c];
      }
    }
    first = false;
  }
}

// Writes a chunk. The parameters are at their slots, or channels_first those of the channels.
template <class T, class Map>
void WriteChunk(const Map& map, const Parameters<T, Map::kParameters>& parameters, const Chunk& chunk) {
  bool streams = false;
  if (chunk.shape.layout == Layout::kChannelsFirst) {
    for (int64_t c = 0; c < chunk.channels; ++c) {
      Pack<T> p[Map::kParameters];
      parameters.GetAll(c, p);
      const Rows row = chunk.map(c);
      if (Streams<T>(map, row)) {
        streams = true;
        WriteMap<true, T>(map, p, row.element, row.width);
      } else {
        WriteMap<false, T>(map, p, row.element, row.width);
      }
    }
  } else {
    const Rows whole_and_last[] = {chunk.rows(), chunk.last_row()};
    for (const Rows& rows : whole_and_last) {
      if (rows.width == 0) continue;
      if (Streams<T>(map, rows)) {
        streams = true;
        WriteRows<true, T>(map, parameters, rows);
      } else {
        WriteRows<false, T>(map, parameters, rows);
      }
    }
  }
  if (streams) StreamFence();
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
  using Element = T;
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

  static void Write(const ForwardTask& task, const MapParameters& parameters) {
    const ForwardArgs& args = task.args;
    const Map map{Sample(static_cast<const T*>(args.x), task),
                  Sample(static_cast<const T*>(args.shortcut), task),
                  {Sample(static_cast<T*>(args.y), task)},
                  task.stream,
                  Act(args.alpha)};
    WriteChunk<T>(map, parameters, Chunk(task));
  }
};

template <class T, class Act, bool kShortcut>
struct BackwardPass {
  using Args = BackwardArgs;
  using Element = T;
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
    alignas(kVectorBytes) S offset[kSlots];
    const bool one_map = args.shape.layout == Layout::kChannelsFirst;
    if (Act::kKeepsInput && !one_map) {
      for (int64_t c = 0; c < chunk.channels; ++c) offset[c] = mean_scale[c] * mean[c];
      ToSlots<T>(chunk, offset);
    }
    const BackwardTerms<T, Act, kShortcut> terms{
        Sample(static_cast<const T*>(args.kept), task), Sample(static_cast<const T*>(args.dy), task),
        Sample(static_cast<const T*>(args.shortcut), task), offset, Act(args.alpha)};
    auto terms_of = [&](int64_t c) {
      if (Act::kKeepsInput && one_map) {
        for (int i = 0; i < Pack<T>::kElements; ++i) offset[i] = mean_scale[c] * mean[c];
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

  static void Write(const BackwardTask& task, const MapParameters& parameters) {
    const BackwardArgs& args = task.args;
    Map map{Sample(static_cast<const T*>(args.kept), task),
            Sample(static_cast<const T*>(args.dy), task),
            {Sample(static_cast<T*>(args.dx), task)},
            task.stream,
            Act(args.alpha)};
    if constexpr (kShortcut) map.out[1] = Sample(static_cast<T*>(args.dshortcut), task);
    WriteChunk<T>(map, parameters, Chunk(task));
  }
};

// ---- The loops of both passes ----

// From the sums of a map to the parameters of its chunks.
template <class Pass, class... Sums>
void MakeParameters(const Task<typename Pass::Args>& task, const double* totals,
                    typename Pass::MapParameters* parameters, const Sums&... parameter_sums) {
  Pass::Finish(task, totals, parameters, parameter_sums...);
  if (task.args.shape.layout == Layout::kChannelsLast) {
    for (auto& values : parameters->values) ToSlots<typename Pass::Element>(Chunk(task), values);
  }
}

// One chunk of a map whose sums are known. Every chunk makes the parameters for itself.
template <class Pass, class... Sums>
void Apply(const Task<typename Pass::Args>& task, const double* totals, const Sums&... parameter_sums) {
  typename Pass::MapParameters parameters;
  MakeParameters<Pass>(task, totals, &parameters, parameter_sums...);
  Pass::Write(task, parameters);
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
  MakeParameters<Pass>(task, totals, &parameters, parameter_sums...);
  for (task.chunk = task.chunking.chunks - 1; task.chunk >= 0; --task.chunk) Pass::Write(task, parameters);
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
