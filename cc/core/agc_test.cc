// The arithmetic against plain loops in double: every instruction-set level that this machine runs, every type, layout
// and activation, odd sizes, in place and not, threads in any order. What needs TensorFlow is tested from Python.

#include "cc/core/agc.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "cc/core/agc_test_util.h"
#include "cc/core/cpu.h"
#include "cc/core/job.h"
#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace {

struct CpuTensors : Tensors {
  using Tensors::Tensors;

  void RunForward(const Case& c, int over, const Parallel& parallel, InstructionSet level) {
    Forward(PrepareForward(c, over), parallel, level);
  }
  void RunBackward(const Case& c, int over, const Parallel& parallel, InstructionSet level) {
    Backward(PrepareBackward(c, over), parallel, level);
  }
};

// A size, and whether there are a bias and a shortcut.
class EverySize : public testing::TestWithParam<std::tuple<std::tuple<int, int, int>, std::pair<bool, bool>>> {};

TEST_P(EverySize, EqualsPlainLoops) {
  const auto [size, addends] = GetParam();
  const auto [batch, positions, channels] = size;
  const auto [bias, shortcut] = addends;
  for (InstructionSet level : Levels()) {
    for (Layout layout : kLayouts) {
      for (DataType type : kTypes) {
        for (Activation activation : kActivations) {
          const Case c{{batch, positions, channels, layout}, type, activation, AlphaOf(activation), bias, shortcut};
          CpuTensors t(c);
          t.RunForward(c, /*over=*/0, Serial(), level);
          CheckForward(c, t);
          t.RunBackward(c, /*over=*/0, Serial(), level);
          CheckBackward(c, t);
          if (HasFatalFailure()) return;

          CpuTensors in_place(c);
          for (int over = 1; over <= (shortcut ? 2 : 1); ++over) {
            in_place.RunForward(c, over, Backwards(8), level);
            ASSERT_TRUE(in_place.y == t.y && in_place.mean == t.mean) << c.Name() << " over " << over;
          }
          for (int over = 1; over <= (c.BackwardShortcut() ? 4 : 2); ++over) {
            in_place.RunBackward(c, over, Backwards(8), level);
            ASSERT_TRUE(in_place.dx == t.dx) << c.Name() << " over " << over;
            ASSERT_TRUE(in_place.dgain == t.dgain && in_place.dmean_scale == t.dmean_scale) << c.Name();
            ASSERT_TRUE(in_place.dbias == t.dbias && in_place.dshortcut == t.dshortcut) << c.Name();
          }
          for (const Array* a : {&t.y, &t.mean, &t.dx, &t.dgain, &t.dmean_scale, &t.dbias, &t.dshortcut, &in_place.y,
                                 &in_place.dx, &in_place.dshortcut}) {
            ASSERT_TRUE(a->BordersIntact()) << c.Name();
          }
        }
      }
    }
  }
}

constexpr std::pair<bool, bool> kNeither{false, false}, kBias{true, false}, kShortcut{false, true}, kBoth{true, true};

// Below and above a vector, a fold, a tree of rows, a block of rows, a task's channels; primes.
INSTANTIATE_TEST_SUITE_P(
    Sizes, EverySize,
    testing::Combine(testing::Values(std::make_tuple(2, 1, 1), std::make_tuple(3, 7, 1), std::make_tuple(1, 300, 2),
                                     std::make_tuple(2, 49, 3), std::make_tuple(2, 5, 15), std::make_tuple(1, 131, 16),
                                     std::make_tuple(3, 9, 17), std::make_tuple(2, 67, 33), std::make_tuple(2, 8, 48),
                                     std::make_tuple(1, 25, 64), std::make_tuple(2, 13, 101),
                                     std::make_tuple(1, 4, 513), std::make_tuple(1, 3, 1033),
                                     std::make_tuple(1, 3, 2047), std::make_tuple(2, 3, 3071)),
                     testing::Values(kNeither, kBoth)));
INSTANTIATE_TEST_SUITE_P(OneAddend, EverySize,
                         testing::Combine(testing::Values(std::make_tuple(3, 9, 17), std::make_tuple(1, 300, 2)),
                                          testing::Values(kBias, kShortcut)));

