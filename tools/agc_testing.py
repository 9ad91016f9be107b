"""What the tests and the fuzzers share: cases, their results in float64, and what may differ from them.

Here and not in tests/, from which tools take nothing. No test lives here, and no formula of the layer: expectations
come from `tf_agc.reference`.
"""

import ctypes
import dataclasses
import math
import os
import platform
import subprocess
import sys
import types

import numpy as np
import tensorflow as tf

from tf_agc import native, reference

DTYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = ("linear", "relu", "relu6", "leaky_relu", "elu")
DATA_FORMATS = ("channels_last", "channels_first")
# What of the optional inputs is there: bias, shortcut.
OPTIONAL = {"neither": (False, False), "bias": (True, False), "shortcut": (False, True), "both": (True, True)}
ALPHA = {"linear": 0.0, "relu": 0.0, "relu6": 0.0, "leaky_relu": 0.2, "elu": 1.0}
# What the op's alpha is called where users give it.
ALPHA_ARGUMENT = {"leaky_relu": "negative_slope", "elu": "alpha"}

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
SMALLEST_NORMAL = {
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
    "float32": 2.0**-126,
    "float64": 2.0**-1022,
}


def parameter_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


@dataclasses.dataclass
class Case:
    """Arguments of one forward and one backward call. The tensors have the dtypes of the op."""

    x: tf.Tensor
    gain: tf.Tensor
    mean_scale: tf.Tensor
    dy: tf.Tensor
    dmean: tf.Tensor
    activation: str
    alpha: float
    data_format: str
    bias: tf.Tensor | None = None
    shortcut: tf.Tensor | None = None

    @property
    def dtype(self):
        return self.x.dtype.name

    @property
    def attributes(self):
        return self.activation, self.alpha, self.data_format

    @property
    def optional(self):
        """The optional inputs that are there, by name: keyword arguments of `agc`."""
        both = {"bias": self.bias, "shortcut": self.shortcut}
        return {name: value for name, value in both.items() if value is not None}

    @property
    def inputs(self):
        """Every input that is there, by name, in the order of the op."""
        return {"x": self.x, "gain": self.gain, "mean_scale": self.mean_scale, **self.optional}

    def call(self, agc, inputs):
        """y and mean of `agc` (of `native` or `reference`), for values of `self.inputs` in their order."""
        named = dict(zip(self.inputs, inputs, strict=True))
        return agc(**named, activation=self.activation, alpha=self.alpha, data_format=self.data_format)

    @property
    def tensors(self):
        return self.x, self.gain, self.mean_scale, self.dy, self.dmean, *self.optional.values()


def make_case(
    shape,
    dtype="float32",
    activation="relu",
    data_format="channels_last",
    alpha=None,
    seed=0,
    bias=False,
    shortcut=False,
):
    """A random case of shape (N, ..., C), transposed for channels_first, with or without a bias and a shortcut.

    Gains have both signs, and `without_kinks` is applied. What all cases have is the same with and without the others.
    """
    rng = np.random.default_rng(seed)
    alpha = ALPHA[activation] if alpha is None else alpha
    batch, channels = shape[0], shape[-1]
    x = 2 * rng.standard_normal(shape) + rng.standard_normal(channels)
    dy = rng.standard_normal(shape)
    if data_format == "channels_first":
        x, dy = np.moveaxis(x, -1, 1), np.moveaxis(dy, -1, 1)
    u = parameter_dtype(dtype)
    gain = rng.uniform(0.3, 3, channels) * rng.choice([-1, 1], channels)
    optional = np.random.default_rng([seed, 1])
    case = Case(
        x=tf.cast(x, dtype),
        gain=tf.cast(gain, u),
        mean_scale=tf.cast(rng.uniform(-0.5, 1.5, channels), u),
        dy=tf.cast(dy, dtype),
        dmean=tf.cast(rng.standard_normal((batch, channels)), u),
        activation=activation,
        alpha=alpha,
        data_format=data_format,
        bias=tf.cast(optional.standard_normal(channels), u) if bias else None,
        shortcut=tf.cast(2 * optional.standard_normal(x.shape), dtype) if shortcut else None,
    )
    return without_kinks(case)


def without_kinks(case):
    """The case with dy = 0 where z is too close to a kink of the activation for every correct kernel to fall on the
    same side: the forward is continuous there, and dy * act' the same 0.
    """
    dtype, exact = case.dtype, _to_float64(case)
    z, x = (_channels_last(value, case) for value in (_z(exact), exact.x.numpy()))
    gain, mean_scale = np.abs(exact.gain.numpy()), np.abs(exact.mean_scale.numpy())
    terms = gain * _largest(x) * (1 + mean_scale) + _added(exact)
    close = np.zeros_like(z, bool)
    for kink in {"linear": (), "relu6": (0, 6)}.get(case.activation, (0,)):
        rounding = 4 * EPSILON[dtype] * max(kink, 1) + 16 * EPSILON[parameter_dtype(dtype)] * terms
        close |= np.abs(z - kink) <= rounding
    if case.data_format == "channels_first":
        close = np.moveaxis(close, -1, 1)
    return dataclasses.replace(case, dy=tf.where(close, tf.zeros_like(case.dy), case.dy))


