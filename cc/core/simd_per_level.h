// Vectors of the instruction-set level that is being compiled: load, store, convert, elementary functions.
//
// Included by loops.cc only, once per level, inside that level's namespace (TF_AGC_ISA_LEVEL). Written with the
// compiler's vector extensions, so that one source serves every level and aarch64; intrinsics only where the extensions
// have no word for an instruction (half precision), or a compiler makes many of it. Everything that is called from here
// must be inlined, an intrinsic or plain C: a template of the standard library would become a weak symbol of this level
// in a library that also runs on lower ones.

#ifndef TF_AGC_CC_CORE_SIMD_PER_LEVEL_H_
#define TF_AGC_CC_CORE_SIMD_PER_LEVEL_H_

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
// The AVX-512 headers of GCC 12 leave registers uninitialised on purpose, and warn about it where they are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)  // which does not know this one
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace TF_AGC_ISA_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kFloatLanes = kVectorBytes / 4;
constexpr int kDoubleLanes = kVectorBytes / 8;

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UintVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t ShortVector __attribute__((vector_size(kVectorBytes / 2)));  // As many lanes as FloatVector.

// What T is computed in.
template <class T>
struct Compute {
  using Scalar = float;
  using Vector = FloatVector;
  static constexpr int kLanes = kFloatLanes;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using Vector = DoubleVector;
  static constexpr int kLanes = kDoubleLanes;
};

template <class To, class From>
inline To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "BitCast keeps the bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class S>
inline V Broadcast(S value) {
  return V{} + value;
}
template <class V, class S>
inline V FullLike(V, S value) {
  return Broadcast<V>(value);
}

// Lane by lane. `condition` is what comparisons of V give.
template <class Condition, class V>
inline V Select(Condition condition, V a, V b) {
  return condition ? a : b;
}

