// The custom calls by which a program that XLA compiled reaches cc/core, or cc/core/cuda: their names, attributes and
// registration.
//
// Nothing here or in custom_call.cc knows TensorFlow; which call a program makes is said in agc_xla_kernels.cc.

#ifndef TF_AGC_CC_XLA_CUSTOM_CALL_H_
#define TF_AGC_CC_XLA_CUSTOM_CALL_H_

#include <string>

#include "cc/core/types.h"

namespace tf_agc {
namespace xla_calls {

// Operands and results as those of the ops, all in row-major layout:
// (x, gain, mean_scale, bias, shortcut) -> (y, mean).
inline constexpr char kForward[] = "TfAgc.Forward";
// (dy, dmean, kept, mean, gain, mean_scale, bias, shortcut) -> (dx, dgain, dmean_scale, dbias, dshortcut).
inline constexpr char kBackward[] = "TfAgc.Backward";

// Absent ones are left out. Where one of two is, kHasBias says which.

// Names of the attributes of both calls.
inline constexpr char kActivation[] = "activation";
inline constexpr char kAlpha[] = "alpha";
inline constexpr char kLayout[] = "layout";
inline constexpr char kHasBias[] = "has_bias";

// The attributes as XLA takes them, a dictionary in MLIR's syntax.
std::string FormatAttributes(core::Activation activation, float alpha, core::Layout layout, bool has_bias);

// Make the calls known to XLA for programs on the CPU, and on NVIDIA's GPUs. Return what went wrong, "" if nothing did.
std::string Register();
std::string RegisterOnGpu();

}  // namespace xla_calls
}  // namespace tf_agc

#endif  // TF_AGC_CC_XLA_CUSTOM_CALL_H_