class Results(types.SimpleNamespace):
    """Both outputs and the gradients of all inputs that there are, as float64 arrays.

    y, mean, dx, dgain, dmean_scale, and no attribute dbias or dshortcut where the case has no such input.
    """


def run(case, agc, function=False):
    """The results of `agc` (of `native` or `reference`) on a case, eager or traced."""
    step = step_of(case, agc)
    step = tf.function(step) if function else step
    return results_of(step(*case.tensors))


def step_of(case, agc):
    """One forward and one backward call, as a function of a case's tensors that returns its results by name."""

    def step(x, gain, mean_scale, dy, dmean, *optional):
        inputs = [x, gain, mean_scale, *optional]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y, mean = case.call(agc, inputs)
        gradients = tape.gradient([y, mean], inputs, output_gradients=[dy, dmean])
        return {"y": y, "mean": mean, **dict(zip([f"d{name}" for name in case.inputs], gradients, strict=True))}

    return step


def results_of(tensors):
    """What a step returned, as `check` takes it."""
    return Results(**{name: tf.cast(tensor, tf.float64).numpy() for name, tensor in tensors.items()})


def _to_float64(case):
    tensors = {
        field.name: tf.cast(getattr(case, field.name), tf.float64)
        for field in dataclasses.fields(case)
        if isinstance(getattr(case, field.name), tf.Tensor)
    }
    return dataclasses.replace(case, **tensors)


def _z(case):
    z, _ = reference.agc(case.x, case.gain, case.mean_scale, "linear", 0.0, case.data_format, **case.optional)
    return z.numpy()


def _largest(maps):
    """The largest finite magnitude of each channel of maps (N, ..., C): what is not finite makes no kink of others."""
    return np.where(np.isfinite(maps), np.abs(maps), 0).max(tuple(range(maps.ndim - 1)), initial=0)


def _added(case):
    """The largest magnitude that bias and shortcut add to a channel."""
    added = 0.0 if case.bias is None else np.abs(case.bias.numpy())
    return added if case.shortcut is None else added + _largest(_channels_last(case.shortcut.numpy(), case))


def float64_results(case):
    """The results of the reference in float64, on the values that the case's dtypes hold."""
    return run(_to_float64(case), reference.agc)


