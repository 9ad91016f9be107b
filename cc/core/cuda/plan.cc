// The rule of plan.h. The numbers were chosen on paper for Hopper's 228 KiB of shared memory, and are not tuned on a
// GPU yet; the results do not depend on them beyond rounding.

#include "cc/core/cuda/plan.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cc/core/scheduling.h"

namespace tf_agc {
namespace core {
namespace cuda {
namespace {

constexpr int kAccessBytes = 16;  // The widest load of one thread.
constexpr int kWarp = 32;
constexpr int64_t kReservedBytes = 1024;  // Shared memory that the driver keeps of each block.
constexpr int64_t kMaxGridBlocks = 0x7fffffff;

// Bytes of a row that a channels_last tile takes. A cache line is 128 bytes in four sectors; beyond 512 a wider tile
// gives no better access, and a narrower one gives more blocks.
constexpr int64_t kSectorBytes = 32, kLeastSegmentBytes = 64, kLineBytes = 128, kMostSegmentBytes = 512;

// Steps of a thread: enough that a block's sums and barriers cost little beside them, few enough that small maps still
// fill warps. channels_first takes fewer, for rows that several threads read together stay contiguous.
constexpr int64_t kStepsChannelsLast = 8, kStepsChannelsFirst = 4;

constexpr int kUsualLanes = 64;             // channels_last: with four columns of 16 bytes, 256 threads.
constexpr int kUsualThreads = 128;          // channels_first, small maps: four warps in a block.
constexpr int64_t kBlocksPerProcessor = 2;  // Below that many blocks for each multiprocessor, tiles are made narrower.

// Two launches: a block takes at least 16 steps of a thread, and a map is cut into at most 64 blocks, since each block
// of the second launch adds up the sums of all.
constexpr int64_t kLeastRounds = 16, kMostChunks = 64;

int64_t PowerOfTwoBelow(int64_t x) {  // The largest that is not above x.
  int64_t power = 1;
  while (power * 2 <= x) power *= 2;
  return power;
}
int64_t PowerOfTwoAbove(int64_t x) {  // The smallest that is not below x.
  int64_t power = 1;
  while (power < x) power *= 2;
  return power;
}

class Planner {
 public:
  Planner(const Call& call, const Device& device)
      : call_(call), device_(device), element_bytes_(ElementBytes(call.data_type)) {
    const Shape& shape = call.shape;
    const bool exact = call.pass == Pass::kForward || HoldsDzInT(call.activation);
    held_bytes_ = exact ? element_bytes_ : std::max<int64_t>(element_bytes_, 4);
    walk_ = Walk{};
    walk_.layout = shape.positions == 1  ? Layout::kChannelsLast
                   : shape.channels == 1 ? Layout::kChannelsFirst
                                         : shape.layout;
    walk_.batch = shape.batch;
    walk_.positions = shape.positions;
    walk_.channels = shape.channels;
    const int64_t wide = kAccessBytes / element_bytes_;
    const int64_t row = ChannelsLast() ? shape.channels : shape.positions;
    walk_.vector = static_cast<int>(call.aligned && row % wide == 0 ? wide : 1);
    walk_.steps = ChannelsLast() ? shape.positions : shape.positions / walk_.vector;
    most_columns_ = ChannelsLast() ? PowerOfTwoAbove(shape.channels / walk_.vector) : kMaxThreads;
  }

  Plan Make() {
    Plan plan{};
    plan.on_chip = OnChip();
    plan.prefetch = plan.on_chip && call_.pass == Pass::kBackward && device_.trial.prefetch != 0;
    if (!plan.on_chip) TwoPasses();
    SetTiles();
    plan.walk = walk_;
    plan.tiles_per_launch = std::min(walk_.tiles, kMaxGridBlocks / walk_.blocks);
    if (!plan.on_chip) {
      const int64_t inputs = call_.pass == Pass::kForward ? 1 : call_.has_shortcut ? 3 : 2;
      const int64_t tile_bytes = inputs * TileMaps(walk_) * walk_.positions * element_bytes_;
      plan.tiles_per_launch = std::clamp<int64_t>(device_.l2_bytes / 2 / tile_bytes, 1, plan.tiles_per_launch);
      plan.block_sums = plan.tiles_per_launch * walk_.blocks * Sums(call_.pass) * TileMaps(walk_);
    }
    plan.shared_bytes = SharedBytes(plan.on_chip);
    if (call_.pass == Pass::kBackward && (walk_.batch > 1 || call_.has_bias)) {
      plan.sample_sums = ChannelGradients(call_.has_bias) * walk_.batch * walk_.channels;
    }
    return plan;
  }

 private:
  bool ChannelsLast() const { return walk_.layout == Layout::kChannelsLast; }
  int64_t SegmentBytes() const { return walk_.columns * walk_.vector * element_bytes_; }
  int64_t Rounds() const { return CeilDiv(walk_.block_steps, walk_.lanes); }
  int64_t SharedBytes(bool holds) const {
    const int parameters = Parameters(call_.pass, call_.has_bias || call_.has_shortcut);
    const SharedLayout layout = MakeSharedLayout(walk_, Sums(call_.pass), parameters, held_bytes_);
    return holds ? layout.bytes : layout.held;
  }
  int64_t Blocks() const { return walk_.tiles * walk_.blocks; }

  void SetTiles() {
    walk_.tiles_per_sample = ChannelsLast() ? CeilDiv(walk_.channels, TileMaps(walk_)) : 0;
    walk_.tiles =
        ChannelsLast() ? walk_.batch * walk_.tiles_per_sample : CeilDiv(walk_.batch * walk_.channels, walk_.columns);
  }

