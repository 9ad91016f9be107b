#!/usr/bin/env bash
# Every test: C++, formatting, Python. Arguments go to pytest, for example: tools/test.sh -k layer
# With another TensorFlow than the newest: tools/test.sh --tensorflow 2.20 -k layer
# pytest runs last, against the installed wheel, and its summary is the last line of standard output.

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
need_googletest
need_file /usr/bin/dot "Graphviz, which keras.utils.plot_model calls" graphviz
need_sanitizers
tests=(//cc/...)
# Some distributions set more than the sanitizers stand, and a container cannot change it.
if ((MMAP_RANDOM_BITS > 28)); then
  say "tests with sanitizers are left out: they need sudo sysctl vm.mmap_rnd_bits=28"
  tests+=(--test_tag_filters=-sanitizer)
fi

# bazel/cuda.bzl finds nvcc, and refuses one that is too old.
if run_bazel query @local_cuda//:toolkit >/dev/null 2>&1; then
  # For the oldest architecture and the newest, which take different ways through primitives.h: this is about whether
  # everything compiles and links. Before the build, whose libraries lie in the same place and are the ones that tests in
  # Python take.
  run_bazel test --config=cuda --repo_env=TF_AGC_CUDA_ARCHITECTURES="75 90" \
    //cc:cuda_symbols_test //cc/core/cuda:cuda_symbols_test
else
  say "there is no nvcc of release 12.1 or newer: what only CUDA's compiler takes is not compiled"
fi

"${ROOT}/tools/build.sh" --tensorflow "${RELEASE}"
run_bazel test "${tests[@]}"
if (need_aarch64); then
  "${ROOT}/tools/test_aarch64.sh" --tensorflow "${RELEASE}"
else
  say "cc/core is not tested on aarch64"
fi
# Programs that tests in Python start.
run_bazel build //cc/serving:saved_model_runner //cc/serving:saved_model_runner_without_ops

cd "${ROOT}"
python=(setup.py tests tf_agc tools)
"${VENV}/bin/ruff" check --quiet "${python[@]}" || fail "ruff check found the errors above: correct them."
"${VENV}/bin/ruff" format --quiet --check "${python[@]}" ||
  fail "the Python files are not formatted: run ${VENV}/bin/ruff format ${python[*]}."
"${VENV}/bin/mypy" || fail "mypy found the errors above: correct the types."
find cc \( -name '*.cc' -o -name '*.cu' -o -name '*.h' \) -print0 | xargs -0 "${VENV}/bin/clang-format" --dry-run -Werror ||
  fail "the C++ files are not formatted: run ${VENV}/bin/clang-format -i on those above."

# The executable and not `python -m pytest`, which would put the checkout, and so the sources, before the installed wheel.
# A file of tests stays in one process, so that what its tests share is made once.
exec "${VENV}/bin/pytest" --numprocesses=2 --dist=loadfile "$@"
