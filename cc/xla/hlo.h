// The two ops in XLA's own operations, for every platform and use where a custom call cannot run: GPUs without our CUDA
// kernels, maps of dynamic size, ahead-of-time compilation. The same definition as cc/core, a second time and in fewer
// lines.
//
// No attribute is read and nothing is validated here.

#ifndef TF_AGC_CC_XLA_HLO_H_
#define TF_AGC_CC_XLA_HLO_H_

#include "cc/kernels/arguments.h"
#include "xla/hlo/builder/xla_builder.h"

namespace tf_agc {
namespace hlo {

struct ForwardResults {
  xla::XlaOp y;
  xla::XlaOp mean;
};

struct BackwardResults {
  xla::XlaOp dx;
  xla::XlaOp dgain;
  xla::XlaOp dmean_scale;
};

// Operands and results have the shapes and types of the ops TfAgc>Agc and TfAgc>AgcGrad. Sizes may be dynamic. What
// does not fit together is reported by the operands' builder.
ForwardResults Forward(const Attributes& attributes, xla::XlaOp x, xla::XlaOp gain, xla::XlaOp mean_scale);
BackwardResults Backward(const Attributes& attributes, xla::XlaOp dy, xla::XlaOp dmean, xla::XlaOp kept,
                         xla::XlaOp mean, xla::XlaOp gain, xla::XlaOp mean_scale);

}  // namespace hlo
}  // namespace tf_agc

#endif  // TF_AGC_CC_XLA_HLO_H_
