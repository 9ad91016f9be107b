// Automatic gain control on a GPU: what a framework binding calls. The arguments of cc/core/types.h with device
// pointers.
//
// Plain C linkage and no CUDA header, so that any compiler's objects link with nvcc's. Arguments are not validated: the
// caller does that, because only it can word the error for its user.
//
// The device is the calling thread's current one (cudaGetDevice); its properties are read once and kept. Nothing here
// allocates device memory, synchronizes, or touches another stream, so calls may be captured into a CUDA graph.

#ifndef TF_AGC_CC_CORE_CUDA_AGC_CUDA_H_
#define TF_AGC_CC_CORE_CUDA_AGC_CUDA_H_

#include <cstdint>

#include "cc/core/types.h"

extern "C" {

// Bytes of device memory that the call with these very arguments needs for `workspace`; 0 where it needs none, -1 where
// the device cannot be asked. Pointers must be set already: their alignment decides how maps are walked.
int64_t TfAgcCudaForwardWorkspaceBytes(const tf_agc::core::ForwardArgs* args);
int64_t TfAgcCudaBackwardWorkspaceBytes(const tf_agc::core::BackwardArgs* args);

// Start the call on `stream` (a cudaStream_t; null is the default stream) and return without waiting. `workspace` is
// aligned to 8 bytes and may be used again once the stream has passed this call; what it holds before is ignored. They
// return a cudaError_t: 0 for success, else the first error.
//
// y, mean, dx and dshortcut are equal to the last bit from run to run, whatever other samples are in the batch; dgain,
// dmean_scale and dbias from run to run. They may differ between kinds of device, and from the CPU's in the last
// places.
int TfAgcCudaForward(const tf_agc::core::ForwardArgs* args, void* workspace, void* stream);
int TfAgcCudaBackward(const tf_agc::core::BackwardArgs* args, void* workspace, void* stream);

// What an error that they returned means, in a static string.
const char* TfAgcCudaErrorString(int error);

// Why none of this can run on this machine: its driver is too old. "" where nothing is known to stand in the way, as
// where there is no driver. Half a sentence, in a static string.
const char* TfAgcCudaProblem();

// ---- For tools/gpu/gpu_check.sh ----

// What this thread's calls, their workspaces included, try from here on instead of what the rule of plan.h chooses:
// plan.h's Trial. 0 is the rule's choice.
void TfAgcCudaTry(int segment_bytes, int cluster, int sharing, int prefetch);

// How the call with these very arguments, which is not empty, is laid out, in words: at most `size` bytes with the 0.
void TfAgcCudaDescribeForward(const tf_agc::core::ForwardArgs* args, char* text, int64_t size);
void TfAgcCudaDescribeBackward(const tf_agc::core::BackwardArgs* args, char* text, int64_t size);

}  // extern "C"

#endif  // TF_AGC_CC_CORE_CUDA_AGC_CUDA_H_
