// What an op's shape function refuses, and its kernels refuse again, since eager execution asks them alone: the one
// copy of those limits and sentences. No kernels here.

#ifndef TF_AGC_CC_OPS_CHECKS_H_
#define TF_AGC_CC_OPS_CHECKS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace tf_agc {

// Of maps: batch, 1 to 6 spatial axes, channels.
constexpr int kMinRank = 3;
constexpr int kMaxRank = 8;

// `shape` is what the message shows.
inline absl::Status CheckRank(int rank, const std::string& shape) {
  if (rank >= kMinRank && rank <= kMaxRank) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("x must have rank ", kMinRank, " to ", kMaxRank, " (batch, ",
                                                 kMinRank - 2, " to ", kMaxRank - 2,
                                                 " spatial axes, channels), got shape ", shape));
}

// The optional inputs are lists of none or one, each with a length attribute: the form that TensorFlow's registry has
// for them (its own fused batch normalization, for one). In the generated wrappers they are lists too.
inline absl::Status CheckOptionalCount(const char* name, int count) {
  if (count == 0 || count == 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " must be absent or one tensor, got ", count));
}

// Of the gradient's op alone.
inline absl::Status CheckGradientShortcut(bool linear, bool has_shortcut) {
  if (!linear || !has_shortcut) return absl::OkStatus();
  return absl::InvalidArgumentError("shortcut must be absent where activation is linear: its gradient is dy");
}

}  // namespace tf_agc

#endif  // TF_AGC_CC_OPS_CHECKS_H_
