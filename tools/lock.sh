#!/usr/bin/env bash
# Makes the locks in requirements/ from requirements.in with uv, which keeps the versions that still fit.
#
#     tools/lock.sh           all of them, after a change of requirements.in
#     tools/lock.sh 2.22.0    that of one TensorFlow: a new release, or another patch of one that has a lock
#
# A lock is all that a TensorFlow release needs to be supported: every script takes it from there (tools/setup.sh).

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() {
  printf 'tf_agc: %s\n' "$*" >&2
  exit 1
}

# lock VERSION START: makes VERSION's lock, and keeps what fits of the lock START. A failure leaves no trace.
lock() {
  local version=$1 start=$2 target=${root}/requirements/tensorflow-${1%.*}.lock
  cp "${start}" "${scratch}/lock"
  (cd "${root}/requirements" && echo "tensorflow==${version}" | uv pip compile --quiet --universal --python-version 3.10 \
    --generate-hashes --custom-compile-command tools/lock.sh requirements.in - -o "${scratch}/lock" >/dev/null) ||
    fail "uv could not make a lock for TensorFlow ${version}: ${target} is as it was."
  mv "${scratch}/lock" "${target}"
  printf 'tf_agc: %s has TensorFlow %s\n' "${target#"${root}/"}" "${version}"
}

command -v uv >/dev/null || fail "there is no uv: run 'python3 -m pip install uv', then start again."
scratch=$(mktemp -d)
trap 'rm -rf "${scratch}"' EXIT
locks=("${root}"/requirements/tensorflow-*.lock)
case $#:${1:-} in
  0:)
    for file in "${locks[@]}"; do
      lock "$(sed -n 's/^tensorflow==\([^ ;]*\).*/\1/p' "${file}")" "${file}"
    done
    ;;
  1:[0-9]*.[0-9]*.[0-9]*)
    start=${root}/requirements/tensorflow-${1%.*}.lock
    [[ -f ${start} ]] || start=${locks[-1]}
    lock "$1" "${start}"
    ;;
  *) fail "lock.sh takes no argument or a whole version such as 2.22.0, got '$*'." ;;
esac
