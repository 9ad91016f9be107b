// Automatic gain control on raw pointers: what a framework binding calls.
//
// No TensorFlow, Eigen or protobuf here or below: the arithmetic is tested and timed alone. Arguments are not
// validated: the caller does that, because only it can word the error for its user.
//
// For sample n, channel c and positions p = 1..P (arXiv 1706.03907; tf_agc/reference.py is the definition):
//
//   mean[n,c] = mean_p x[n,p,c]
//   z[n,p,c]  = gain[c] * (x[n,p,c] - mean_scale[c] * mean[n,c]) + bias[c] + shortcut[n,p,c]
//   y[n,p,c]  = act(z[n,p,c])
//
// bias and shortcut may be absent, which is another call and not a call with zeros.

#ifndef TF_AGC_CC_CORE_AGC_H_
#define TF_AGC_CC_CORE_AGC_H_

#include <cstdint>

#include "cc/core/cpu.h"
#include "cc/core/parallel.h"

namespace tf_agc {
namespace core {

// The element type T of the maps. Parameters and means have type U: double for kDouble, float for all others.
enum class DataType { kHalf, kBfloat16, kFloat, kDouble };

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

// Runs everything on the calling thread.
Parallel Serial();

// Results are equal to the last bit whatever `parallel` does and, for y, mean and dx, whatever other samples are in the
// batch. They may differ between instruction sets; `level` is for tests, and must run on this machine.
//
// Returns false, and has written nothing, where there is no memory for sums. No task runs before they are allocated.
bool Forward(const ForwardArgs& args, const Parallel& parallel, InstructionSet level = BestInstructionSet());
bool Backward(const BackwardArgs& args, const Parallel& parallel, InstructionSet level = BestInstructionSet());

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_AGC_H_
