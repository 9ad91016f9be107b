#!/usr/bin/env bash
# Fails if a shared library given as argument asks others for CUDA's functions, or hands out its own. TensorFlow's library
# would answer with stubs of another release, without a word from the linker.

set -euo pipefail

for library in "$@"; do
  symbols=$(nm -D --format=posix "${library}" | grep -E '^(__)?cu(da|d|[A-Z])' || true)
  if [[ -n ${symbols} ]]; then
    printf 'symbols of CUDA that %s imports (U) or exports:\n%s\n' "${library}" "${symbols}" >&2
    exit 1
  fi
done
