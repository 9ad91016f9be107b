// Launches the kernels of a pass as its plan says.

#ifndef TF_AGC_CC_CORE_CUDA_LAUNCH_PASS_H_
#define TF_AGC_CC_CORE_CUDA_LAUNCH_PASS_H_

#include <cstdint>

#include "cc/core/cuda/kernels.h"
#include "cc/core/cuda/plan.h"
#include "cc/core/cuda/primitives.h"
#include "cc/core/scheduling.h"
#include "cc/core/types.h"

namespace tf_agc {
namespace core {
namespace cuda {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue.

template <class PassType, int kVector, Layout kLayout>
int LaunchWalk(const Plan& plan, const Device& device, LaunchArgs<typename PassType::Args> launch, void* stream) {
  const int threads = plan.walk.columns * plan.walk.lanes;
  for (int64_t tile = 0; tile < plan.walk.tiles; tile += plan.tiles_per_launch) {
    const int64_t rest = plan.walk.tiles - tile;
    const int64_t blocks = (rest < plan.tiles_per_launch ? rest : plan.tiles_per_launch) * plan.walk.blocks;
    const Grid grid{blocks,
                    threads,
                    plan.on_chip ? plan.walk.blocks : 1,
                    plan.shared_bytes,
                    device.shared_bytes_per_block,
                    /*holds=*/plan.on_chip,
                    /*dependent=*/false};
    launch.first_tile = tile;
    int error;
    if (plan.on_chip) {
      error = Launch(&OnChip<PassType, kVector, kLayout>, grid, stream, launch);
    } else {
      error = Launch(&SumTiles<PassType, kVector, kLayout>, grid, stream, launch);
      if (error == 0) error = Launch(&WriteTiles<PassType, kVector, kLayout>, grid, stream, launch);
    }
    if (error != 0) return error;
  }
  return 0;
}

template <class PassType>
int LaunchPass(const Plan& plan, const Device& device, LaunchArgs<typename PassType::Args> launch, void* stream) {
  launch.layout = MakeSharedLayout(plan.walk, PassType::kSums, PassType::kParameters, 0);
  constexpr int kWide = 16 / sizeof(typename PassType::Element);
  if (plan.walk.layout == Layout::kChannelsLast) {
    return plan.walk.vector == 1 ? LaunchWalk<PassType, 1, Layout::kChannelsLast>(plan, device, launch, stream)
                                 : LaunchWalk<PassType, kWide, Layout::kChannelsLast>(plan, device, launch, stream);
  }
  return plan.walk.vector == 1 ? LaunchWalk<PassType, 1, Layout::kChannelsFirst>(plan, device, launch, stream)
                               : LaunchWalk<PassType, kWide, Layout::kChannelsFirst>(plan, device, launch, stream);
}

// Calls body(T{}) for the type of the maps' elements and returns what it returns.
template <class Body>
int WithElementType(DataType data_type, const Body& body) {
  switch (data_type) {
    case DataType::kHalf:
      return body(Half{});
    case DataType::kBfloat16:
      return body(Bfloat16{});
    case DataType::kDouble:
      return body(double{});
    case DataType::kFloat:
      break;
  }
  return body(float{});
}

template <class Args>
LaunchArgs<Args> MakeLaunchArgs(const Args& args, const Plan& plan, void* workspace) {
  LaunchArgs<Args> launch{args, plan.walk, {}, MapsOfBlock(plan.walk), 0, nullptr, nullptr, nullptr, plan.prefetch};
  launch.args.activation = Effective(args.activation, args.alpha);
  double* doubles = static_cast<double*>(workspace);
  if (plan.sample_sums > 0) launch.sample_sums = doubles;
  if (plan.sample_sums > 0 && args.bias != nullptr) {
    launch.dz_sums = doubles + ChannelGradients(false) * plan.walk.batch * plan.walk.channels;
  }
  if (plan.block_sums > 0) launch.block_sums = doubles + plan.sample_sums;
  return launch;
}

}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CUDA_LAUNCH_PASS_H_
