#!/usr/bin/env bash
# The whole suite for every supported TensorFlow on every Python from 3.10 to 3.13 that this machine has, and a table of it.
#
#     tools/test_matrix.sh [ARGUMENT...]
#     tools/test_matrix.sh --nightly [ARGUMENT...]    for tf-nightly and keras-nightly instead, on python3; needs uv
#
# Arguments go to pytest. What is tested is the last commit, by tools/test.sh in a checkout of its own in .cache/matrix; this
# checkout stays as it is. A run that was stopped goes on where it was: what passed with the same commit and arguments is not
# run again. There is one environment for each TensorFlow, of 2.7 GB, which every other Python makes anew.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
matrix=${root}/.cache/matrix

fail() {
  printf 'tf_agc: %s\n' "$*" >&2
  exit 1
}

# Not into the table, which goes to stdout.
say() {
  printf 'tf_agc: %s\n' "$*" >&2
}

# check_out NAME: sets `checkout` and `commit`.
check_out() {
  checkout=${matrix}/$1
  [[ -d ${checkout} ]] || git clone --quiet --no-checkout "${root}" "${checkout}"
  git -C "${checkout}" fetch --quiet "${root}" HEAD
  git -C "${checkout}" checkout --quiet --force --detach FETCH_HEAD
  commit=$(git -C "${checkout}" rev-parse --short HEAD)
  [[ -z $(git -C "${root}" status --porcelain) ]] || say "changes without a commit are not tested"
}

# find_python VERSION: prints the path of one that runs. Those of pyenv may be not on the PATH, or there and not run.
find_python() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-${HOME}/.pyenv}/versions/$1".*/bin/python; do
    if "${candidate}" -c '' 2>/dev/null; then
      command -v "${candidate}"
      return
    fi
  done
  return 1
}

# lock_nightly PYTHON: makes the lock of today's nightly builds, and prints its release.
lock_nightly() {
  local lock=${matrix}/nightly.lock version stand_in
  command -v uv >/dev/null || fail "there is no uv: run 'python3 -m pip install uv', then start again."
  rm -f "${checkout}"/requirements/*.lock
  git -C "${checkout}" checkout --quiet --force
  cp "$(printf '%s\n' "${checkout}"/requirements/tensorflow-*.lock | sort -V | tail -n 1)" "${lock}"
  echo 'tensorflow ; python_version < "0"' >"${matrix}/override"
  printf '%s\n' tf-nightly keras-nightly |
    uv pip compile --quiet --python "$1" --generate-hashes --override "${matrix}/override" \
      "${checkout}/requirements/requirements.in" - --upgrade-package tf-nightly --upgrade-package keras-nightly \
      --output-file "${lock}" >/dev/null || fail "uv could not make a lock for tf-nightly and keras-nightly."
  version=$(sed -n 's/^tf-nightly==\([^ ;]*\).*/\1/p' "${lock}")
  # Packages and tools/setup.sh ask for a distribution of the name `tensorflow`: an empty one answers.
  stand_in=${matrix}/tensorflow-${version}-py3-none-any.whl
  "$1" - "${version}" "${stand_in}" <<'PROGRAM'
import sys, zipfile
version, file = sys.argv[1:]
files = {
    "METADATA": f"Metadata-Version: 2.1\nName: tensorflow\nVersion: {version}\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: tf_agc\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}
with zipfile.ZipFile(file, "w") as wheel:
    for name, content in files.items():
        wheel.writestr(zipfile.ZipInfo(f"tensorflow-{version}.dist-info/{name}"), content)
PROGRAM
  echo "tensorflow @ file://${stand_in} --hash=sha256:$(sha256sum "${stand_in}" | cut -d ' ' -f 1)" >>"${lock}"
  mv "${lock}" "${checkout}/requirements/tensorflow-${version%.*.*}.lock"
  echo "${version%.*.*}"
}

# versions RELEASE: the beginning of a row, from the environment that tools/test.sh has made.
versions() {
  # shellcheck disable=SC2016
  TF_CPP_MIN_LOG_LEVEL=3 bash -c 'source "$0" && "${VENV}/bin/python" -c "
import platform, keras, tensorflow
print(f\"| {tensorflow.__version__} | {keras.__version__} | {platform.python_version()} |\")"' \
    "${checkout}/tools/setup.sh" --tensorflow "$1" 2>/dev/null | tail -n 1
}

# test_one RELEASE PYTHON ARGUMENT...: sets `row`; fails if a test does.
test_one() {
  local name=tensorflow-$1-python-$2 wanted="${commit} ${*:3}" log passed has result status=0
  log=${matrix}/${name}.log
  passed=${matrix}/${name}.passed
  if [[ -f ${passed} && $(head -n 1 "${passed}") == "${wanted}" ]]; then
    row=$(tail -n 1 "${passed}")
    return
  fi
  rm -f "${passed}"
  say "testing TensorFlow $1 on Python $2; the log is ${log}"
  PYTHON=$(find_python "$2")
  export PYTHON
  "${checkout}/tools/test.sh" --tensorflow "$1" "${@:3}" >"${log}" 2>&1 </dev/null || status=1
  # pytest's summary, after which it lets out what TensorFlow wrote to stderr before the first test; without one, what the
  # suite ended with.
  result=$(sed -n 's/^==* \(.*[0-9] \(passed\|failed\|error\).*[^ =]\) *=*$/\1/p' "${log}" | tail -n 1)
  [[ -n ${result} ]] || result=$(tail -n 1 "${log}")
  has=$(versions "$1") || true
  row="${has:-| $1 | | $2 |} ${result} |"
  ((status != 0)) || printf '%s\n' "${wanted}" "${row}" >"${passed}"
  return "${status}"
}

mkdir -p "${matrix}"
pythons=()
if [[ ${1:-} == --nightly ]]; then
  shift
  check_out nightly
  releases=("$(lock_nightly "$(find_python 3)")")
  pythons=(3)
  # They are about the locks that are committed.
  set -- --ignore=tests/package/test_dependencies.py \
    --deselect=tests/tools/test_setup.py::test_lock_holds_what_is_required "$@"
else
  check_out checkout
  for version in 3.10 3.11 3.12 3.13; do
    if find_python "${version}" >/dev/null; then
      pythons+=("${version}")
    else
      say "there is no Python ${version} here"
    fi
  done
  ((${#pythons[@]})) || fail "there is no Python here: install Python 3.10 to 3.13."
  # The newest first.
  mapfile -t releases < <(printf '%s\n' "${checkout}"/requirements/*.lock | sed 's/.*tensorflow-//; s/\.lock$//' | sort -Vr)
fi

# Python changes faster than TensorFlow: only for the latter is C++ compiled again.
rows=()
failed=0
for release in "${releases[@]}"; do
  for version in "${pythons[@]}"; do
    test_one "${release}" "${version}" "$@" || failed=1
    say "${row}"
    rows+=("${row}")
  done
done

cat <<TABLE
Commit ${commit}, $(date +%Y-%m-%d), on $(sed -n 's/^PRETTY_NAME="\(.*\)"/\1/p' /etc/os-release), $(nproc) cores of \
$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1):

| TensorFlow | Keras | Python | result |
|---|---|---|---|
TABLE
printf '%s\n' "${rows[@]}"
exit "${failed}"
