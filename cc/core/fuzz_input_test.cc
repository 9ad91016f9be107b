// The fuzzer's property on inputs that never change, with any compiler.

#include "cc/core/fuzz_input.h"

#include <cstdint>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace {

TEST(FuzzInput, RandomBytes) {
  std::mt19937 random(1);
  for (int i = 0; i < 1000; ++i) {
    std::vector<uint8_t> bytes(random() % 64);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    RunFuzzInput(bytes.data(), bytes.size());
    ASSERT_FALSE(HasFailure()) << "input " << i;
  }
}

TEST(FuzzInput, NoBytes) { RunFuzzInput(nullptr, 0); }

}  // namespace
}  // namespace core
}  // namespace tf_agc
