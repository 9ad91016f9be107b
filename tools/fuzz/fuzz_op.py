"""Examples for tf_agc.agc and its gradient, right and wrong ones, and what is expected of them.

Right ones are compared with the reference in float64, within the bounds of the tests, of which
there is one copy, agc_testing.py. Wrong ones must be refused with a sentence about their argument. No process, no
option, no loop over examples here.

Compared is what is promised. A map (of one sample and channel) whose values are finite and whose sums and products
fit the type that is computed in: y and dx; a channel of such maps: dgain and dmean_scale, too. A map with NaN or
infinity: y; and NaN shows in the gradients that it enters. Not compared: maps whose sums overflow that type,
infinite parameters, and other gradients where something is not finite. The op's second output, which agc does not
return, is compared by fuzz_graph.py.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

import agc_testing
import tf_agc

MODES = (*["eager"] * 20, *["function"] * 6, *["unknown shapes"] * 6, "jit")
VALUES = ("normal", "offset", "constant", "zero", "tiny", "huge", "nan", "inf", "-inf", "max")
PARAMETERS = (1.0, 0.5, -2.0, 3.0, 0.0, -0.0, 1e-45, -1e-38, 1e-4, 1e4, 1e30, math.nan, math.inf, -math.inf)
ALPHAS = (0.0, 0.1, 0.2, 1.0, 1.7, 1e-45, 1e-39, 1.2e-38, 1e-6, 1e6, 1e30, 3.4e38)
_MAPS = ("y", "dx", "dshortcut")  # the results that are maps
# TensorFlow's own gradients stop at sizes of 2**31. Twice 2**20 is more than memory, where nothing else is 0.
HUGE = 2**20

_NOT_TENSORS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "object": object,
    "text": lambda: "abc",
    "strings": lambda: ["a", "b"],
    "ragged list": lambda: [[[1.0, 2.0], [3.0]]],
    "ragged": lambda: tf.ragged.constant([[[1.0], [2.0, 3.0]]]),
    "sparse": lambda: tf.sparse.from_dense(tf.ones([2, 3, 4])),
    "dictionary": dict,
    "out of range": lambda: [[[10**400]]],
    "complex": lambda: [1j],
    "objects": lambda: np.full((2, 3, 4), None),
    "dates": lambda: np.zeros((2, 3, 4), "datetime64[s]"),
    "lists of other lengths": lambda: [tf.ones([2]), tf.ones([3])],
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One call. What is a tuple of kinds or numbers goes to the channels in turn.

    wrong: the argument that is, and how: a key of _NOT_TENSORS, a shape, a dtype; for attributes the value itself.
    """

    sizes: tuple[int, ...]  # batch, spatial sizes, channels
    dtype: str
    activation: str
    alpha: float
    data_format: str
    x: tuple[str, ...]
    dy: tuple[str, ...]
    gain: tuple[float, ...]
    mean_scale: tuple[float, ...]
    seed: int
    mode: str
    wrong: tuple[str, Any] | None = None
    bias: tuple[float, ...] = ()  # empty: absent
    shortcut: tuple[str, ...] = ()

    @property
    def inputs(self) -> list[str]:
        """The tensors that are there, in the op's order."""
        optional = [name for name in ("bias", "shortcut") if getattr(self, name)]
        return ["x", "gain", "mean_scale", *optional]


def _in_turn(values: tuple) -> st.SearchStrategy:
    return st.lists(st.sampled_from(values), min_size=1, max_size=4).map(tuple)