// a * b + c, rounded once on levels that have an instruction for it.
inline FloatVector MultiplyAdd(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return BitCast<FloatVector>(vfmaq_f32(BitCast<float32x4_t>(c), BitCast<float32x4_t>(a), BitCast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}
inline DoubleVector MultiplyAdd(DoubleVector a, DoubleVector b, DoubleVector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return BitCast<DoubleVector>(vfmaq_f64(BitCast<float64x2_t>(c), BitCast<float64x2_t>(a), BitCast<float64x2_t>(b)));
#else
  return a * b + c;
#endif
}

// value * factor, where all lanes of `factor` are 0 or 1.
template <class V>
inline V TimesZeroOrOne(V value, V factor) {
#if defined(__AVX512F__)
  // One product under a mask; the factor itself is never made.
  const V zero{};
  return Select(factor != zero, value, value * zero);
#else
  return value * factor;
#endif
}

// ---- Half precision ----

// 16 bits to 32. The compilers' own conversion between vectors of these widths takes two or three instructions more.
inline UintVector Widen(ShortVector value) {
#if defined(__AVX512F__)
  return BitCast<UintVector>(_mm512_cvtepu16_epi32(BitCast<__m256i>(value)));
#elif defined(__AVX2__)
  return BitCast<UintVector>(_mm256_cvtepu16_epi32(BitCast<__m128i>(value)));
#elif defined(__aarch64__)
  return BitCast<UintVector>(vmovl_u16(BitCast<uint16x4_t>(value)));
#else
  return __builtin_convertvector(value, UintVector);
#endif
}

// 32 bits to 16, of values below 2^16.
inline ShortVector Narrow(UintVector value) {
#if defined(__AVX512F__)
  return BitCast<ShortVector>(_mm512_cvtepi32_epi16(BitCast<__m512i>(value)));
#elif defined(__AVX2__)
  const __m256i v = BitCast<__m256i>(value);
  return BitCast<ShortVector>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#elif defined(__aarch64__)
  return BitCast<ShortVector>(vmovn_u32(BitCast<uint32x4_t>(value)));
#else
  return __builtin_convertvector(value, ShortVector);
#endif
}

inline FloatVector HalfToFloat(ShortVector half) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(BitCast<__m256i>(half));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(BitCast<__m128i>(half));
#elif defined(__aarch64__)
  return BitCast<FloatVector>(vcvt_f32_f16(BitCast<float16x4_t>(half)));
#else
  const UintVector bits = Widen(half);
  const UintVector magnitude = bits & 0x7fffu;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and makes denormals normal at once.
  const FloatVector scaled = BitCast<FloatVector>(magnitude << 13) * 0x1p112f;
  const UintVector infinite_or_nan = magnitude >= 0x7c00u ? Broadcast<UintVector>(0x7f800000u) : UintVector{};
  return BitCast<FloatVector>(BitCast<UintVector>(scaled) | infinite_or_nan | ((bits & 0x8000u) << 16));
#endif
}

// Rounds to nearest, ties to even.
inline ShortVector FloatToHalf(FloatVector value) {
#if defined(__AVX512F__)
  return BitCast<ShortVector>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return BitCast<ShortVector>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  return BitCast<ShortVector>(vcvt_f16_f32(BitCast<float32x4_t>(value)));
#else
  const UintVector bits = BitCast<UintVector>(value);
  const UintVector magnitude = bits & 0x7fffffffu;
  // Normal results: move the bias, add just under half a unit (half a unit when the kept bits are odd), cut. A carry
  // out of the mantissa raises the exponent, up to infinity, as it should.
  const UintVector normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Denormal results: adding 0.5 lets the adder do the rounding at the right bit.
  const UintVector denormal =
      BitCast<UintVector>(BitCast<FloatVector>(magnitude) + 0.5f) - BitCast<UintVector>(Broadcast<FloatVector>(0.5f));
  UintVector result = magnitude < (113u << 23) ? denormal : normal;
  result = magnitude >= (143u << 23) ? Broadcast<UintVector>(0x7c00u) : result;
  result = magnitude > 0x7f800000u ? Broadcast<UintVector>(0x7e00u) : result;
  return Narrow(result | ((bits & 0x80000000u) >> 16));
#endif
}

// ---- bfloat16: the upper half of a float ----

// Arithmetic hands on the bits of a NaN. Those of a bfloat16 end in zeros; a parameter's may be anything, and are made
// the usual ones where they enter, once per channel, so that the rounding above need not look for NaN in every element.
template <class S>
inline S QuietNan(S value) {
  return value != value ? static_cast<S>(__builtin_nanf("")) : value;
}

// max(z, 0); NaN stays.
inline FloatVector MaxZero(FloatVector z) {
#if defined(__AVX512F__)
  return _mm512_max_ps(FloatVector{}, z);  // The second operand, if either is NaN.
#elif defined(__AVX__)
  return _mm256_max_ps(FloatVector{}, z);
#elif defined(__x86_64__)
  return _mm_max_ps(FloatVector{}, z);
#elif defined(__aarch64__)
  return BitCast<FloatVector>(vmaxq_f32(BitCast<float32x4_t>(z), vdupq_n_f32(0)));
#else
  return z < 0.0f ? FloatVector{} : z;
#endif
}
inline DoubleVector MaxZero(DoubleVector z) { return z < 0.0 ? DoubleVector{} : z; }

// ---- Sums of lanes ----

// sums[0..kLanes) += v, lane by lane, in vectors of doubles.
inline void AddLanes(FloatVector v, DoubleVector* sums) {
#if defined(__AVX512F__)
  sums[0] += DoubleVector(_mm512_cvtps_pd(_mm512_castps512_ps256(v)));
  sums[1] += DoubleVector(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif defined(__AVX__)
  sums[0] += DoubleVector(_mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  sums[1] += DoubleVector(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
  for (int l = 0; l < kFloatLanes; ++l) sums[l / kDoubleLanes][l % kDoubleLanes] += static_cast<double>(v[l]);
#endif
}
inline void AddLanes(DoubleVector v, DoubleVector* sums) { sums[0] += v; }

// The first half of the lanes plus the second one, and so on to a single number.
inline double SumLanes(DoubleVector v) {
#if defined(__AVX512F__)
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
#elif defined(__AVX__)
  const __m256d four = v;
#endif
#if defined(__AVX__)
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
#else
  for (int half = kDoubleLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) v[l] += v[l + half];
  }
  return v[0];
#endif
}

// ---- Memory. Nothing here needs alignment. ----

// What is loaded and stored at once: one vector, of bfloat16 the two that fill a vector of memory. They are its even
// and its odd elements, which takes a shift and a mask where neighbours would take permutations.
template <class T>
struct Pack {
  using V = typename Compute<T>::Vector;
  static constexpr int kVectors = 1;
  static constexpr int kElements = Compute<T>::kLanes;
  V v[kVectors];
};
template <>
struct Pack<Bfloat16> {
  using V = FloatVector;
  static constexpr int kVectors = 2;
  static constexpr int kElements = 2 * kFloatLanes;
  V v[kVectors];
};

// Where the vectors of a pack, one behind the other, have its element `i`.
template <class T>
constexpr int SlotInPack(int i) {
  return i % Pack<T>::kVectors * Compute<T>::kLanes + i / Pack<T>::kVectors;
}

template <class T>
inline typename Pack<T>::V SumOfVectors(const Pack<T>& pack) {
  typename Pack<T>::V sum = pack.v[0];
  for (int i = 1; i < Pack<T>::kVectors; ++i) sum += pack.v[i];
  return sum;
}

inline Pack<Bfloat16> Split(UintVector bits) {
  return {{BitCast<FloatVector>(bits << 16), BitCast<FloatVector>(bits & 0xffff0000u)}};
}
// Rounds to nearest, ties to even. A NaN whose lower half is not 0 might carry into the sign: see QuietNan.
inline UintVector Join(const Pack<Bfloat16>& pack) {
  const UintVector even = BitCast<UintVector>(pack.v[0]), odd = BitCast<UintVector>(pack.v[1]);
#if defined(__AVX512F__)
  // Both halves of all elements: what is cut off decides, with the last bit that stays, whether to add one.
  const UintVector upper = (even >> 16) | (odd & 0xffff0000u), lower = (even & 0xffffu) | (odd << 16);
  const __m512i decides = BitCast<__m512i>(lower | (upper & 0x00010001u)), u = BitCast<__m512i>(upper);
  const __mmask32 up = _mm512_cmpgt_epu16_mask(decides, _mm512_set1_epi16(-0x8000));
  return BitCast<UintVector>(_mm512_mask_sub_epi16(u, up, u, _mm512_set1_epi16(-1)));
#else
  auto rounded = [](UintVector bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); };
  return (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u);
#endif
}

template <class V, class S>
inline V LoadVector(const S* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
inline FloatVector Load(const float* from) { return LoadVector<FloatVector>(from); }
inline DoubleVector Load(const double* from) { return LoadVector<DoubleVector>(from); }

inline Pack<float> LoadPack(const float* from) { return {{Load(from)}}; }
inline Pack<double> LoadPack(const double* from) { return {{Load(from)}}; }
inline Pack<Half> LoadPack(const Half* from) { return {{HalfToFloat(LoadVector<ShortVector>(from))}}; }
inline Pack<Bfloat16> LoadPack(const Bfloat16* from) { return Split(LoadVector<UintVector>(from)); }

inline void Store(float* to, FloatVector v) { __builtin_memcpy(to, &v, sizeof v); }
inline void Store(double* to, DoubleVector v) { __builtin_memcpy(to, &v, sizeof v); }

inline void StorePack(float* to, const Pack<float>& pack) { Store(to, pack.v[0]); }
inline void StorePack(double* to, const Pack<double>& pack) { Store(to, pack.v[0]); }
inline void StorePack(Half* to, const Pack<Half>& pack) {
  const ShortVector half = FloatToHalf(pack.v[0]);
  __builtin_memcpy(to, &half, sizeof half);
}
inline void StorePack(Bfloat16* to, const Pack<Bfloat16>& pack) {
  const UintVector bits = Join(pack);
  __builtin_memcpy(to, &bits, sizeof bits);
}

// Stores past the caches: memory that is written whole need not be read first. `to` is aligned to kStreamBytes<T>; a
// thread calls StreamFence() before another one may read. Where a level has no such store of this width, they are
// plain.
template <class T>
constexpr int64_t kStreamBytes = Pack<T>::kElements * int64_t{sizeof(T)};

#if defined(__AVX512F__)
inline void StreamPack(float* to, const Pack<float>& pack) { _mm512_stream_ps(to, pack.v[0]); }
inline void StreamPack(double* to, const Pack<double>& pack) { _mm512_stream_pd(to, pack.v[0]); }
inline void StreamPack(Half* to, const Pack<Half>& pack) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), BitCast<__m256i>(FloatToHalf(pack.v[0])));
}
inline void StreamPack(Bfloat16* to, const Pack<Bfloat16>& pack) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), BitCast<__m512i>(Join(pack)));
}
#elif defined(__AVX2__)
inline void StreamPack(float* to, const Pack<float>& pack) { _mm256_stream_ps(to, pack.v[0]); }
inline void StreamPack(double* to, const Pack<double>& pack) { _mm256_stream_pd(to, pack.v[0]); }
inline void StreamPack(Half* to, const Pack<Half>& pack) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), BitCast<__m128i>(FloatToHalf(pack.v[0])));
}
inline void StreamPack(Bfloat16* to, const Pack<Bfloat16>& pack) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), BitCast<__m256i>(Join(pack)));
}
#else
template <class T>
inline void StreamPack(T* to, const Pack<T>& pack) {
  StorePack(to, pack);
}
#endif