// Maps of several chunks, shared by threads and not: also where whole maps are walked one chunk after the other.
INSTANTIATE_TEST_SUITE_P(Chunks, EverySize,
                         testing::Combine(testing::Values(std::make_tuple(1, 70001, 1), std::make_tuple(1, 2113, 37),
                                                          std::make_tuple(1, 40, 3071)),
                                          testing::Values(kNeither, kBoth)));

// A y that is too large for the caches is written past them, in place it never is.
TEST(Forward, LargeNewOutputsAreThoseInPlace) {
  const size_t positions = 1000, channels = 64;
  const size_t half_of_cache = static_cast<size_t>(std::max(L3CacheBytes(), L2CacheBytes()) / 2);
  for (DataType type : kTypes) {
    const size_t sample = positions * channels * Bytes(type), batch = half_of_cache / 2 / sample + 1;
    const auto memory = [&] {  // Aligned, or nothing is streamed.
      return std::unique_ptr<char, decltype(&std::free)>(static_cast<char*>(std::aligned_alloc(64, batch * sample)),
                                                         std::free);
    };
    const auto x = memory(), y = memory();
    Array ones(ParameterType(type), channels), mean(ParameterType(type), batch * channels), mean_in_place(mean);
    for (size_t c = 0; c < channels; ++c) ones.Set(c, 1);
    for (InstructionSet level : Levels()) {
      for (Layout layout : kLayouts) {
        for (size_t i = 0; i < batch * sample / 2; ++i) {
          const uint16_t bits = static_cast<uint16_t>(0x3c00 + i * 37 % 509);  // Positive numbers of every type.
          std::memcpy(x.get() + 2 * i, &bits, 2);
        }
        const Shape shape{static_cast<int64_t>(batch), positions, channels, layout};
        ForwardArgs args{shape, type, Activation::kRelu, 0, x.get(), ones.data(), ones.data(), y.get(), mean.data()};
        ASSERT_TRUE(Forward(args, Serial(), level));
        args.y = x.get();
        args.mean = mean_in_place.data();
        ASSERT_TRUE(Forward(args, Serial(), level));
        ASSERT_EQ(std::memcmp(x.get(), y.get(), batch * sample), 0)
            << InstructionSetName(level) << " type " << static_cast<int>(type);
        ASSERT_TRUE(mean == mean_in_place);
      }
    }
  }
}

TEST(Forward, SampleDoesNotDependOnItsNeighbours) {
  for (Layout layout : kLayouts) {
    const Case many{{5, 2113, 37, layout}, DataType::kFloat, Activation::kRelu, 0, /*bias=*/true, /*shortcut=*/true};
    Case one = many;
    one.shape.batch = 1;
    CpuTensors all(many), single(one);
    for (size_t i = 0; i < single.x.size(); ++i) {
      single.x.Set(i, all.x.Get(i + 3 * single.x.size()));
      single.shortcut.Set(i, all.shortcut.Get(i + 3 * single.x.size()));
    }
    single.gain = all.gain;
    single.mean_scale = all.mean_scale;
    single.bias = all.bias;
    all.RunForward(many, false, Serial(), BestInstructionSet());
    single.RunForward(one, false, Backwards(8), BestInstructionSet());
    for (size_t i = 0; i < single.y.size(); ++i) ASSERT_EQ(single.y.Get(i), all.y.Get(i + 3 * single.y.size()));
  }
}

TEST(Backward, GroupsOfSamplesAddUp) {
  for (Layout layout : kLayouts) {
    const Case c{{201, 6, 5, layout}, DataType::kFloat, Activation::kRelu, 0, /*bias=*/true, /*shortcut=*/true};
    CpuTensors t(c);
    t.RunForward(c, false, Serial(), BestInstructionSet());
    t.RunBackward(c, 0, Backwards(3), BestInstructionSet());
    CheckForward(c, t);
    CheckBackward(c, t);
  }
}

