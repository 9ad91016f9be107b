// The physical limit that benchmarks compare with: a copy of the same bytes on the same number of threads. No
// arithmetic of the op's here. Python calls it through ctypes (tools/benchmarks/bench_cpu.py).

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace {

void CopyPlain(char* to, const char* from, int64_t bytes) {
#if defined(__x86_64__)
  // Not memcpy, which turns to streaming stores by itself at some size.
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    for (int k = 0; k < 64; k += 16) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + k));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i + k), v);
    }
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

void CopyStreaming(char* to, const char* from, int64_t bytes) {
#if defined(__x86_64__)
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    for (int k = 0; k < 64; k += 16) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + k));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + k), v);
    }
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
  _mm_sfence();
#else
  CopyPlain(to, from, bytes);
#endif
}

}  // namespace

extern "C" {

// Copies `bytes` bytes between two arrays aligned to 64, each thread a part of its own; threads are started and joined
// once for `repetitions` copies, so that one copy costs no thread start.
void TfAgcCopy(char* to, const char* from, int64_t bytes, int threads, int streaming, int repetitions) {
  const int64_t part = (bytes / threads + 63) / 64 * 64;
  auto work = [=](int thread) {
    const int64_t begin = thread * part < bytes ? thread * part : bytes;
    const int64_t end = begin + part < bytes ? begin + part : bytes;
    for (int i = 0; i < repetitions; ++i) {
      (streaming ? CopyStreaming : CopyPlain)(to + begin, from + begin, end - begin);
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
}
}
