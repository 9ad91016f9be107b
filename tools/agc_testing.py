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

import agc_numerics
from agc_numerics import ACTIVATIONS as ACTIVATIONS
from agc_numerics import DATA_FORMATS as DATA_FORMATS
from agc_numerics import DTYPES as DTYPES
from agc_numerics import EPSILON as EPSILON
from agc_numerics import SMALLEST_NORMAL as SMALLEST_NORMAL
from agc_numerics import parameter_dtype as parameter_dtype
from tf_agc import native, reference

_MAPS = ("y", "dx", "dshortcut")
# What of the optional inputs is there: bias, shortcut.
OPTIONAL = {"neither": (False, False), "bias": (True, False), "shortcut": (False, True), "both": (True, True)}
ALPHA = {"linear": 0.0, "relu": 0.0, "relu6": 0.0, "leaky_relu": 0.2, "elu": 1.0}
# What the op's alpha is called where users give it.
ALPHA_ARGUMENT = {"leaky_relu": "negative_slope", "elu": "alpha"}


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
    """The case with dy = 0 where right kernels may fall on either side of a kink of the activation."""
    exact = _to_float64(case)
    z, _ = reference.agc(exact.x, exact.gain, exact.mean_scale, "linear", 0.0, case.data_format, **exact.optional)
    close = agc_numerics.near_kinks(_as_arrays(case), _as_maps(z.numpy(), case))
    dy = tf.where(close, tf.zeros([], case.dy.dtype), _as_maps(case.dy.numpy(), case))
    if case.data_format == "channels_first":
        dy = tf.linalg.matrix_transpose(dy)
    return dataclasses.replace(case, dy=tf.reshape(dy, case.dy.shape))


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


def _as_arrays(case):
    """The case as NumPy's float64, maps as [N, P, C]."""
    tensors = {name: value.numpy() for name, value in vars(_to_float64(case)).items() if isinstance(value, tf.Tensor)}
    maps = {name: _as_maps(tensors[name], case) for name in ("x", "dy", "shortcut") if name in tensors}
    return agc_numerics.Case(**tensors | maps, dtype=case.dtype, activation=case.activation, alpha=case.alpha)


def _as_maps(values, case):
    """(N, ..., C) or (N, C, ...) as [N, P, C]."""
    if case.data_format == "channels_first":
        values = np.moveaxis(values, 1, -1)
    return values.reshape(values.shape[0], math.prod(values.shape[1:-1]), values.shape[-1])


def float64_results(case):
    """The results of the reference in float64, on the values that the case's dtypes hold."""
    return run(_to_float64(case), reference.agc)


def check(case, results, expected=None):
    """Asserts that results are what float64 gives, up to the errors that `agc_numerics` allows."""
    expected = vars(expected or float64_results(case))
    assert vars(results).keys() == expected.keys()
    arrays = _as_arrays(case)
    want = {name: _as_maps(values, case) if name in _MAPS else values for name, values in expected.items()}
    allowed = agc_numerics.allowed_errors(arrays, want)
    for name, values in expected.items():
        got = getattr(results, name)
        assert got.shape == values.shape, f"{name}: shape {got.shape}, expected {values.shape}"
        error = np.abs((_as_maps(got, case) if name in _MAPS else got) - want[name])
        bad = ~(error <= allowed[name])  # NaN is bad, too
        assert not bad.any(), (
            f"{name}: {bad.sum()} of {bad.size} differ, worst {np.nanmax(error / allowed[name]):.3g} "
            f"times what is allowed; {case.activation}, {case.dtype}, {case.data_format}, "
            f"x {case.x.shape}, {', '.join(case.optional) or 'x alone'}"
        )


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
    """Calls and in-place calls since `reset`, counted in the kernels; with XLA, in its custom calls."""

    _NAMES = (
        "forward",
        "forward_in_place",
        "backward",
        "dx_over_dy",
        "dx_over_kept",
        "forward_over_shortcut",
        "dshortcut_over_dy",
    )
    _XLA_NAMES = ("forward", "forward_in_place", "backward", "dx_over_dy", "dshortcut_over_dy")

    def __init__(self, xla=False):
        library = ctypes.CDLL(str((native.XLA_STATUS if xla else native.STATUS).library))
        self._names = self._XLA_NAMES if xla else self._NAMES
        self.reset = library.TfAgcXlaResetCounters if xla else library.TfAgcResetCounters
        self._read = library.TfAgcXlaCounters if xla else library.TfAgcCounters

    def read(self):
        values = (ctypes.c_int64 * len(self._names))()
        self._read(values, len(self._names))
        return dict(zip(self._names, values, strict=True))


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