inline void StreamFence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first `count` elements, fewer than a pack has; the others are zero. Slow but on the highest level: for what is
// left over once per map.
template <class T>
inline Pack<T> LoadPartial(const T* from, int64_t count) {
  T buffer[Pack<T>::kElements] = {};
  __builtin_memcpy(buffer, from, static_cast<size_t>(count) * sizeof(T));
  return LoadPack(buffer);
}
template <class T>
inline void StorePartial(T* to, int64_t count, const Pack<T>& pack) {
  T buffer[Pack<T>::kElements];
  StorePack(buffer, pack);
  __builtin_memcpy(to, buffer, static_cast<size_t>(count) * sizeof(T));
}

#if defined(__AVX512F__)
// Masked lanes are not touched, so these do not reach beyond the array.
inline Pack<float> LoadPartial(const float* from, int64_t count) {
  return {{_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from)}};
}
inline Pack<Half> LoadPartial(const Half* from, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return {{HalfToFloat(BitCast<ShortVector>(bits))}};
}
inline Pack<Bfloat16> LoadPartial(const Bfloat16* from, int64_t count) {
  return Split(BitCast<UintVector>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1), from)));
}
inline void StorePartial(float* to, int64_t count, const Pack<float>& pack) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), pack.v[0]);
}
inline void StorePartial(Half* to, int64_t count, const Pack<Half>& pack) {
  const __m256i bits = BitCast<__m256i>(FloatToHalf(pack.v[0]));
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), bits);
}
inline void StorePartial(Bfloat16* to, int64_t count, const Pack<Bfloat16>& pack) {
  _mm512_mask_storeu_epi16(to, static_cast<__mmask32>((1u << count) - 1), BitCast<__m512i>(Join(pack)));
}
#endif

