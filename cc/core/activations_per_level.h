// The activations and their derivatives, once, for the CPU's vectors (V is a vector of S) and for CUDA's threads (V is
// S).
//
// Included by loops.cc and by the CUDA kernels, each inside the namespace that has Broadcast, MaxZero, Expm1 and Log1p
// for its V. No include guard and no includes, for the same reason.
//
// Forward(z) is act(z). From what was kept, k, and the gradient of the output, d:
// Slope(k) is act'(z), and dz = d * Slope(k) as in stock TensorFlow, where an infinite d at a dead place gives NaN:
// loss scaling must see it. GainTerm<kShortcut>(k, d, dz, offset, s) is what sums up to dgain (Linear: dz * u), or, for
// all others, which know z = gain * u + bias + s and not u, to gain * dgain and bias times the sum of dz: dz * (z - s).
// Where the slope is 0, so is the term, and s does not count, be it infinite. Without a shortcut s is not looked at.

#ifndef TF_AGC_DEVICE
#define TF_AGC_DEVICE  // CUDA needs a word before each function.
#endif

template <class V, class S>
struct Linear {
  static constexpr bool kKeepsInput = true;
  static constexpr bool kSlopeIsZeroOrOne = true;
  TF_AGC_DEVICE explicit Linear(double) {}
  TF_AGC_DEVICE V Forward(V z) const { return z; }
  TF_AGC_DEVICE V Slope(V) const { return Broadcast<V>(S(1)); }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V, V dz, V offset, V) const {
    return dz * (k - offset);
  }
};

template <class V, class S>
struct Relu {
  static constexpr bool kKeepsInput = false;
  static constexpr bool kSlopeIsZeroOrOne = true;
  TF_AGC_DEVICE explicit Relu(double) {}
  TF_AGC_DEVICE V Forward(V z) const { return MaxZero(z); }
  TF_AGC_DEVICE V Slope(V k) const { return k > S(0) ? Broadcast<V>(S(1)) : V{}; }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V, V dz, V, V s) const {
    if constexpr (kShortcut) k -= k > S(0) ? s : V{};
    return dz * k;
  }
};

template <class V, class S>
struct Relu6 {
  static constexpr bool kKeepsInput = false;
  static constexpr bool kSlopeIsZeroOrOne = true;
  TF_AGC_DEVICE explicit Relu6(double) {}
  TF_AGC_DEVICE V Forward(V z) const {
    const V six = Broadcast<V>(S(6));
    z = MaxZero(z);
    return z > six ? six : z;
  }
  TF_AGC_DEVICE V Slope(V k) const {
    const V rising = k > S(0) ? Broadcast<V>(S(1)) : V{};
    return k < S(6) ? rising : V{};
  }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V, V dz, V, V s) const {
    if constexpr (kShortcut) {
      const V below_six = k < S(6) ? s : V{};
      k -= k > S(0) ? below_six : V{};
    }
    return dz * k;
  }
};

template <class V, class S>
struct LeakyRelu {
  static constexpr bool kKeepsInput = false;
  static constexpr bool kSlopeIsZeroOrOne = false;
  S alpha;
  TF_AGC_DEVICE explicit LeakyRelu(double a) : alpha(static_cast<S>(a)) {}
  TF_AGC_DEVICE V Forward(V z) const { return z > S(0) ? z : z * alpha; }
  TF_AGC_DEVICE V Slope(V k) const { return k > S(0) ? Broadcast<V>(S(1)) : Broadcast<V>(alpha); }
  // Below 0, dz * z = (d * alpha) * (k / alpha).
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V d, V dz, V, V s) const {
    if constexpr (kShortcut) return d * k - dz * s;
    return d * k;
  }
};

template <class V, class S>
struct Elu {
  static constexpr bool kKeepsInput = false;
  static constexpr bool kSlopeIsZeroOrOne = false;
  S alpha;
  TF_AGC_DEVICE explicit Elu(double a) : alpha(static_cast<S>(a)) {}
  TF_AGC_DEVICE V Forward(V z) const {
    const V negative = z > S(0) ? V{} : z;
    return z > S(0) ? z : Expm1(negative) * alpha;
  }
  // exp(z) * alpha = k + alpha below 0; rounding k to T may take it below -alpha.
  TF_AGC_DEVICE V Slope(V k) const {
    V slope = k + alpha;
    slope = slope < S(0) ? V{} : slope;
    return k > S(0) ? Broadcast<V>(S(1)) : slope;
  }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V, V dz, V, V s) const {
    const V negative = k > S(0) ? V{} : k / alpha;
    // Where k = -alpha, z is lost, and dz = 0 anyway.
    V z = negative <= S(-1) ? V{} : Log1p(negative);
    z = k > S(0) ? k : z;
    if constexpr (kShortcut) z -= negative <= S(-1) ? V{} : s;
    return dz * z;
  }
};