@st.composite
def examples(draw: Callable) -> Example:
    budget = draw(st.sampled_from([600, 6000, 60_000]))
    sizes = []
    for size in draw(st.lists(st.one_of(st.integers(1, 40), st.sampled_from([1, 64, 257])), min_size=3, max_size=8)):
        sizes.append(max(1, min(size, budget)))
        budget //= sizes[-1]
    empty = draw(st.sampled_from([None] * 8 + [0, -1]))
    if empty is not None:
        for axis in range(len(sizes)):
            sizes[axis] = draw(st.sampled_from([sizes[axis]] * 3 + [HUGE] + [0] * (empty == 0)))
        sizes[-1] = min(sizes[-1], 300)
        sizes[empty] = 0
    activation = draw(st.sampled_from(agc_testing.ACTIVATIONS))
    example = Example(
        sizes=tuple(sizes),
        dtype=draw(st.sampled_from(agc_testing.DTYPES)),
        activation=activation,
        alpha=draw(st.sampled_from(ALPHAS)) if activation in ("leaky_relu", "elu") else 0.0,
        data_format=draw(st.sampled_from(agc_testing.DATA_FORMATS)),
        x=draw(_in_turn(("normal",) * 8 + VALUES)),
        dy=draw(_in_turn(("normal",) * 20 + VALUES)),
        gain=draw(_in_turn(PARAMETERS[:4] * 4 + PARAMETERS)),
        mean_scale=draw(_in_turn(PARAMETERS[:4] * 4 + PARAMETERS)),
        seed=draw(st.integers(0, 2**31)),
        mode=draw(st.sampled_from(MODES)),
        bias=draw(st.one_of(st.just(()), _in_turn(PARAMETERS[:4] * 4 + PARAMETERS))),
        shortcut=draw(st.one_of(st.just(()), _in_turn(("normal",) * 8 + VALUES))),
    )
    return dataclasses.replace(example, wrong=draw(_wrong(example))) if draw(st.integers(0, 2)) == 0 else example


def _wrong(example: Example) -> st.SearchStrategy:
    channels = example.sizes[-1]
    small = st.lists(st.integers(0, 5), max_size=10).map(tuple)
    anything = st.one_of(
        st.none(),
        st.text("chanels_firtéN\0", max_size=14),
        st.binary(max_size=3),
        st.integers(),
        st.floats(),
        st.just([]),
    )
    bad_x = small.filter(lambda shape: not 3 <= len(shape) <= 8 or shape[0] > 0 and 0 in _positions(shape, example))
    tensor = st.one_of(
        st.sampled_from([*_NOT_TENSORS]),
        st.sampled_from(["int32", "bool", "complex64", "string", "uint8", "float8_e5m2", "qint8"]),
    )
    parameter = st.one_of(tensor, small.filter(lambda shape: shape not in ((), (channels,))))
    numbers = st.sampled_from([-1, -1e-45, math.nan, math.inf, 1e39, 10**400, Fraction(-1, 3), True, "1", 1j, b"1"])
    if example.activation not in ("leaky_relu", "elu"):
        numbers = st.one_of(numbers, st.floats())
    return st.one_of(
        st.tuples(st.just("x"), st.one_of(tensor, bad_x)),
        st.tuples(st.sampled_from(["gain", "mean_scale"]), parameter),
        # None is no wrong one here.
        st.tuples(st.just("bias"), parameter.filter(lambda how: how != "None")),
        st.tuples(
            st.just("shortcut"),
            st.one_of(tensor.filter(lambda how: how != "None"), small.filter(lambda shape: shape != _small(example))),
        ),
        st.tuples(st.sampled_from(["negative_slope", "alpha"]), numbers),
        st.tuples(st.just("activation"), anything.filter(lambda value: value not in (None, *agc_testing.ACTIVATIONS))),
        st.tuples(st.just("data_format"), anything.filter(lambda value: value not in agc_testing.DATA_FORMATS)),
    )


def _small(example: Example) -> tuple[int, ...]:
    """The shape of x where something else is wrong."""
    shape = [2, *[1] * (len(example.sizes) - 2), example.sizes[-1]]
    if example.data_format == "channels_first":
        shape.insert(1, shape.pop())
    return tuple(shape)


def _positions(shape: tuple[int, ...], example: Example) -> tuple[int, ...]:
    return shape[1:-1] if example.data_format == "channels_last" else shape[2:]


def outcome(example: Example) -> str:
    if example.wrong:
        return _refused(example)
    if 0 in example.sizes:
        return _empty(example)
    return _compared(example)


# ---- Right arguments


