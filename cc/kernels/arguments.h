// What TensorFlow's kernels and XLA's both ask of an op's attributes and of its inputs' shapes, in the same words.
// No buffers and no arithmetic here; types were checked by TensorFlow.

#ifndef TF_AGC_CC_KERNELS_ARGUMENTS_H_
#define TF_AGC_CC_KERNELS_ARGUMENTS_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "cc/core/types.h"
#include "cc/ops/checks.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor_shape.h"

namespace tf_agc {

// The attributes that both ops have.
struct Attributes {
  core::Activation activation = core::Activation::kLinear;
  float alpha = 0;
  core::Layout layout = core::Layout::kChannelsLast;
  bool has_bias = false;
  bool has_shortcut = false;

  absl::Status Read(tensorflow::OpKernelConstruction* context) {
    std::string name;
    TF_RETURN_IF_ERROR(context->GetAttr("activation", &name));
    if (name == "linear") {
      activation = core::Activation::kLinear;
    } else if (name == "relu") {
      activation = core::Activation::kRelu;
    } else if (name == "relu6") {
      activation = core::Activation::kRelu6;
    } else if (name == "leaky_relu") {
      activation = core::Activation::kLeakyRelu;
    } else if (name == "elu") {
      activation = core::Activation::kElu;
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("activation must be linear, relu, relu6, leaky_relu or elu, got ", name));
    }
    TF_RETURN_IF_ERROR(context->GetAttr("alpha", &alpha));
    // Threads that flush denormals compare them as 0: the bits say the same in all threads.
    uint32_t bits;
    std::memcpy(&bits, &alpha, sizeof(bits));
    const bool negative = bits > 0x80000000u;
    if (!std::isfinite(alpha) || negative) {
      return absl::InvalidArgumentError(absl::StrCat("alpha must be finite and >= 0, got ", alpha));
    }
    const bool denormal = (bits & 0x7f800000u) == 0;
    if (denormal) alpha = 0;
    TF_RETURN_IF_ERROR(context->GetAttr("data_format", &name));
    if (name != "N...C" && name != "NC...") {
      return absl::InvalidArgumentError(absl::StrCat("data_format must be N...C or NC..., got ", name));
    }
    layout = name == "N...C" ? core::Layout::kChannelsLast : core::Layout::kChannelsFirst;
    TF_RETURN_IF_ERROR(ReadOptional(context, "bias", &has_bias));
    return ReadOptional(context, "shortcut", &has_shortcut);
  }

 private:
  static absl::Status ReadOptional(tensorflow::OpKernelConstruction* context, const char* name, bool* present) {
    int count;
    TF_RETURN_IF_ERROR(context->GetAttr(absl::StrCat("num_", name), &count));
    *present = count > 0;
    return CheckOptionalCount(name, count);
  }
};

// Where optional inputs and outputs stand: behind those that are always there.
struct Optional {
  Optional(const Attributes& attributes, int others)
      : bias(attributes.has_bias ? others : -1),
        shortcut(attributes.has_shortcut ? others + (attributes.has_bias ? 1 : 0) : -1) {}
  int bias;  // -1 where it is absent.
  int shortcut;
};

inline absl::Status ReadShape(const tensorflow::TensorShape& maps, core::Layout layout, core::Shape* shape) {
  const int rank = maps.dims();
  TF_RETURN_IF_ERROR(CheckRank(rank, maps.DebugString()));
  const int channel_axis = layout == core::Layout::kChannelsLast ? rank - 1 : 1;
  *shape = {maps.dim_size(0), 1, maps.dim_size(channel_axis), layout};
  // The sizes of a map without elements may be anything: their product may overflow, and nobody will use it.
  const bool has_elements = maps.num_elements() > 0;
  for (int i = 1; i < rank; ++i) {
    if (i == channel_axis) continue;
    if (has_elements) shape->positions *= maps.dim_size(i);
    if (maps.dim_size(i) == 0) shape->positions = 0;
  }
  if (shape->positions == 0 && shape->batch > 0) {
    return absl::InvalidArgumentError(absl::StrCat("x has no positions (a spatial size is 0) but a batch of ",
                                                   shape->batch, ": the mean of an empty map is undefined, got shape ",
                                                   maps.DebugString()));
  }
  return absl::OkStatus();
}

inline absl::Status CheckPerChannel(const char* name, const tensorflow::TensorShape& got, const core::Shape& shape) {
  if (got.dims() == 1 && got.dim_size(0) == shape.channels) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " must have shape [C] = [", shape.channels, "], got ", got.DebugString()));
}

inline absl::Status CheckPerMap(const char* name, const tensorflow::TensorShape& got, const core::Shape& shape) {
  if (got.dims() == 2 && got.dim_size(0) == shape.batch && got.dim_size(1) == shape.channels) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " must have shape [N, C] = [", shape.batch, ",", shape.channels,
                                                 "], got ", got.DebugString()));
}

// `name` must be shaped as the maps `like`.
inline absl::Status CheckMaps(const char* name, const tensorflow::TensorShape& got, const char* like,
                              const tensorflow::TensorShape& maps) {
  if (got == maps) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " must have the shape of ", like, " ", maps.DebugString(), ", got ", got.DebugString()));
}

// Those of bias and shortcut that are there, among the inputs of an op with `others` before them.
template <class ShapeOf>
absl::Status CheckOptionalInputs(const Attributes& attributes, int others, const ShapeOf& shape_of, const char* like,
                                 const tensorflow::TensorShape& maps, const core::Shape& shape) {
  const Optional inputs(attributes, others);
  if (attributes.has_bias) TF_RETURN_IF_ERROR(CheckPerChannel("bias", shape_of(inputs.bias), shape));
  if (!attributes.has_shortcut) return absl::OkStatus();
  return CheckMaps("shortcut", shape_of(inputs.shortcut), like, maps);
}

// All inputs of the two ops, whose shapes shape_of(input) gives, and the sizes of the maps.
template <class ShapeOf>
absl::Status CheckForwardInputs(const Attributes& attributes, const ShapeOf& shape_of, core::Shape* shape) {
  const tensorflow::TensorShape& x = shape_of(0);
  TF_RETURN_IF_ERROR(ReadShape(x, attributes.layout, shape));
  TF_RETURN_IF_ERROR(CheckPerChannel("gain", shape_of(1), *shape));
  TF_RETURN_IF_ERROR(CheckPerChannel("mean_scale", shape_of(2), *shape));
  return CheckOptionalInputs(attributes, 3, shape_of, "x", x, *shape);
}
template <class ShapeOf>
absl::Status CheckBackwardInputs(const Attributes& attributes, const ShapeOf& shape_of, core::Shape* shape) {
  const tensorflow::TensorShape& kept = shape_of(2);
  TF_RETURN_IF_ERROR(ReadShape(kept, attributes.layout, shape));
  TF_RETURN_IF_ERROR(CheckMaps("dy", shape_of(0), "kept", kept));
  TF_RETURN_IF_ERROR(CheckPerMap("dmean", shape_of(1), *shape));
  TF_RETURN_IF_ERROR(CheckPerMap("mean", shape_of(3), *shape));
  TF_RETURN_IF_ERROR(CheckPerChannel("gain", shape_of(4), *shape));
  TF_RETURN_IF_ERROR(CheckPerChannel("mean_scale", shape_of(5), *shape));
  return CheckOptionalInputs(attributes, 6, shape_of, "kept", kept, *shape);
}

}  // namespace tf_agc

#endif  // TF_AGC_CC_KERNELS_ARGUMENTS_H_
