// Whether this machine's NVIDIA driver runs what the library's CUDA compiled. Plain C++, so that it is tested without
// either.

#ifndef TF_AGC_CC_CORE_CUDA_DRIVER_H_
#define TF_AGC_CC_CORE_CUDA_DRIVER_H_

#include <string>

namespace tf_agc {
namespace core {
namespace cuda {

// The newest CUDA that a driver runs, by the file name of its library: 13000 for 13.0. 0 where there is none.
int DriverVersion(const char* library);

// Why code of CUDA `built_with` does not run with a driver of that version, "" where it does: within a major version,
// all drivers run it. Without a driver (0) there is nothing to run it on, and nothing to say.
std::string DriverProblem(int driver, int built_with);

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_DRIVER_H_