def _values(example: Example, name: str) -> np.ndarray:
    """x, dy or shortcut as [N, P, C], of the example's dtype."""
    rng = np.random.default_rng([example.seed, ("x", "dy", "shortcut").index(name)])
    batch, positions, channels = example.sizes[0], math.prod(example.sizes[1:-1]), example.sizes[-1]
    dtype = tf.as_dtype(example.dtype)
    values = rng.standard_normal((batch, positions, channels))
    kinds = getattr(example, name)
    for turn, kind in enumerate(kinds):
        part = values[..., turn :: len(kinds)]  # a view
        if kind == "offset":
            part += 1000
        elif kind == "constant":
            # Of few digits, whose sums are exact: the reference's own in float64 are no better than the op's.
            part[:] = part[:, :1].astype(np.float16)
        elif kind in ("zero", "tiny"):
            part *= 0 if kind == "zero" else agc_testing.SMALLEST_NORMAL[example.dtype]
        elif kind == "huge":
            part[:] = np.clip(part / 3, -1, 1) * float(dtype.max)
        elif kind != "normal" and part.size:
            part.flat[rng.integers(part.size)] = float(dtype.max) if kind == "max" else float(kind)
    with np.errstate(over="ignore"):
        return values.astype(dtype.as_numpy_dtype)


def _case(example: Example) -> agc_testing.Case:
    """The arguments with one axis of positions, which the call makes into others."""
    batch, channels = example.sizes[0], example.sizes[-1]
    parameter = agc_testing.parameter_dtype(example.dtype)

    def of_channels(values: tuple[float, ...]) -> tf.Tensor:
        return tf.constant(np.resize(values, channels).astype(parameter))

    case = agc_testing.Case(
        x=tf.constant(_values(example, "x")),
        gain=of_channels(example.gain),
        mean_scale=of_channels(example.mean_scale),
        bias=of_channels(example.bias) if example.bias else None,
        shortcut=tf.constant(_values(example, "shortcut")) if example.shortcut else None,
        dy=tf.constant(_values(example, "dy")),
        dmean=tf.zeros([batch, channels], parameter),
        activation=example.activation,
        alpha=example.alpha if example.alpha >= agc_testing.SMALLEST_NORMAL["float32"] else 0.0,  # as it is taken
        data_format="channels_last",
    )
    return agc_testing.without_kinks(case)


def _attributes(example: Example) -> dict[str, Any]:
    attributes = {"activation": example.activation, "data_format": example.data_format}
    names = agc_testing.ALPHA_ARGUMENT
    alphas = {name: example.alpha if activation == example.activation else None for activation, name in names.items()}
    return attributes | alphas


def _call(example: Example, inputs: list, dy: Any) -> list[tf.Tensor]:
    """y and the gradients of the example's inputs."""

    def step(*tensors: tf.Tensor) -> list[tf.Tensor]:
        *inputs, dy = tensors
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = tf_agc.agc(**dict(zip(example.inputs, inputs, strict=True)), **_attributes(example))
        return [y, *tape.gradient(y, inputs, output_gradients=dy)]

    return _in_mode(example.mode, step, [*inputs, dy])


def _in_mode(mode: str, step: Callable, tensors: list) -> Any:
    if mode == "unknown shapes":
        step = tf.function(step, input_signature=[tf.TensorSpec(None, tensor.dtype) for tensor in tensors])
    elif mode != "eager":
        step = tf.function(step, jit_compile=mode == "jit")
    return step(*tensors)


def _empty(example: Example) -> str:
    """No values: shapes, and gradients of parameters that are sums over nothing."""
    shape, channels = list(example.sizes), example.sizes[-1]
    if example.data_format == "channels_first":
        shape.insert(1, shape.pop())
    try:
        maps = tf.zeros(shape, example.dtype)
    except tf.errors.InvalidArgumentError as error:  # the product of the sizes before the 0 is beyond 64 bits
        if "would have more than" not in error.message:
            raise
        return "no tensor to TensorFlow"
    ones = tf.ones([channels], agc_testing.parameter_dtype(example.dtype))
    inputs = {name: maps if name in ("x", "shortcut") else ones for name in example.inputs}
    y, *gradients = _call(example, [*inputs.values()], maps)
    for value, like in zip((y, *gradients), (maps, *inputs.values()), strict=True):
        assert value.shape == like.shape, f"shape {value.shape}, expected {like.shape}"
        if like is ones:
            np.testing.assert_array_equal(value, np.zeros(channels))
    return f"without elements, {example.mode}"


