#include "cc/core/cpu.h"

#include <fstream>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

namespace tf_agc {
namespace core {
namespace {

InstructionSet Detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // __builtin_cpu_supports has no name for F16C in older compilers, and looks at the operating system's part for AVX
  // only.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && f16c;
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) return InstructionSet::kX86_64_V4;
  if (v3) return InstructionSet::kX86_64_V3;
  // TensorFlow's own wheel needs AVX, so nothing below v2 ever gets here.
  return InstructionSet::kX86_64_V2;
#else
  return InstructionSet::kBaseline;
#endif
}

#if defined(__x86_64__)
// Bits of MXCSR: flush results to zero, take denormal operands as zero.
constexpr unsigned kFlushBits = 0x8040;
#elif defined(__aarch64__)
// Bit FZ of FPCR.
constexpr uint64_t kFlushBits = uint64_t{1} << 24;

uint64_t ReadFpcr() {
  uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}

void WriteFpcr(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#endif

// The size of the first core's cache of this level, 0 where there is none or the system does not tell. Not from
// sysconf, whose third level is that of a whole machine of which a virtual one may have two cores.
int64_t CacheBytes(int level) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    std::ifstream level_file(folder + "level"), type_file(folder + "type"), size_file(folder + "size");
    int found_level = 0;
    int64_t size = 0;
    std::string type;
    char unit = 0;
    if (!(level_file >> found_level) || !(type_file >> type) || !(size_file >> size)) continue;
    size_file >> unit;
    if (found_level != level || type == "Instruction") continue;
    return size * (unit == 'K' ? 1024 : unit == 'M' ? 1024 * 1024 : 1);
  }
  return 0;
}

}  // namespace

InstructionSet BestInstructionSet() {
  static const InstructionSet best = Detect();
  return best;
}

const char* InstructionSetName(InstructionSet level) {
  switch (level) {
    case InstructionSet::kX86_64_V2:
      return "x86-64-v2";
    case InstructionSet::kX86_64_V3:
      return "x86-64-v3";
    case InstructionSet::kX86_64_V4:
      return "x86-64-v4";
    case InstructionSet::kBaseline:
      break;
  }
  return "baseline";
}

int64_t L2CacheBytes() {
  static const int64_t bytes = CacheBytes(2);
  return bytes > 0 ? bytes : int64_t{512} * 1024;
}

int64_t L3CacheBytes() {
  static const int64_t bytes = CacheBytes(3);
  return bytes;
}

#if defined(__x86_64__)
ScopedKeepDenormals::ScopedKeepDenormals() : saved_(_mm_getcsr()) {
  if (saved_ & kFlushBits) _mm_setcsr(static_cast<unsigned>(saved_) & ~kFlushBits);
}
ScopedKeepDenormals::~ScopedKeepDenormals() {
  if (saved_ & kFlushBits) _mm_setcsr(static_cast<unsigned>(saved_));
}
#elif defined(__aarch64__)
ScopedKeepDenormals::ScopedKeepDenormals() : saved_(ReadFpcr()) {
  if (saved_ & kFlushBits) WriteFpcr(saved_ & ~kFlushBits);
}
ScopedKeepDenormals::~ScopedKeepDenormals() {
  if (saved_ & kFlushBits) WriteFpcr(saved_);
}
#else
ScopedKeepDenormals::ScopedKeepDenormals() : saved_(0) {}
ScopedKeepDenormals::~ScopedKeepDenormals() {}
#endif

}  // namespace core
}  // namespace tf_agc
