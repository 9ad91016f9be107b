#!/usr/bin/env bash
# Every test: C++, formatting, Python. Arguments go to pytest, for example: tools/test.sh -k layer
# pytest runs last, against the installed wheel, and its summary is the last line.

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
need_file /usr/src/googletest/googletest/src/gtest-all.cc "GoogleTest" libgtest-dev

"${ROOT}/tools/build.sh"
run_bazel test //cc/...
if command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
  # For one architecture: this is about whether everything compiles and links.
  run_bazel test --config=cuda --repo_env=TF_AGC_CUDA_ARCHITECTURES=90 \
    //cc:cuda_symbols_test //cc/core/cuda:cuda_symbols_test
else
  say "there is no nvcc: what only CUDA's compiler takes is not compiled"
fi

cd "${ROOT}"
python=(setup.py tests tf_agc tools)
"${VENV}/bin/ruff" check --quiet "${python[@]}" || fail "ruff check found the errors above: correct them."
"${VENV}/bin/ruff" format --quiet --check "${python[@]}" ||
  fail "the Python files are not formatted: run .venv/bin/ruff format ${python[*]}."
find cc \( -name '*.cc' -o -name '*.h' \) -print0 | xargs -0 "${VENV}/bin/clang-format" --dry-run -Werror ||
  fail "the C++ files are not formatted: run .venv/bin/clang-format -i on those above."

# The executable and not `python -m pytest`, which would put the checkout, and so the sources, before the installed wheel.
exec "${VENV}/bin/pytest" "$@"
