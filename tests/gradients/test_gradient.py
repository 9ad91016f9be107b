"""First-order gradients of the native op: kinks, the mean output, parts of them, overflows."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from agc_testing import (
    ACTIVATIONS,
    ALPHA,
    DATA_FORMATS,
    DTYPES,
    EPSILON,
    OPTIONAL,
    check,
    float64_results,
    make_case,
    parameter_dtype,
    run,
    without_kinks,
)
from tf_agc import AutomaticGainControl, native, reference

pytestmark = pytest.mark.usefixtures("native_required")


@pytest.mark.parametrize("optional", OPTIONAL)
@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numeric(activation, data_format, optional, mode):
    bias, shortcut = OPTIONAL[optional]
    case = make_case((2, 3, 2, 3), "float64", activation, data_format, seed=3, bias=bias, shortcut=shortcut)

    def outputs(*inputs):
        y, mean = case.call(native.agc, inputs)
        # Both outputs, weighted; dy is 0 near the kinks.
        return tf.reduce_sum(y * case.dy) + tf.reduce_sum(mean * case.dmean)

    outputs = tf.function(outputs) if mode == "function" else outputs
    arguments = [*case.inputs.values()]
    computed, numeric = tf.test.compute_gradient(outputs, arguments, delta=1e-6)
    for got, want in zip(computed, numeric, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_at_the_kinks(activation):
    # Small integers and a mean of 0: z is exactly 0 and exactly 6 in both.
    x = tf.constant([[[0.0], [3.0], [-3.0], [1.0], [-1.0], [0.0]]])
    gain, mean_scale = tf.constant([2.0]), tf.constant([1.0])
    # -2 and 2 in sum: the same z.
    bias, shortcut = tf.constant([-2.0]), tf.fill(x.shape, 2.0)

    def gradients(agc, **optional):
        inputs = [x, gain, mean_scale, *optional.values()]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y, _ = agc(x, gain, mean_scale, activation, ALPHA[activation], "channels_last", **optional)
        weights = tf.constant([[[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]])
        return tape.gradient(y, inputs, output_gradients=weights)

    for optional in ({}, {"bias": bias, "shortcut": shortcut}):
        for got, want in zip(gradients(native.agc, **optional), gradients(reference.agc, **optional), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_through_the_mean_alone(activation, mode):
    case = make_case((2, 5, 3), "float32", activation)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            _, mean = native.agc(x, case.gain, case.mean_scale, *case.attributes)
            loss = tf.reduce_sum(mean * case.dmean)
        return tape.gradient(loss, x)

    step = tf.function(step) if mode == "function" else step
    want = np.broadcast_to(case.dmean[:, None] / 5, case.x.shape)
    np.testing.assert_allclose(step(case.x), want, rtol=1e-6)


@pytest.mark.parametrize("activation", ["linear", "elu"])
def test_nested_functions(activation):
    case = make_case((2, 4, 5, 8), "float32", activation, bias=True, shortcut=True)
    inner = tf.function(lambda *inputs: case.call(native.agc, inputs))

    def agc(x, gain, mean_scale, activation, alpha, data_format, bias, shortcut):
        return tf.function(lambda: inner(x, gain, mean_scale, bias, shortcut))()

    check(case, run(case, agc, function=True))
    check(case, run(case, agc))


def test_gradients_of_a_v1_graph():
    case = make_case((2, 4, 5, 8), "float32", "relu", bias=True, shortcut=True)
    case.dmean = tf.zeros_like(case.dmean)
    with tf.Graph().as_default():
        x, shortcut, dy = (tf.compat.v1.placeholder(tf.float32, [None, None, None, 8]) for _ in range(3))
        inputs = [x, *(tf.constant(value.numpy()) for value in (case.gain, case.mean_scale, case.bias)), shortcut]
        y, _ = case.call(native.agc, inputs)
        gradients = tf.gradients(y, inputs, dy)
        for gradient, value in zip(gradients, inputs, strict=True):
            assert gradient.shape.as_list() == value.shape.as_list()
        with tf.compat.v1.Session() as session:
            feeds = {x: case.x, shortcut: case.shortcut, dy: case.dy}
            got = session.run(gradients, {placeholder: value.numpy() for placeholder, value in feeds.items()})
    want = run(case, reference.agc)
    for name, value in zip(case.inputs, got, strict=True):
        np.testing.assert_allclose(value, getattr(want, f"d{name}"), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_overflow_is_not_hidden(value, activation):
    # As stock ops do: dy * act'(z), so that even a dead position (0 * Inf) shows loss scaling that
    # its scale is too large.
    x = tf.constant([[[1.0, 1.0], [-3.0, 2.0], [2.0, -3.0]]])
    gain, mean_scale = tf.constant([1.0, 1.0]), tf.constant([1.0, 1.0])
    dy = np.ones(x.shape, np.float32)
    dy[0, 1, 0] = value  # z < 0

    def gradients(agc):
        with tf.GradientTape() as tape:
            tape.watch([x, gain, mean_scale])
            y, _ = agc(x, gain, mean_scale, activation, ALPHA[activation], "channels_last")
        return tape.gradient(y, [x, gain, mean_scale], output_gradients=tf.constant(dy))

    dx, dgain, dmean_scale = gradients(native.agc)
    assert not np.isfinite(dx[0, :, 0]).all() and not np.isfinite(dgain[0])
    assert np.isfinite(dx[0, :, 1]).all() and np.isfinite(dgain[1]) and np.isfinite(dmean_scale[1])
    for got, want in zip((dx, dgain, dmean_scale), gradients(reference.agc), strict=True):
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))


@pytest.mark.parametrize(
    ("activation", "value", "has_dgain"),
    [
        ("linear", np.inf, True),
        ("linear", -np.inf, True),
        ("relu", np.inf, False),
        ("relu", -np.inf, True),
        ("relu6", np.inf, True),
        ("relu6", -np.inf, True),
        ("leaky_relu", np.inf, False),
        ("leaky_relu", -np.inf, False),
        ("elu", np.inf, False),
        ("elu", -np.inf, True),
    ],
)
def test_an_infinite_shortcut(activation, value, has_dgain):
    # Where the activation is flat, and where x is kept, it has no part in any gradient. Elsewhere y is infinite, too,
    # and their difference is NaN.
    x = tf.constant([[[1.0, 1.0], [-3.0, 2.0], [2.0, -3.0]]])
    shortcut = np.ones(x.shape, np.float32)
    shortcut[0, 1, 0] = value

    def results(agc):
        inputs = [x, tf.ones([2]), tf.ones([2]), tf.constant(shortcut)]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y, _ = agc(*inputs[:3], activation, ALPHA[activation], "channels_last", shortcut=inputs[3])
        names = ("y", "dx", "dgain", "dmean_scale", "dshortcut")
        return dict(zip(names, [y, *tape.gradient(y, inputs)], strict=True))

    got, want = results(native.agc), results(reference.agc)
    assert np.isfinite(got["dgain"][0]) == has_dgain
    if not has_dgain:
        got["dgain"], want["dgain"] = got["dgain"][1:], want["dgain"][1:]
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("activation", "value"), [("relu", -np.inf), ("relu6", np.inf), ("elu", -np.inf)])
def test_an_infinite_bias_switches_a_channel_off(activation, value):
    x = tf.constant([[[1.0, 1.0], [-3.0, 2.0], [2.0, -3.0]]])

    def results(agc):
        inputs = [x, tf.ones([2]), tf.ones([2]), tf.constant([value, 0.5])]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y, _ = agc(*inputs[:3], activation, ALPHA[activation], "channels_last", bias=inputs[3])
        return [y, *tape.gradient(y, inputs)]

    for got, want in zip(results(native.agc), results(reference.agc), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_unwatched_inputs_have_no_gradient():
    case = make_case((2, 4, 8), "float32", "relu")
    with tf.GradientTape() as tape:
        tape.watch(case.gain)
        y, _ = native.agc(case.x, case.gain, case.mean_scale, *case.attributes)
    dx, dgain = tape.gradient(y, [case.x, case.gain])
    assert dx is None and dgain.shape == [8]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_x_reaches_its_channel_only(activation):
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 9)).astype(np.float32)
    x[1, 2, 3, 4] = np.nan
    gain, mean_scale = tf.ones([9]), tf.ones([9])
    with tf.GradientTape() as tape:
        tape.watch([gain, mean_scale])
        y, _ = native.agc(tf.constant(x), gain, mean_scale, activation, ALPHA[activation], "channels_last")
    for gradient in tape.gradient(y, [gain, mean_scale]):
        np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(gradient)), [4])


# ---- The gain's gradient where y is kept ----


@pytest.mark.parametrize("gain", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "elu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_the_gains_gradient_through_a_shortcut(dtype, activation, gain):
    """gain * u is y - bias - shortcut: the rounding of y, at most half an epsilon of it, is divided by the gain.

    The roundings of different elements have nothing to do with each other, so that they add up as the root of the sum
    of their squares. Each has a standard deviation of at most 1 / sqrt(3) of its bound; 4 in sum are allowed.
    """
    case = make_case((4, 12, 12, 32), dtype, activation, bias=True, shortcut=True, seed=5)
    case.gain = tf.cast(gain * np.random.default_rng(0).uniform(0.8, 1.25, 32), case.gain.dtype)
    case = without_kinks(case)
    want, got = float64_results(case), run(case, native.agc)
    y, dy = np.abs(want.y), np.abs(case.dy.numpy().astype(np.float64))
    moved = np.abs(want.dshortcut) * y
    if activation == "elu":  # below 0, (y + alpha) * (log(1 + y / alpha) - bias - shortcut) has another derivative by y
        inputs = [tf.cast(value, tf.float64) for value in (case.x, case.gain, case.mean_scale)]
        gain_u, _ = reference.agc(*inputs, "linear", 0.0, case.data_format)
        moved = np.where(want.y > 0, moved, dy * y * np.abs(1 + gain_u))
    axes, gains = (0, 1, 2), np.abs(case.gain.numpy())
    rounding = EPSILON[dtype] / 2 * np.sqrt((moved**2).sum(axes) / 3) / gains
    # And the arithmetic, which is done in float32 or better.
    terms = (np.abs(case.bias.numpy()) + np.abs(case.shortcut.numpy().astype(np.float64)) + y + 1) * dy
    arithmetic = 4 * EPSILON[parameter_dtype(dtype)] * np.sqrt((terms**2).sum(axes)) / gains
    error = np.abs(got.dgain - want.dgain)
    assert (error <= 4 * rounding + arithmetic).all(), (error / (4 * rounding + arithmetic)).max()
    if dtype in ("float16", "bfloat16") and gain == 0.05:
        assert (error > rounding / 10).any()  # the rounding is what it is about


# ---- Partly needed gradients ----

_INPUTS = ("x", "gain", "mean_scale", "bias", "shortcut")
_SOME = [names for size in (1, 2) for names in itertools.combinations(_INPUTS, size)]


@pytest.mark.parametrize("needed", _SOME, ids=" ".join)
@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_some_inputs_alone(activation, needed, mode):
    case = make_case((2, 4, 5, 3), "float64", activation, bias=True, shortcut=True)

    def gradients(needed):
        # Three ways not to want a gradient: not watched, stopped, and not asked for.
        inputs = case.inputs
        with tf.GradientTape() as tape:
            tape.watch([inputs[name] for name in needed])
            y, mean = case.call(native.agc, inputs.values())
        with tf.GradientTape() as stopped_tape:
            stopped_tape.watch(list(inputs.values()))
            stopped = [value if name in needed else tf.stop_gradient(value) for name, value in inputs.items()]
            outputs = case.call(native.agc, stopped)
        upstream = [case.dy, case.dmean]
        sources = [inputs[name] for name in needed]
        return (
            tape.gradient([y, mean], sources, output_gradients=upstream),
            stopped_tape.gradient(outputs, sources, output_gradients=upstream),
        )

    unwatched, stopped = (tf.function(gradients) if mode == "function" else gradients)(needed)
    expected = run(case, reference.agc)
    for name, *got in zip(needed, unwatched, stopped, strict=True):
        for gradient in got:
            np.testing.assert_allclose(gradient, getattr(expected, "d" + name), rtol=1e-10, atol=1e-10)


def test_some_inputs_alone_in_a_v1_graph():
    case = make_case((2, 4, 5, 3), "float64", "linear", bias=True, shortcut=True)
    expected = run(case, reference.agc)
    with tf.Graph().as_default():
        inputs = {name: tf.constant(value.numpy()) for name, value in case.inputs.items()}
        y, mean = case.call(native.agc, inputs.values())
        upstream = [tf.constant(case.dy.numpy()), tf.constant(case.dmean.numpy())]
        for needed in _SOME:
            frozen = [inputs[name] for name in _INPUTS if name not in needed]
            gradients = tf.gradients([y, mean], [inputs[name] for name in needed], upstream, stop_gradients=frozen)
            with tf.compat.v1.Session() as session:
                for name, got in zip(needed, session.run(gradients), strict=True):
                    np.testing.assert_allclose(got, getattr(expected, "d" + name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_with_a_frozen_gain_keeps_no_map(frozen, counters):
    # x is kept for the gain's gradient alone; without it, y is written over x while training, too.
    gain, mean_scale = tf.Variable(tf.ones([8]), trainable=not frozen), tf.Variable(tf.ones([8]))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = native.agc(x + 1.0, gain, mean_scale, "linear", 0.0, "channels_last")
        return tape.gradient(y, [x, mean_scale] if frozen else [x, mean_scale, gain])

    step(make_case((2, 6, 5, 8)).x)
    counts = counters.read()
    assert (counts["forward"], counts["backward"]) == (1, 1)
    assert counts["forward_in_place"] == frozen


# ---- Loss scaling ----


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_scaling_skips_a_step_that_overflows(activation, fresh_keras):
    inputs = keras.Input((4, 4, 3))
    layer = AutomaticGainControl(activation, dtype="mixed_float16")
    model = keras.Model(inputs, layer(inputs))
    # The gradient of the outputs is the scale itself or minus that: 2**16 overflows in half, 2**15 does not.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3), initial_scale=2.0**17)
    model.compile(optimizer, lambda signs, y: tf.reduce_sum(signs * tf.cast(y, tf.float32)))
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype(np.float32) + 1

    scales, gains = [], []
    for _ in range(4):
        model.fit(x, np.sign(x), verbose=0)
        scales.append(float(optimizer.dynamic_scale.value))
        gains.append(layer.gain.numpy())
    assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
    np.testing.assert_array_equal(gains[:2], np.ones((2, 3)))
    assert np.isfinite(gains).all() and (gains[2] != 1).any()
