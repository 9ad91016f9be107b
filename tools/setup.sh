# shellcheck shell=bash
# The one place of set-up, sourced by build.sh, build_wheel.sh, test.sh and bazel.sh: compiler, a venv with everything in
# the lock, Bazel, and .bazelrc.configured. A second run finds all of it and fetches nothing. Nothing is built here.
#
# --tensorflow X, as the first argument of any of these scripts, chooses a TensorFlow release that has a lock in
# requirements/, and is taken off the arguments here. Without it: the newest, in .venv. Others are in .cache/venv-X.
# PYTHON=/path/to/python3 chooses the interpreter that the venv is made from, BAZEL=/path/to/bazel the Bazel. TF_AGC_CUDA=1
# builds with CUDA (docs/cuda.md).
# Afterwards: ${ROOT}, ${RELEASE}, ${VENV}, run_bazel, need_file. Every failure is one sentence on stderr; logs are in .cache.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
CACHE=${ROOT}/.cache

# A venv takes 2.7 GB, what Bazel keeps and pip's downloads the rest.
NEEDED_KILOBYTES=$((4 * 1024 * 1024))

# A Bazel that does not even tell its version in this time is fetching something that it does not get.
BAZEL_PROBE_SECONDS=30
BAZELISK_PACKAGE=@bazel/bazelisk@1.28.1

fail() {
  printf 'tf_agc: %s\n' "$*" >&2
  exit 1
}

say() {
  printf 'tf_agc: %s\n' "$*"
}

# choose_tensorflow [RELEASE]: sets RELEASE, LOCK and VENV.
choose_tensorflow() {
  local locks=("${ROOT}"/requirements/tensorflow-*.lock) releases newest
  releases=("${locks[@]##*/tensorflow-}")
  releases=("${releases[@]%.lock}")
  newest=${releases[-1]}
  RELEASE=${1-${newest}}
  LOCK=${ROOT}/requirements/tensorflow-${RELEASE}.lock
  [[ -f ${LOCK} ]] ||
    fail "--tensorflow must be one of ${releases[*]} (those with a lock in requirements), got '${RELEASE}'."
  VENV=${ROOT}/.venv
  [[ ${RELEASE} == "${newest}" ]] || VENV=${CACHE}/venv-${RELEASE}
}

# install WHAT PACKAGE...: installs Debian packages, for want of WHAT.
install() {
  local what=$1
  shift
  local advice="run 'sudo apt-get install $*', then start again"
  local sudo=()
  command -v apt-get >/dev/null || fail "${what} is missing and this is neither Debian nor Ubuntu: install what they call $*."
  if [[ $(id -u) != 0 ]]; then
    sudo -n true 2>/dev/null || fail "${what} is missing and only root may install it: ${advice}."
    sudo=(sudo)
  fi
  say "installing $*"
  {
    "${sudo[@]}" apt-get -qq update &&
      "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq --yes --no-install-recommends install "$@"
  } >"${CACHE}/apt.log" 2>&1 </dev/null ||
    fail "${what} is missing and apt-get could not install it (${CACHE}/apt.log): ${advice}."
}

# need_file FILE WHAT PACKAGE...: installs the packages unless FILE exists.
need_file() {
  local file=$1
  shift
  [[ -e ${file} ]] || install "$@"
}

need_googletest() {
  need_file /usr/src/googletest/googletest/src/gtest-all.cc "GoogleTest" libgtest-dev
}

MMAP_RANDOM_BITS=$(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 0)

