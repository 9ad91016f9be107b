// More elements than 32 bits count, on machines that do not have the memory: one block of it, mapped again and again.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cc/core/agc.h"
#include "cc/core/agc_test_util.h"
#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace {

constexpr int64_t kBlockBytes = int64_t{64} << 20;

// Virtual memory of `bytes` bytes and whatever is missing to a whole block; all blocks are the same physical one. What
// lies behind it and before it cannot be touched, so an index that overflowed ends the test.
class Repeated {
 public:
  explicit Repeated(int64_t bytes) : blocks_((bytes + kBlockBytes - 1) / kBlockBytes) {
    const int file = memfd_create("tf_agc", 0);
    if (file < 0 || ftruncate(file, kBlockBytes) != 0) return;
    const size_t all = static_cast<size_t>((blocks_ + 2) * kBlockBytes);
    void* reserved = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved != MAP_FAILED) {
      reserved_ = static_cast<char*>(reserved);
      ok_ = true;
      for (int64_t block = 0; block < blocks_ && ok_; ++block) {
        char* at = data() + block * kBlockBytes;
        ok_ = mmap(at, static_cast<size_t>(kBlockBytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == at;
      }
    }
    close(file);
  }
  Repeated(const Repeated&) = delete;
  Repeated& operator=(const Repeated&) = delete;
  ~Repeated() {
    if (reserved_ != nullptr) munmap(reserved_, static_cast<size_t>((blocks_ + 2) * kBlockBytes));
  }

  bool ok() const { return ok_; }
  char* data() const { return reserved_ + kBlockBytes; }

 private:
  int64_t blocks_;
  char* reserved_ = nullptr;
  bool ok_ = false;
};

// `value`, as bits of a half, where the index is divisible by 4, else 0.
void FillQuarter(const Repeated& memory, uint16_t value) {
  auto* halves = reinterpret_cast<uint16_t*>(memory.data());
  for (int64_t i = 0; i < kBlockBytes / 2; ++i) halves[i] = i % 4 == 0 ? value : 0;
}

struct Sizes {
  int64_t batch, positions, channels;
};

// As if for two threads, but of all tasks the first and the last one only: a test of what is computed with sizes, in a
// moment.
Parallel FirstAndLast() {
  auto run = [](void*, const Phase* phases, int count) {
    for (const Phase* phase = phases; phase < phases + count; ++phase) {
      phase->task(phase->context, 0);
      if (phase->tasks > 1) phase->task(phase->context, phase->tasks - 1);
    }
  };
  return {2, nullptr, run};
}

// Looks at the first and the last elements. With all = false, `parallel` leaves out the tasks between them.
void CheckEnds(const Sizes& sizes, Layout layout, const Parallel& parallel, bool all) {
  constexpr int64_t kEnd = 400;  // Within the first task, and within the last.
  const int64_t elements = sizes.batch * sizes.positions * sizes.channels;
  ASSERT_GT(elements, int64_t{1} << 32);
  const Repeated x(2 * elements), y(2 * elements), kept(2 * elements), dx(2 * elements);
  ASSERT_TRUE(x.ok() && y.ok() && kept.ok() && dx.ok());
  FillQuarter(x, 0x3c00);  // 1
  const Case maps{{sizes.batch, sizes.positions, sizes.channels, layout}, DataType::kHalf, Activation::kRelu, 0};
  const std::vector<float> gain(maps.channels(), 2), mean_scale(maps.channels(), 1);
  std::vector<float> mean(maps.maps()), dmean(maps.maps()), dgain(maps.channels()), dmean_scale(maps.channels());
  Forward({maps.shape, maps.type, maps.activation, 0, x.data(), gain.data(), mean_scale.data(), y.data(), mean.data()},
          parallel);
  // dy is y, as it comes from all tasks.
  FillQuarter(kept, 0x3e00);  // 1.5
  Backward({maps.shape, maps.type, maps.activation, 0, kept.data(), dmean.data(), kept.data(), mean.data(), gain.data(),
            mean_scale.data(), dx.data(), dgain.data(), dmean_scale.data()},
           parallel);

  // A quarter of every map is 1. Of a single map, two chunks of very many are nothing.
  const double quarter = all || maps.maps() > 1 ? 0.25 : 0;
  auto half_at = [](const Repeated& memory, int64_t i) {
    return HalfToDouble(reinterpret_cast<const uint16_t*>(memory.data())[i]);
  };
  for (int64_t from_end = 0; from_end < 2 * kEnd; ++from_end) {
    const int64_t i = from_end < kEnd ? from_end : elements - 1 - (from_end - kEnd);
    const double z = 2 * ((i % 4 == 0) - quarter);
    ASSERT_NEAR(half_at(y, i), std::max(z, 0.0), 1e-3) << maps.Name() << " " << i;
    const double dz = i % 4 == 0 ? 1.5 : 0;
    ASSERT_NEAR(half_at(dx, i), 2 * (dz - quarter * 1.5), 2e-3) << maps.Name() << " " << i;
  }
  for (size_t map : {size_t{0}, maps.maps() - 1}) ASSERT_NEAR(mean[map], quarter, 1e-4) << maps.Name();
  if (!all) return;
  const double ones = static_cast<double>(sizes.batch) * static_cast<double>(sizes.positions) / 4;
  for (size_t channel = 0; channel < maps.channels(); ++channel) {
    // The sums of dz * (x - mean) and of -gain * mean * dz.
    ASSERT_NEAR(dgain[channel], ones * 1.5 * 0.75, 1e-6 * ones) << maps.Name();
    ASSERT_NEAR(dmean_scale[channel], -2 * 0.25 * ones * 1.5, 1e-6 * ones) << maps.Name();
  }
}

class Large : public testing::TestWithParam<Sizes> {};

TEST_P(Large, FirstAndLastTask) {
  for (Layout layout : kLayouts) CheckEnds(GetParam(), layout, FirstAndLast(), /*all=*/false);
}

// Minutes: by hand, with --gtest_also_run_disabled_tests.
TEST_P(Large, DISABLED_EveryTask) {
  for (Layout layout : kLayouts) CheckEnds(GetParam(), layout, Backwards(2), /*all=*/true);
}

// Large in positions, in samples, in channels. Odd numbers of channels, and maps of 4 n positions, so that a quarter of
// every map is 1 in both layouts.
INSTANTIATE_TEST_SUITE_P(Sizes, Large,
                         testing::Values(Sizes{1, (int64_t{1} << 32) + 20004, 1},
                                         Sizes{(int64_t{1} << 17) + 3, 1000, 33},
                                         Sizes{1, 1024, (int64_t{1} << 22) + 1}));

TEST(Forward, MeanOfEqualValues) {
  // 10^8 of them: sums in float32 would stop at 2^24.
  constexpr int64_t kCount = 100000000;
  const Repeated memory(4 * kCount);
  ASSERT_TRUE(memory.ok());
  auto* floats = reinterpret_cast<float*>(memory.data());
  std::fill(floats, floats + kBlockBytes / 4, 0.1f);
  for (Layout layout : kLayouts) {
    for (InstructionSet level : Levels()) {
      const Repeated y(4 * kCount);
      ASSERT_TRUE(y.ok());
      const float gain = 1, mean_scale = 1;
      float mean = 0;
      Forward({{1, kCount, 1, layout},
               DataType::kFloat,
               Activation::kLinear,
               0,
               floats,
               &gain,
               &mean_scale,
               y.data(),
               &mean},
              Backwards(2), level);
      EXPECT_NEAR(mean, 0.1f, 0x1p-27);  // One unit in the last place.
      EXPECT_NEAR(reinterpret_cast<const float*>(y.data())[kCount - 1], 0, 0x1p-27);
    }
  }
}

}  // namespace
}  // namespace core
}  // namespace tf_agc
