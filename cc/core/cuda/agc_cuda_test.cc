// The kernels against plain loops in double, on the CPU: their source runs in the emulation of CUDA
// (emulation/emulation.h). Small made-up devices make small maps take every way that plan.h has. Built plain and under
// sanitizers.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cc/core/agc_test_util.h"
#include "cc/core/cuda/emulation/emulation.h"
#include "cc/core/cuda/launchers.h"
#include "cc/core/types.h"
#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

// Largest cluster, multiprocessors, shared memory of a block and of a multiprocessor, L2 cache, dependent launches.
constexpr Device kDevices[] = {
    {1, 2, 4 << 10, 4 << 10, 8 << 10},
    {1, 2, 8 << 10, 16 << 10, 16 << 10},
    {8, 2, 8 << 10, 16 << 10, 16 << 10, true},
};
constexpr Device kHopper = {8, 132, 227 << 10, 228 << 10, 50 << 20, true};

struct CudaTensors : Tensors {
  using Tensors::Tensors;

  int RunForward(const Case& c, int over, const Device& device) {
    const ForwardArgs args = PrepareForward(c, over);
    std::vector<double> workspace = Workspace(WorkspaceBytes(args, device));
    const int error = Forward(args, device, workspace.empty() ? nullptr : workspace.data(), nullptr);
    cudaDeviceSynchronize();
    return error;
  }
  int RunBackward(const Case& c, int over, const Device& device) {
    const BackwardArgs args = PrepareBackward(c, over);
    std::vector<double> workspace = Workspace(WorkspaceBytes(args, device));
    const int error = Backward(args, device, workspace.empty() ? nullptr : workspace.data(), nullptr);
    cudaDeviceSynchronize();
    return error;
  }

 private:
  static std::vector<double> Workspace(int64_t bytes) {
    return std::vector<double>(static_cast<size_t>(bytes) / sizeof(double), std::nan(""));
  }
};

void SetSeed(uint32_t seed) { emulation::SetSchedule({seed}); }

// Without and with a bias and a shortcut.
struct Addends {
  bool bias;
  bool shortcut;
};
constexpr Addends kAbsent = {false, false}, kBoth = {true, true};
constexpr Addends kSomeAddends[] = {{true, false}, {false, true}, kBoth};

void ExpectSameForward(const Tensors& a, const Tensors& b) {
  EXPECT_TRUE(a.y == b.y);
  EXPECT_TRUE(a.mean == b.mean);
}
void ExpectSameBackward(const Tensors& a, const Tensors& b) {
  EXPECT_TRUE(a.dx == b.dx);
  EXPECT_TRUE(a.dgain == b.dgain);
  EXPECT_TRUE(a.dmean_scale == b.dmean_scale);
  EXPECT_TRUE(a.dbias == b.dbias);
  EXPECT_TRUE(a.dshortcut == b.dshortcut);
}

class EverySize : public testing::TestWithParam<std::tuple<int, int, int>> {};

// Fresh outputs against plain loops, outputs over inputs against fresh ones. `turn` chooses among the ways to do it.
void CheckCall(const Case& c, const Device& device, uint32_t turn) {
  SCOPED_TRACE(c.Name());
  const bool aligned = turn % 2 == 0;
  SetSeed(turn);
  CudaTensors t(c, aligned);
  ASSERT_EQ(t.RunForward(c, /*over=*/0, device), 0);
  CheckForward(c, t);
  ASSERT_EQ(t.RunBackward(c, /*over=*/0, device), 0);
  CheckBackward(c, t);
  if (testing::Test::HasFatalFailure()) return;

  CudaTensors in_place(c, aligned);
  SetSeed(turn + 1);
  const int forward = 1 + static_cast<int>(turn / 2 % (c.shortcut ? 2 : 1));
  const int backward = 1 + static_cast<int>(turn / 2 % (c.BackwardShortcut() ? 4 : 2));
  SCOPED_TRACE("over " + std::to_string(forward) + ", " + std::to_string(backward));
  ASSERT_EQ(in_place.RunForward(c, forward, device), 0);
  ExpectSameForward(in_place, t);
  ASSERT_EQ(in_place.RunBackward(c, backward, device), 0);
  ExpectSameBackward(in_place, t);
  for (const Array* a : {&t.y, &t.mean, &t.dx, &t.dgain, &t.dmean_scale, &t.dbias, &t.dshortcut, &in_place.y,
                         &in_place.dx, &in_place.dshortcut}) {
    EXPECT_TRUE(a->BordersIntact());
  }
}

