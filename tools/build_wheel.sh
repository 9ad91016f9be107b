#!/usr/bin/env bash
# Builds the wheel of a release into dist/, for one TensorFlow; installs nothing.
#
#     tools/build_wheel.sh [--tensorflow X]    X: a release with a lock in requirements/; the newest if not given
#
# One commit gives the same bytes wherever it is built, with the same compiler and Python. The last line is the wheel's
# SHA-256, as sha256sum prints it in dist/.

set -euo pipefail
case $#:${1:-} in
  0: | 1:--tensorflow | 1:--tensorflow=* | 2:--tensorflow) ;;
  1:-h | 1:--help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
  *)
    echo "tf_agc: build_wheel.sh takes --tensorflow X and nothing else, got '$*'." >&2
    exit 1
    ;;
esac
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run_bazel build //:wheel

built=("${ROOT}"/bazel-bin/wheel/*.whl)
name=${built[0]##*/}
wheel=${ROOT}/dist/${name}
mkdir -p "${ROOT}/dist"
if [[ ! -e ${wheel} ]]; then
  # Copied aside and moved: a wheel in dist/ is whole.
  cp "${built[0]}" "${ROOT}/dist/.new"
  chmod 644 "${ROOT}/dist/.new"
  mv "${ROOT}/dist/.new" "${wheel}"
elif ! cmp --silent "${built[0]}" "${wheel}"; then
  fail "${wheel} is another build of the same version, and was left alone: remove it, or raise PATCH in tf_agc/version.py."
fi
[[ -z $(git -C "${ROOT}" status --porcelain 2>/dev/null) ]] || say "the checkout has changes without a commit, and so has the wheel"
cd "${ROOT}/dist"
sha256sum "${name}"
