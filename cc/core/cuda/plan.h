// How a call is laid out on a device: which kernels, which threads, which block takes what. Plain C++: a pure function
// of sizes and of a device's description, so that it is tested for any device without one. No arithmetic on elements.

#ifndef TF_AGC_CC_CORE_CUDA_PLAN_H_
#define TF_AGC_CC_CORE_CUDA_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cc/core/types.h"

#if defined(__CUDACC__)
#define TF_AGC_HOST_DEVICE __host__ __device__ inline
#else
#define TF_AGC_HOST_DEVICE inline
#endif

namespace tf_agc {
namespace core {
namespace cuda {

// What is tried instead of the rule's choice: each that is not 0. For sweeps (tools/gpu/gpu_check.sh) alone.
struct Trial {
  int segment_bytes = 0;  // Of a channels_last tile: 128, 64 or 32.
  int cluster = 0;        // Blocks.
  int sharing = 0;        // So many blocks' shared memory fits a multiprocessor.
  int prefetch = 0;       // Plan::prefetch, which the rule leaves out.
};

// What a plan asks of a device.
struct Device {
  int largest_cluster;                      // 1 where the code that runs on it has none.
  int multiprocessors;                      //
  int64_t shared_bytes_per_block;           // The most that a block may opt into.
  int64_t shared_bytes_per_multiprocessor;  //
  int64_t l2_bytes;                         //
  bool dependent_launches = false;          // Whether a launch may start before the one before it is done: from 9.0 on.
  Trial trial = {};
};

// The compute capability whose code runs on a device, of those that the library was compiled for: the newest that is
// not newer than the device. A device with clusters runs older code without them. 0 where there is none.
int CapabilityOfCode(const std::vector<int>& compiled, int device);

enum class Pass { kForward, kBackward };

// What a plan asks of a call.
struct Call {
  Pass pass;
  Shape shape;  // batch and channels are at least 1.
  DataType data_type;
  Activation activation;  // Effective() (scheduling.h).
  bool aligned;           // Every map tensor starts at a multiple of 16 bytes.
  bool has_bias;
  bool has_shortcut;
};

constexpr int kMaxThreads = 256;  // In a block.

// So many blocks of an on-chip kernel share a multiprocessor at most: nvcc is told, and keeps to the registers that
// this leaves. Three is what plans aim at, so that one loads while others store; two where nvcc could keep to them only
// by going through memory in its loops. Lean are forward without a bias and a shortcut, and backward of relu.
constexpr int kWantedSharing = 3;
TF_AGC_HOST_DEVICE constexpr int MostSharing(Pass pass, bool lean, int vector) {
  if (pass == Pass::kForward) return lean ? 4 : 3;
  return lean || vector < 8 ? 3 : 2;
}

// A thread adds at most this many steps in float before it goes on in double, which keeps the error of a mean at a few
// units in the last place for any number of positions. The elements of a step are added as a tree.
constexpr int kFloatSteps = 64;

// The walk over the maps.
//
// A step is what one access of `vector` elements takes along a map: channels_last, `vector` channels at one position;
// channels_first, `vector` positions of one channel. A column is what a thread walks step by step: `vector` maps side
// by side, or one map. A tile is `columns` neighbouring columns, and `lanes` threads share each column, taking every
// lanes-th step. A tile's steps are cut into `blocks` ranges of block_steps, one for each block.
//
// The order of a map's sum is set by vector, lanes, blocks and block_steps, and these never depend on the batch: so a
// sample's results do not. `columns` may.
struct Walk {
  Layout layout;
  int64_t batch;
  int64_t positions;
  int64_t channels;
  int vector;                // Elements.
  int columns;               // A power of two, as lanes; columns * lanes threads are whole warps.
  int lanes;                 //
  int64_t steps;             // Of a column.
  int64_t block_steps;       //
  int blocks;                // Of a tile.
  int64_t tiles_per_sample;  // channels_last only: there, a tile stays within a sample.
  int64_t tiles;             //
};

struct Plan {
  Walk walk;
  // Whether the blocks of a tile are a cluster that keeps the tile in shared memory between summing and writing, in one
  // launch. Otherwise one launch sums, and a second one reads the maps again, from the L2 cache where they fit it.
  bool on_chip;
  // Whether, on chip, the backward pass asks for what it reads last to come to the L2 cache when it starts.
  bool prefetch;
  int64_t tiles_per_launch;  // Of one launch, or of one pair.
  int64_t shared_bytes;      // Of each block.
  // The workspace, in doubles: sums of the blocks of tiles_per_launch tiles, then the terms of each sample for dgain,
  // dmean_scale and, with a bias, dbias; without a bias, only where there are several samples.
  int64_t block_sums;
  int64_t sample_sums;
};

inline int64_t WorkspaceBytes(const Plan& plan) {
  return (plan.block_sums + plan.sample_sums) * int64_t{sizeof(double)};
}

// The rule, in order:
// 1. One channel is walked as channels_first and one position as channels_last: the layouts are the same there, and
//    these are the fuller rows.
// 2. An access is 16 bytes where that divides every row, else one element.
// 3. On chip if the tile fits. A channels_last tile is 128 bytes wide, a cache line, if two blocks can share a
//    multiprocessor then; else 64, else 32, which is the unit of DRAM and caches. Of all cluster sizes that let
//    three (or MostSharing()) blocks share one, the smallest; else those for one block less, and so on.
// 4. Otherwise two launches, of as many tiles as half the L2 cache holds of what the first one reads.
Plan MakePlan(const Call& call, const Device& device);

// For people, as "on chip: clusters of 4 blocks, 256 threads, 53 KiB each, 64 bytes wide".
std::string Describe(const Plan& plan, DataType data_type);

// The backward pass holds dz between its two steps: in T where that is exact (dz is then dy, 0 or NaN), else in float.
TF_AGC_HOST_DEVICE constexpr bool HoldsDzInT(Activation activation) {
  return activation != Activation::kLeakyRelu && activation != Activation::kElu;
}

// ---- Index arithmetic, for kernels and tests ----

// a / b for a >= 0 and b > 0. GPUs divide 32 bits in a fraction of the time, and nearly all numbers have no more.
TF_AGC_HOST_DEVICE int64_t Quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}
TF_AGC_HOST_DEVICE int64_t Remainder(int64_t a, int64_t b) { return a - Quotient(a, b) * b; }

// The maps of a tile.
TF_AGC_HOST_DEVICE int TileMaps(const Walk& walk) {
  return walk.layout == Layout::kChannelsLast ? walk.columns * walk.vector : walk.columns;
}

// The index n * channels + c of a tile's i-th map, or -1 where the tile ends before.
TF_AGC_HOST_DEVICE int64_t MapOf(const Walk& walk, int64_t tile, int i) {
  if (walk.layout == Layout::kChannelsLast) {
    const int64_t sample = Quotient(tile, walk.tiles_per_sample);
    const int64_t channel = (tile - sample * walk.tiles_per_sample) * TileMaps(walk) + i;
    return channel < walk.channels ? sample * walk.channels + channel : -1;
  }
  const int64_t map = tile * walk.columns + i;
  return map < walk.batch * walk.channels ? map : -1;
}

// The element at which the column of a map starts, and the elements from one of its steps to the next.
TF_AGC_HOST_DEVICE int64_t FirstElement(const Walk& walk, int64_t map) {
  if (walk.layout == Layout::kChannelsFirst) return map * walk.positions;
  const int64_t sample = Quotient(map, walk.channels);
  return sample * walk.channels * walk.positions + (map - sample * walk.channels);
}
TF_AGC_HOST_DEVICE int64_t StepElements(const Walk& walk) {
  return walk.layout == Layout::kChannelsLast ? walk.channels : walk.vector;
}

// Threads of one column within a warp, and the warps over which a column's threads are spread.
TF_AGC_HOST_DEVICE int LanesPerWarp(const Walk& walk) {
  if (walk.layout == Layout::kChannelsFirst) return walk.lanes < 32 ? walk.lanes : 32;
  return walk.columns < 32 ? 32 / walk.columns : 1;
}
TF_AGC_HOST_DEVICE int WarpsPerColumn(const Walk& walk) { return walk.lanes / LanesPerWarp(walk); }

// The maps of a tile whose sums one block of a cluster turns into parameters, for all blocks. Where there are fewer
// maps than blocks, each is a block's, and the last blocks have none. A power of two on chip, as the maps and the
// blocks.
inline int MapsOfBlock(const Walk& walk) { return TileMaps(walk) > walk.blocks ? TileMaps(walk) / walk.blocks : 1; }

// Shared memory of a block: [barriers][sums][sums of each warp][parameters][what is held], all aligned to 16 bytes.
// What comes from others has a place that nothing else uses: no block asks another one whether it is ready. Sums are
// those of all blocks for the maps of this one, as many as of one block for all maps.
struct SharedLayout {
  int sums;
  int warp_sums;
  int parameters;
  int held;
  int64_t bytes;
};
inline SharedLayout MakeSharedLayout(const Walk& walk, int sums, int parameters, int64_t held_bytes) {
  auto aligned = [](int bytes) { return (bytes + 15) / 16 * 16; };
  const int maps = TileMaps(walk);
  const int64_t rounds = (walk.block_steps + walk.lanes - 1) / walk.lanes;
  SharedLayout layout;
  layout.sums = walk.blocks > 1 ? 16 : 0;
  layout.warp_sums = layout.sums + aligned(MapsOfBlock(walk) * walk.blocks * sums * 8);
  layout.parameters = layout.warp_sums + aligned(maps * sums * 8 * WarpsPerColumn(walk));
  layout.held = layout.parameters + aligned(maps * parameters * 8);  // Room for doubles, whatever T.
  layout.bytes = layout.held + rounds * walk.columns * walk.lanes * walk.vector * held_bytes;
  return layout;
}

// One sum forward (x) and two backward (dz and the gain's term), whatever is added to z: dbias sums dz, too.
constexpr int Sums(Pass pass) { return pass == Pass::kForward ? 1 : 2; }
// Gain and offset; forward the bias too where anything is added to z, and backward a shift.
constexpr int Parameters(Pass pass, bool has_addends) { return pass == Pass::kForward && !has_addends ? 2 : 3; }
// Gradients that are summed over samples: of gain and mean_scale, and of the bias.
TF_AGC_HOST_DEVICE constexpr int ChannelGradients(bool has_bias) { return has_bias ? 3 : 2; }

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_PLAN_H_