TEST_P(EverySize, EqualsPlainLoops) {
  const auto [batch, positions, channels] = GetParam();
  // Odd steps in all loops and a start of its own for each size, so that everything meets both alignments, each kind of
  // addends and each place of outputs.
  uint32_t turn = static_cast<uint32_t>(batch + positions + channels);
  for (const Device& device : kDevices) {
    ++turn;
    for (Layout layout : kLayouts) {
      ++turn;
      for (DataType type : kTypes) {
        for (Activation activation : kActivations) {
          Case c{{batch, positions, channels, layout}, type, activation, AlphaOf(activation)};
          CheckCall(c, device, ++turn);
          c.bias = kSomeAddends[turn % 3].bias;
          c.shortcut = kSomeAddends[turn % 3].shortcut;
          CheckCall(c, device, turn);
          if (HasFailure()) return;
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
// Several tiles in a sample, blocks in a cluster, launches.
INSTANTIATE_TEST_SUITE_P(Large, EverySize,
                         testing::Values(std::make_tuple(2, 200, 16), std::make_tuple(2, 67, 33),
                                         std::make_tuple(1, 3, 515), std::make_tuple(1, 2113, 2),
                                         std::make_tuple(1, 8200, 1)));

// Floats that are held for vectors of half, behind sums and parameters of two columns: 16 bytes after a multiple of 32.
TEST(OnChip, HoldsFloatsOfHalf) {
  for (Activation activation : {Activation::kElu, Activation::kLeakyRelu}) {
    const Case c{{1, 512, 2, Layout::kChannelsFirst}, DataType::kHalf, activation, AlphaOf(activation)};
    SetSeed(1);
    CudaTensors t(c, /*aligned=*/true);
    const Walk walk = PlanOf(t.PrepareBackward(c, 0), kHopper).walk;
    ASSERT_EQ(walk.columns, 2);
    ASSERT_EQ(walk.vector, 8);
    ASSERT_EQ(t.RunForward(c, 0, kHopper), 0);
    CheckForward(c, t);
    ASSERT_EQ(t.RunBackward(c, 0, kHopper), 0);
    CheckBackward(c, t);
  }
}

// One float map size for each way through the kernels.
struct Way {
  const char* name;
  Device device;
  Shape shape;
  bool aligned;
  bool on_chip;
  int blocks;
  int forward_launches;
  int backward_launches;

  Case WithRelu(const Addends& addends) const {
    return {shape, DataType::kFloat, Activation::kRelu, 0, addends.bias, addends.shortcut};
  }
};
const Way kWays[] = {
    {"block", kDevices[0], {3, 128, 3, Layout::kChannelsLast}, false, true, 1, 1, 2},
    {"block, one sample", kDevices[1], {1, 64, 16, Layout::kChannelsLast}, true, true, 1, 1, 1},
    {"block, channels_first", kDevices[1], {3, 320, 16, Layout::kChannelsFirst}, true, true, 1, 1, 2},
    {"cluster of 2", kDevices[2], {3, 200, 16, Layout::kChannelsLast}, true, true, 2, 1, 2},
    {"cluster of 4", kDevices[2], {1, 720, 3, Layout::kChannelsLast}, false, true, 4, 1, 1},
    {"cluster of 8", kDevices[2], {3, 1600, 16, Layout::kChannelsLast}, true, true, 8, 1, 2},
    {"cluster of 4, channels_first", kDevices[2], {3, 2113, 3, Layout::kChannelsFirst}, false, true, 4, 1, 2},
    {"cluster of 8, channels_first", kDevices[2], {1, 8200, 2, Layout::kChannelsFirst}, true, true, 8, 1, 1},
    {"two launches", kDevices[1], {1, 1600, 16, Layout::kChannelsLast}, true, false, 2, 2, 2},
    {"two launches for each tile", kDevices[2], {3, 2113, 16, Layout::kChannelsLast}, true, false, 3, 6, 7},
    {"two launches for each tile, channels_first",
     kDevices[0],
     {2, 8200, 2, Layout::kChannelsFirst},
     false,
     false,
     3,
     8,
     9},
};

TEST(Ways, AreTaken) {
  for (const Way& way : kWays) {
    for (const Addends& addends : {kAbsent, kBoth}) {
      SCOPED_TRACE(way.name);
      SetSeed(1);
      const Case c = way.WithRelu(addends);
      CudaTensors t(c, way.aligned);
      const Plan plan = PlanOf(t.PrepareForward(c, 0), way.device);
      EXPECT_EQ(plan.on_chip, way.on_chip);
      EXPECT_EQ(plan.walk.blocks, way.blocks);
      EXPECT_EQ(plan.walk.vector, way.aligned ? 4 : 1);
      EXPECT_EQ(PlanOf(t.PrepareBackward(c, 0), way.device).on_chip, way.on_chip);
      emulation::TakeStatistics();
      ASSERT_EQ(t.RunForward(c, 0, way.device), 0);
      EXPECT_EQ(emulation::TakeStatistics().launches, way.forward_launches);
      ASSERT_EQ(t.RunBackward(c, 0, way.device), 0);
      // With a bias, one sample's terms are added up as those of several are.
      const int more = addends.bias && way.shape.batch == 1 ? 1 : 0;
      const emulation::Statistics backward = emulation::TakeStatistics();
      EXPECT_EQ(backward.launches, way.backward_launches + more);
      const bool adds_samples = addends.bias || way.shape.batch > 1;
      EXPECT_EQ(backward.dependent_launches, adds_samples && way.device.dependent_launches ? 1 : 0);
      CheckForward(c, t);
      CheckBackward(c, t);
    }
  }
}

TEST(Ways, OneMisalignedMapMeansSingleElements) {
  const Way& way = kWays[3];
  const Case c = way.WithRelu(kBoth);
  CudaTensors t(c, /*aligned=*/true);
  const ForwardArgs forward = t.PrepareForward(c, 0);
  const BackwardArgs backward = t.PrepareBackward(c, 0);
  auto vector_without = [&](auto args, auto map) {
    const auto* aligned = static_cast<const char*>(args.*map);
    args.*map = const_cast<char*>(aligned + sizeof(float));
    return PlanOf(args, way.device).walk.vector;
  };
  EXPECT_EQ(PlanOf(forward, way.device).walk.vector, 4);
  EXPECT_EQ(PlanOf(backward, way.device).walk.vector, 4);
  for (auto map : {&ForwardArgs::x, &ForwardArgs::shortcut}) EXPECT_EQ(vector_without(forward, map), 1);
  EXPECT_EQ(vector_without(forward, &ForwardArgs::y), 1);
  for (auto map : {&BackwardArgs::dy, &BackwardArgs::kept, &BackwardArgs::shortcut}) {
    EXPECT_EQ(vector_without(backward, map), 1);
  }
  for (auto map : {&BackwardArgs::dx, &BackwardArgs::dshortcut}) EXPECT_EQ(vector_without(backward, map), 1);
}

TEST(Ways, AnyOrderGivesTheSameBits) {
  for (const Way& way : kWays) {
    for (const Addends& addends : {kAbsent, kBoth}) {
      SCOPED_TRACE(way.name);
      const Case c = way.WithRelu(addends);
      SetSeed(0);
      CudaTensors first(c, way.aligned);
      ASSERT_EQ(first.RunForward(c, 0, way.device), 0);
      ASSERT_EQ(first.RunBackward(c, 0, way.device), 0);
      for (uint32_t seed : {0, 1, 2, 3}) {
        // Outputs over inputs: an element that was overwritten too early would be another one.
        const int over = static_cast<int>(seed);
        SetSeed(seed);
        CudaTensors again(c, way.aligned);
        ASSERT_EQ(again.RunForward(c, 1 + over % (c.shortcut ? 2 : 1), way.device), 0);
        ExpectSameForward(first, again);
        ASSERT_EQ(again.RunBackward(c, 1 + over % (c.shortcut ? 4 : 2), way.device), 0);
        ExpectSameBackward(first, again);
      }
    }
  }
}

TEST(Ways, SampleDoesNotDependOnItsNeighbours) {
  for (const Way& way : kWays) {
    SCOPED_TRACE(way.name);
    Case one = way.WithRelu(kBoth), many = one;
    one.shape.batch = 1;
    many.shape.batch = 5;
    CudaTensors all(many, way.aligned), single(one, way.aligned);
    const size_t sample = single.x.size(), channels = single.gain.size();
    for (size_t i = 0; i < sample; ++i) {
      single.x.Set(i, all.x.Get(i + 3 * sample));
      single.shortcut.Set(i, all.shortcut.Get(i + 3 * sample));
      single.dy.Set(i, all.dy.Get(i + 3 * sample));
    }
    for (size_t i = 0; i < channels; ++i) single.dmean.Set(i, all.dmean.Get(i + 3 * channels));
    single.gain = all.gain;
    single.mean_scale = all.mean_scale;
    single.bias = all.bias;
    ASSERT_EQ(all.RunForward(many, 0, way.device), 0);
    ASSERT_EQ(single.RunForward(one, 0, way.device), 0);
    ASSERT_EQ(all.RunBackward(many, 0, way.device), 0);
    ASSERT_EQ(single.RunBackward(one, 0, way.device), 0);
    for (size_t i = 0; i < sample; ++i) {
      ASSERT_EQ(single.y.Get(i), all.y.Get(i + 3 * sample));
      ASSERT_EQ(single.dx.Get(i), all.dx.Get(i + 3 * sample));
      ASSERT_EQ(single.dshortcut.Get(i), all.dshortcut.Get(i + 3 * sample));
    }
  }
}

// On a Hopper GPU as it is, a map of a million positions takes a cluster, and its sum goes on in double.
TEST(Forward, MeanOfManyLargeValues) {
  for (Layout layout : kLayouts) {
    const Case c{{1, 1000000, 1, layout}, DataType::kFloat, Activation::kLinear, 0};
    CudaTensors t(c);
    double sum = 0;
    for (size_t i = 0; i < t.x.size(); ++i) {
      t.x.Set(i, 1000 + t.x.Get(i));
      sum += t.x.Get(i);
    }
    ASSERT_EQ(t.RunForward(c, 0, kHopper), 0);
    EXPECT_NEAR(t.mean.Get(0), sum / 1e6, 1000 * 2 * 0x1p-23);
  }
}

TEST(Forward, HalfSumsDoNotOverflow) {
  const Case c{{1, 1000, 3, Layout::kChannelsLast}, DataType::kHalf, Activation::kLinear, 0};
  CudaTensors t(c);
  for (size_t i = 0; i < t.x.size(); ++i) t.x.Set(i, 60000);
  ASSERT_EQ(t.RunForward(c, 0, kDevices[1]), 0);
  EXPECT_EQ(t.mean.Get(1), HalfToDouble(0x7b53));  // The half nearest to 60000.
}

// ---- As the CPU's kernel does it ----

// Whether both are NaN, the same infinity, or finite.
void ExpectSameKind(const Array& a, const Array& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = a.Get(i), y = b.Get(i);
    ASSERT_EQ(std::isnan(x), std::isnan(y)) << i << ": " << x << ", on the CPU " << y;
    if (std::isinf(x) || std::isinf(y)) {
      ASSERT_EQ(x, y) << i;
    }
  }
}

TEST(AsOnTheCpu, NanAndInfinity) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const Device& device : kDevices) {
    for (DataType type : kTypes) {
      for (Activation activation : kActivations) {
        for (const Addends& addends : {kAbsent, kBoth}) {
          const Case c{{3, 37, 19, Layout::kChannelsLast},
                       type,
                       activation,
                       AlphaOf(activation),
                       addends.bias,
                       addends.shortcut};
          SCOPED_TRACE(c.Name());
          CudaTensors t(c);
          t.x.Set(c.Index(0, 11, 3), -inf);
          t.x.Set(c.Index(1, 12, 4), inf);
          t.gain.Set(6, 0);
          t.gain.Set(7, 0x1p-149);
          // There, dgain would be what rounding leaves of these, over the gain: infinite or not by the order of sums.
          t.bias.Set(7, 0);
          if (c.shortcut) {
            for (int n = 0; n < 3; ++n) {
              for (int p = 0; p < 37; ++p) t.shortcut.Set(c.Index(n, p, 7), 0);
            }
          }
          t.gain.Set(8, std::nan(""));
          t.mean_scale.Set(9, std::nan(""));
          t.mean_scale.Set(10, inf);
          t.dmean.Set(19 + 11, inf);
          t.dy.Set(c.Index(0, 20, 12), -inf);
          t.dy.Set(c.Index(1, 21, 13), inf);
          t.bias.Set(15, -inf);
          t.shortcut.Set(c.Index(1, 22, 16), -inf);  // Where the slope is 0, nothing is not finite for it.
          t.shortcut.Set(c.Index(1, 23, 17), inf);
          if (type == DataType::kFloat || type == DataType::kDouble) {  // Array has no NaN of 16 bits.
            t.x.Set(c.Index(2, 13, 5), std::nan(""));
            t.dy.Set(c.Index(2, 22, 14), std::nan(""));
            t.shortcut.Set(c.Index(2, 24, 18), std::nan(""));
          }
          Tensors on_cpu = t;
          ASSERT_EQ(t.RunForward(c, 0, device), 0);
          ASSERT_EQ(t.RunBackward(c, 0, device), 0);
          core::Forward(on_cpu.PrepareForward(c, 0), Serial());
          core::Backward(on_cpu.PrepareBackward(c, 0), Serial());
          ExpectSameKind(t.y, on_cpu.y);
          ExpectSameKind(t.mean, on_cpu.mean);
          ExpectSameKind(t.dx, on_cpu.dx);
          ExpectSameKind(t.dgain, on_cpu.dgain);
          ExpectSameKind(t.dmean_scale, on_cpu.dmean_scale);
          if (c.bias) ExpectSameKind(t.dbias, on_cpu.dbias);
          if (c.BackwardShortcut()) ExpectSameKind(t.dshortcut, on_cpu.dshortcut);
        }
      }
    }
  }
}

// Where nothing rounds, every bit: signs of zeros, and 16-bit results beside ties, below the normal and above the
// largest.
TEST(AsOnTheCpu, SignsOfZerosAndRounding) {
  for (DataType type : kTypes) {
    for (Activation activation : {Activation::kLinear, Activation::kRelu, Activation::kRelu6, Activation::kLeakyRelu}) {
      const bool shortcut = activation == Activation::kLinear || activation == Activation::kRelu6;
      const Case c{{1, 1, 1024, Layout::kChannelsLast}, type, activation, 0.25, /*bias=*/false, shortcut};
      SCOPED_TRACE(c.Name());
      CudaTensors t(c, /*aligned=*/true);
      std::mt19937 random(7);
      std::uniform_real_distribution<double> exponent(-28, 17), mantissa(1, 2);
      for (size_t i = 0; i < t.x.size(); ++i) {
        t.x.Set(i, i % 2 ? 1 : -1);
        t.gain.Set(i, std::ldexp(mantissa(random), static_cast<int>(exponent(random))));
        t.mean_scale.Set(i, 0);
      }
      // A shortcut alone is added as it is: -0 to -0.
      for (size_t i = 0; i < t.shortcut.size(); ++i) t.shortcut.Set(i, -0.0);
      const double ties[] = {65519, 65520, 0x1.002p0, 0x1.006p0, 0x1.01p0, 0x1.03p0, 0x1.8p-24, 0x1p-25};
      for (size_t i = 0; i < 8; ++i) t.gain.Set(i, ties[i]);
      for (size_t i = 8; i < 16; ++i) {
        t.x.Set(i, i % 2 ? 0.0 : -0.0);
        t.gain.Set(i, i % 4 < 2 ? -1 : 1);
      }
      Tensors on_cpu = t;
      ASSERT_EQ(t.RunForward(c, 0, kDevices[2]), 0);
      core::Forward(on_cpu.PrepareForward(c, 0), Serial());
      EXPECT_TRUE(t.y == on_cpu.y);
      EXPECT_TRUE(t.mean == on_cpu.mean);
    }
  }
}

// -0 is what changes nothing when it is added; an absent bias is one where there is a shortcut.
TEST(Addends, MinusZerosChangeNoBit) {
  for (DataType type : kTypes) {
    for (Activation activation : kActivations) {
      const Case absent{{2, 37, 24, Layout::kChannelsLast}, type, activation, AlphaOf(activation)};
      CudaTensors without(absent, /*aligned=*/true);
      for (size_t i = 0; i < 24; ++i) without.x.Set(i, i % 2 ? 0.0 : -0.0);
      without.mean_scale.Set(0, 0);
      without.mean_scale.Set(1, 0);
      CudaTensors with = without;
      for (size_t i = 0; i < with.shortcut.size(); ++i) with.shortcut.Set(i, -0.0);
      for (size_t i = 0; i < with.bias.size(); ++i) with.bias.Set(i, -0.0);
      ASSERT_EQ(without.RunForward(absent, 0, kDevices[2]), 0);
      ASSERT_EQ(without.RunBackward(absent, 0, kDevices[2]), 0);
      for (const Addends& addends : kSomeAddends) {
        Case c = absent;
        c.bias = addends.bias;
        c.shortcut = addends.shortcut;
        SCOPED_TRACE(c.Name());
        ASSERT_EQ(with.RunForward(c, 0, kDevices[2]), 0);
        ASSERT_EQ(with.RunBackward(c, 0, kDevices[2]), 0);
        ExpectSameForward(with, without);
        EXPECT_TRUE(with.dx == without.dx);
        EXPECT_TRUE(with.dgain == without.dgain);
        EXPECT_TRUE(with.dmean_scale == without.dmean_scale);
      }
    }
  }
}

TEST(Backward, EluAtItsFloor) {
  for (DataType type : kTypes) {
    const Case c{{1, 40, 2, Layout::kChannelsLast}, type, Activation::kElu, 0.3};
    CudaTensors t(c);
    for (size_t i = 0; i < t.x.size(); ++i) t.x.Set(i, i % 4 < 2 ? -200 : 200);
    ASSERT_EQ(t.RunForward(c, 0, kDevices[1]), 0);
    ASSERT_EQ(t.RunBackward(c, 0, kDevices[1]), 0);
    EXPECT_TRUE(std::isfinite(t.dgain.Get(0)) && std::isfinite(t.dgain.Get(1))) << c.Name();
  }
}

TEST(Alpha, ZeroActsAsRelu) {
  for (Activation activation : {Activation::kLeakyRelu, Activation::kElu}) {
    const Case with_alpha{{2, 37, 19, Layout::kChannelsLast}, DataType::kFloat, activation, 0};
    Case relu = with_alpha;
    relu.activation = Activation::kRelu;
    CudaTensors a(with_alpha), b(relu);
    ASSERT_EQ(a.RunForward(with_alpha, 0, kDevices[1]), 0);
    ASSERT_EQ(a.RunBackward(with_alpha, 0, kDevices[1]), 0);
    ASSERT_EQ(b.RunForward(relu, 0, kDevices[1]), 0);
    ASSERT_EQ(b.RunBackward(relu, 0, kDevices[1]), 0);
    ExpectSameForward(a, b);
    ExpectSameBackward(a, b);
  }
}

TEST(Empty, BatchAndChannels) {
  for (Layout layout : kLayouts) {
    const Case no_samples{{0, 5, 3, layout}, DataType::kFloat, Activation::kRelu, 0, /*bias=*/true, /*shortcut=*/true};
    CudaTensors t(no_samples);
    t.bias.Set(1, std::numeric_limits<double>::infinity());
    ASSERT_EQ(t.RunForward(no_samples, 0, kHopper), 0);
    ASSERT_EQ(t.RunBackward(no_samples, 0, kHopper), 0);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(t.dgain.Get(i), 0);
      EXPECT_EQ(t.dmean_scale.Get(i), 0);
      EXPECT_EQ(t.dbias.Get(i), 0);
    }
    const Case no_channels{{2, 5, 0, layout}, DataType::kFloat, Activation::kRelu, 0, /*bias=*/true, /*shortcut=*/true};
    CudaTensors none(no_channels);
    emulation::TakeStatistics();
    ASSERT_EQ(none.RunForward(no_channels, 0, kHopper), 0);
    ASSERT_EQ(none.RunBackward(no_channels, 0, kHopper), 0);
    EXPECT_EQ(emulation::TakeStatistics().launches, 0);
    EXPECT_TRUE(none.y.BordersIntact() && none.dgain.BordersIntact());
  }
}

TEST(Workspace, MissingIsAnError) {
  const Case c = kWays[9].WithRelu(kBoth);
  CudaTensors t(c, true);
  EXPECT_EQ(Forward(t.PrepareForward(c, 0), kWays[9].device, nullptr, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(Backward(t.PrepareBackward(c, 0), kWays[9].device, nullptr, nullptr), cudaErrorInvalidValue);
}

TEST(Workspace, GrowsForABiasAlone) {
  for (const Way& way : kWays) {
    SCOPED_TRACE(way.name);
    CudaTensors t(way.WithRelu(kBoth), way.aligned);
    auto bytes = [&](const Addends& addends) {
      return WorkspaceBytes(t.PrepareBackward(way.WithRelu(addends), 0), way.device);
    };
    const int64_t map_sums = way.shape.batch * way.shape.channels * int64_t{sizeof(double)};
    EXPECT_EQ(bytes({true, false}), bytes(kAbsent) + (way.shape.batch > 1 ? 1 : 3) * map_sums);
    EXPECT_LE(bytes({false, true}), bytes(kAbsent));
  }
}

// ---- That these tests would find what they look for ----

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

// Runs a kernel as one cluster of two blocks, each a warp.
template <class Argument>
cudaError_t LaunchClusterOfTwo(size_t shared_bytes, void (*kernel)(Argument), const Argument& argument) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, argument);
  cudaDeviceSynchronize();
  return error;
}

#endif

#if defined(__SANITIZE_ADDRESS__)

TEST(SharedMemory, IsNotLeft) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 48;
  void (*kernel)(int) = [](int at) { emulation::SharedMemory()[at] = 0; };
  auto run = [&](int at) {
    EXPECT_EQ(cudaLaunchKernelEx(&config, kernel, at), cudaSuccess);
    cudaDeviceSynchronize();
  };
  run(47);
  EXPECT_DEATH(run(48), "AddressSanitizer: heap-buffer-overflow");
}

