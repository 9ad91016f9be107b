// The plan's promises, for real devices and made-up ones, over many sizes: properties of the layout, every element
// taken once, and indices of tensors that no machine of ours could hold.

#include "cc/core/cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

constexpr Device kDevices[] = {
    {1, 40, 64 << 10, 64 << 10, 4 << 20},       // T4
    {1, 108, 163 << 10, 164 << 10, 40 << 20},   // A100
    {1, 84, 99 << 10, 100 << 10, 6 << 20},      // A40
    {8, 132, 227 << 10, 228 << 10, 50 << 20},   // H100
    {8, 148, 227 << 10, 228 << 10, 126 << 20},  // B200
    {2, 16, 227 << 10, 228 << 10, 6 << 20},     // A part of a GPU.
    {8, 2, 4 << 10, 9 << 10, 16 << 10},         // Nothing fits.
};

struct CallOnDevice : Call {
  Device device;

  Plan MakePlan() const { return cuda::MakePlan(*this, device); }
  std::string Name() const {
    return std::string(pass == Pass::kForward ? "forward" : "backward") + " N=" + std::to_string(shape.batch) +
           " P=" + std::to_string(shape.positions) + " C=" + std::to_string(shape.channels) +
           (shape.layout == Layout::kChannelsLast ? " channels_last" : " channels_first") +
           " type=" + std::to_string(static_cast<int>(data_type)) +
           " activation=" + std::to_string(static_cast<int>(activation)) + (aligned ? " aligned" : "") +
           (has_bias ? " bias" : "") + (has_shortcut ? " shortcut" : "") + " clusters of " +
           std::to_string(device.largest_cluster) + " shared=" + std::to_string(device.shared_bytes_per_block);
  }
};

// Calls of sizes up to `most`, spread over their orders of magnitude.
class Calls {
 public:
  explicit Calls(int64_t most) : most_(static_cast<double>(most)) {}

  CallOnDevice Next() {
    CallOnDevice call;
    call.pass = Pick({Pass::kForward, Pass::kBackward});
    call.shape.layout = Pick({Layout::kChannelsLast, Layout::kChannelsFirst});
    double left = most_;
    for (int64_t* size : Order(&call.shape)) {
      *size = static_cast<int64_t>(std::pow(left, std::uniform_real_distribution<double>(0, 1)(random_)));
      if (random_() % 2) *size = std::max<int64_t>(*size / 8 * 8, 1);
      left /= static_cast<double>(*size);
    }
    call.data_type = Pick({DataType::kHalf, DataType::kBfloat16, DataType::kFloat, DataType::kDouble});
    call.activation = Pick({Activation::kLinear, Activation::kRelu, Activation::kElu});
    call.aligned = random_() % 2 == 0;
    call.has_bias = random_() % 2 == 0;
    call.has_shortcut = random_() % 2 == 0;
    call.device = kDevices[random_() % (sizeof(kDevices) / sizeof(kDevices[0]))];
    return call;
  }

 private:
  template <class T>
  T Pick(std::initializer_list<T> from) {
    return from.begin()[random_() % from.size()];
  }
  std::vector<int64_t*> Order(Shape* shape) {
    std::vector<int64_t*> sizes = {&shape->batch, &shape->positions, &shape->channels};
    std::shuffle(sizes.begin(), sizes.end(), random_);
    return sizes;
  }

  double most_;
  std::mt19937 random_{7};
};

