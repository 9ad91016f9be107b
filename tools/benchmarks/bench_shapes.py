"""The shapes and types that the benchmarks of the op time, on the CPU and on a GPU. Knows no TensorFlow.

cc/core/agc_bench.cc, which times the loops alone, has `SHAPES` once more in C++; a test compares them.
"""

import math

# (N, H, W, C)
SHAPES = (
    (32, 32, 32, 64),
    (32, 56, 56, 64),
    (16, 112, 112, 64),
    (128, 14, 14, 256),
    (64, 28, 28, 128),
    (32, 7, 7, 2048),
    (128, 32, 32, 16),
    (1, 56, 56, 64),
    (1, 224, 224, 32),
    (8, 28, 28, 513),
)
QUICK_SHAPES = ((32, 32, 32, 64), (1, 56, 56, 64), (8, 28, 28, 513))
CHANNELS_FIRST_SHAPES = SHAPES[:4]
DTYPES = ("float32", "bfloat16", "float16")

# Of 8 MB and more in float32.
JUNCTION_SHAPES = tuple(shape for shape in SHAPES if math.prod(shape) >= 2**21)
JUNCTION_DTYPES = DTYPES[:2]

# On a GPU besides `SHAPES`. Its goals are for the last two, of 64 MB and more in bfloat16.
LARGE_SHAPES = ((32, 56, 56, 256), (32, 28, 28, 512), (32, 14, 14, 1024), (64, 112, 112, 64), (128, 56, 56, 256))
# One sample that stays in the cache.
LATENCY_SHAPE = (1, 56, 56, 64)


def parse(text: str) -> tuple[int, ...]:
    """A shape as an option has it, N,H,W,C. Raises ValueError for anything else."""
    shape = tuple(map(int, text.split(",")))
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"must be four sizes N,H,W,C, got {text!r}")
    return shape
