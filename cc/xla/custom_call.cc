// XLA's typed FFI on one side, cc/core on the other: buffers become pointers, XLA's thread pool becomes core::Parallel,
// its stream on a GPU goes to the launchers.
// Nothing is validated: XLA passes the shapes and types that agc_xla_kernels.cc compiled the program for.

#include "cc/xla/custom_call.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "cc/core/agc.h"
#include "cc/core/job.h"
#include "xla/ffi/api/ffi.h"
#ifdef TF_AGC_CUDA
#include "cc/core/cuda/agc_cuda.h"
#endif

// Declared in a header that includes far more of XLA. TensorFlow's libraries for aarch64 do not export XLA_FFI_GetApi.
namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace tf_agc {
namespace xla_calls {
namespace {

namespace ffi = ::xla::ffi;

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;
using OptionalBuffer = std::optional<Buffer>;
using OptionalResult = std::optional<Result>;

enum Counter {
  kForwardCalls,
  kForwardInPlace,
  kBackwardCalls,
  kBackwardOverDy,
  kShortcutGradientOverDy,
  kCounters,
};

std::atomic<int64_t> counters[kCounters];

void Count(Counter counter) { counters[counter].fetch_add(1, std::memory_order_relaxed); }

// XLA's pool behind the callback that cc/core knows.
core::Parallel ParallelOf(ffi::ThreadPool* pool) {
  auto run = [](void* pool, const core::Phase* phases, int count) {
    auto* threads = static_cast<ffi::ThreadPool*>(pool);
    core::RunPhases(phases, count, threads->num_threads(), [&](auto help) { threads->Schedule(std::move(help)); });
  };
  // Where XLA runs without a pool it says 0.
  return {static_cast<int>(std::max<int64_t>(pool->num_threads(), 1)), pool, run, core::kCyclesPerThread};
}

core::DataType DataTypeOf(const Buffer& maps) {
  switch (maps.element_type()) {
    case ffi::DataType::F16:
      return core::DataType::kHalf;
    case ffi::DataType::BF16:
      return core::DataType::kBfloat16;
    case ffi::DataType::F64:
      return core::DataType::kDouble;
    default:
      return core::DataType::kFloat;
  }
}

core::Shape ShapeOf(const Buffer& maps, core::Layout layout) {
  const Buffer::Dimensions sizes = maps.dimensions();
  const size_t channel_axis = layout == core::Layout::kChannelsLast ? sizes.size() - 1 : 1;
  core::Shape shape{sizes[0], 1, sizes[channel_axis], layout};
  if (maps.element_count() == 0) return shape;  // Nobody asks for its positions, whose number may overflow.
  for (size_t i = 1; i < sizes.size(); ++i) {
    if (i != channel_axis) shape.positions *= sizes[i];
  }
  return shape;
}

// What is absent leaves no gap: without a bias, the shortcut stands in its place.
template <class T>
void MoveToPlace(bool has_bias, T* bias, T* shortcut) {
  if (!has_bias) std::swap(*bias, *shortcut);
}

const void* DataOf(const OptionalBuffer& buffer) { return buffer ? buffer->untyped_data() : nullptr; }
void* DataOf(OptionalResult result) { return result ? (*result)->untyped_data() : nullptr; }

core::ForwardArgs ForwardArgsOf(Buffer x, Buffer gain, Buffer mean_scale, OptionalBuffer bias, OptionalBuffer shortcut,
                                Result y, Result mean, int32_t activation, float alpha, int32_t layout, bool has_bias) {
  MoveToPlace(has_bias, &bias, &shortcut);
  Count(kForwardCalls);
  if (y->untyped_data() == x.untyped_data()) Count(kForwardInPlace);
  return {ShapeOf(x, static_cast<core::Layout>(layout)),
          DataTypeOf(x),
          static_cast<core::Activation>(activation),
          alpha,
          x.untyped_data(),
          gain.untyped_data(),
          mean_scale.untyped_data(),
          y->untyped_data(),
          mean->untyped_data(),
          DataOf(bias),
          DataOf(shortcut)};
}

core::BackwardArgs BackwardArgsOf(Buffer dy, Buffer dmean, Buffer kept, Buffer mean, Buffer gain, Buffer mean_scale,
                                  OptionalBuffer bias, OptionalBuffer shortcut, Result dx, Result dgain,
                                  Result dmean_scale, OptionalResult dbias, OptionalResult dshortcut,
                                  int32_t activation, float alpha, int32_t layout, bool has_bias) {
  MoveToPlace(has_bias, &bias, &shortcut);
  MoveToPlace(has_bias, &dbias, &dshortcut);
  Count(kBackwardCalls);
  if (dx->untyped_data() == dy.untyped_data()) Count(kBackwardOverDy);
  if (dshortcut && dy.untyped_data() == DataOf(dshortcut)) Count(kShortcutGradientOverDy);
  return {ShapeOf(kept, static_cast<core::Layout>(layout)),
          DataTypeOf(kept),
          static_cast<core::Activation>(activation),
          alpha,
          dy.untyped_data(),
          dmean.untyped_data(),
          kept.untyped_data(),
          mean.untyped_data(),
          gain.untyped_data(),
          mean_scale.untyped_data(),
          dx->untyped_data(),
          dgain->untyped_data(),
          dmean_scale->untyped_data(),
          DataOf(bias),
          DataOf(shortcut),
          DataOf(dbias),
          DataOf(dshortcut)};
}

// What XLA passes to the calls on any platform, behind that platform's context.
template <class Binding>
auto BindForward(Binding context) {
  return std::move(context)
      .template Arg<Buffer>()          // x
      .template Arg<Buffer>()          // gain
      .template Arg<Buffer>()          // mean_scale
      .template OptionalArg<Buffer>()  // bias
      .template OptionalArg<Buffer>()  // shortcut
      .template Ret<Buffer>()          // y
      .template Ret<Buffer>()          // mean
      .template Attr<int32_t>(kActivation)
      .template Attr<float>(kAlpha)
      .template Attr<int32_t>(kLayout)
      .template Attr<bool>(kHasBias);
}

template <class Binding>
auto BindBackward(Binding context) {
  return std::move(context)
      .template Arg<Buffer>()          // dy
      .template Arg<Buffer>()          // dmean
      .template Arg<Buffer>()          // kept
      .template Arg<Buffer>()          // mean
      .template Arg<Buffer>()          // gain
      .template Arg<Buffer>()          // mean_scale
      .template OptionalArg<Buffer>()  // bias
      .template OptionalArg<Buffer>()  // shortcut
      .template Ret<Buffer>()          // dx
      .template Ret<Buffer>()          // dgain
      .template Ret<Buffer>()          // dmean_scale
      .template OptionalRet<Buffer>()  // dbias
      .template OptionalRet<Buffer>()  // dshortcut
      .template Attr<int32_t>(kActivation)
      .template Attr<float>(kAlpha)
      .template Attr<int32_t>(kLayout)
      .template Attr<bool>(kHasBias);
}

// ---- On the CPU ----

ffi::Error ErrorOf(bool computed) {
  if (computed) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "tf_agc got no memory for its sums");
}

constexpr auto Forward = [](ffi::ThreadPool pool, auto... arguments) {
  return ErrorOf(core::Forward(ForwardArgsOf(arguments...), ParallelOf(&pool)));
};

constexpr auto Backward = [](ffi::ThreadPool pool, auto... arguments) {
  return ErrorOf(core::Backward(BackwardArgsOf(arguments...), ParallelOf(&pool)));
};

XLA_FFI_DEFINE_HANDLER(kForwardHandler, Forward, BindForward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kBackwardHandler, Backward, BindBackward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

// ---- On the GPU ----

#ifdef TF_AGC_CUDA

template <class Args>
ffi::Error Launch(const Args& args, void* stream, ffi::ScratchAllocator* scratch,
                  int64_t (*workspace_bytes)(const Args*), int (*launch)(const Args*, void*, void*)) {
  const int64_t bytes = workspace_bytes(&args);
  void* workspace = nullptr;
  if (bytes > 0) {
    const std::optional<void*> allocated = scratch->Allocate(bytes, /*alignment=*/16);
    if (!allocated) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "tf_agc got no memory for its workspace");
    workspace = *allocated;
  }
  const int error = launch(&args, workspace, stream);
  if (error == 0) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("tf_agc could not be launched: ") + TfAgcCudaErrorString(error));
}

constexpr auto ForwardOnGpu = [](void* stream, ffi::ScratchAllocator scratch, auto... arguments) {
  return Launch(ForwardArgsOf(arguments...), stream, &scratch, TfAgcCudaForwardWorkspaceBytes, TfAgcCudaForward);
};

constexpr auto BackwardOnGpu = [](void* stream, ffi::ScratchAllocator scratch, auto... arguments) {
  return Launch(BackwardArgsOf(arguments...), stream, &scratch, TfAgcCudaBackwardWorkspaceBytes, TfAgcCudaBackward);
};

using GpuStream = ffi::PlatformStream<void*>;

XLA_FFI_DEFINE_HANDLER(kForwardOnGpuHandler, ForwardOnGpu,
                       BindForward(ffi::Ffi::Bind().Ctx<GpuStream>().Ctx<ffi::ScratchAllocator>()));
XLA_FFI_DEFINE_HANDLER(kBackwardOnGpuHandler, BackwardOnGpu,
                       BindBackward(ffi::Ffi::Bind().Ctx<GpuStream>().Ctx<ffi::ScratchAllocator>()));

#endif  // TF_AGC_CUDA

std::string RegisterOne(const char* name, const char* platform, XLA_FFI_Handler* handler) {
  const XLA_FFI_Api* api = ffi::GetXlaFfiApi();
  XLA_FFI_Error* error = ffi::Ffi::RegisterStaticHandler(api, name, platform, handler);
  if (error == nullptr) return "";
  const std::string message = ffi::internal::GetErrorMessage(api, error);
  ffi::internal::DestroyError(api, error);
  return message;
}

}  // namespace

