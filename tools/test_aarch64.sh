#!/usr/bin/env bash
# The C++ tests of cc/core, compiled for aarch64 by Debian's cross compiler and run in QEMU. Not Bazel's: it would take a
# toolchain's description as long as this. Sources that have passed are not compiled again.

set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
need_googletest
need_aarch64

cd "${ROOT}"
out=${CACHE}/aarch64
mkdir -p "${out}"
sources=(cc/core/*.cc cc/core/*.h "${BASH_SOURCE[0]}")
hash=$(aarch64-linux-gnu-g++ --version | cat - "${sources[@]}" | sha256sum)
if [[ -f ${out}/passed && $(<"${out}/passed") == "${hash}" ]]; then
  say "the tests of cc/core have passed on aarch64 with these sources"
  exit
fi

googletest=/usr/src/googletest/googletest
options=(-std=c++17 -O2 -Wall -Wextra -Werror -I. -isystem "${googletest}/include")
# As in bazel/isa.bzl.
loops=(-O3 -fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math -ffp-contract=off -DTF_AGC_ISA_LEVEL=baseline)

# compile NAME SOURCE OPTION...: makes NAME.o.
compile() {
  say "compiling $2 for aarch64"
  aarch64-linux-gnu-g++ "${options[@]}" -c "$2" -o "${out}/$1.o" "${@:3}"
}

compile loops cc/core/loops.cc "${loops[@]}" &
compiling=$!
compile gtest "${googletest}/src/gtest-all.cc" -w "-I${googletest}"
compile gtest_main "${googletest}/src/gtest_main.cc" -w
for name in agc cpu fuzz_input agc_test fuzz_input_test job_test; do compile "${name}" "cc/core/${name}.cc"; done
wait "${compiling}"

for test in agc_test fuzz_input_test job_test; do
  aarch64-linux-gnu-g++ -static "${out}"/{"${test}",fuzz_input,agc,cpu,loops,gtest,gtest_main}.o -o "${out}/${test}" -lpthread \
    2>"${out}/link.log" || fail "${test} does not link for aarch64: ${out}/link.log"
  # Without the slowest: threads that share maps are job_test's, and wide maps only repeat what narrow ones do.
  qemu-aarch64 "${out}/${test}" --gtest_brief=1 \
    --gtest_filter='-Job.SharedMaps:OneAddend/*:Backward.MoreThreadsThanGroups:Sizes/EverySize.EqualsPlainLoops/2?'
done
echo "${hash}" >"${out}/passed"
