// The formulas, as in cc/core/loops.cc: sums and elements are float32, float64 for float64 maps, and rounded to the
// type of the maps once.

#include "cc/xla/hlo.h"

#include <cstdint>
#include <numeric>
#include <vector>

#include "cc/core/scheduling.h"
#include "xla/hlo/builder/lib/arithmetic.h"
#include "xla/hlo/builder/lib/constants.h"

namespace tf_agc {
namespace hlo {
namespace {

using ::xla::XlaOp;

// What the formulas need to know of maps, and sums and broadcasts between maps and what belongs to them.
class Maps {
 public:
  // `gain` has the type to compute in.
  Maps(XlaOp maps, XlaOp gain, core::Layout layout) : maps_(maps), gain_(gain) {
    const xla::Shape shape = *maps.builder()->GetShape(maps);
    type_ = shape.element_type();
    compute_type_ = maps.builder()->GetShape(gain)->element_type();
    const int64_t rank = static_cast<int64_t>(shape.dimensions().size());
    channel_axis_ = layout == core::Layout::kChannelsLast ? rank - 1 : 1;
    for (int64_t i = 1; i < rank; ++i) {
      if (i != channel_axis_) spatial_axes_.push_back(i);
    }
  }

  XlaOp Constant(double value) const { return xla::ScalarLike(gain_, value); }
  XlaOp ToCompute(XlaOp maps) const { return xla::ConvertElementType(maps, compute_type_); }
  XlaOp FromCompute(XlaOp maps) const { return xla::ConvertElementType(maps, type_); }

  // Maps to [N, C].
  XlaOp SumPositions(XlaOp maps) const { return Sum(maps, spatial_axes_); }
  // [N, C] to [C].
  XlaOp SumSamples(XlaOp values) const { return Sum(values, {0}); }

  // The number of positions of a map, also where it is known only when the program runs.
  XlaOp Positions() const {
    XlaOp product = Constant(1);
    for (int64_t axis : spatial_axes_) product = xla::Mul(product, ToCompute(xla::GetDimensionSize(maps_, axis)));
    return product;
  }

  // How [C] and [N, C] are broadcast to maps: arguments for XLA's binary operations.
  std::vector<int64_t> PerChannel() const { return {channel_axis_}; }
  std::vector<int64_t> PerMap() const { return {0, channel_axis_}; }

 private:
  XlaOp Sum(XlaOp values, absl::Span<const int64_t> axes) const {
    return xla::Reduce(values, Constant(0), xla::CreateScalarAddComputation(compute_type_, maps_.builder()), axes);
  }

