#!/usr/bin/env bash
# The wheel for aarch64, tried in QEMU: Debian's Python 3.11 and TensorFlow for aarch64 compare TensorFlow's kernels and XLA's
# with the float64 reference. It takes some minutes, and says nothing about speed.
#
#     tools/smoke_aarch64.sh [--tensorflow X] [ARGUMENT...]
#
# Arguments go to pytest, in place of a choice of tests. Those that start another Python cannot run.

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
need_aarch64
"${ROOT}/tools/build_aarch64.sh" --tensorflow "${RELEASE}"

cross=${CACHE}/aarch64
root=${cross}/root
if [[ ! -d ${root} ]]; then
  say "fetching Debian's Python for aarch64"
  apt=${cross}/apt
  mkdir -p "${apt}"/{lists,archives}/partial
  : >"${apt}/status" # Nothing is installed there, so that all dependencies are fetched.
  options=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=true
    -o Dir::State="${apt}" -o Dir::State::status="${apt}/status" -o Dir::Cache="${apt}")
  {
    apt-get "${options[@]}" update &&
      apt-get "${options[@]}" --yes --no-install-recommends --download-only install python3.11 libstdc++6
  } >"${apt}/log" 2>&1 </dev/null || fail "apt-get could not fetch Python for aarch64: see ${apt}/log."
  rm -rf "${root}.new"
  for package in "${apt}"/archives/*.deb; do dpkg-deb --extract "${package}" "${root}.new"; done
  mv "${root}.new" "${root}"
fi

rm -rf "${cross}/installed"
"${VENV}/bin/python" -m zipfile -e "${cross}"/wheel/*.whl "${cross}/installed"
(($# > 0)) || set -- tests/op/test_kernel.py tests/xla/test_xla.py \
  -k "test_every_combination and channels_last and not function and not hlo"
cd "${ROOT}"
# -P: not the sources of this checkout, which are for this machine's processor.
export PYTHONPATH=${cross}/installed:${cross}/site-${TENSORFLOW_VERSION}-$(lock_hash)
export PYTHONPYCACHEPREFIX=${cross}/pycache TF_CPP_MIN_LOG_LEVEL=2
exec qemu-aarch64 -L "${root}" "${root}/usr/bin/python3.11" -P -m pytest -p no:cacheprovider "$@"
