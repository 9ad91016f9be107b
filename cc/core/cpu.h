// What this machine's CPU can do. Nothing here knows the op.

#ifndef TF_AGC_CC_CORE_CPU_H_
#define TF_AGC_CC_CORE_CPU_H_

#include <cstdint>

namespace tf_agc {
namespace core {

// The instruction-set levels that loops.cc is compiled for, lowest first. On x86-64 they are the levels of its psABI.
enum class InstructionSet { kBaseline, kX86_64_V2, kX86_64_V3, kX86_64_V4 };

// The highest level that was compiled in and that this CPU and operating system run.
InstructionSet BestInstructionSet();

// "x86-64-v3" and so on.
const char* InstructionSetName(InstructionSet level);

// Sizes in bytes: of one core's second-level cache, and of the third-level cache that cores share. Cautious guesses
// where the system does not tell; 0 means no third level.
int64_t L2CacheBytes();
int64_t L3CacheBytes();

// While it lives, this thread computes with denormals. TensorFlow's pool threads flush them, calling threads do where
// it told them to, and other programs' do not: a result would depend on where it was computed.
class ScopedKeepDenormals {
 public:
  ScopedKeepDenormals();
  ~ScopedKeepDenormals();
  ScopedKeepDenormals(const ScopedKeepDenormals&) = delete;
  ScopedKeepDenormals& operator=(const ScopedKeepDenormals&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_CPU_H_