TEST(SharedMemory, IsNotReadAfterItsBlock) {
  void (*kernel)(int*) = [](int* out) {
    *out = *static_cast<const unsigned char*>(__cluster_map_shared_rank(emulation::SharedMemory(), 1 - blockIdx.x));
  };
  int out;
  EXPECT_DEATH(LaunchClusterOfTwo(48, kernel, &out), "AddressSanitizer: use-after-poison");
}

#else

// Each barrier of each kernel is left out in turn.

struct Missing {
  int launch;
  int barrier;
};
constexpr Missing kNone = {-1, -1};

// Runs one pass of a way with a barrier missing, or with all; the other pass only prepares.
void RunWithout(const Missing& missing, uint32_t seed, const Way& way, const Case& c, Pass pass, CudaTensors* t) {
  SetSeed(0);
  if (pass == Pass::kBackward) {
    EXPECT_EQ(t->RunForward(c, 0, way.device), 0);
  }
  emulation::TakeStatistics();
  emulation::SetSchedule({seed, missing.barrier, missing.launch});
  EXPECT_EQ(pass == Pass::kForward ? t->RunForward(c, 0, way.device) : t->RunBackward(c, 0, way.device), 0);
  SetSeed(0);
}

// Launches of the pass's own kernels: those that are looked at. What is behind them is AddSamples.
int OwnLaunches(const Way& way) { return way.on_chip ? 1 : 2; }