def check(case, results, expected=None):
    """Asserts that results are what float64 gives, up to the roundings that the op's dtypes allow.

    One rounding of y and dx to T, and 16 roundings in U (sums of pairwise blocks, products, expm1)
    of the largest term that went into a result; measured are up to 2, and 7 for elu in double.
    Half and bfloat16 have a fused activation take z, for dgain, and elu's act' from y as it was
    rounded to T: there 4 roundings to T of the largest term; measured is up to 0.4. dgain takes u from
    z - bias - shortcut, so that they are among the terms. What T rounds wrongly by more is at a kink,
    where cases have dy = 0. Denormals, of inputs too, may be flushed.
    """
    expected = expected or float64_results(case)
    dtype, case = case.dtype, _to_float64(case)
    epsilon, epsilon_u = EPSILON[dtype], EPSILON[parameter_dtype(dtype)]
    from_rounded_y = set()
    if dtype in ("float16", "bfloat16") and case.activation != "linear":
        from_rounded_y = {"dgain"}
        if case.activation == "elu":
            from_rounded_y |= {"dx", "dmean_scale", "dbias", "dshortcut"}

    # The largest terms, channel by channel. The reference gives u and the means.
    ones = tf.ones_like(case.gain)
    u, _ = reference.agc(case.x, ones, case.mean_scale, "linear", 0.0, case.data_format)
    u, x, dy = (_channels_last(value.numpy(), case) for value in (u, case.x, case.dy))
    # What counts as a term at least: four flushed denormals in a row.
    flushed = 4 * SMALLEST_NORMAL[parameter_dtype(dtype)] / (16 * epsilon_u)
    gain, mean_scale = np.maximum(np.abs(case.gain.numpy()), flushed), np.abs(case.mean_scale.numpy())
    # elu finds z as log1p(y / alpha): an absolute error of about epsilon, so one of 1 / gain. Linear does not ask y.
    added = _added(case)
    from_y = np.zeros_like(gain)
    if case.activation != "linear":
        nonzero = case.gain.numpy() != 0
        from_y[nonzero] = (1 / gain + added / np.abs(np.where(nonzero, case.gain.numpy(), 1)))[nonzero]
    samples_and_positions = tuple(range(x.ndim - 1))
    x_max = np.abs(x).max(samples_and_positions, initial=flushed)
    slope = max(1.0, case.alpha)
    dy = np.maximum(np.abs(dy), flushed)
    dz_max = slope * dy.max(samples_and_positions, initial=0)
    dz_sum = slope * dy.sum(tuple(range(1, x.ndim - 1)))
    positions = max(1, math.prod(x.shape[1:-1]))

    largest = {
        "y": (gain * x_max * (1 + mean_scale) + added) * slope,
        "mean": x_max,
        "dx": gain * dz_max * (1 + mean_scale) + np.abs(case.dmean).max(initial=0) / positions,
        # u is a difference: with one rounding of what it is the difference of, which may be larger. x may be flushed.
        "dgain": slope
        * (dy * (np.abs(u) + (x_max / 16 + flushed) * (1 + mean_scale) + from_y)).sum(samples_and_positions),
        # A mean of terms that cancel has the error of the terms.
        "dmean_scale": gain * x_max * dz_sum.sum(0),
        "dbias": dz_sum.sum(0),
        "dshortcut": dz_max,
    }
    rounded = {"y": epsilon, "mean": epsilon_u, "dx": epsilon, "dshortcut": epsilon}
    assert vars(results).keys() == vars(expected).keys() <= largest.keys()
    for name, want in vars(expected).items():
        got, scale = getattr(results, name), largest[name]
        assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
        if name in ("y", "dx", "dshortcut"):
            want, got = _channels_last(want, case), _channels_last(got, case)
        roundings = 4 * epsilon if name in from_rounded_y else 16 * epsilon_u
        allowed = rounded.get(name, epsilon_u) * np.abs(want) + roundings * scale
        # Denormals of T are flushed to 0 or not, as the thread that runs the kernel is set up.
        allowed = allowed + SMALLEST_NORMAL[dtype]
        if name == "y" and case.activation == "elu":
            allowed = allowed + case.alpha * EPSILON["float64"]  # the reference's own: stock elu is exp(z) - 1
        error = np.abs(got - want)
        bad = ~(error <= allowed)  # NaN is bad, too
        assert not bad.any(), (
            f"{name}: {bad.sum()} of {bad.size} differ, worst {np.nanmax(error / allowed):.3g} "
            f"times what is allowed; {case.activation}, {dtype}, {case.data_format}, "
            f"x {case.x.shape}, {', '.join(case.optional) or 'x alone'}"
        )


def _channels_last(value, case):
    return value if case.data_format == "channels_last" else np.moveaxis(value, 1, -1)


def assert_close(got, want, tolerance):
    """Compares nested tensors, each relative to its largest entry."""
    for one, other in zip(tf.nest.flatten(got), tf.nest.flatten(want), strict=True):
        one, other = (tf.cast(value, tf.float64).numpy() for value in (one, other))
        assert one.shape == other.shape and np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max(initial=1e-300))


def floating_point_control():
    """This thread's rounding mode, masks of exceptions and treatment of denormals; not which exceptions occurred."""
    environment = (ctypes.c_uint32 * 8)()  # fenv_t of glibc
    assert ctypes.CDLL("libm.so.6").fegetenv(environment) == 0
    if platform.machine() == "x86_64":
        return environment[0] & 0xFFFF, environment[7] & 0xFFC0  # of x87; of SSE, MXCSR
    return environment[0]  # FPCR of aarch64


class Counters:
    """Calls and in-place calls since `reset`, counted in the kernels."""

    _NAMES = (
        "forward",
        "forward_in_place",
        "backward",
        "dx_over_dy",
        "dx_over_kept",
        "forward_over_shortcut",
        "dshortcut_over_dy",
    )

    def __init__(self):
        self._library = ctypes.CDLL(str(native.STATUS.library))

    def reset(self):
        self._library.TfAgcResetCounters()

    def read(self):
        values = (ctypes.c_int64 * len(self._NAMES))()
        self._library.TfAgcCounters(values, len(self._NAMES))
        return dict(zip(self._NAMES, values, strict=True))


def python(*arguments, path=None, check=True, prefix=(), **environment):
    """Runs a fresh Python that imports tools and the tf_agc under test, or that under `path`; `prefix` starts it."""
    root = path or os.path.dirname(os.path.dirname(native.__file__))
    tools = os.path.dirname(__file__)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TF_AGC_")}
    done = subprocess.run(
        [*prefix, sys.executable, *map(str, arguments)],
        cwd="/",  # Python would look for packages in this process's, the checkout
        env={**inherited, "PYTHONPATH": f"{root}{os.pathsep}{tools}", "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr
    return done
