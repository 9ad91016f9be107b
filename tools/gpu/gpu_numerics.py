"""What gpu_check.py expects of the kernels, in float64 and without TensorFlow, and its types in memory.

The definition is tf_agc/reference.py, with which test_gpu_check.py compares what is here; how far results may be off is
in agc_numerics.py. Maps are [N, P, C] in here, whatever their layout in memory.
"""

from collections.abc import Sequence

import numpy as np

import agc_numerics
from agc_numerics import Case, parameter_dtype

ALPHA = {"leaky_relu": 0.25, "elu": 1.0}  # exact as a float, which the op has for it


def storage(dtype: str) -> np.dtype:
    """NumPy's type of the same size; bfloat16, which it has not, is kept as bits."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds float64 values, to the nearest even where that is a question."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 values of what is stored."""
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


def has_dshortcut(case: Case) -> bool:
    """Whether the backward pass takes the shortcut and writes its gradient; of linear, that is dy."""
    return case.shortcut is not None and case.activation != "linear"


def result_kinds(case: Case) -> dict[str, str]:
    """What both passes write, and whether it is of "maps", of each "map" or of each "channel"."""
    kinds = {"y": "maps", "mean": "map", "dx": "maps", "dgain": "channel", "dmean_scale": "channel"}
    if case.bias is not None:
        kinds["dbias"] = "channel"
    if has_dshortcut(case):
        kinds["dshortcut"] = "maps"
    return kinds


def make_case(shape: tuple[int, ...], dtype: str, activation: str, seed: int, addends: Sequence[str] = ()) -> Case:
    """Random maps and parameters; dy is 0 where z is too near a kink for every right kernel to fall on one side.

    `shape`: (N, P, C). `addends`: which of "bias" and "shortcut" there are.
    """
    rng = np.random.default_rng(seed)

    def rounded(values, dtype=dtype):
        return decode(encode(values, dtype), dtype)

    (batch, _, channels), u = shape, parameter_dtype(dtype)
    x = 2 * rng.standard_normal(shape, np.float32) + rng.standard_normal(channels, np.float32)
    case = Case(
        x=rounded(x),
        gain=rounded(rng.uniform(0.3, 3, channels) * rng.choice([-1, 1], channels), u),
        mean_scale=rounded(rng.uniform(-0.5, 1.5, channels), u),
        dy=rounded(rng.standard_normal(shape, np.float32)),
        dmean=rounded(rng.standard_normal((batch, channels)), u),
        dtype=dtype,
        activation=activation,
        alpha=ALPHA.get(activation, 0.0),
        bias=rounded(rng.standard_normal(channels), u) if "bias" in addends else None,
        shortcut=rounded(rng.standard_normal(shape, np.float32)) if "shortcut" in addends else None,
    )
    case.dy[agc_numerics.near_kinks(case, _z(case))] = 0
    return case


def make_timing_case(shape: tuple[int, ...], dtype: str, activation: str, junction: bool = False) -> Case:
    """Maps for timing, in which a block of random numbers is repeated. Their results are not to be compared.

    With `junction` there are a bias and a shortcut.
    """
    rng = np.random.default_rng(0)
    x, dy, shortcut = (
        np.resize(rng.standard_normal(2**20 + 1, np.float32), shape).astype(np.float64) for _ in range(3)
    )
    ones, zeros = np.ones(shape[-1]), np.zeros((shape[0], shape[-1]))
    alpha = ALPHA.get(activation, 0.0)
    return Case(x, ones, ones, dy, zeros, dtype, activation, alpha, *((ones, shortcut) if junction else ()))


def _z(case: Case) -> np.ndarray:
    z = case.gain * (case.x - case.mean_scale * case.x.mean(1, keepdims=True))
    return sum((term for term in (case.bias, case.shortcut) if term is not None), z)


def expected(case: Case) -> dict[str, np.ndarray]:
    """What `result_kinds` names."""
    positions = case.x.shape[1]
    mean = case.x.mean(1)
    u = case.x - case.mean_scale * mean[:, np.newaxis]
    z = _z(case)
    if case.activation == "linear":
        y, slope = z, 1.0
    elif case.activation == "relu6":
        y, slope = np.clip(z, 0, 6), (z > 0) & (z < 6)
    elif case.activation == "elu":
        y = np.where(z > 0, z, case.alpha * np.expm1(np.minimum(z, 0)))
        slope = np.where(z > 0, 1.0, y + case.alpha)
    else:  # relu is leaky_relu with alpha 0
        slope = np.where(z > 0, 1.0, case.alpha)
        y = z * slope
    dz = case.dy * slope
    results = {
        "y": y,
        "mean": mean,
        "dx": case.gain * (dz - case.mean_scale * dz.mean(1, keepdims=True)) + case.dmean[:, np.newaxis] / positions,
        "dgain": (dz * u).sum((0, 1)),
        "dmean_scale": -case.gain * (mean * dz.sum(1)).sum(0),
        "dbias": dz.sum((0, 1)),
        "dshortcut": dz,
    }
    return {name: results[name] for name in result_kinds(case)}


def errors(case: Case, want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, float]:
    """For each result, the largest error as a multiple of what is allowed; NaN where one is not a number."""
    allowed = agc_numerics.allowed_errors(case, want)
    return {name: float((np.abs(got[name] - want[name]) / allowed[name]).max(initial=0)) for name in want}
