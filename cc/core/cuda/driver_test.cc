// With a driver that only tells its version: fake_driver.cc.

#include "cc/core/cuda/driver.h"

#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

TEST(DriverVersion, IsWhatTheLibrarySays) {
  EXPECT_EQ(DriverVersion("cc/core/cuda/libfake_driver.so"), 12080);
  EXPECT_EQ(DriverVersion("libno_such_driver.so.1"), 0);
  EXPECT_EQ(DriverVersion("libc.so.6"), 0);  // Which has no such function.
}

TEST(DriverProblem, IsAnOlderMajorVersion) {
  EXPECT_EQ(DriverProblem(12080, 13000),
            "the NVIDIA driver runs CUDA 12.8 at most, and tf_agc was built with CUDA 13.0");
  EXPECT_EQ(DriverProblem(13000, 13010), "");
  EXPECT_EQ(DriverProblem(13010, 12090), "");
  EXPECT_EQ(DriverProblem(0, 13000), "");
}

}  // namespace
}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
