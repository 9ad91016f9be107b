#!/usr/bin/env bash
# libFuzzer on the CPU's arithmetic, under AddressSanitizer and UndefinedBehaviorSanitizer: fuzz_core.sh MINUTES [SEED]
# A finding ends it, and is a file in .cache/fuzz; `fuzz_core.sh FILE` runs that one input again.

set -euo pipefail
usage="usage: tools/fuzz/fuzz_core.sh MINUTES [SEED], or tools/fuzz/fuzz_core.sh FILE"
[[ $# == 1 && -f $1 || ${1:-} =~ ^[1-9][0-9]*$ && $# -le 2 && ${2:-1} =~ ^[1-9][0-9]*$ ]] || {
  echo "${usage}" >&2
  exit 2
}
input=$1 seed=${2:-1}
[[ ! -f ${input} ]] || input=$(realpath "${input}")
set --
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

need_googletest
# Clang 14 and 19 have been seen to work; the runtime is a package of its own.
has_fuzzer() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
    clang++ -x c++ -fsanitize=fuzzer,address,undefined -o /dev/null - 2>/dev/null
}
command -v clang++ >/dev/null || install "Clang" clang
if ! has_fuzzer; then
  major=$(clang++ -dumpversion)
  install "Clang's libFuzzer" "libclang-rt-${major%%.*}-dev"
  has_fuzzer || fail "clang++ does not link -fsanitize=fuzzer: install libFuzzer for it."
fi

# Another compiler, so other outputs and another server: nothing that GCC built is built again for it.
output=${CACHE}/bazel_clang
bazel=("${BAZEL_PATH}" "--output_base=${output}")
mkdir -p "${CACHE}/fuzz"
cd "${ROOT}"
"${bazel[@]}" build --config=fuzz --repo_env=CC=clang //cc/core:fuzzer
fuzzer=$("${bazel[@]}" info --config=fuzz --repo_env=CC=clang bazel-bin 2>/dev/null)/cc/core/fuzzer
"${bazel[@]}" shutdown

export UBSAN_OPTIONS=print_stacktrace=1
if [[ -f ${input} ]]; then
  exec "${fuzzer}" "${input}"
fi
# Empty: the same seed makes the same inputs.
rm -rf "${CACHE}/fuzz/corpus"
mkdir "${CACHE}/fuzz/corpus"
exec "${fuzzer}" -max_total_time=$((input * 60)) -seed="${seed}" -max_len=256 -len_control=0 -timeout=60 -rss_limit_mb=4096 \
  -artifact_prefix="${CACHE}/fuzz/" -print_final_stats=1 "${CACHE}/fuzz/corpus"