// A pool with more threads than there are groups, and maps of several chunks.
TEST(Backward, MoreThreadsThanGroups) {
  for (Layout layout : kLayouts) {
    const Case c{{65, 32769, 1, layout}, DataType::kFloat, Activation::kRelu, 0, /*bias=*/true, /*shortcut=*/true};
    CpuTensors t(c);
    t.RunForward(c, false, Serial(), BestInstructionSet());
    t.RunBackward(c, 0, Backwards(70), BestInstructionSet());
    CheckForward(c, t);
    CheckBackward(c, t);
  }
}

// As the frameworks' bindings run it: maps that threads share, in phases of a job.
TEST(Job, SharedMaps) {
  const auto run = [](void*, const Phase* phases, int count) {
    std::vector<std::thread> pool;
    RunPhases(phases, count, 4, [&](auto help) { pool.emplace_back(std::move(help)); });
    for (std::thread& thread : pool) thread.join();
  };
  const Parallel threads = {4, nullptr, run};
  for (Layout layout : kLayouts) {
    for (const Shape& shape : {Shape{1, 1000003, 1, layout}, Shape{3, 5003, 37, layout}, Shape{2, 200003, 3, layout}}) {
      for (bool addends : {false, true}) {
        const Case c{shape, DataType::kFloat, Activation::kRelu, 0, addends, addends};
        CpuTensors alone(c), shared(c);
        alone.RunForward(c, false, Serial(), BestInstructionSet());
        alone.RunBackward(c, 0, Serial(), BestInstructionSet());
        CheckForward(c, alone);
        CheckBackward(c, alone);
        shared.RunForward(c, true, threads, BestInstructionSet());
        EXPECT_TRUE(shared.y == alone.y && shared.mean == alone.mean) << c.Name();
        shared.RunBackward(c, 1, threads, BestInstructionSet());
        EXPECT_TRUE(shared.dx == alone.dx) << c.Name();
        EXPECT_TRUE(shared.dgain == alone.dgain && shared.dmean_scale == alone.dmean_scale) << c.Name();
        EXPECT_TRUE(shared.dbias == alone.dbias && shared.dshortcut == alone.dshortcut) << c.Name();
      }
    }
  }
}

TEST(Forward, MeanOfManyLargeValues) {
  for (InstructionSet level : Levels()) {
    for (Layout layout : kLayouts) {
      const Case c{{1, 1000000, 1, layout}, DataType::kFloat, Activation::kLinear, 0};
      CpuTensors t(c);
      double sum = 0;
      for (size_t i = 0; i < t.x.size(); ++i) {
        t.x.Set(i, 1000 + t.x.Get(i));
        sum += t.x.Get(i);
      }
      t.RunForward(c, false, Serial(), level);
      EXPECT_NEAR(t.mean.Get(0), sum / 1e6, 1000 * 2 * 0x1p-23);
    }
  }
}

TEST(Forward, HalfSumsDoNotOverflow) {
  for (InstructionSet level : Levels()) {
    const Case c{{1, 1000, 3, Layout::kChannelsLast}, DataType::kHalf, Activation::kLinear, 0};
    CpuTensors t(c);
    for (size_t i = 0; i < t.x.size(); ++i) t.x.Set(i, 60000);
    t.RunForward(c, false, Serial(), level);
    EXPECT_EQ(t.mean.Get(1), HalfToDouble(0x7b53));  // The half nearest to 60000.
  }
}

TEST(Forward, HalfRoundsLikeTheStandardSays) {
  // gain * x with every exponent that matters: denormal, normal, overflowing. P = 1 and mean_scale = 0 make y = gain *
  // x.
  for (InstructionSet level : Levels()) {
    for (DataType type : {DataType::kHalf, DataType::kBfloat16}) {
      const Case c{{1, 1, 4099, Layout::kChannelsLast}, type, Activation::kLinear, 0};
      CpuTensors t(c);
      std::mt19937 random(7);
      std::uniform_real_distribution<double> exponent(-28, 17), mantissa(1, 2);
      for (size_t i = 0; i < t.x.size(); ++i) {
        t.x.Set(i, i % 2 ? 1 : -1);
        t.gain.Set(i, std::ldexp(mantissa(random), static_cast<int>(exponent(random))));
        t.mean_scale.Set(i, 0);
      }
      t.gain.Set(0, 65519);      // The last that rounds to the largest half.
      t.gain.Set(1, 65520);      // The first that rounds to infinity: a tie.
      t.gain.Set(2, 0x1.002p0);  // A tie, to even.
      t.gain.Set(3, 0x1.006p0);
      Array expected = t.y;
      for (size_t i = 0; i < t.x.size(); ++i) expected.Set(i, t.x.Get(i) * t.gain.Get(i));
      t.RunForward(c, false, Serial(), level);
      for (size_t i = 0; i < t.x.size(); ++i) ASSERT_EQ(t.y.Get(i), expected.Get(i)) << t.gain.Get(i);
    }
  }
}

