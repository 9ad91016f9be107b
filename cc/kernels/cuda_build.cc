// What Python asks about CUDA.

#ifdef TF_AGC_CUDA
#include "cuda_build.h"

#include "cc/core/cuda/agc_cuda.h"
#endif

// The release of CUDA and what was compiled for, as "13.0, sm_75 sm_90, PTX 90"; "" in a library for CPUs alone.
extern "C" const char* TfAgcCudaBuild() {
#ifdef TF_AGC_CUDA
  return TF_AGC_CUDA_BUILD;
#else
  return "";
#endif
}

// Why the GPU kernels are not used on this machine, half a sentence; "" where they are, and in a library for CPUs
// alone.
extern "C" const char* TfAgcGpuProblem() {
#ifdef TF_AGC_CUDA
  return TfAgcCudaProblem();
#else
  return "";
#endif
}