// ---- Elementary functions, for elu ----

// exp(z) - 1 for z <= 0; NaN gives NaN. 2 units in the last place, relative to the result, denormal results included.
inline FloatVector Expm1(FloatVector z) {
  // exp(-87) is below half a unit of 1.
  z = z < -87.0f ? Broadcast<FloatVector>(-87.0f) : z;
  // z = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  const FloatVector shifted = z * 1.44269504f + kRound;
  const FloatVector n = shifted - kRound;
  const FloatVector r = (z - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts (Cody and Waite).
  // exp(r) - 1, the minimax polynomial of Cephes' expf.
  FloatVector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const FloatVector expm1_r = p * (r * r) + r;
  const FloatVector scale = BitCast<FloatVector>((BitCast<UintVector>(shifted) + 127) << 23);
  return scale * expm1_r + (scale - 1.0f);
}

// log(1 + t) for -1 < t <= 0; NaN gives NaN.
inline FloatVector Log1p(FloatVector t) {
  const FloatVector u = t + 1.0f;
  // u = m 2^e with m in [sqrt(1/2), sqrt(2)). For e = 0, m - 1 is t itself, which has bits that 1 + t rounds away.
  // Unsigned but for the shift that keeps the sign of e: of a u outside of the domain, too, whose result is thrown
  // away.
  const UintVector bits = BitCast<UintVector>(u);
  const IntVector e = BitCast<IntVector>(bits - 0x3f3504f3) >> 23;
  const FloatVector m = BitCast<FloatVector>(bits - (BitCast<UintVector>(e) << 23));
  const FloatVector f = e == 0 ? t : m - 1.0f;
  // log(1 + f), the minimax polynomial of Cephes' logf.
  FloatVector p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const FloatVector f2 = f * f;
  const FloatVector exponent = __builtin_convertvector(e, FloatVector);
  const FloatVector result = ((p * f * f2 + exponent * -2.12194440e-4f) - f2 * 0.5f) + f + exponent * 0.693359375f;
  return t != t ? t : result;
}

// Double has no vector form: it is there for checking gradients, and the C library is exact.
inline DoubleVector Expm1(DoubleVector z) {
  for (int i = 0; i < kDoubleLanes; ++i) z[i] = __builtin_expm1(z[i]);
  return z;
}
inline DoubleVector Log1p(DoubleVector t) {
  for (int i = 0; i < kDoubleLanes; ++i) t[i] = __builtin_log1p(t[i]);
  return t;
}

}  // namespace TF_AGC_ISA_LEVEL
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_SIMD_PER_LEVEL_H_