TEST(Forward, NanAndInfinityGoThrough) {
  const double inf = std::numeric_limits<double>::infinity();
  for (InstructionSet level : Levels()) {
    for (Layout layout : kLayouts) {
      for (DataType type : {DataType::kFloat, DataType::kDouble}) {
        for (Activation activation : kActivations) {
          const Case c{{3, 37, 19, layout}, type, activation, AlphaOf(activation)};
          CpuTensors t(c);
          t.x.Set(c.Index(0, 11, 3), std::nan(""));
          t.x.Set(c.Index(1, 12, 4), inf);
          t.RunForward(c, false, Serial(), level);
          t.RunBackward(c, 0, Serial(), level);
          for (int64_t p = 0; p < 37; ++p) {
            EXPECT_TRUE(std::isnan(t.y.Get(c.Index(0, p, 3)))) << c.Name();
            EXPECT_FALSE(std::isnan(t.y.Get(c.Index(0, p, 4)))) << c.Name();
            EXPECT_FALSE(std::isnan(t.y.Get(c.Index(2, p, 3)))) << c.Name();
          }
          EXPECT_TRUE(std::isnan(t.mean.Get(3)));
          EXPECT_EQ(t.mean.Get(19 + 4), inf);
          EXPECT_TRUE(std::isnan(t.y.Get(c.Index(1, 12, 4)))) << c.Name();  // Infinity minus infinity.
          EXPECT_TRUE(std::isnan(t.dgain.Get(3))) << c.Name();
          EXPECT_FALSE(std::isnan(t.dgain.Get(5))) << c.Name();
        }
      }
    }
  }
}

TEST(Bfloat16, NanOfAnyBitsStaysNan) {
  // Rounding these bits by adding to them would carry into the sign.
  const uint32_t bits = 0x7fffffff;
  float nan;
  std::memcpy(&nan, &bits, 4);
  for (InstructionSet level : Levels()) {
    for (Layout layout : kLayouts) {
      const Case c{{2, 37, 19, layout}, DataType::kBfloat16, Activation::kLinear, 0};
      CpuTensors t(c);
      std::memcpy(t.gain.data() + 4 * 3, &nan, 4);
      std::memcpy(t.mean_scale.data() + 4 * 5, &nan, 4);
      std::memcpy(t.dmean.data() + 4 * 7, &nan, 4);
      t.RunForward(c, false, Serial(), level);
      t.RunBackward(c, 0, Serial(), level);
      for (int64_t p = 0; p < 37; ++p) {
        EXPECT_TRUE(std::isnan(t.y.Get(c.Index(0, p, 3)))) << c.Name();
        EXPECT_TRUE(std::isnan(t.y.Get(c.Index(1, p, 5)))) << c.Name();
        EXPECT_TRUE(std::isnan(t.dx.Get(c.Index(0, p, 3)))) << c.Name();
        EXPECT_TRUE(std::isnan(t.dx.Get(c.Index(1, p, 5)))) << c.Name();
        EXPECT_TRUE(std::isnan(t.dx.Get(c.Index(0, p, 7)))) << c.Name();
        EXPECT_FALSE(std::isnan(t.dx.Get(c.Index(1, p, 7)))) << c.Name();
      }
    }
  }
}

