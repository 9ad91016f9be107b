// What any bytes mean as a call of the CPU's arithmetic, and what must hold for it. Who makes the bytes: fuzzer.cc, and
// fuzz_input_test.cc.

#ifndef TF_AGC_CC_CORE_FUZZ_INPUT_H_
#define TF_AGC_CC_CORE_FUZZ_INPUT_H_

#include <cstddef>
#include <cstdint>

namespace tf_agc {
namespace core {

// Runs one forward and one backward call with sizes, types, enums, values, alignment, threads, instruction-set level
// and overlap as `bytes` say, and again in another way. GoogleTest's assertions fail where a result is not that of the
// plain loops in double (for ordinary values), where the two ways differ, or where anything is written outside of the
// outputs.
void RunFuzzInput(const uint8_t* bytes, size_t size);

}  // namespace core
}  // namespace tf_agc

#endif  // TF_AGC_CC_CORE_FUZZ_INPUT_H_
