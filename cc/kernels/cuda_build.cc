// What `python -m tf_agc` prints about CUDA.

#ifdef TF_AGC_CUDA
#include "cuda_build.h"
#endif

// The release of CUDA and what was compiled for, as "13.0, sm_75 sm_90, PTX 90"; "" in a library for CPUs alone.
extern "C" const char* TfAgcCudaBuild() {
#ifdef TF_AGC_CUDA
  return TF_AGC_CUDA_BUILD;
#else
  return "";
#endif
}
