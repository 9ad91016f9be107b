#!/usr/bin/env bash
# Checks the CUDA kernels on a GPU: right, and how fast. --help lists the options. PYTHON=/path/to/python3 chooses the
# interpreter; it needs NumPy, and PyTorch for the comparison with its layers. Nothing is installed.

set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/.." gpu.gpu_check "$@"
