// The two ops' signatures and shape functions, nothing else. Signatures, attributes and their (absent) defaults are
// stored in SavedModels and can never change.

#include <string>
#include <vector>

#include "cc/ops/checks.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace tf_agc {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status GetOptional(InferenceContext* c, const char* name, int* count) {
  TF_RETURN_IF_ERROR(c->GetAttr(absl::StrCat("num_", name), count));
  return CheckOptionalCount(name, *count);
}

// The shapes of a map and of what goes with it, as far as they are known.
struct Shapes {
  ShapeHandle maps;
  ShapeHandle means;     // [N, C]
  ShapeHandle channels;  // [C]
};

// Merges the shape of maps (inputs `maps`), of means (inputs `means`) and of parameters (inputs `parameters`).
absl::Status MergeShapes(InferenceContext* c, const std::vector<int>& maps, const std::vector<int>& means,
                         const std::vector<int>& parameters, Shapes* shapes) {
  shapes->maps = c->UnknownShape();
  for (int i : maps) TF_RETURN_IF_ERROR(c->Merge(shapes->maps, c->input(i), &shapes->maps));
  DimensionHandle batch = c->UnknownDim(), channels = c->UnknownDim();
  std::string data_format;
  TF_RETURN_IF_ERROR(c->GetAttr("data_format", &data_format));
  const int channel_axis = data_format == "N...C" ? -1 : 1;
  const bool rank_known = c->RankKnown(shapes->maps);
  if (rank_known) {
    TF_RETURN_IF_ERROR(CheckRank(c->Rank(shapes->maps), c->DebugString(shapes->maps)));
    batch = c->Dim(shapes->maps, 0);
    channels = c->Dim(shapes->maps, channel_axis);
  }
  for (int i : means) {
    ShapeHandle mean;
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 2, &mean));
    TF_RETURN_IF_ERROR(c->Merge(c->Dim(mean, 0), batch, &batch));
    TF_RETURN_IF_ERROR(c->Merge(c->Dim(mean, 1), channels, &channels));
  }
  for (int i : parameters) {
    ShapeHandle parameter;
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 1, &parameter));
    TF_RETURN_IF_ERROR(c->Merge(c->Dim(parameter, 0), channels, &channels));
  }
  if (rank_known) {
    TF_RETURN_IF_ERROR(c->ReplaceDim(shapes->maps, 0, batch, &shapes->maps));
    TF_RETURN_IF_ERROR(c->ReplaceDim(shapes->maps, channel_axis, channels, &shapes->maps));
  }
  shapes->means = c->Matrix(batch, channels);
  shapes->channels = c->Vector(channels);
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("TfAgc>Agc")
    .Input("x: T")
    .Input("gain: U")
    .Input("mean_scale: U")
    .Input("bias: num_bias * U")
    .Input("shortcut: num_shortcut * T")
    .Output("y: T")
    .Output("mean: U")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("U: {float, double}")
    .Attr("num_bias: int >= 0")
    .Attr("num_shortcut: int >= 0")
    .Attr("activation: {'linear', 'relu', 'relu6', 'leaky_relu', 'elu'}")
    .Attr("alpha: float")
    .Attr("data_format: {'N...C', 'NC...'}")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      int num_bias, num_shortcut;
      TF_RETURN_IF_ERROR(GetOptional(c, "bias", &num_bias));
      TF_RETURN_IF_ERROR(GetOptional(c, "shortcut", &num_shortcut));
      std::vector<int> maps = {0}, parameters = {1, 2};
      if (num_bias == 1) parameters.push_back(3);
      if (num_shortcut == 1) maps.push_back(3 + num_bias);
      Shapes shapes;
      TF_RETURN_IF_ERROR(MergeShapes(c, maps, {}, parameters, &shapes));
      c->set_output(0, shapes.maps);
      c->set_output(1, shapes.means);
      return absl::OkStatus();
    })
    .Doc(R"doc(
Automatic gain control of feature maps (arXiv 1706.03907).

For sample n, channel c and spatial position p: mean[n,c] is the mean of x[n,:,c] and
y[n,p,c] = act(gain[c] * (x[n,p,c] - mean_scale[c] * mean[n,c]) + bias[c] + shortcut[n,p,c]).

x: Maps [N, spatial..., C] or [N, C, spatial...], 1 to 6 spatial axes.
gain: [C].
mean_scale: [C].
bias: Absent, or one: [C].
shortcut: Absent, or one: shaped as x.
y: As x.
mean: [N, C], of x before scaling.
U: double where T is double, float otherwise.
alpha: Of leaky_relu (slope below 0) and elu (minus the value at minus infinity); finite, >= 0.
)doc");

REGISTER_OP("TfAgc>AgcGrad")
    .Input("dy: T")
    .Input("dmean: U")
    .Input("kept: T")
    .Input("mean: U")
    .Input("gain: U")
    .Input("mean_scale: U")
    .Input("bias: num_bias * U")
    .Input("shortcut: num_shortcut * T")
    .Output("dx: T")
    .Output("dgain: U")
    .Output("dmean_scale: U")
    .Output("dbias: num_bias * U")
    .Output("dshortcut: num_shortcut * T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("U: {float, double}")
    .Attr("num_bias: int >= 0")
    .Attr("num_shortcut: int >= 0")
    .Attr("activation: {'linear', 'relu', 'relu6', 'leaky_relu', 'elu'}")
    .Attr("alpha: float")
    .Attr("data_format: {'N...C', 'NC...'}")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      int num_bias, num_shortcut;
      TF_RETURN_IF_ERROR(GetOptional(c, "bias", &num_bias));
      TF_RETURN_IF_ERROR(GetOptional(c, "shortcut", &num_shortcut));
      std::string activation;
      TF_RETURN_IF_ERROR(c->GetAttr("activation", &activation));
      TF_RETURN_IF_ERROR(CheckGradientShortcut(activation == "linear", num_shortcut > 0));
      std::vector<int> maps = {0, 2}, parameters = {4, 5};
      if (num_bias == 1) parameters.push_back(6);
      if (num_shortcut == 1) maps.push_back(6 + num_bias);
      Shapes shapes;
      TF_RETURN_IF_ERROR(MergeShapes(c, maps, {1, 3}, parameters, &shapes));
      c->set_output(0, shapes.maps);
      c->set_output(1, shapes.channels);
      c->set_output(2, shapes.channels);
      if (num_bias == 1) c->set_output(3, shapes.channels);
      if (num_shortcut == 1) c->set_output(3 + num_bias, shapes.maps);
      return absl::OkStatus();
    })
    .Doc(R"doc(
Gradients of TfAgc>Agc.

dy: Gradient of y.
dmean: Gradient of mean, [N, C].
kept: x where activation is linear, y for every other activation.
mean: [N, C], from the forward op.
bias: As in the forward op.
shortcut: As in the forward op; but absent where activation is linear: kept tells everything without it, and its
  gradient is dy.
)doc");

}  // namespace tf_agc
