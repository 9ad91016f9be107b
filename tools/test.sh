#!/usr/bin/env bash
# Every test: C++, formatting, Python. Arguments go to pytest, for example: tools/test.sh -k layer
# pytest runs last, against the installed wheel, and its summary is the last line.

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
need_file /usr/src/googletest/googletest/src/gtest-all.cc "GoogleTest" libgtest-dev

"${ROOT}/tools/build.sh"
run_bazel test //cc/...

cd "${ROOT}"
python=(setup.py tests tf_agc tools)
"${VENV}/bin/ruff" check --quiet "${python[@]}" || fail "ruff check found the errors above: correct them."
"${VENV}/bin/ruff" format --quiet --check "${python[@]}" ||
  fail "the Python files are not formatted: run .venv/bin/ruff format ${python[*]}."
"${VENV}/bin/mypy" || fail "mypy found the errors above: correct the types."
find cc \( -name '*.cc' -o -name '*.h' \) -print0 | xargs -0 "${VENV}/bin/clang-format" --dry-run -Werror ||
  fail "the C++ files are not formatted: run .venv/bin/clang-format -i on those above."

# The executable and not `python -m pytest`, which would put the checkout, and so the sources, before the installed wheel.
exec "${VENV}/bin/pytest" "$@"