TEST(Backward, InfiniteGradientIsSeenEvenWhereReluIsDead) {
  for (InstructionSet level : Levels()) {
    const Case c{{2, 37, 19, Layout::kChannelsLast}, DataType::kFloat, Activation::kRelu, 0};
    CpuTensors t(c);
    t.RunForward(c, false, Serial(), level);
    size_t dead = 0;
    while (t.y.Get(dead) > 0) ++dead;
    t.dy.Set(dead, std::numeric_limits<double>::infinity());
    t.RunBackward(c, 0, Serial(), level);
    EXPECT_FALSE(std::isfinite(t.dx.Get(dead)));
    EXPECT_FALSE(std::isfinite(t.dgain.Get(dead % 19)));
  }
}

// Where the slope is 0, what was added does not count: y tells nothing of it.
TEST(Backward, InfiniteAddendsAreNotSeenWhereTheActivationIsFlat) {
  for (InstructionSet level : Levels()) {
    for (Layout layout : kLayouts) {
      for (DataType type : kTypes) {
        for (Activation activation : {Activation::kRelu, Activation::kRelu6, Activation::kElu}) {
          // An alpha that every type holds: or elu is not quite flat there.
          const Case c{{2, 37, 19, layout}, type, activation, /*alpha=*/1, /*bias=*/true, /*shortcut=*/true};
          CpuTensors t(c);
          const size_t dead = c.Index(1, 7, 3);
          t.shortcut.Set(dead, -1000);  // The same to the activation as minus infinity.
          t.bias.Set(5, -1000);
          t.RunForward(c, 0, Serial(), level);
          t.RunBackward(c, 0, Serial(), level);
          CpuTensors infinite(c);
          infinite.shortcut.Set(dead, -std::numeric_limits<double>::infinity());
          infinite.bias.Set(5, -std::numeric_limits<double>::infinity());
          infinite.RunForward(c, 0, Serial(), level);
          infinite.RunBackward(c, 0, Serial(), level);
          EXPECT_TRUE(infinite.y == t.y && infinite.dx == t.dx && infinite.dgain == t.dgain) << c.Name();
          EXPECT_TRUE(infinite.dshortcut == t.dshortcut && infinite.dbias == t.dbias) << c.Name();
        }
      }
    }
  }
}

// Absent and zero are the same numbers, by other loops.
TEST(Addends, ZerosChangeNoValue) {
  for (InstructionSet level : Levels()) {
    for (Activation activation : kActivations) {
      const Case absent{{2, 37, 19, Layout::kChannelsLast}, DataType::kFloat, activation, AlphaOf(activation)};
      Case zero = absent;
      zero.bias = zero.shortcut = true;
      CpuTensors a(absent), b(zero);
      for (size_t i = 0; i < b.bias.size(); ++i) b.bias.Set(i, 0);
      for (size_t i = 0; i < b.shortcut.size(); ++i) b.shortcut.Set(i, 0);
      a.RunForward(absent, 0, Serial(), level);
      a.RunBackward(absent, 0, Serial(), level);
      b.RunForward(zero, 0, Serial(), level);
      b.RunBackward(zero, 0, Serial(), level);
      for (size_t i = 0; i < a.y.size(); ++i) {
        ASSERT_EQ(a.y.Get(i), b.y.Get(i)) << zero.Name();
        ASSERT_EQ(a.dx.Get(i), b.dx.Get(i)) << zero.Name();
      }
      for (size_t i = 0; i < a.dgain.size(); ++i) ASSERT_EQ(a.dgain.Get(i), b.dgain.Get(i)) << zero.Name();
    }
  }
}

TEST(Backward, ZeroGainGivesNumbers) {
  for (InstructionSet level : Levels()) {
    for (Activation activation : kActivations) {
      for (bool addends : {false, true}) {
        const Case c{
            {2, 37, 19, Layout::kChannelsLast}, DataType::kFloat, activation, AlphaOf(activation), addends, addends};
        CpuTensors t(c);
        t.gain.Set(5, 0);
        t.gain.Set(6, 0x1p-149);
        t.RunForward(c, false, Serial(), level);
        t.RunBackward(c, 0, Serial(), level);
        if (activation != Activation::kLinear) {
          EXPECT_EQ(t.dgain.Get(5), 0) << c.Name();
        } else {
          EXPECT_NE(t.dgain.Get(5), 0);
        }
        if (!addends) {
          EXPECT_TRUE(std::isfinite(t.dgain.Get(6))) << c.Name();
        }
        EXPECT_EQ(t.dmean_scale.Get(5), 0);
      }
    }
  }
}