// Of the first launch of each kernel: where there are several pairs of launches, of the first pair.
std::vector<Missing> Barriers(const Way& way, const Case& c, Pass pass) {
  CudaTensors t(c, way.aligned);
  RunWithout(kNone, 0, way, c, pass, &t);
  const std::vector<int> barriers = emulation::TakeStatistics().barriers;
  const int launches = static_cast<int>(barriers.size());
  const bool adds_samples = pass == Pass::kBackward && (c.bias || c.shape.batch > 1);
  std::vector<Missing> all;
  for (int launch = 0; launch < launches; ++launch) {
    if (launch >= OwnLaunches(way) && !(adds_samples && launch + 1 == launches)) continue;
    EXPECT_GE(barriers[static_cast<size_t>(launch)], 1);
    for (int barrier = 0; barrier < barriers[static_cast<size_t>(launch)]; ++barrier) all.push_back({launch, barrier});
  }
  return all;
}

// Without a cluster's barrier, stores may come to a barrier in shared memory that is not there yet: that the emulation
// finds itself, and ends the process.
bool Fails(int status) { return !testing::ExitedWithCode(0)(status); }

std::string NameOf(const Way& way, Pass pass, const Missing& missing) {
  return std::string(way.name) + (pass == Pass::kForward ? ", forward" : ", backward") + ", launch " +
         std::to_string(missing.launch) + ", barrier " + std::to_string(missing.barrier);
}

