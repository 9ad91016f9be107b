#include "cc/core/cuda/driver.h"

#include <dlfcn.h>

#include <string>

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

std::string Release(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

}  // namespace

int DriverVersion(const char* library) {
  void* driver = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) return 0;
  int version = 0;
  if (auto* get = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"))) {
    if (get(&version) != 0) version = 0;
  }
  dlclose(driver);
  return version;
}

std::string DriverProblem(int driver, int built_with) {
  if (driver == 0 || driver / 1000 >= built_with / 1000) return "";
  return "the NVIDIA driver runs CUDA " + Release(driver) + " at most, and tf_agc was built with CUDA " +
         Release(built_with);
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
