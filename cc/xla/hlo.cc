// The formulas, as in cc/core/loops.cc, whose activations these are too: sums and elements are float32, float64 for
// float64 maps, and rounded to the type of the maps once.

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

// What the activations ask of an operand, beside what XLA has under the same names.
XlaOp operator+(XlaOp x, double y) { return x + xla::ScalarLike(x, y); }
XlaOp operator*(XlaOp x, double y) { return x * xla::ScalarLike(x, y); }
XlaOp operator/(XlaOp x, double y) { return x / xla::ScalarLike(x, y); }
XlaOp operator<(XlaOp x, double y) { return xla::Lt(x, xla::ScalarLike(x, y)); }
XlaOp operator<=(XlaOp x, double y) { return xla::Le(x, xla::ScalarLike(x, y)); }
XlaOp operator>(XlaOp x, double y) { return xla::Gt(x, xla::ScalarLike(x, y)); }
XlaOp MaxZero(XlaOp z) { return xla::Max(z, xla::ScalarLike(z, 0)); }  // NaN stays.

#include "cc/core/activations_per_level.h"

// Calls body(act) with the op's activation and returns what it returns.
template <class Body>
auto WithActivationOf(const Attributes& attributes, const Body& body) {
  const core::Activation activation = core::Effective(attributes.activation, attributes.alpha);
  return WithActivation<XlaOp, double>(activation, attributes.alpha, body);
}

template <class Act>
std::vector<XlaOp> BackwardThrough(const Act& act, const Attributes& attributes, absl::Span<const XlaOp> inputs) {
  const XlaOp dmean = inputs[1], mean = inputs[3], gain = inputs[4], mean_scale = inputs[5];
  const Optional optional(attributes, 6);
  const Maps maps(inputs[2], gain, attributes.layout);
  const XlaOp dy = maps.ToCompute(inputs[0]);
  const XlaOp kept = maps.ToCompute(inputs[2]);
  const XlaOp dz = dy * act.Slope(kept);
  const XlaOp dz_sum = maps.SumPositions(dz);
  XlaOp dbias;
  if (attributes.has_bias) dbias = maps.SumSamples(dz_sum);

  XlaOp offset;  // Shaped as the maps.
  if constexpr (Act::kKeepsInput) {
    offset = xla::Add(xla::ZerosLike(kept), xla::Mul(mean, mean_scale, {1}), maps.PerMap());
  }
  const XlaOp gain_term = attributes.has_shortcut ? act.template GainTerm<true>(
                                                        kept, dy, dz, offset, maps.ToCompute(inputs[optional.shortcut]))
                                                  : act.template GainTerm<false>(kept, dy, dz, offset, XlaOp());
  XlaOp gain_sum = maps.SumSamples(maps.SumPositions(gain_term));
  const XlaOp zero = xla::ZerosLike(gain);
  if (attributes.has_bias && !Act::kKeepsInput) {
    // Where dz adds up to 0, as where the activation is flat, an infinite bias does not count.
    const XlaOp bias = xla::Select(xla::Eq(dbias, zero), zero, inputs[optional.bias]);
    gain_sum = gain_sum - bias * dbias;
  }
  // At gain 0 what the sum came from is lost: 0, or NaN where something was not finite.
  const XlaOp dgain = Act::kKeepsInput ? gain_sum : xla::Select(xla::Eq(gain, zero), gain_sum * zero, gain_sum / gain);

  const XlaOp dz_mean = xla::Div(xla::Mul(dz_sum, mean_scale, {1}), maps.Positions());
  const XlaOp centred = xla::Mul(xla::Sub(dz, dz_mean, maps.PerMap()), gain, maps.PerChannel());
  const XlaOp dx = xla::Add(centred, xla::Div(dmean, maps.Positions()), maps.PerMap());
  const XlaOp dmean_scale = -(gain * maps.SumSamples(mean * dz_sum));

  std::vector<XlaOp> outputs = {maps.FromCompute(dx), dgain, dmean_scale};
  if (attributes.has_bias) outputs.push_back(dbias);
  if (attributes.has_shortcut) outputs.push_back(maps.FromCompute(dz));
  return outputs;
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
  const XlaOp y = WithActivationOf(attributes, [&](auto act) { return act.Forward(z); });
  return {maps.FromCompute(y), mean};
}

std::vector<XlaOp> Backward(const Attributes& attributes, absl::Span<const XlaOp> inputs) {
  return WithActivationOf(attributes, [&](auto act) { return BackwardThrough(act, attributes, inputs); });
}

}  // namespace hlo
}  // namespace tf_agc