// Forward, a block that is alone reads its sums by the threads that wrote them: its second barrier is backward's. What
// AddSamples waits for first is done where it is no dependent launch.
bool IsIdle(const Way& way, Pass pass, const Missing& missing) {
  if (missing.launch >= OwnLaunches(way)) return missing.barrier == 0 && !way.device.dependent_launches;
  return pass == Pass::kForward && way.on_chip && way.blocks == 1 && missing.barrier == 1;
}

#if defined(__SANITIZE_THREAD__)

extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }

TEST(MissingBarrier, IsARace) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  for (int index : {0, 3, 9}) {  // A block, a cluster, two launches.
    const Way& way = kWays[index];
    const Case c = way.WithRelu(index == 3 ? kBoth : kAbsent);
    for (Pass pass : {Pass::kForward, Pass::kBackward}) {
      for (const Missing& missing : Barriers(way, c, pass)) {
        if (IsIdle(way, pass, missing)) continue;
        auto run = [&] {
          CudaTensors t(c, way.aligned);
          RunWithout(missing, 0, way, c, pass, &t);
          std::exit(0);
        };
        EXPECT_EXIT(run(), Fails, "ThreadSanitizer: data race|CUDA emulation: ") << NameOf(way, pass, missing);
      }
    }
  }
}

