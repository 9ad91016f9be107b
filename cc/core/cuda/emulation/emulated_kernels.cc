// The kernels as C++, for tests: -DTF_AGC_CUDA_EMULATION makes primitives.h take emulation.h for CUDA.

#include "cc/core/cuda/backward.cu"
#include "cc/core/cuda/forward.cu"
