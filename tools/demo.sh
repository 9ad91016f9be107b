#!/usr/bin/env bash
# Sets everything up, builds and installs the wheel, and runs the demo; arguments go to the demo (--help lists them).

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

"${root}/tools/build.sh"
exec "${root}/.venv/bin/python" "${root}/tools" demo.demo "$@"
