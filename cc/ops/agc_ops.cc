// The two ops' signatures and shape functions, nothing else. Signatures, attributes and their (absent) defaults are
// stored in SavedModels and can never change.

#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace tf_agc {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

constexpr int kMinRank = 3;
constexpr int kMaxRank = 8;

// The shapes of a map and of what goes with it, as far as they are known.
struct Shapes {
  ShapeHandle maps;
  ShapeHandle means;     // [N, C]
  ShapeHandle channels;  // [C]
};

// Merges the shape of maps (inputs `maps`), of means (inputs `means`) and of parameters (inputs `parameters`).
absl::Status MergeShapes(InferenceContext* c, std::initializer_list<int> maps, std::initializer_list<int> means,
                         std::initializer_list<int> parameters, Shapes* shapes) {
  shapes->maps = c->UnknownShape();
  for (int i : maps) TF_RETURN_IF_ERROR(c->Merge(shapes->maps, c->input(i), &shapes->maps));
  DimensionHandle batch = c->UnknownDim(), channels = c->UnknownDim();
  std::string data_format;
  TF_RETURN_IF_ERROR(c->GetAttr("data_format", &data_format));
  const int channel_axis = data_format == "N...C" ? -1 : 1;
  const bool rank_known = c->RankKnown(shapes->maps);
  if (rank_known) {
    if (c->Rank(shapes->maps) < kMinRank || c->Rank(shapes->maps) > kMaxRank) {
      return absl::InvalidArgumentError(absl::StrCat(
          "x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels), got shape ", c->DebugString(shapes->maps)));
    }
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
    .Output("y: T")
    .Output("mean: U")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("U: {float, double}")
    .Attr("activation: {'linear', 'relu', 'relu6', 'leaky_relu', 'elu'}")
    .Attr("alpha: float")
    .Attr("data_format: {'N...C', 'NC...'}")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      Shapes shapes;
      TF_RETURN_IF_ERROR(MergeShapes(c, {0}, {}, {1, 2}, &shapes));
      c->set_output(0, shapes.maps);
      c->set_output(1, shapes.means);
      return absl::OkStatus();
    })
    .Doc(R"doc(
Automatic gain control of feature maps (arXiv 1706.03907).

For sample n, channel c and spatial position p: mean[n,c] is the mean of x[n,:,c] and
y[n,p,c] = act(gain[c] * (x[n,p,c] - mean_scale[c] * mean[n,c])).

x: Maps [N, spatial..., C] or [N, C, spatial...], 1 to 6 spatial axes.
gain: [C].
mean_scale: [C].
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
    .Output("dx: T")
    .Output("dgain: U")
    .Output("dmean_scale: U")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("U: {float, double}")
    .Attr("activation: {'linear', 'relu', 'relu6', 'leaky_relu', 'elu'}")
    .Attr("alpha: float")
    .Attr("data_format: {'N...C', 'NC...'}")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      Shapes shapes;
      TF_RETURN_IF_ERROR(MergeShapes(c, {0, 2}, {1, 3}, {4, 5}, &shapes));
      c->set_output(0, shapes.maps);
      c->set_output(1, shapes.channels);
      c->set_output(2, shapes.channels);
      return absl::OkStatus();
    })
    .Doc(R"doc(
Gradients of TfAgc>Agc.

dy: Gradient of y.
dmean: Gradient of mean, [N, C].
kept: x where activation is linear, y for every other activation.
mean: [N, C], from the forward op.
)doc");

}  // namespace tf_agc