  XlaOp maps_;
  XlaOp gain_;
  xla::PrimitiveType type_;
  xla::PrimitiveType compute_type_;
  int64_t channel_axis_;
  std::vector<int64_t> spatial_axes_;
};

core::Activation Effective(const Attributes& attributes) {
  return core::Effective(attributes.activation, attributes.alpha);
}

// act(z). XLA's Max and Min hand NaN on.
XlaOp Activate(const Attributes& attributes, const Maps& maps, XlaOp z) {
  const XlaOp zero = maps.Constant(0), alpha = maps.Constant(attributes.alpha);
  switch (Effective(attributes)) {
    case core::Activation::kLinear:
      break;
    case core::Activation::kRelu:
      return xla::Max(z, zero);
    case core::Activation::kRelu6:
      // Not Min(Max(z, 0), 6): where TensorFlow 2.20's XLA compiles that for the CPU, NaN becomes 0.
      return xla::Select(xla::Gt(z, maps.Constant(6)), xla::FullLike(z, 6), xla::Max(z, zero));
    case core::Activation::kLeakyRelu:
      return xla::Select(xla::Gt(z, zero), z, xla::Mul(z, alpha));
    case core::Activation::kElu:
      return xla::Select(xla::Gt(z, zero), z, xla::Mul(xla::Expm1(z), alpha));
  }
  return z;
}

// act'(z) from what was kept.
XlaOp Slope(const Attributes& attributes, const Maps& maps, XlaOp kept) {
  const XlaOp zero = xla::ZerosLike(kept), one = maps.Constant(1), alpha = maps.Constant(attributes.alpha);
  const XlaOp ones = xla::Add(zero, one), rising = xla::Gt(kept, zero);
  switch (Effective(attributes)) {
    case core::Activation::kLinear:
      break;
    case core::Activation::kRelu:
      return xla::Select(rising, ones, zero);
    case core::Activation::kRelu6:
      return xla::Select(xla::And(rising, xla::Lt(kept, maps.Constant(6))), ones, zero);
    case core::Activation::kLeakyRelu:
      return xla::Select(rising, ones, xla::Add(zero, alpha));
    case core::Activation::kElu:
      // Rounding kept to its type may have taken it below -alpha.
      return xla::Select(rising, ones, xla::Max(xla::Add(kept, alpha), zero));
  }
  return ones;
}

// What sums up to dgain (linear) or to gain * dgain (all others, which know z and not u), but for bias and shortcut,
// which are in z and not in gain * u.
XlaOp GainTerm(const Attributes& attributes, const Maps& maps, XlaOp kept, XlaOp dy, XlaOp dz, XlaOp offset) {
  switch (Effective(attributes)) {
    case core::Activation::kLinear:
      return xla::Mul(dz, xla::Sub(kept, offset, maps.PerMap()));
    case core::Activation::kRelu:
    case core::Activation::kRelu6:
      break;
    case core::Activation::kLeakyRelu:
      // Below 0, dz * z = (dy * alpha) * (kept / alpha).
      return xla::Mul(dy, kept);
    case core::Activation::kElu: {
      const XlaOp zero = xla::ZerosLike(kept), rising = xla::Gt(kept, zero);
      const XlaOp below = xla::Div(xla::Select(rising, zero, kept), maps.Constant(attributes.alpha));
      // At kept = -alpha, z is lost, and dz = 0 anyway.
      const XlaOp z = xla::Select(xla::Le(below, maps.Constant(-1)), zero, xla::Log1p(below));
      return xla::Mul(dz, xla::Select(rising, kept, z));
    }
  }
  return xla::Mul(dz, kept);
}

}  // namespace

std::vector<XlaOp> Forward(const Attributes& attributes, absl::Span<const XlaOp> inputs) {
  const XlaOp gain = inputs[1], mean_scale = inputs[2];
  const Optional optional(attributes, 3);
  const Maps maps(inputs[0], gain, attributes.layout);
  const XlaOp x = maps.ToCompute(inputs[0]);
  const XlaOp mean = xla::Div(maps.SumPositions(x), maps.Positions());
  const XlaOp u = xla::Sub(x, xla::Mul(mean, mean_scale, {1}), maps.PerMap());
  XlaOp z = xla::Mul(u, gain, maps.PerChannel());
  if (attributes.has_bias) z = xla::Add(z, inputs[optional.bias], maps.PerChannel());
  if (attributes.has_shortcut) z = xla::Add(z, maps.ToCompute(inputs[optional.shortcut]));
  return {maps.FromCompute(Activate(attributes, maps, z)), mean};
}

std::vector<XlaOp> Backward(const Attributes& attributes, absl::Span<const XlaOp> inputs) {
  const XlaOp dmean = inputs[1], mean = inputs[3], gain = inputs[4], mean_scale = inputs[5];
  const Optional optional(attributes, 6);
  const Maps maps(inputs[2], gain, attributes.layout);
  const XlaOp dy = maps.ToCompute(inputs[0]);
  const XlaOp kept = maps.ToCompute(inputs[2]);
  // A product and no selection, as in stock TensorFlow: an infinite dy at a dead place gives NaN.
  const XlaOp slope = Slope(attributes, maps, kept);
  const XlaOp dz = xla::Mul(dy, slope);
  const XlaOp dz_sum = maps.SumPositions(dz);
  XlaOp dbias;
  if (attributes.has_bias) dbias = maps.SumSamples(dz_sum);

  const bool linear = attributes.activation == core::Activation::kLinear;
  const XlaOp offset = xla::Mul(mean, mean_scale, {1});
  XlaOp gain_term = GainTerm(attributes, maps, kept, dy, dz, offset);
  if (attributes.has_shortcut) {
    const XlaOp shortcut = maps.ToCompute(inputs[optional.shortcut]), none = xla::ZerosLike(shortcut);
    // A selection here: an infinite shortcut at a dead place must not give NaN.
    gain_term = xla::Sub(gain_term, xla::Mul(dz, xla::Select(xla::Eq(slope, none), none, shortcut)));
  }
  XlaOp gain_sum = maps.SumSamples(maps.SumPositions(gain_term));
  const XlaOp zero = xla::ZerosLike(gain);
  if (attributes.has_bias && !linear) {
    // As for the shortcut: where dz adds up to 0, as where the activation is flat, an infinite bias does not count.
    const XlaOp bias = xla::Select(xla::Eq(dbias, zero), zero, inputs[optional.bias]);
    gain_sum = xla::Sub(gain_sum, xla::Mul(bias, dbias));
  }
  // At gain 0 what the sum came from is lost: 0, or NaN where something was not finite.
  const XlaOp dgain =
      linear ? gain_sum : xla::Select(xla::Eq(gain, zero), xla::Mul(gain_sum, zero), xla::Div(gain_sum, gain));

  const XlaOp dz_mean = xla::Div(xla::Mul(dz_sum, mean_scale, {1}), maps.Positions());
  const XlaOp centred = xla::Mul(xla::Sub(dz, dz_mean, maps.PerMap()), gain, maps.PerChannel());
  const XlaOp dx = xla::Add(centred, xla::Div(dmean, maps.Positions()), maps.PerMap());
  const XlaOp dmean_scale = xla::Neg(xla::Mul(gain, maps.SumSamples(xla::Mul(mean, dz_sum))));

  std::vector<XlaOp> outputs = {maps.FromCompute(dx), dgain, dmean_scale};
  if (attributes.has_bias) outputs.push_back(dbias);
  if (attributes.has_shortcut) outputs.push_back(maps.FromCompute(dz));
  return outputs;
}

}  // namespace hlo
}  // namespace tf_agc