std::string FormatAttributes(core::Activation activation, float alpha, core::Layout layout, bool has_bias) {
  // The bits of alpha, which MLIR takes for a float: digits would depend on the process's locale.
  uint32_t alpha_bits;
  static_assert(sizeof(alpha_bits) == sizeof(alpha));
  std::memcpy(&alpha_bits, &alpha, sizeof(alpha));
  char text[128];
  std::snprintf(text, sizeof(text), "{%s = %d : i32, %s = 0x%08X : f32, %s = %d : i32, %s = %s}", kActivation,
                static_cast<int>(activation), kAlpha, static_cast<unsigned>(alpha_bits), kLayout,
                static_cast<int>(layout), kHasBias, has_bias ? "true" : "false");
  return text;
}

std::string Register() {
  const std::string error = RegisterOne(kForward, "Host", kForwardHandler);
  return error.empty() ? RegisterOne(kBackward, "Host", kBackwardHandler) : error;
}

std::string RegisterOnGpu() {
#ifdef TF_AGC_CUDA
  if (TfAgcCudaProblem()[0] != '\0') return TfAgcCudaProblem();
  const std::string error = RegisterOne(kForward, "CUDA", kForwardOnGpuHandler);
  return error.empty() ? RegisterOne(kBackward, "CUDA", kBackwardOnGpuHandler) : error;
#else
  return "built without CUDA";
#endif
}

}  // namespace xla_calls
}  // namespace tf_agc

// ---- For tests, through ctypes ----

extern "C" {

// Writes the first n of: forward calls, those that wrote over x, backward calls, those that wrote dx over dy, those
// that wrote dshortcut over dy. Returns how many there are.
int TfAgcXlaCounters(int64_t* values, int n) {
  using tf_agc::xla_calls::counters;
  using tf_agc::xla_calls::kCounters;
  for (int i = 0; i < n && i < kCounters; ++i) values[i] = counters[i].load(std::memory_order_relaxed);
  return kCounters;
}

void TfAgcXlaResetCounters() {
  for (auto& counter : tf_agc::xla_calls::counters) counter.store(0, std::memory_order_relaxed);
}
}
