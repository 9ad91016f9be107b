// The activations of activations_per_level.h for one thread of CUDA, whose vector is a scalar.

#ifndef TF_AGC_CC_CORE_CUDA_ACTIVATIONS_H_
#define TF_AGC_CC_CORE_CUDA_ACTIVATIONS_H_

#include <cmath>

#include "cc/core/cuda/primitives.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {

template <class V>
TF_AGC_DEVICE V Select(bool condition, V a, V b) {
  return condition ? a : b;
}
template <class V>
TF_AGC_DEVICE V FullLike(V, V value) {
  return value;
}
// max(z, 0); NaN stays.
template <class V>
TF_AGC_DEVICE V MaxZero(V z) {
  return z < V(0) ? V(0) : z;
}
TF_AGC_DEVICE float Expm1(float z) { return expm1f(z); }
TF_AGC_DEVICE double Expm1(double z) { return expm1(z); }
TF_AGC_DEVICE float Log1p(float t) { return log1pf(t); }
TF_AGC_DEVICE double Log1p(double t) { return log1p(t); }

#include "cc/core/activations_per_level.h"

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_ACTIVATIONS_H_