bool IsPowerOfTwo(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

void CheckPlan(const CallOnDevice& call, const Plan& plan) {
  const Walk& walk = plan.walk;
  const int threads = walk.columns * walk.lanes;
  EXPECT_TRUE(IsPowerOfTwo(walk.columns) && IsPowerOfTwo(walk.lanes));
  EXPECT_TRUE(threads % 32 == 0 && threads <= kMaxThreads) << threads;
  EXPECT_EQ(LanesPerWarp(walk) * WarpsPerColumn(walk), walk.lanes);

  // Every step is in exactly one block's range; an int counts what a thread takes of it.
  EXPECT_GE(walk.blocks * walk.block_steps, walk.steps);
  EXPECT_LE(walk.block_steps, int64_t{UINT32_MAX});
  EXPECT_LE(walk.block_steps / walk.lanes, int64_t{INT32_MAX});
  const bool vector_of_channels = walk.vector > 1 && walk.layout == Layout::kChannelsLast;
  EXPECT_EQ(walk.steps * (vector_of_channels ? 1 : walk.vector), call.shape.positions);

  // Every map is in exactly one tile.
  const int64_t maps = call.shape.batch * call.shape.channels;
  const int64_t last = walk.tiles - 1;
  EXPECT_EQ(MapOf(walk, 0, 0), 0);
  EXPECT_GE(MapOf(walk, last, 0), 0);
  int64_t last_map = -1;
  for (int i = 0; i < TileMaps(walk); ++i) last_map = std::max(last_map, MapOf(walk, last, i));
  EXPECT_EQ(last_map, maps - 1);

  // What a device takes.
  EXPECT_GE(plan.tiles_per_launch, 1);
  EXPECT_LE(plan.tiles_per_launch * walk.blocks, int64_t{INT32_MAX});
  EXPECT_GE(plan.shared_bytes, 1);
  EXPECT_LE(plan.shared_bytes, std::max<int64_t>(call.device.shared_bytes_per_block, plan.on_chip ? 0 : 48 << 10));
  if (plan.on_chip) {
    EXPECT_TRUE(IsPowerOfTwo(walk.blocks));
    EXPECT_LE(walk.blocks, call.device.largest_cluster);
    // The blocks finish every map, one block each, and their sums take no more room than one block's of all maps.
    EXPECT_TRUE(IsPowerOfTwo(MapsOfBlock(walk)));
    EXPECT_EQ(MapsOfBlock(walk) * walk.blocks, std::max(TileMaps(walk), walk.blocks));
    EXPECT_LE((walk.block_steps + walk.lanes - 1) / walk.lanes, kFloatSteps);
    EXPECT_EQ(plan.block_sums, 0);
  } else {
    EXPECT_EQ(plan.block_sums, plan.tiles_per_launch * walk.blocks * Sums(call.pass) * TileMaps(walk));
  }
  const bool of_samples = call.pass == Pass::kBackward && (call.shape.batch > 1 || call.has_bias);
  EXPECT_EQ(plan.sample_sums, of_samples ? (call.has_bias ? 3 : 2) * maps : 0);
}

TEST(Plan, KeepsItsPromises) {
  for (int64_t most : {int64_t{1} << 10, int64_t{1} << 20, int64_t{1} << 37}) {
    Calls calls(most);
    for (int i = 0; i < 20000 && !testing::Test::HasFailure(); ++i) {
      const CallOnDevice call = calls.Next();
      SCOPED_TRACE(call.Name());
      CheckPlan(call, call.MakePlan());
    }
  }
}

// What is absent takes no memory, and what is there takes no more than it needs.
TEST(Plan, BiasAndShortcutTakeTheirOwnMemoryAlone) {
  Calls calls(int64_t{1} << 24);
  for (int i = 0; i < 20000 && !testing::Test::HasFailure(); ++i) {
    CallOnDevice call = calls.Next();
    SCOPED_TRACE(call.Name());
    const Plan with = call.MakePlan();
    const bool forward = call.pass == Pass::kForward, addends = call.has_bias || call.has_shortcut;
    const bool dbias = !forward && call.has_bias;
    call.has_bias = call.has_shortcut = false;
    const Plan without = call.MakePlan();
    const int64_t maps = call.shape.batch * call.shape.channels;
    EXPECT_EQ(with.sample_sums, dbias ? 3 * maps : without.sample_sums);
    if (!forward) {
      // Bias and shortcut are in none of the shared memory, and the order of sums is the same.
      EXPECT_EQ(with.on_chip, without.on_chip);
      EXPECT_EQ(with.shared_bytes, without.shared_bytes);
      EXPECT_EQ(with.walk.lanes, without.walk.lanes);
      EXPECT_EQ(with.walk.block_steps, without.walk.block_steps);
      EXPECT_LE(with.block_sums, without.block_sums);  // A shortcut leaves less of the cache to the other maps.
    } else if (with.walk.columns == without.walk.columns && with.walk.blocks == without.walk.blocks) {
      EXPECT_EQ(with.shared_bytes > without.shared_bytes, addends);
    }
  }
}

TEST(Plan, OrderOfSumsDoesNotDependOnTheBatch) {
  Calls calls(int64_t{1} << 24);
  for (int i = 0; i < 20000 && !testing::Test::HasFailure(); ++i) {
    CallOnDevice call = calls.Next();
    SCOPED_TRACE(call.Name());
    const Plan many = call.MakePlan();
    call.shape.batch = 1;
    const Plan one = call.MakePlan();
    EXPECT_EQ(one.on_chip, many.on_chip);
    EXPECT_EQ(one.walk.vector, many.walk.vector);
    EXPECT_EQ(one.walk.lanes, many.walk.lanes);
    EXPECT_EQ(one.walk.blocks, many.walk.blocks);
    EXPECT_EQ(one.walk.block_steps, many.walk.block_steps);
  }
}

// As the kernels' threads walk.
TEST(Walk, TakesEveryElementOnce) {
  Calls calls(2000);
  for (int i = 0; i < 2000 && !testing::Test::HasFailure(); ++i) {
    const CallOnDevice call = calls.Next();
    SCOPED_TRACE(call.Name());
    const Walk walk = call.MakePlan().walk;
    const int maps_of_step = walk.layout == Layout::kChannelsLast ? walk.vector : 1;
    std::vector<int> taken(static_cast<size_t>(call.shape.batch * call.shape.positions * call.shape.channels));
    for (int64_t tile = 0; tile < walk.tiles; ++tile) {
      for (int column = 0; column < walk.columns; ++column) {
        const int64_t map = MapOf(walk, tile, column * maps_of_step);
        if (map < 0) continue;
        for (int64_t step = 0; step < walk.steps; ++step) {
          const int64_t element = FirstElement(walk, map) + step * StepElements(walk);
          ASSERT_TRUE(element >= 0 && element + walk.vector <= static_cast<int64_t>(taken.size()));
          if (walk.vector > 1) {
            ASSERT_EQ(element % walk.vector, 0) << "not aligned";
          }
          for (int k = 0; k < walk.vector; ++k) ++taken[static_cast<size_t>(element + k)];
        }
      }
    }
    for (int count : taken) ASSERT_EQ(count, 1);
  }
}

TEST(Walk, ReachesTheLastElementOfHugeTensors) {
  const Shape shapes[] = {{1, int64_t{5} << 32, 1, Layout::kChannelsLast},
                          {int64_t{5} << 32, 1, 1, Layout::kChannelsFirst},
                          {1, 1, int64_t{5} << 32, Layout::kChannelsFirst},
                          {3, 224 * 224, 50000, Layout::kChannelsLast},
                          {3, 224 * 224, 50000, Layout::kChannelsFirst},
                          {100000, 49, 2048, Layout::kChannelsLast},
                          {100000, 49, 2048, Layout::kChannelsFirst},
                          {1, (int64_t{1} << 33) + 1, 3, Layout::kChannelsLast},
                          {1, (int64_t{1} << 33) + 1, 3, Layout::kChannelsFirst}};
  for (const Shape& shape : shapes) {
    for (Pass pass : {Pass::kForward, Pass::kBackward}) {
      for (const Device& device : kDevices) {
        const CallOnDevice call{{pass, shape, DataType::kBfloat16, Activation::kRelu, true, true, true}, device};
        SCOPED_TRACE(call.Name());
        const Plan plan = call.MakePlan();
        CheckPlan(call, plan);
        const int64_t maps = shape.batch * shape.channels;
        const int64_t last_step = (plan.walk.steps - 1) * StepElements(plan.walk);
        const int64_t elements = maps * shape.positions;
        // The step of the last map's last position: channels_last, the vector that ends with the last channel.
        const bool last = plan.walk.layout == Layout::kChannelsLast;
        const int64_t first_map = last ? maps - plan.walk.vector : maps - 1;
        EXPECT_EQ(FirstElement(plan.walk, first_map) + last_step + plan.walk.vector, elements);
      }
    }
  }
}

TEST(CapabilityOfCode, IsTheNewestThatTheDeviceRuns) {
  EXPECT_EQ(CapabilityOfCode({75, 80, 90}, 86), 80);
  EXPECT_EQ(CapabilityOfCode({75, 80, 90}, 90), 90);
  EXPECT_EQ(CapabilityOfCode({75, 80, 90}, 120), 90);
  EXPECT_EQ(CapabilityOfCode({75, 80}, 90), 80);  // From PTX: no clusters.
  EXPECT_EQ(CapabilityOfCode({90}, 80), 0);
}

// ---- The rule, for calls whose plan was worked out by hand ----

constexpr Device kHopper = kDevices[3];

Plan Bfloat16Forward(const Shape& shape, const Device& device, bool aligned = true) {
  return MakePlan({Pass::kForward, shape, DataType::kBfloat16, Activation::kRelu, aligned, false, false}, device);
}

TEST(Rule, SixteenBytesWhereTheyDivideEveryRow) {
  EXPECT_EQ(Bfloat16Forward({8, 49, 64, Layout::kChannelsLast}, kHopper).walk.vector, 8);
  EXPECT_EQ(Bfloat16Forward({8, 49, 64, Layout::kChannelsLast}, kHopper, /*aligned=*/false).walk.vector, 1);
  EXPECT_EQ(Bfloat16Forward({8, 49, 60, Layout::kChannelsLast}, kHopper).walk.vector, 1);
  EXPECT_EQ(Bfloat16Forward({8, 49, 64, Layout::kChannelsFirst}, kHopper).walk.vector, 1);
  EXPECT_EQ(Bfloat16Forward({8, 56, 3, Layout::kChannelsFirst}, kHopper).walk.vector, 8);
}

TEST(Rule, OneChannelAndOnePosition) {
  EXPECT_EQ(Bfloat16Forward({8, 64, 1, Layout::kChannelsLast}, kHopper).walk.layout, Layout::kChannelsFirst);
  EXPECT_EQ(Bfloat16Forward({8, 1, 64, Layout::kChannelsFirst}, kHopper).walk.layout, Layout::kChannelsLast);
}

TEST(Rule, CacheLinesWhereTwoBlocksShare) {
  struct {
    Shape shape;
    int64_t segment_bytes;
    int blocks;
    int sharing;
  } const cases[] = {
      // Positions times 128 bytes over the blocks: 49 KiB each, and the sums.
      {{32, 56 * 56, 64, Layout::kChannelsLast}, 128, 8, 3},
      {{32, 56 * 56, 256, Layout::kChannelsLast}, 128, 8, 3},
      {{32, 28 * 28, 512, Layout::kChannelsLast}, 128, 2, 3},
      {{32, 64 * 64, 256, Layout::kChannelsLast}, 128, 8, 3},
      {{32, 72 * 72, 256, Layout::kChannelsLast}, 128, 8, 2},
      // 196 KiB each with 128 bytes.
      {{32, 112 * 112, 64, Layout::kChannelsLast}, 64, 8, 2},
  };
  for (const auto& c : cases) {
    for (Pass pass : {Pass::kForward, Pass::kBackward}) {
      const CallOnDevice call{{pass, c.shape, DataType::kBfloat16, Activation::kRelu, true, false, false}, kHopper};
      SCOPED_TRACE(call.Name());
      const Plan plan = call.MakePlan();
      ASSERT_TRUE(plan.on_chip);
      EXPECT_EQ(plan.walk.columns * plan.walk.vector * 2, c.segment_bytes);
      EXPECT_EQ(plan.walk.blocks, c.blocks);
      EXPECT_LE(plan.shared_bytes, (228 << 10) / c.sharing - 1024);
      EXPECT_GT(plan.shared_bytes, (228 << 10) / (c.sharing + 1) - 1024);
    }
  }
}

TEST(Rule, SmallestClusterThatLetsThreeBlocksShare) {
  EXPECT_EQ(Bfloat16Forward({32, 14 * 14, 64, Layout::kChannelsLast}, kHopper).walk.blocks, 1);
  EXPECT_EQ(Bfloat16Forward({32, 24 * 24, 64, Layout::kChannelsLast}, kHopper).walk.blocks, 2);
}

// 98 KiB and the sums fit half a multiprocessor, and not a third.
TEST(Rule, TwoBlocksWhereRegistersAllowNoThird) {
  Call call{};
  call.pass = Pass::kBackward;
  call.shape = {32, 28 * 28, 64, Layout::kChannelsLast};
  call.data_type = DataType::kBfloat16;
  call.aligned = true;
  call.activation = Activation::kRelu6;
  EXPECT_EQ(MakePlan(call, kHopper).walk.blocks, 1);
  call.activation = Activation::kRelu;
  EXPECT_EQ(MakePlan(call, kHopper).walk.blocks, 2);
}

TEST(Rule, SmallerClustersOnAPartOfAGpu) {
  const Device part = kDevices[5];
  const Plan plan = Bfloat16Forward({32, 28 * 28, 512, Layout::kChannelsLast}, part);
  EXPECT_TRUE(plan.on_chip);
  EXPECT_EQ(plan.walk.blocks, 2);
  const Plan large = Bfloat16Forward({32, 56 * 56, 256, Layout::kChannelsLast}, part);
  EXPECT_TRUE(large.on_chip);
  EXPECT_EQ(large.walk.blocks, 2);
  EXPECT_EQ(large.walk.columns * large.walk.vector * 2, 64);
}

TEST(Trial, OverridesTheRule) {
  const Shape shape = {32, 56 * 56, 256, Layout::kChannelsLast};
  Device device = kHopper;
  EXPECT_EQ(Describe(Bfloat16Forward(shape, device), DataType::kBfloat16),
            "on chip: clusters of 8 blocks, 256 threads, 58 KiB each, 128 bytes wide");
  device.trial = {64, 4, 0, 1};
  EXPECT_EQ(Describe(Bfloat16Forward(shape, device), DataType::kBfloat16),
            "on chip: clusters of 4 blocks, 256 threads, 55 KiB each, 64 bytes wide");
  const CallOnDevice backward{{Pass::kBackward, shape, DataType::kBfloat16, Activation::kRelu, true, false, false},
                              device};
  EXPECT_TRUE(backward.MakePlan().prefetch);
  device.trial = {128, 4, 1, 0};
  EXPECT_EQ(Bfloat16Forward(shape, device).walk.columns, 8);
  EXPECT_EQ(Bfloat16Forward(shape, device).walk.blocks, 4);
  // What does not fit is not on chip.
  device.trial = {128, 1, 0, 0};
  EXPECT_EQ(Describe(Bfloat16Forward(shape, device), DataType::kBfloat16),
            "two launches: 7 blocks a tile, 256 threads, 6 KiB each, 128 bytes wide");
}

TEST(Rule, TwoLaunchesOfHalfTheL2Cache) {
  // Without clusters, even 32 bytes a row are 392 KiB; a tile of 128 bytes a row has 1568.
  const Plan plan = Bfloat16Forward({32, 112 * 112, 64, Layout::kChannelsLast}, kDevices[1]);
  EXPECT_FALSE(plan.on_chip);
  EXPECT_EQ(plan.walk.tiles, 32);
  EXPECT_EQ(plan.tiles_per_launch, 20 * 1024 / 1568);
}

TEST(Rule, SmallBatchesTakeNarrowTiles) {
  const Plan one = Bfloat16Forward({1, 14 * 14, 1024, Layout::kChannelsLast}, kHopper);
  const Plan many = Bfloat16Forward({256, 14 * 14, 1024, Layout::kChannelsLast}, kHopper);
  EXPECT_LT(one.walk.columns, many.walk.columns);
  // One column in several warps cannot be narrowed.
  const Plan rows = Bfloat16Forward({1, 200 * 200, 3, Layout::kChannelsFirst}, kHopper);
  EXPECT_EQ(rows.walk.columns, 1);
  EXPECT_EQ(rows.walk.tiles, 3);
}

}  // namespace
}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
