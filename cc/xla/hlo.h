// The two ops in XLA's own operations, for every platform and use where a custom call cannot run: GPUs without our CUDA
// kernels, maps of dynamic size, ahead-of-time compilation. The same definition as cc/core, with the same activations.
//
// No attribute is read and nothing is validated here.

#ifndef TF_AGC_CC_XLA_HLO_H_
#define TF_AGC_CC_XLA_HLO_H_

#include <vector>

#include "absl/types/span.h"
#include "cc/kernels/arguments.h"
#include "xla/hlo/builder/xla_builder.h"

namespace tf_agc {
namespace hlo {

// From the inputs of the ops TfAgc>Agc and TfAgc>AgcGrad to their outputs, with the order, shapes and types that they
// have there. Sizes may be dynamic. What does not fit together is reported by the inputs' builder.
std::vector<xla::XlaOp> Forward(const Attributes& attributes, absl::Span<const xla::XlaOp> inputs);
std::vector<xla::XlaOp> Backward(const Attributes& attributes, absl::Span<const xla::XlaOp> inputs);

}  // namespace hlo
}  // namespace tf_agc

#endif  // TF_AGC_CC_XLA_HLO_H_
