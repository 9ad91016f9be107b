// libFuzzer's entry points; what the bytes mean is fuzz_input.cc's.

#include <cstddef>
#include <cstdint>

#include "cc/core/fuzz_input.h"
#include "gtest/gtest.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  // An exception that nobody catches is what libFuzzer takes for a finding.
  testing::FLAGS_gtest_throw_on_failure = true;
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  tf_agc::core::RunFuzzInput(bytes, size);
  return 0;
}
