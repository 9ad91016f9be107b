#!/usr/bin/env bash
# The C++ that needs no TensorFlow and its tests, built with sanitizers: AddressSanitizer with UndefinedBehaviorSanitizer,
# then ThreadSanitizer. Outputs lie beside the others, and nothing is built again after it.

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
need_sanitizers

for sanitizer in asan tsan; do
  say "${sanitizer}"
  run_bazel test "--config=${sanitizer}" //cc:job_test //cc/core:all //cc/serving:npy_test
done
# The CUDA kernels in their emulation have targets of their own, which tools/test.sh runs too.
run_bazel test --test_tag_filters=sanitizer //cc/core/cuda/...