TEST(Backward, EluAtItsFloor) {
  for (InstructionSet level : Levels()) {
    for (DataType type : kTypes) {
      const Case c{{1, 40, 2, Layout::kChannelsLast}, type, Activation::kElu, 0.3};
      CpuTensors t(c);
      for (size_t i = 0; i < t.x.size(); ++i) t.x.Set(i, i % 4 < 2 ? -200 : 200);
      t.RunForward(c, false, Serial(), level);
      t.RunBackward(c, 0, Serial(), level);
      EXPECT_TRUE(std::isfinite(t.dgain.Get(0)) && std::isfinite(t.dgain.Get(1))) << c.Name();
    }
  }
}

TEST(Forward, DenormalsAreKeptAndTheControlRegisterIsRestored) {
  const Case c{{1, 64, 16, Layout::kChannelsLast}, DataType::kFloat, Activation::kRelu, 0};
  CpuTensors t(c);
  for (size_t i = 0; i < t.x.size(); ++i) t.x.Set(i, (i / 16) % 2 ? 0x1p-140 : 0);
  t.gain.Set(1, 1);
  t.mean_scale.Set(1, 1);
  t.RunForward(c, false, Serial(), BestInstructionSet());
  EXPECT_EQ(t.y.Get(17), 0x1p-141);
#if defined(__x86_64__)
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040);
  t.y = t.x;
  t.RunForward(c, false, Serial(), BestInstructionSet());
  const unsigned after = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before);
  EXPECT_EQ(t.y.Get(17), 0x1p-141);
  EXPECT_EQ(after & 0x8040u, 0x8040u);
#endif
}

TEST(Empty, BatchAndChannels) {
  for (Layout layout : kLayouts) {
    const Case no_samples{{0, 5, 3, layout}, DataType::kFloat, Activation::kRelu, 0, /*bias=*/true, /*shortcut=*/true};
    CpuTensors t(no_samples);
    t.RunForward(no_samples, false, Serial(), BestInstructionSet());
    t.RunBackward(no_samples, 0, Serial(), BestInstructionSet());
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(t.dgain.Get(i), 0);
      EXPECT_EQ(t.dmean_scale.Get(i), 0);
      EXPECT_EQ(t.dbias.Get(i), 0);
    }
    const Case no_channels{{2, 5, 0, layout}, DataType::kFloat, Activation::kRelu, 0};
    CpuTensors none(no_channels);
    none.RunForward(no_channels, false, Serial(), BestInstructionSet());
    none.RunBackward(no_channels, 0, Serial(), BestInstructionSet());
    EXPECT_TRUE(none.y.BordersIntact() && none.dgain.BordersIntact());
  }
}

TEST(Alpha, ZeroActsAsRelu) {
  for (Activation activation : {Activation::kLeakyRelu, Activation::kElu}) {
    const Case with_alpha{{2, 37, 19, Layout::kChannelsLast}, DataType::kFloat, activation, 0};
    Case relu = with_alpha;
    relu.activation = Activation::kRelu;
    CpuTensors a(with_alpha), b(relu);
    a.RunForward(with_alpha, false, Serial(), BestInstructionSet());
    a.RunBackward(with_alpha, 0, Serial(), BestInstructionSet());
    b.RunForward(relu, false, Serial(), BestInstructionSet());
    b.RunBackward(relu, 0, Serial(), BestInstructionSet());
    EXPECT_TRUE(a.y == b.y && a.dx == b.dx && a.dgain == b.dgain);
  }
}

TEST(Cpu, NamesAndCache) {
  EXPECT_STREQ(InstructionSetName(InstructionSet::kX86_64_V3), "x86-64-v3");
  EXPECT_GT(L2CacheBytes(), 16 * 1024);
  EXPECT_GE(L3CacheBytes(), 0);
}

}  // namespace
}  // namespace core
}  // namespace tf_agc
