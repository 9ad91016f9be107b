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

#include "cc/core/cpu.h"
#include "cc/core/parallel.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {

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