// Two blocks read each other's shared memory, which must live until both have: for that a relaxed arrival is enough,
// but not for what they write.
void ReadOther(bool publish) {
  auto* own = reinterpret_cast<int*>(emulation::SharedMemory());
  own[threadIdx.x] = static_cast<int>(threadIdx.x);
  publish ? __cluster_barrier_arrive() : __cluster_barrier_arrive_relaxed();
  __cluster_barrier_wait();
  const auto* others = static_cast<const int*>(__cluster_map_shared_rank(own, 1 - blockIdx.x));
  EXPECT_EQ(others[threadIdx.x], static_cast<int>(threadIdx.x));
  __cluster_barrier_arrive_relaxed();
  __cluster_barrier_wait();
}

TEST(RelaxedArrival, PublishesNothing) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  auto run = [](bool publish) { std::exit(LaunchClusterOfTwo(32 * sizeof(int), &ReadOther, publish)); };
  EXPECT_EXIT(run(true), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(run(false), testing::ExitedWithCode(66), "ThreadSanitizer: data race");
}

// What is stored into another block may be read once its bytes have been waited for, and not before.
void ReadStored(bool wait) {
  auto* barrier = reinterpret_cast<uint64_t*>(emulation::SharedMemory());
  auto* numbers = reinterpret_cast<int*>(emulation::SharedMemory() + 16);
  const int number = static_cast<int>(threadIdx.x);
  if (threadIdx.x == 0) {
    emulation::InitBarrier(barrier, 1);
    emulation::FenceBarrierInit();
    emulation::ArriveAndExpect(barrier, 32 * sizeof(int));
  }
  __cluster_barrier_arrive_relaxed();
  __cluster_barrier_wait();
  emulation::StoreAsync(&numbers[number], 1 - static_cast<int>(blockIdx.x), &number, sizeof number, barrier);
  if (wait) emulation::WaitForParity(barrier, 0);
  volatile int read = numbers[31 - number];
  (void)read;
  if (!wait) emulation::WaitForParity(barrier, 0);
}