def _compared(example: Example) -> str:
    case = _case(example)
    channels_first = example.data_format == "channels_first"

    def maps(flat: tf.Tensor) -> tf.Tensor:
        whole = flat.numpy().reshape(example.sizes)
        return tf.constant(np.ascontiguousarray(np.moveaxis(whole, -1, 1) if channels_first else whole))

    def flat(maps: tf.Tensor) -> np.ndarray:
        whole = np.moveaxis(maps.numpy(), 1, -1) if channels_first else maps.numpy()
        return whole.reshape(case.x.shape).astype(np.float64)

    inputs = {name: maps(value) if name in ("x", "shortcut") else value for name, value in case.inputs.items()}
    outputs = _call(example, [*inputs.values()], maps(case.dy))
    got = dict(zip(["y", *(f"d{name}" for name in inputs)], outputs, strict=True))
    for name in {"y", "dx", "dshortcut"} & got.keys():
        assert got[name].shape == inputs["x"].shape and got[name].dtype == case.x.dtype
    _check(case, {name: flat(value) if name in _MAPS else value.numpy() for name, value in got.items()})
    return f"compared, {example.mode}"


def _check(case: agc_testing.Case, results: dict[str, np.ndarray]) -> None:
    x, gain, mean_scale, dy = (
        tensor.numpy().astype(np.float64) for tensor in (case.x, case.gain, case.mean_scale, case.dy)
    )
    bias, shortcut = (
        0 * like if tensor is None else tensor.numpy().astype(np.float64)
        for tensor, like in ((case.bias, np.zeros_like(gain)), (case.shortcut, np.zeros_like(x)))
    )
    y = results["y"]
    samples, positions, channels = x.shape

    # The largest number that comes up, map by map, as far as inputs are finite.
    def largest(values: np.ndarray) -> np.ndarray:
        return np.abs(np.where(np.isfinite(values), values, 0)).max(1).clip(1)

    slope = max(1, case.alpha)
    factors = np.abs(gain).clip(1) * (1 + np.abs(mean_scale)) * slope
    # What bias and shortcut add, and what they add to dgain, where they cancel but for roundings.
    added = (np.abs(bias) + largest(shortcut)) * slope * bool(case.optional)
    added_to_u = added / np.where(gain == 0, 1, np.abs(gain)).clip(None, 1)
    parameter = agc_testing.parameter_dtype(case.dtype)
    fits_forward = 4 * (positions * largest(x) * factors + added) < tf.as_dtype(parameter).max
    fits = (
        4 * samples * positions * (largest(x) * factors + added_to_u) * largest(dy) * slope < tf.as_dtype(parameter).max
    )
    fits &= 2 * (np.maximum(largest(x), largest(dy)) * factors + added) < float(case.x.dtype.max)
    finite_parameters = np.isfinite(gain) & np.isfinite(mean_scale) & np.isfinite(bias)
    smallest = agc_testing.SMALLEST_NORMAL[parameter]
    flushed = np.zeros_like(finite_parameters)
    for values in (gain, mean_scale, bias):
        flushed |= (values != 0) & (np.abs(values) < smallest)
    clean = fits & finite_parameters
    for maps in (x, dy, shortcut):
        clean = clean & np.isfinite(maps).all(1)

    # Every clean map as a channel of its own.
    sample, channel = np.nonzero(clean)

    def alone(maps: np.ndarray) -> np.ndarray:
        return maps[sample, :, channel].T[np.newaxis]

    part = _part(case, alone, channel)
    want = _expected(part)
    of_maps = {name: alone(value) for name, value in results.items() if name in _MAPS}
    agc_testing.check(part, agc_testing.Results(**vars(want) | of_maps), want)

    whole = np.flatnonzero(clean.all(0))
    part = _part(case, lambda maps: maps[..., whole], whole)
    want = _expected(part)
    of_channels = {name: value[whole] for name, value in results.items() if name not in _MAPS}
    agc_testing.check(part, agc_testing.Results(**vars(want) | of_channels), want)

    # y of the others, coarsely: NaN and infinities where float64 has them, or where T overflows. The reference flushes
    # denormals, and 0 * Inf is NaN.
    sample, channel = np.nonzero(fits_forward & finite_parameters & ~flushed & ~clean)
    part = _part(dataclasses.replace(case, dy=tf.zeros_like(case.dy)), alone, channel)
    want_y, maximum, epsilon = _expected(part).y[0].T, float(case.x.dtype.max), agc_testing.EPSILON[case.dtype]
    got_y = y[sample, :, channel]
    overflow = np.abs(want_y) > maximum * (1 - 4 * epsilon)
    assert (got_y[overflow] * np.sign(want_y[overflow]) >= maximum * (1 - 8 * epsilon)).all(), "y: no overflow"
    terms = (largest(x) * factors + added)[sample, channel, np.newaxis]
    with np.errstate(invalid="ignore"):  # Inf - Inf
        error = np.abs(got_y - want_y)
    close = (error <= 4 * epsilon * terms) | (got_y == want_y) | (np.isnan(got_y) & np.isnan(want_y)) | overflow
    assert close.all(), f"y: {got_y[~close][:5]} where float64 has {want_y[~close][:5]}"

    ordinary = finite_parameters & (np.abs(gain) > 1e-4)
    for name in ("dgain", "dmean_scale"):
        lost = ordinary & (np.isnan(x) | np.isnan(dy)).any((0, 1)) & ~np.isnan(results[name])
        assert not lost.any(), f"{name}: NaN in x or dy is lost in the channels {np.flatnonzero(lost)}"
    lost = (finite_parameters & np.isnan(dy).any(1))[:, np.newaxis] & ~np.isnan(results["dx"])
    assert not lost.any(), "dx: NaN in dy is lost"
    for name, lost in (("dbias", np.isnan(dy).any((0, 1))), ("dshortcut", np.isnan(dy))):
        assert name not in results or np.isnan(results[name])[lost].all(), f"{name}: NaN in dy is lost"


