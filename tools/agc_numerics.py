"""How far results of the op may be from float64, and where right kernels may differ: for tests, fuzzers and the GPU.

NumPy alone, as a GPU machine needs no TensorFlow. Maps are [N, P, C] here, whatever their layout in memory. Nothing is
computed here that the op computes: that is tf_agc/reference.py, and gpu/gpu_numerics.py without TensorFlow.
"""

import dataclasses

import numpy as np

DTYPES = ("float16", "bfloat16", "float32", "float64")  # in the order of core::DataType
ACTIVATIONS = ("linear", "relu", "relu6", "leaky_relu", "elu")  # of core::Activation
DATA_FORMATS = ("channels_last", "channels_first")  # of core::Layout

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


def parameter_dtype(dtype: str) -> str:
    """The type of parameters and means."""
    return "float64" if dtype == "float64" else "float32"


@dataclasses.dataclass(frozen=True)
class Case:
    """One call forward and one backward, as float64 arrays of the values that the op's types hold."""

    x: np.ndarray  # [N, P, C]
    gain: np.ndarray  # [C]
    mean_scale: np.ndarray  # [C]
    dy: np.ndarray  # [N, P, C]
    dmean: np.ndarray  # [N, C]
    dtype: str
    activation: str
    alpha: float
    bias: np.ndarray | None = None  # [C]
    shortcut: np.ndarray | None = None  # [N, P, C]

    @property
    def added(self) -> np.ndarray:
        """The largest magnitude that bias and shortcut add to a channel."""
        added = np.zeros_like(self.gain) if self.bias is None else np.abs(self.bias)
        return added if self.shortcut is None else added + _largest(self.shortcut)


def near_kinks(case: Case, z: np.ndarray) -> np.ndarray:
    """Where z is too close to a kink of the activation for every right kernel to fall on the same side.

    The forward is continuous there; with dy = 0, dy * act' is the same 0.
    """
    terms = np.abs(case.gain) * _largest(case.x) * (1 + np.abs(case.mean_scale)) + case.added
    close = np.zeros_like(z, bool)
    for kink in {"linear": (), "relu6": (0, 6)}.get(case.activation, (0,)):
        rounding = 4 * EPSILON[case.dtype] * max(kink, 1) + 16 * EPSILON[parameter_dtype(case.dtype)] * terms
        close |= np.abs(z - kink) <= rounding
    return close


def _largest(maps: np.ndarray) -> np.ndarray:
    """The largest finite magnitude of each channel: what is not finite makes no kink of others."""
    return np.where(np.isfinite(maps), np.abs(maps), 0).max((0, 1), initial=0)


def allowed_errors(case: Case, want: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How far each result may be from what float64 gives, up to the roundings that the op's dtypes allow.

    One rounding of y and dx to T, and 16 roundings in U (sums of pairwise blocks, products, expm1)
    of the largest term that went into a result; measured are up to 2, and 7 for elu in double.
    Half and bfloat16 have a fused activation take z, for dgain, and elu's act' from y as it was
    rounded to T: there 4 roundings to T of the largest term; measured is up to 0.4. dgain takes u from
    z - bias - shortcut, so that they are among the terms. What T rounds wrongly by more is at a kink,
    where cases have dy = 0 (`near_kinks`). Denormals, of inputs too, may be flushed.

    Args:
        case: the arguments.
        want: results in float64 by name, maps as [N, P, C]: "mean" and any others.

    Returns:
        By the names of `want`.
    """
    epsilon, epsilon_u = EPSILON[case.dtype], EPSILON[parameter_dtype(case.dtype)]
    from_rounded_y = set()
    if case.dtype in ("float16", "bfloat16") and case.activation != "linear":
        from_rounded_y = {"dgain"}
        if case.activation == "elu":
            from_rounded_y |= {"dx", "dmean_scale", "dbias", "dshortcut"}

    # What counts as a term at least: four flushed denormals in a row.
    flushed = 4 * SMALLEST_NORMAL[parameter_dtype(case.dtype)] / (16 * epsilon_u)
    gain, mean_scale = np.maximum(np.abs(case.gain), flushed), np.abs(case.mean_scale)
    # elu finds z as log1p(y / alpha): an absolute error of about epsilon, so one of 1 / gain. Linear does not ask y.
    from_y = np.zeros_like(gain)
    if case.activation != "linear":
        nonzero = case.gain != 0
        from_y[nonzero] = (1 / gain + case.added / np.abs(np.where(nonzero, case.gain, 1)))[nonzero]
    u = case.x - case.mean_scale * want["mean"][:, np.newaxis]
    x_max = np.abs(case.x).max((0, 1), initial=flushed)
    slope = max(1.0, case.alpha)
    dy = np.maximum(np.abs(case.dy), flushed)
    dz_max, dz_sum = slope * dy.max((0, 1), initial=0), slope * dy.sum((0, 1))
    positions = max(1, case.x.shape[1])

    largest = {
        "y": (gain * x_max * (1 + mean_scale) + case.added) * slope,
        "mean": x_max,
        "dx": gain * dz_max * (1 + mean_scale) + np.abs(case.dmean).max(initial=0) / positions,
        # u is a difference: with one rounding of what it is the difference of, which may be larger. x may be flushed.
        "dgain": slope * (dy * (np.abs(u) + (x_max / 16 + flushed) * (1 + mean_scale) + from_y)).sum((0, 1)),
        # A mean of terms that cancel has the error of the terms.
        "dmean_scale": gain * x_max * dz_sum,
        "dbias": dz_sum,
        "dshortcut": dz_max,
    }
    allowed = {}
    for name, values in want.items():
        rounding = epsilon if name in ("y", "dx", "dshortcut") else epsilon_u
        roundings = 4 * epsilon if name in from_rounded_y else 16 * epsilon_u
        # Denormals of T are flushed to 0 or not, as the thread that runs the kernel is set up.
        allowed[name] = rounding * np.abs(values) + roundings * largest[name] + SMALLEST_NORMAL[case.dtype]
        if name == "y" and case.activation == "elu":  # the reference's own: stock elu is exp(z) - 1
            allowed[name] = allowed[name] + case.alpha * EPSILON["float64"]
    return allowed