TEST(AsynchronousStore, IsARaceBeforeItsBytesAreWaitedFor) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  auto run = [](bool wait) { std::exit(LaunchClusterOfTwo(16 + 32 * sizeof(int), &ReadStored, wait)); };
  EXPECT_EXIT(run(true), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(run(false), testing::ExitedWithCode(66), "ThreadSanitizer: data race");
}

#else

TEST(MissingBarrier, ChangesResults) {
  for (const Way& way : kWays) {
    for (const Addends& addends : {kAbsent, kBoth}) {
      const Case c = way.WithRelu(addends);
      for (Pass pass : {Pass::kForward, Pass::kBackward}) {
        CudaTensors right(c, way.aligned);
        RunWithout(kNone, 0, way, c, pass, &right);
        for (const Missing& missing : Barriers(way, c, pass)) {
          auto run = [&] {
            int wrong = 0;
            for (uint32_t seed = 0; seed < 8; ++seed) {
              CudaTensors t(c, way.aligned);
              RunWithout(missing, seed, way, c, pass, &t);
              wrong += pass == Pass::kForward
                           ? !(t.y == right.y && t.mean == right.mean)
                           : !(t.dx == right.dx && t.dgain == right.dgain && t.dmean_scale == right.dmean_scale);
            }
            std::exit(wrong > 0 ? 1 : 0);
          };
          if (IsIdle(way, pass, missing)) {
            EXPECT_EXIT(run(), testing::ExitedWithCode(0), "") << NameOf(way, pass, missing);
          } else {
            EXPECT_EXIT(run(), Fails, "") << NameOf(way, pass, missing);
          }
        }
      }
    }
  }
}

#endif  // __SANITIZE_THREAD__
#endif  // __SANITIZE_ADDRESS__

}  // namespace
}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
