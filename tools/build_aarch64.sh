#!/usr/bin/env bash
# Builds the wheel for aarch64 on x86-64 with Debian's cross compiler, into .cache/aarch64/wheel; installs nothing.
#
#     tools/build_aarch64.sh [--tensorflow X]    X: a release with a lock in requirements/; the newest if not given
#
# The headers and libraries are those of TensorFlow's own wheel for aarch64. Nothing is run: tools/smoke_aarch64.sh does that.

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
(($# == 0)) || fail "build_aarch64.sh takes --tensorflow X and nothing else, got '$*'."
need_file /usr/bin/aarch64-linux-gnu-g++ "a compiler for aarch64" g++-aarch64-linux-gnu

cross=${CACHE}/aarch64
# Of the lock: TensorFlow, what it imports, and what runs tests. Python 3.11 is what smoke_aarch64.sh has.
packages=" absl-py astunparse certifi charset-normalizer flatbuffers gast google-pasta grpcio h5py hypothesis idna iniconfig \
keras markdown-it-py mdurl ml-dtypes namex numpy opt-einsum optree packaging pluggy protobuf pygments pytest requests \
rich setuptools six sortedcontainers tensorflow termcolor typing-extensions urllib3 wheel wrapt "
site=${cross}/site-${TENSORFLOW_VERSION}-$(lock_hash)
if [[ ! -d ${site} ]]; then
  say "fetching TensorFlow ${TENSORFLOW_VERSION} for aarch64, and what it needs"
  rm -rf "${site}.new"
  mkdir -p "${cross}"
  awk -v packages="${packages}" '/^[a-z0-9]/ { wanted = index(packages, " " substr($0, 1, index($0, "==") - 1) " ") } wanted' \
    "${LOCK}" >"${cross}/requirements"
  platforms=()
  for glibc in 17 26 27 28 34; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
  "${VENV}/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --require-hashes --no-compile \
    --only-binary=:all: "${platforms[@]}" --implementation cp --python-version 3.11 \
    --target "${site}.new" -r "${cross}/requirements" >"${cross}/pip.log" 2>&1 </dev/null ||
    fail "pip could not fetch packages for aarch64: see the end of ${cross}/pip.log."
  mv "${site}.new" "${site}"
fi

# Bazel describes the compiler and the linker that it finds under their plain names. An output base of its own leaves the usual
# one's as they are.
mkdir -p "${cross}/bin"
for tool in ar dwp gcc gcov ld ld.gold nm objcopy objdump strip; do
  ln -sf "/usr/bin/aarch64-linux-gnu-${tool}" "${cross}/bin/${tool}"
done
bazel=(--output_base="${cross}/bazel" --max_idle_secs=60)
options=(--config=aarch64 --repo_env=TF_AGC_TENSORFLOW="${site}/tensorflow")
PATH=${cross}/bin:${PATH}
run_bazel "${bazel[@]}" build "${options[@]}" //:wheel
built=("$(run_bazel "${bazel[@]}" info "${options[@]}" bazel-bin 2>/dev/null)"/wheel/*.whl)
rm -rf "${cross}/wheel"
mkdir "${cross}/wheel"
cp "${built[0]}" "${cross}/wheel"
say "built ${cross}/wheel/${built[0]##*/}"
