// A call's sizes, options and pointers: what all who make, cut up or compute a call agree on, on the CPU and in CUDA.
// The formulas are in agc.h. Plain data: loops.cc sees it, and may see no inline function (loops.h).

#ifndef TF_AGC_CC_CORE_TYPES_H_
#define TF_AGC_CC_CORE_TYPES_H_

#include <cstdint>

namespace tf_agc {
namespace core {

// The element type T of the maps. Parameters and means have type U: double for kDouble, float for all others.
enum class DataType { kHalf, kBfloat16, kFloat, kDouble };

// Elements of 16 bits, as they lie in memory; arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

enum class Activation { kLinear, kRelu, kRelu6, kLeakyRelu, kElu };

enum class Layout {
  kChannelsLast,   // [batch, positions, channels]
  kChannelsFirst,  // [batch, channels, positions]
};

// Sizes of the maps; all spatial axes are flattened into `positions`. positions >= 1, the others may be 0.
struct Shape {
  int64_t batch;
  int64_t positions;
  int64_t channels;
  Layout layout;
};

// Pointers need no alignment beyond their element's.
struct ForwardArgs {
  Shape shape;
  DataType data_type;
  Activation activation;
  double alpha;            // Of leaky_relu and elu; finite, >= 0. 0 acts as relu.
  const void* x;           // T, shaped as `shape` says.
  const void* gain;        // U[channels].
  const void* mean_scale;  // U[channels].
  void* y;                 // T, as x. May be x or shortcut itself; must not overlap them otherwise.
  void* mean;              // U[batch, channels].
  // Null where they are absent.
  const void* bias = nullptr;      // U[channels].
  const void* shortcut = nullptr;  // T, as x.
};

struct BackwardArgs {
  Shape shape;
  DataType data_type;
  Activation activation;
  double alpha;
  const void* dy;          // T, shaped as `shape` says: the gradient of y.
  const void* dmean;       // U[batch, channels]: the gradient of mean.
  const void* kept;        // T: x for kLinear, y for every other activation.
  const void* mean;        // U[batch, channels], from Forward.
  const void* gain;        // U[channels].
  const void* mean_scale;  // U[channels].
  void* dx;                // T. May be dy, kept or shortcut itself; must not overlap them otherwise.
  void* dgain;             // U[channels].
  void* dmean_scale;       // U[channels].
  // Null where they are absent: as in the forward call, but that kLinear has no shortcut here. It keeps x, which tells
  // u without it, and dshortcut would be dy.
  const void* bias = nullptr;      // U[channels].
  const void* shortcut = nullptr;  // T, as kept.
  void* dbias = nullptr;           // U[channels]; with bias.
  void* dshortcut = nullptr;       // T; with shortcut. As dx, and must not overlap dx.
};

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_TYPES_H_
