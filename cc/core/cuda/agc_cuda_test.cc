// The kernels against plain loops in double, on the CPU: their source runs in the emulation of CUDA (emulation.h). Small
// made-up devices make small maps take every way that plan.h has. Built plain and under sanitizers.

#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "cc/core/agc.h"
#include "cc/core/agc_test_util.h"
#include "cc/core/cuda/emulation.h"
#include "cc/core/cuda/launch.h"
#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

// Compute capability, multiprocessors, shared memory of a block and of a multiprocessor, L2 cache.
constexpr Device kDevices[] = {
    {75, 2, 2 << 10, 4 << 10, 4 << 10},
    {80, 2, 3 << 10, 12 << 10, 8 << 10},
    {90, 2, 3 << 10, 12 << 10, 8 << 10},
};
constexpr Device kHopper = {90, 132, 227 << 10, 228 << 10, 50 << 20};

struct CudaTensors : Tensors {
  using Tensors::Tensors;

  int RunForward(const Case& c, bool in_place, const Device& device) {
    const ForwardArgs args = PrepareForward(c, in_place);
    std::vector<double> workspace = Workspace(WorkspaceBytes(args, device));
    return Forward(args, device, workspace.empty() ? nullptr : workspace.data(), nullptr);
  }
  int RunBackward(const Case& c, int over, const Device& device) {
    const BackwardArgs args = PrepareBackward(c, over);
    std::vector<double> workspace = Workspace(WorkspaceBytes(args, device));
    return Backward(args, device, workspace.empty() ? nullptr : workspace.data(), nullptr);
  }

 private:
  static std::vector<double> Workspace(int64_t bytes) {
    return std::vector<double>(static_cast<size_t>(bytes) / sizeof(double), std::nan(""));
  }
};

void SetSeed(uint32_t seed) { emulation::SetSchedule({seed, -1}); }

class EverySize : public testing::TestWithParam<std::tuple<int, int, int>> {};

TEST_P(EverySize, EqualsPlainLoops) {
  const auto [batch, positions, channels] = GetParam();
  uint32_t turn = 0;
  for (const Device& device : kDevices) {
    for (Layout layout : kLayouts) {
      for (DataType type : kTypes) {
        for (Activation activation : kActivations) {
          const bool aligned = ++turn % 2 == 0;  // 5 activations: each takes both.
          SetSeed(turn);
          const Case c{{batch, positions, channels, layout}, type, activation, AlphaOf(activation)};
          CudaTensors t(c, aligned);
          ASSERT_EQ(t.RunForward(c, /*in_place=*/false, device), 0);
          CheckForward(c, t);
          ASSERT_EQ(t.RunBackward(c, /*over=*/0, device), 0);
          CheckBackward(c, t);
          if (HasFatalFailure()) return;

          CudaTensors in_place(c, aligned);
          SetSeed(turn + 1);
          ASSERT_EQ(in_place.RunForward(c, /*in_place=*/true, device), 0);
          ASSERT_TRUE(in_place.y == t.y && in_place.mean == t.mean) << c.Name();
          const int over = 1 + static_cast<int>(turn / 2 % 2);
          ASSERT_EQ(in_place.RunBackward(c, over, device), 0);
          ASSERT_TRUE(in_place.dx == t.dx) << c.Name() << " over " << over;
          ASSERT_TRUE(in_place.dgain == t.dgain && in_place.dmean_scale == t.dmean_scale) << c.Name();
          for (const Array* a : {&t.y, &t.mean, &t.dx, &t.dgain, &t.dmean_scale, &in_place.y, &in_place.dx}) {
            ASSERT_TRUE(a->BordersIntact()) << c.Name();
          }
        }
      }
    }
  }
}

// One of everything; below and above a vector, a warp, a tile; primes; more samples than AddSamples has lanes.
INSTANTIATE_TEST_SUITE_P(Small, EverySize,
                         testing::Values(std::make_tuple(1, 1, 1), std::make_tuple(3, 7, 1), std::make_tuple(2, 1, 24),
                                         std::make_tuple(2, 9, 17), std::make_tuple(1, 49, 8),
                                         std::make_tuple(37, 4, 5)));
INSTANTIATE_TEST_SUITE_P(Large, EverySize,
                         testing::Values(std::make_tuple(2, 320, 8), std::make_tuple(1, 300, 3),
                                         std::make_tuple(2, 67, 33), std::make_tuple(1, 5, 515),
                                         std::make_tuple(1, 2113, 2), std::make_tuple(1, 8200, 1)));

}  // namespace
}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
