#!/usr/bin/env bash
# Bazel as the other scripts run it, after their set-up. For work on the C++: tools/bazel.sh run //cc/core:bench

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[[ "$*" != *//cc/core:bench* ]] || need_file /usr/include/benchmark/benchmark.h "google-benchmark" libbenchmark-dev
run_bazel "$@"