def _part(
    case: agc_testing.Case, of_maps: Callable[[np.ndarray], np.ndarray], channels: np.ndarray
) -> agc_testing.Case:
    """The case of some channels, or of what `of_maps` makes channels of, from maps [N, P, C]."""
    values: dict[str, Any] = {}
    for name in ("x", "dy", "shortcut"):
        maps = getattr(case, name)
        values[name] = None if maps is None else tf.constant(np.ascontiguousarray(of_maps(maps.numpy())))
    for name in ("gain", "mean_scale", "bias"):
        parameter = getattr(case, name)
        values[name] = None if parameter is None else tf.gather(parameter, channels)
    return dataclasses.replace(case, **values, dmean=tf.zeros([values["x"].shape[0], len(channels)], case.gain.dtype))


def _expected(case: agc_testing.Case) -> agc_testing.Results:
    want = agc_testing.float64_results(case)
    if case.activation != "linear":
        want.dgain = np.where(case.gain.numpy() == 0, 0, want.dgain)  # as documented: u is lost
    return want


# ---- Wrong ones


def _refused(example: Example) -> str:
    assert example.wrong
    name, how = example.wrong
    maps = tf.ones(_small(example), example.dtype)
    ones = tf.ones([example.sizes[-1]], agc_testing.parameter_dtype(example.dtype))
    names = dict.fromkeys([*example.inputs, *([name] if name in ("bias", "shortcut") else [])])
    tensors: dict[str, Any] = {one: maps if one in ("x", "shortcut") else ones for one in names}
    attributes = _attributes(example)
    mode = example.mode
    if name in attributes:
        attributes[name] = how
    elif isinstance(how, tuple):
        tensors[name] = tf.ones(how, tensors[name].dtype)
    elif how in _NOT_TENSORS:
        tensors[name] = _NOT_TENSORS[how]()
        mode = "eager" if mode == "unknown shapes" else mode
    else:
        dtype = getattr(tf.dtypes.experimental, how, None) or tf.as_dtype(how)
        # NumPy's own strings: the objects that TensorFlow names would be integers.
        tensors[name] = tf.constant(np.zeros((2, 3, 4), "S1" if dtype == tf.string else dtype.as_numpy_dtype))

    def step(*values: Any) -> tf.Tensor:
        return tf_agc.agc(**dict(zip(tensors, values, strict=True)), **attributes)

    try:
        if mode == "unknown shapes":
            _in_mode(mode, step, [*tensors.values()])
        else:  # what is no tensor cannot be an argument of a tf.function
            _in_mode(mode, lambda: step(*tensors.values()), [])
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        # Every sentence of ours begins so; the name alone may also be a line of source code.
        assert re.search(rf"\b{name} (must|has no positions)", str(error)), f"{name} is not named: {error}"
        return f"refused, {name}: {type(error).__name__}"
    raise AssertionError(f"{name} was accepted")
