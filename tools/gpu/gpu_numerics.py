"""What gpu_check.py expects of the kernels, in float64 and without TensorFlow, and how far they may be off.

The definition is tf_agc/reference.py, and tools/agc_testing.py says what roundings are allowed; test_gpu_check.py
holds both against what is here. Maps are [N, P, C] in here, whatever their layout in memory.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

ACTIVATIONS = ("linear", "relu", "relu6", "leaky_relu", "elu")  # in the order of core::Activation
LAYOUTS = ("channels_last", "channels_first")  # of core::Layout
DTYPES = ("float16", "bfloat16", "float32", "float64")  # of core::DataType
ALPHA = {"leaky_relu": 0.25, "elu": 1.0}  # exact as a float, which the op has for it

_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
_SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


def parameter_dtype(dtype: str) -> str:
    """The type of parameters and means."""
    return "float64" if dtype == "float64" else "float32"


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


@dataclasses.dataclass(frozen=True)
class Case:
    """One call forward and one backward. All values are exact in the types of the op."""

    x: np.ndarray  # [N, P, C]
    gain: np.ndarray  # [C]
    mean_scale: np.ndarray  # [C]
    dy: np.ndarray  # [N, P, C]
    dmean: np.ndarray  # [N, C]
    dtype: str
    activation: str
    bias: np.ndarray | None = None  # [C]
    shortcut: np.ndarray | None = None  # [N, P, C]

    @property
    def alpha(self) -> float:
        return ALPHA.get(self.activation, 0.0)

    @property
    def has_dshortcut(self) -> bool:
        """Whether the backward pass takes the shortcut and writes its gradient; of linear, that is dy."""
        return self.shortcut is not None and self.activation != "linear"

    @property
    def results(self) -> dict[str, str]:
        """What both passes write, and whether it is of "maps", of each "map" or of each "channel"."""
        kinds = {"y": "maps", "mean": "map", "dx": "maps", "dgain": "channel", "dmean_scale": "channel"}
        if self.bias is not None:
            kinds["dbias"] = "channel"
        if self.has_dshortcut:
            kinds["dshortcut"] = "maps"
        return kinds


def make_case(
    batch: int,
    positions: int,
    channels: int,
    dtype: str,
    activation: str,
    seed: int,
    addends: Sequence[str] = (),
) -> Case:
    """Random maps and parameters; dy is 0 where z is too near a kink for every right kernel to fall on one side.

    `addends`: which of "bias" and "shortcut" there are.
    """
    rng = np.random.default_rng(seed)

    def rounded(values, dtype=dtype):
        return decode(encode(values, dtype), dtype)

    shape, u = (batch, positions, channels), parameter_dtype(dtype)
    x = 2 * rng.standard_normal(shape, np.float32) + rng.standard_normal(channels, np.float32)
    case = Case(
        x=rounded(x),
        gain=rounded(rng.uniform(0.3, 3, channels) * rng.choice([-1, 1], channels), u),
        mean_scale=rounded(rng.uniform(-0.5, 1.5, channels), u),
        dy=rounded(rng.standard_normal(shape, np.float32)),
        dmean=rounded(rng.standard_normal((batch, channels)), u),
        dtype=dtype,
        activation=activation,
        bias=rounded(rng.standard_normal(channels), u) if "bias" in addends else None,
        shortcut=rounded(rng.standard_normal(shape, np.float32)) if "shortcut" in addends else None,
    )
    offset = case.mean_scale * case.x.mean(1, keepdims=True)
    z, added = case.gain * (case.x - offset) + _added(case), _added(case, np.abs)
    for kink in {"linear": (), "relu6": (0, 6)}.get(activation, (0,)):
        terms = max(kink, 1) + np.abs(case.gain * offset) + added
        case.dy[np.abs(z - kink) <= 4 * _EPSILON[dtype] * terms] = 0
    return case


def make_timing_case(
    batch: int, positions: int, channels: int, dtype: str, activation: str, junction: bool = False
) -> Case:
    """Maps for timing, in which a block of random numbers is repeated. Their results are not to be compared.

    With `junction` there are a bias and a shortcut.
    """
    rng = np.random.default_rng(0)
    x, dy, shortcut = (
        np.resize(rng.standard_normal(2**20 + 1, np.float32), (batch, positions, channels)).astype(np.float64)
        for _ in range(3)
    )
    ones, zeros = np.ones(channels), np.zeros((batch, channels))
    return Case(x, ones, ones, dy, zeros, dtype, activation, *((ones, shortcut) if junction else ()))


def _added(case: Case, of_term: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray | float:
    """bias + shortcut, or a function of each, as far as they are there."""
    return sum(of_term(term) for term in (case.bias, case.shortcut) if term is not None)


def expected(case: Case) -> dict[str, np.ndarray]:
    """What `Case.results` names."""
    positions = case.x.shape[1]
    mean = case.x.mean(1)
    u = case.x - case.mean_scale * mean[:, np.newaxis]
    z = case.gain * u + _added(case)
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
    return {name: results[name] for name in case.results}


def errors(case: Case, want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, float]:
    """For each result, the largest error as a multiple of what is allowed; NaN where one is not a number.

    Allowed are one rounding of the maps to T and 16 roundings in U of the largest term that went into a result; in half
    and bfloat16, where a fused activation takes z from the rounded y, 4 roundings to T.
    """
    epsilon, epsilon_u = _EPSILON[case.dtype], _EPSILON[parameter_dtype(case.dtype)]
    from_rounded_y = set()
    if case.dtype in ("float16", "bfloat16") and case.activation != "linear":
        from_rounded_y = {"dgain"}
        if case.activation == "elu":
            from_rounded_y = {"dx", "dgain", "dmean_scale", "dbias", "dshortcut"}

    gain, mean_scale, slope = np.abs(case.gain), np.abs(case.mean_scale), max(1.0, case.alpha)
    u = np.abs(case.x - case.mean_scale * want["mean"][:, np.newaxis])
    x_max = np.abs(case.x).max((0, 1), initial=0)
    dy = np.abs(case.dy)
    added = _added(case, np.abs)
    largest = {
        "y": (gain * x_max * (1 + mean_scale) + added) * slope,
        "mean": x_max,
        "dx": gain * slope * dy.max((0, 1), initial=0) * (1 + mean_scale)
        + np.abs(case.dmean).max(initial=0) / case.x.shape[1],
        # elu finds z as log1p(y / alpha): an absolute error of about epsilon, so one of 1 / gain. What is added to z is
        # subtracted again.
        "dgain": slope * (dy * (u + (1 + added) / gain)).sum((0, 1)),
        # A mean of terms that cancel has the error of the terms.
        "dmean_scale": gain * x_max * slope * dy.sum((0, 1)),
        "dbias": slope * dy.sum((0, 1)),
        "dshortcut": slope * dy,
    }
    worst = {}
    for name, kind in case.results.items():
        roundings = 4 * epsilon if name in from_rounded_y else 16 * epsilon_u
        of_result = epsilon if kind == "maps" else epsilon_u
        allowed = of_result * np.abs(want[name]) + roundings * largest[name] + _SMALLEST_NORMAL[case.dtype]
        worst[name] = float((np.abs(got[name] - want[name]) / allowed).max(initial=0))
    return worst
