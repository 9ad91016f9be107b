"""What nvcc says of the main kernels for sm_90: registers, spills, and so blocks on a multiprocessor, as plan.h counts.

Only compiled, not run: this needs nvcc and no GPU.
"""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

_REGISTERS = 65536  # of a multiprocessor
_THREADS = 256  # of a block: plan.h's kMaxThreads

# Kernel, pass, its template arguments, vector, layout; blocks on a multiprocessor; bytes, stored and loaded together,
# that may go to memory for want of registers.
_KERNELS = (
    ("OnChip", "Backward", "Bfloat16, false, true", 8, "Last", 3, 0),
    ("OnChip", "Backward", "Half, false, true", 8, "Last", 3, 0),
    ("OnChip", "Backward", "float, false, true", 4, "Last", 3, 0),
    ("OnChip", "Backward", "Bfloat16, true, true", 8, "Last", 3, 16),
    ("OnChip", "Backward", "Half, true, true", 8, "Last", 3, 16),
    ("OnChip", "Backward", "float, true, true", 4, "Last", 3, 0),
    ("OnChip", "Backward", "Bfloat16, true, false", 8, "Last", 2, 0),
    ("OnChip", "Backward", "float, false, false", 4, "Last", 3, 0),
    ("OnChip", "Forward", "Bfloat16, false", 8, "Last", 4, 64),
    ("OnChip", "Forward", "Half, false", 8, "Last", 4, 0),
    ("OnChip", "Forward", "float, false", 4, "Last", 4, 0),
    ("OnChip", "Forward", "Bfloat16, true", 8, "Last", 3, 32),
    ("OnChip", "Forward", "float, true", 4, "Last", 3, 0),
    ("OnChip", "Forward", "Bfloat16, false", 8, "First", 4, 0),
    ("OnChip", "Forward", "Half, false", 8, "First", 4, 0),
    ("SumTiles", "Backward", "Bfloat16, false, true", 8, "Last", 2, 0),
    ("SumTiles", "Backward", "Bfloat16, false, false", 8, "Last", 2, 0),
    ("SumTiles", "Backward", "Bfloat16, true, true", 8, "Last", 2, 0),
    ("SumTiles", "Backward", "Bfloat16, true, false", 8, "Last", 2, 0),
    ("SumTiles", "Backward", "Half, true, false", 8, "Last", 2, 0),
    ("SumTiles", "Backward", "float, true, false", 4, "Last", 2, 0),
)


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """Registers and spilled bytes by kernel, pass, template arguments, vector and layout."""
    from gpu import gpu_check

    nvcc = gpu_check.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
    folder = tmp_path_factory.mktemp("cuda")
    kernels = (
        f"template __global__ void {kernel}<{name}Pass<{arguments}>, {vector}, Layout::kChannels{layout}>"
        f"(const __grid_constant__ LaunchArgs<{name}Args>);"
        for kernel, name, arguments, vector, layout, *_ in _KERNELS
    )
    source = folder / "kernels.cu"
    source.write_text(
        '#include "cc/core/cuda/backward_pass.h"\n#include "cc/core/cuda/forward_pass.h"\n'
        "namespace tf_agc::core::cuda {\n" + "\n".join(kernels) + "\n}\n"
    )
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT}", "-cubin", "-gencode=arch=compute_90,code=sm_90", "-Xptxas=-v"]
    done = subprocess.run([*command, "-o", folder / "kernels.cubin", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    report = re.findall(
        r"entry function 'void \S*?(\w+)<\S*?(\w+)Pass<(.*?)>, (\d+), \S*?Layout\)([01])>.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        names,
        re.DOTALL,
    )
    return {
        (kernel, name, arguments.replace("tf_agc::core::", ""), int(vector), ("Last", "First")[int(layout)]): (
            int(registers),
            int(stores) + int(loads),
        )
        for kernel, name, arguments, vector, layout, stores, loads, registers in report
    }


@pytest.mark.parametrize("kernel", _KERNELS, ids=lambda kernel: " ".join(map(str, kernel[:5])))
def test_blocks_share_a_multiprocessor(resources, kernel):
    *key, blocks, most_spilled = kernel
    registers, spilled = resources[tuple(key)]
    # A warp takes them by 256: eight a thread.
    assert _REGISTERS // (-(-registers // 8) * 8 * _THREADS) >= blocks, registers
    assert spilled <= most_spilled
