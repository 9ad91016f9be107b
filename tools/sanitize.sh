#!/usr/bin/env bash
# The C++ that needs no TensorFlow and its tests, built with sanitizers: AddressSanitizer with UndefinedBehaviorSanitizer,
# then ThreadSanitizer. What the other scripts build is left as it is.

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[[ $# == 0 ]] || fail "tools/sanitize.sh takes no arguments, got '$*'."
need_googletest
need_sanitizers
((MMAP_RANDOM_BITS <= 28)) || fail "GCC's sanitizers need sudo sysctl vm.mmap_rnd_bits=28."

for sanitizer in asan tsan; do
  say "${sanitizer}"
  run_bazel test "--config=${sanitizer}" //cc/core:all //cc/serving:npy_test
done
# The CUDA kernels in their emulation have targets of their own, which tools/test.sh runs too.
run_bazel test --test_tag_filters=sanitizer //cc/core/cuda/...