  bool OnChip() {
    const Trial& trial = device_.trial;
    const bool lean =
        call_.pass == Pass::kForward ? !call_.has_bias && !call_.has_shortcut : call_.activation == Activation::kRelu;
    const int most_sharing = std::min(kWantedSharing, MostSharing(call_.pass, lean, walk_.vector));
    for (const int64_t segment : {kLineBytes, kLeastSegmentBytes, kSectorBytes}) {
      if (trial.segment_bytes != 0 && segment != trial.segment_bytes) continue;
      // A wide row is not worth a multiprocessor that waits for its only block.
      const int least_sharing = segment == kLineBytes && trial.segment_bytes == 0 ? 2 : 1;
      for (int sharing = most_sharing; sharing >= least_sharing; --sharing) {
        if (trial.sharing != 0 && sharing != trial.sharing) continue;
        const int64_t budget = std::min(device_.shared_bytes_per_block,
                                        device_.shared_bytes_per_multiprocessor / sharing - kReservedBytes);
        for (int cluster = 1; cluster <= device_.largest_cluster; cluster *= 2) {
          if (trial.cluster != 0 && cluster != trial.cluster) continue;
          if (!FitsOnChip(segment, budget, cluster)) continue;
          if (trial.segment_bytes == 0) Widen(budget);
          Narrow();
          return true;
        }
      }
    }
    return false;
  }

  // Sets the narrowest tile for a cluster of that size. Nothing here may depend on the batch.
  bool FitsOnChip(int64_t segment, int64_t budget, int cluster) {
    walk_.blocks = cluster;
    walk_.block_steps = CeilDiv(walk_.steps, cluster);
    if (ChannelsLast()) {
      walk_.columns =
          static_cast<int>(std::clamp<int64_t>(segment / (walk_.vector * element_bytes_), 1, most_columns_));
      const int most_lanes = kMaxThreads / walk_.columns;
      walk_.lanes = static_cast<int>(std::clamp<int64_t>(PowerOfTwoBelow(walk_.block_steps / kStepsChannelsLast), 1,
                                                         std::min(kUsualLanes, most_lanes)));
      while (Rounds() > kFloatSteps && walk_.lanes < most_lanes) walk_.lanes *= 2;
    } else {
      walk_.columns = 1;
      walk_.lanes = static_cast<int>(
          std::clamp<int64_t>(PowerOfTwoBelow(walk_.block_steps / kStepsChannelsFirst), 1, kMaxThreads));
    }
    walk_.columns = std::max(walk_.columns, kWarp / walk_.lanes);
    return Rounds() <= kFloatSteps && SharedBytes(true) <= budget;
  }

  bool CanDouble(int64_t budget) {
    if (walk_.columns * walk_.lanes * 2 > kMaxThreads || walk_.columns * 2 > most_columns_) return false;
    walk_.columns *= 2;
    const bool fits = SharedBytes(true) <= budget;
    walk_.columns /= 2;
    return fits;
  }

  void Widen(int64_t budget) {
    if (ChannelsLast()) {
      while (SegmentBytes() * 2 <= kMostSegmentBytes && CanDouble(budget)) walk_.columns *= 2;
    } else {
      while (walk_.columns * walk_.lanes < kUsualThreads && CanDouble(budget)) walk_.columns *= 2;
    }
  }

  // Small batches: narrower tiles for more multiprocessors. Only `columns` changes, and so no sum does.
  void Narrow() {
    const int64_t enough = kBlocksPerProcessor * device_.multiprocessors;
    for (SetTiles(); walk_.columns > 1 && walk_.columns * walk_.lanes > kWarp; SetTiles()) {
      const bool scarce = Blocks() < device_.multiprocessors;
      const int64_t least = scarce ? kSectorBytes : kLineBytes;
      if (Blocks() >= enough || (ChannelsLast() && SegmentBytes() <= least)) return;
      walk_.columns /= 2;
    }
  }

  void TwoPasses() {
    const int64_t columns = kLeastSegmentBytes * 2 / (walk_.vector * element_bytes_);
    walk_.columns = ChannelsLast() ? static_cast<int>(std::clamp<int64_t>(columns, 1, most_columns_)) : 1;
    walk_.lanes = kMaxThreads / walk_.columns;
    const int64_t chunk = std::max(kLeastRounds * walk_.lanes, CeilDiv(walk_.steps, kMostChunks));
    walk_.block_steps = CeilDiv(chunk, walk_.lanes) * walk_.lanes;
    walk_.blocks = static_cast<int>(CeilDiv(walk_.steps, walk_.block_steps));
  }

  const Call call_;
  const Device& device_;
  const int64_t element_bytes_;
  int64_t held_bytes_;
  int64_t most_columns_;
  Walk walk_;
};

}  // namespace

int CapabilityOfCode(const std::vector<int>& compiled, int device) {
  int newest = 0;
  for (const int capability : compiled) {
    if (capability <= device) newest = std::max(newest, capability);
  }
  return newest;
}

Plan MakePlan(const Call& call, const Device& device) { return Planner(call, device).Make(); }

std::string Describe(const Plan& plan, DataType data_type) {
  const Walk& walk = plan.walk;
  const std::string blocks = std::to_string(walk.blocks) + (walk.blocks == 1 ? " block" : " blocks");
  std::string text = plan.on_chip ? "on chip: clusters of " + blocks : "two launches: " + blocks + " a tile";
  text += ", " + std::to_string(walk.columns * walk.lanes) + " threads, " +
          std::to_string(CeilDiv(plan.shared_bytes, 1024)) + " KiB each";
  if (walk.layout == Layout::kChannelsLast) {
    text += ", " + std::to_string(walk.columns * walk.vector * ElementBytes(data_type)) + " bytes wide";
  }
  return text + (plan.prefetch ? ", prefetched" : "");
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc
