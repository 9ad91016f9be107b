#!/usr/bin/env bash
# Fails if an archive or object given as argument defines a weak symbol. The linker keeps one copy of a weak symbol for the
# whole library: one that was compiled for x86-64-v4 would be called, and crash, on every lesser machine.

set -euo pipefail

weak=$(nm --demangle --defined-only "$@" | grep -E '^[0-9a-f]+ [WVu] ' || true)
if [[ -n "${weak}" ]]; then
  printf 'weak symbols in %s:\n%s\n' "$*" "${weak}" >&2
  exit 1
fi
