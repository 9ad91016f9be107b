// What the CPU's scheduler (agc.cc) and CUDA's (cuda/plan.cc) both ask of a call's arguments. Not for loops.cc, whose
// levels share no inline function (loops.h).

#ifndef TF_AGC_CC_CORE_SCHEDULING_H_
#define TF_AGC_CC_CORE_SCHEDULING_H_

#include <cstdint>

#include "cc/core/types.h"

namespace tf_agc {
namespace core {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t ElementBytes(DataType data_type) {
  switch (data_type) {
    case DataType::kHalf:
    case DataType::kBfloat16:
      return 2;
    case DataType::kDouble:
      return 8;
    case DataType::kFloat:
      break;
  }
  return 4;
}

// alpha = 0 is relu, whose backward pass needs no division by alpha.
inline Activation Effective(Activation activation, double alpha) {
  const bool has_alpha = activation == Activation::kLeakyRelu || activation == Activation::kElu;
  return has_alpha && alpha == 0 ? Activation::kRelu : activation;
}

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_SCHEDULING_H_
