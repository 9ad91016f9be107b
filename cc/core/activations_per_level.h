// The activations and their derivatives, once, for the CPU's vectors (V is a vector of S), for CUDA's threads (V is S)
// and for XLA's operations (V is an XlaOp, S is double).
//
// Included by loops.cc (once per instruction-set level), by cuda/activations.h and by xla/hlo.cc, each inside the
// namespace that has, for its V: arithmetic and comparisons with V and S, Select, FullLike, MaxZero, Expm1 and Log1p.
// No include guard and no includes, for the same reason.
//
// Forward(z) is act(z). From what was kept, k, and the gradient of the output, d:
// Slope(k) is act'(z), and dz = d * Slope(k) as in stock TensorFlow, where an infinite d at a dead place gives NaN:
// loss scaling must see it. GainTerm<kShortcut>(k, d, dz, offset, s) is what sums up to dgain (Linear: dz * u), or, for
// all others, which know z = gain * u + bias + s and not u, to gain * dgain and bias times the sum of dz: dz * (z - s).
// It is a product of GainFactor<kShortcut>(k, offset, s) and of dz, or, where kGainTermOfD, of d: whoever adds it may
// do both at once. Where the slope is 0, so is the term, and s does not count, be it infinite. Without a shortcut s is
// not looked at, and offset by Linear alone.

#ifndef TF_AGC_DEVICE
#define TF_AGC_DEVICE  // CUDA needs a word before each function.
#endif

template <class V, class S>
struct Linear {
  static constexpr bool kKeepsInput = true;
  static constexpr bool kSlopeIsZeroOrOne = true;
  static constexpr bool kGainTermOfD = false;
  TF_AGC_DEVICE explicit Linear(double) {}
  TF_AGC_DEVICE V Forward(V z) const { return z; }
  TF_AGC_DEVICE V Slope(V k) const { return FullLike(k, S(1)); }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainFactor(V k, V offset, V) const {
    return k - offset;
  }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V d, V dz, V offset, V s) const {
    return (kGainTermOfD ? d : dz) * GainFactor<kShortcut>(k, offset, s);
  }
};

template <class V, class S>
struct Relu {
  static constexpr bool kKeepsInput = false;
  static constexpr bool kSlopeIsZeroOrOne = true;
  static constexpr bool kGainTermOfD = false;
  TF_AGC_DEVICE explicit Relu(double) {}
  TF_AGC_DEVICE V Forward(V z) const { return MaxZero(z); }
  TF_AGC_DEVICE V Slope(V k) const { return Select(k > S(0), FullLike(k, S(1)), FullLike(k, S(0))); }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainFactor(V k, V, V s) const {
    if constexpr (kShortcut) return k - Select(k > S(0), s, FullLike(k, S(0)));
    return k;
  }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V d, V dz, V offset, V s) const {
    return (kGainTermOfD ? d : dz) * GainFactor<kShortcut>(k, offset, s);
  }
};

template <class V, class S>
struct Relu6 {
  static constexpr bool kKeepsInput = false;
  static constexpr bool kSlopeIsZeroOrOne = true;
  static constexpr bool kGainTermOfD = false;
  TF_AGC_DEVICE explicit Relu6(double) {}
  TF_AGC_DEVICE V Forward(V z) const {
    // No minimum of a maximum: where TensorFlow 2.20's XLA compiles that for the CPU, NaN becomes 0.
    return Select(z > S(6), FullLike(z, S(6)), MaxZero(z));
  }
  TF_AGC_DEVICE V Slope(V k) const {
    const V zero = FullLike(k, S(0));
    return Select(k < S(6), Select(k > S(0), FullLike(k, S(1)), zero), zero);
  }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainFactor(V k, V, V s) const {
    if constexpr (kShortcut) {
      const V zero = FullLike(k, S(0));
      return k - Select(k > S(0), Select(k < S(6), s, zero), zero);
    }
    return k;
  }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V d, V dz, V offset, V s) const {
    return (kGainTermOfD ? d : dz) * GainFactor<kShortcut>(k, offset, s);
  }
};

template <class V, class S>
struct LeakyRelu {
  static constexpr bool kKeepsInput = false;
  static constexpr bool kSlopeIsZeroOrOne = false;
  static constexpr bool kGainTermOfD = true;
  S alpha;
  TF_AGC_DEVICE explicit LeakyRelu(double a) : alpha(static_cast<S>(a)) {}
  TF_AGC_DEVICE V Forward(V z) const { return Select(z > S(0), z, z * alpha); }
  TF_AGC_DEVICE V Slope(V k) const { return Select(k > S(0), FullLike(k, S(1)), FullLike(k, alpha)); }
  // Below 0, dz * (z - s) = (d * alpha) * (k / alpha - s).
  template <bool kShortcut>
  TF_AGC_DEVICE V GainFactor(V k, V, V s) const {
    if constexpr (kShortcut) return k - Slope(k) * s;
    return k;
  }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V d, V dz, V offset, V s) const {
    return (kGainTermOfD ? d : dz) * GainFactor<kShortcut>(k, offset, s);
  }
};

template <class V, class S>
struct Elu {
  static constexpr bool kKeepsInput = false;
  static constexpr bool kSlopeIsZeroOrOne = false;
  static constexpr bool kGainTermOfD = false;
  S alpha;
  TF_AGC_DEVICE explicit Elu(double a) : alpha(static_cast<S>(a)) {}
  TF_AGC_DEVICE V Forward(V z) const {
    const V negative = Select(z > S(0), FullLike(z, S(0)), z);
    return Select(z > S(0), z, Expm1(negative) * alpha);
  }
  // exp(z) * alpha = k + alpha below 0; rounding k to T may take it below -alpha.
  TF_AGC_DEVICE V Slope(V k) const {
    const V slope = k + alpha;
    return Select(k > S(0), FullLike(k, S(1)), Select(slope < S(0), FullLike(k, S(0)), slope));
  }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainFactor(V k, V, V s) const {
    const V zero = FullLike(k, S(0));
    const V negative = Select(k > S(0), zero, k / alpha);
    // Where k = -alpha, z is lost, and dz = 0 anyway.
    const V z = Select(k > S(0), k, Select(negative <= S(-1), zero, Log1p(negative)));
    if constexpr (kShortcut) return z - Select(negative <= S(-1), zero, s);
    return z;
  }
  template <bool kShortcut>
  TF_AGC_DEVICE V GainTerm(V k, V d, V dz, V offset, V s) const {
    return (kGainTermOfD ? d : dz) * GainFactor<kShortcut>(k, offset, s);
  }
};

// Calls body(act) with the activation and returns what it returns.
template <class V, class S, class Body>
TF_AGC_DEVICE decltype(auto) WithActivation(core::Activation activation, double alpha, const Body& body) {
  switch (activation) {
    case core::Activation::kRelu:
      return body(Relu<V, S>(alpha));
    case core::Activation::kRelu6:
      return body(Relu6<V, S>(alpha));
    case core::Activation::kLeakyRelu:
      return body(LeakyRelu<V, S>(alpha));
    case core::Activation::kElu:
      return body(Elu<V, S>(alpha));
    case core::Activation::kLinear:
      break;
  }
  return body(Linear<V, S>(alpha));
}
