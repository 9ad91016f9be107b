#!/usr/bin/env bash
# Builds the wheel with Bazel and installs it into the venv of its TensorFlow (the newest, or --tensorflow X). The libraries
# also go beside the sources, so that a Python started in the checkout finds them. A second run without changes builds and
# installs nothing.

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run_bazel build //:wheel

wheels=("${ROOT}"/bazel-bin/wheel/*.whl)
wheel=${wheels[0]}
stamp=${VENV}/tf_agc_wheel
hash=$(sha256sum <"${wheel}")
library=("${VENV}"/lib/python*/site-packages/tf_agc/native_library)
if [[ ! -f ${stamp} || $(<"${stamp}") != "${hash}" || ! -d ${library[0]} ]]; then
  say "installing ${wheel##*/}"
  "${VENV}/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --force-reinstall "${wheel}"
  echo "${hash}" >"${stamp}"
  library=("${VENV}"/lib/python*/site-packages/tf_agc/native_library)
fi

# Written aside and moved: a process that has the old library open keeps it.
beside=${ROOT}/tf_agc/native_library
mkdir -p "${beside}"
for file in "${library[0]}"/*; do
  if ! cmp --silent "${file}" "${beside}/${file##*/}"; then
    cp "${file}" "${beside}/.new"
    mv "${beside}/.new" "${beside}/${file##*/}"
  fi
done