need_sanitizers() {
  local library
  for library in libasan libubsan libtsan; do
    # A path where g++ has it, else the bare name. Debian's g++ always has them.
    [[ $(g++ -print-file-name="${library}.so") == /* ]] ||
      fail "g++ has no ${library}, with which the C++ is tested: install the package of that name."
  done
}

need_aarch64() {
  need_file /usr/bin/aarch64-linux-gnu-g++ "a compiler for aarch64" g++-aarch64-linux-gnu
  need_file /usr/bin/qemu-aarch64 "an emulation of aarch64" qemu-user
}

check_compiler() {
  local options=(-std=c++17)
  command -v g++ >/dev/null || install "a C++ compiler" g++
  # cc/core is compiled for this level too (bazel/isa.bzl), whatever this machine runs.
  [[ $(uname -m) != x86_64 ]] || options+=(-march=x86-64-v4)
  g++ "${options[@]}" -fsyntax-only -x c++ /dev/null 2>/dev/null ||
    fail "g++ does not take ${options[*]}: install g++ 11 or newer."
}

python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

lock_hash() {
  sha256sum <"${LOCK}" | cut -c1-16
}

# The venv is whole when pip has finished with this lock file, in this place.
venv_stamp() {
  echo "$(lock_hash) ${VENV}"
}

venv_is_ready() {
  local version
  [[ -f ${VENV}/tf_agc_stamp && $(<"${VENV}/tf_agc_stamp") == "$(venv_stamp)" ]] || return 1
  version=$(python_version "${VENV}/bin/python") || return 1
  [[ -z ${PYTHON:-} || ${version} == "$(python_version "${PYTHON}")" ]]
}

make_venv() {
  local python=${PYTHON:-python3} version free
  command -v "${python}" >/dev/null ||
    fail "there is no ${python}: install Python 3.10 to 3.13, or name one with PYTHON=/path/to/python3."
  version=$(python_version "${python}") || fail "${python} does not run: name a Python with PYTHON=/path/to/python3."
  case ${version} in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) fail "${python} is Python ${version}: install 3.10 to 3.13, and name it with PYTHON=/path/to/python3." ;;
  esac
  free=$(df -Pk "${ROOT}" | awk 'NR == 2 { print $4 }')
  ((free >= NEEDED_KILOBYTES)) ||
    fail "${ROOT} has $((free / 1024)) MB of free disk space: $((NEEDED_KILOBYTES / 1024)) MB are needed."
  if ! "${python}" -c 'import ensurepip, venv' 2>/dev/null; then
    install "${python}'s venv module" "python${version}-venv"
    "${python}" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "${python} has no venv module: name another Python with PYTHON=/path/to/python3."
  fi

  # .venv is a usual name: one that was not made here is somebody's own.
  [[ ! -e ${VENV} || -f ${VENV}/tf_agc_stamp ]] ||
    fail "${VENV} was not made by this script: move it away, then start again."
  say "making ${VENV} with Python ${version} (some minutes)"
  rm -rf "${VENV}"
  mkdir -p "${VENV}"
  : >"${VENV}/tf_agc_stamp"
  "${python}" -m venv "${VENV}" >"${CACHE}/pip.log" 2>&1 ||
    fail "${python} could not make ${VENV}: see ${CACHE}/pip.log."
  # --no-deps: the lock is complete, and older pips stumble over extras when they resolve it once more.
  "${VENV}/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps --require-hashes \
    -r "${LOCK}" >>"${CACHE}/pip.log" 2>&1 </dev/null ||
    fail "pip could not install ${LOCK#"${ROOT}/"}: see the end of ${CACHE}/pip.log, then start again."
  venv_stamp >"${VENV}/tf_agc_stamp"
}

check_tensorflow() {
  TENSORFLOW_VERSION=$("${VENV}/bin/python" -c '
import importlib.metadata
print(importlib.metadata.version("tensorflow"))' 2>/dev/null) ||
    fail "there is no TensorFlow in ${VENV}: remove that directory, then start again."
  [[ ${TENSORFLOW_VERSION} == "${RELEASE}".* ]] ||
    fail "${VENV} has TensorFlow ${TENSORFLOW_VERSION} where ${RELEASE} is needed: remove that directory, then start again."
}

# Prints "GENERATION PATH" if the command is a Bazel that runs here and that WORKSPACE is written for.
probe_bazel() {
  local path version
  path=$(command -v "$1") || return 1
  version=$(cd "${ROOT}" && timeout "${BAZEL_PROBE_SECONDS}" "${path}" --version 2>/dev/null </dev/null) || return 1
  case ${version} in
    "bazel 7."*) echo "7 ${path}" ;;
    "bazel 4."* | "bazel no_version") echo "4 ${path}" ;; # Debian's does not know its version.
    *) return 1 ;;
  esac
}

get_bazelisk() {
  command -v npm >/dev/null || return 1
  say "looking for Bazelisk in npm"
  timeout "${BAZEL_PROBE_SECONDS}" npm install --silent --no-save --prefix "${CACHE}/bazelisk" "${BAZELISK_PACKAGE}" \
    >"${CACHE}/npm.log" 2>&1 </dev/null
}

find_bazel() {
  local stamp=${CACHE}/bazel candidate found=
  if [[ -f ${stamp} ]]; then
    read -r BAZEL_GENERATION BAZEL_PATH <"${stamp}"
    [[ ! -x ${BAZEL_PATH} || (-n ${BAZEL:-} && ${BAZEL_PATH} != "$(command -v "${BAZEL}")") ]] || return 0
  fi
  if [[ -n ${BAZEL:-} ]]; then
    found=$(probe_bazel "${BAZEL}") || fail "BAZEL=${BAZEL} does not run as Bazel 7 or Debian's Bazel 4: name another one, or none."
  else
    # Debian's `bazel` refuses the release in .bazelversion; the binary behind it, bazel-4, does not look there.
    for candidate in bazel bazelisk bazel-4; do
      ! found=$(probe_bazel "${candidate}") || break
    done
    if [[ -z ${found} ]] && get_bazelisk; then
      found=$(probe_bazel "${CACHE}/bazelisk/node_modules/.bin/bazelisk") || found=
    fi
    if [[ -z ${found} ]]; then
      install "Bazel" bazel-bootstrap "${BAZEL_COMPANIONS[@]}"
      found=$(probe_bazel bazel-4) ||
        fail "bazel-bootstrap's bazel-4 does not run: install Bazel $(<"${ROOT}/.bazelversion") and name it with BAZEL=/path/to/bazel."
    fi
  fi
  echo "${found}" >"${stamp}"
  read -r BAZEL_GENERATION BAZEL_PATH <"${stamp}"
}

BAZEL_COMPANIONS=(bazel-platforms bazel-rules-java bazel-rules-proto bazel-skylib)

# What .bazelrc cannot say for every machine.
write_bazelrc() {
  local file=${ROOT}/.bazelrc.configured environment lines repository
  environment=python-$(python_version "${VENV}/bin/python")-tensorflow-${TENSORFLOW_VERSION}-$(lock_hash)
  lines="# Written by tools/setup.sh for this machine and Bazel ${BAZEL_GENERATION}; changes are lost.
common --repo_env=TF_AGC_PYTHON=${VENV}/bin/python
common --repo_env=TF_AGC_ENVIRONMENT=${environment}"
  if [[ ${BAZEL_GENERATION} == 4 ]]; then
    # Debian's Bazel never fetches: the repositories that every build names are its own packages, or stand-ins of ours.
    for repository in \
      bazel_skylib=/usr/share/bazel/tools/skylib \
      platforms=/usr/share/bazel/platforms \
      rules_java=/usr/share/bazel/rules/java \
      rules_proto=/usr/share/bazel/rules/proto \
      "remote_coverage_tools=${ROOT}/bazel/debian/remote_coverage_tools" \
      "rules_cc=${ROOT}/bazel/debian/rules_cc"; do
      need_file "${repository#*=}/WORKSPACE" "a companion of Debian's Bazel" "${BAZEL_COMPANIONS[@]}"
      lines+=$'\n'"common --override_repository=${repository}"
    done
    # Its other sandbox prints a screenful of log for every action.
    lines+=$'\n'"build --spawn_strategy=processwrapper-sandbox"
  else
    lines+=$'\n'"common --noenable_bzlmod"
  fi
  [[ -z ${CI:-} ]] || lines+=$'\n'"build --config=dev"
  [[ ${TF_AGC_CUDA:-} != 1 ]] || lines+=$'\n'"build --config=cuda"
  [[ -f ${file} && $(<"${file}") == "${lines}" ]] || echo "${lines}" >"${file}"
}

run_bazel() {
  (cd "${ROOT}" && "${BAZEL_PATH}" "$@")
}

# The script's own arguments: sourced without arguments, this file shares them.
case ${1:-} in
  --tensorflow)
    choose_tensorflow "${2:-}"
    shift 2
    ;;
  --tensorflow=*)
    choose_tensorflow "${1#*=}"
    shift
    ;;
  *) choose_tensorflow ;;
esac
[[ ${ROOT} != *[[:space:]]* ]] || fail "${ROOT} has a space in its name, which Bazel does not take: move the checkout."
mkdir -p "${CACHE}" 2>/dev/null && [[ -w ${ROOT} ]] ||
  fail "${ROOT} cannot be written by $(id -un): take a checkout of your own."
check_compiler
venv_is_ready || make_venv
check_tensorflow
find_bazel
write_bazelrc
