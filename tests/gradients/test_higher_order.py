"""Derivatives of derivatives through the native op, and forward mode, against the reference's.

First-order gradients are in test_gradient.py; transformations (jacobian, vectorized_map, loops) in
test_transformations.py.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_agc
from agc_testing import ACTIVATIONS, DATA_FORMATS, EPSILON, OPTIONAL, assert_close, make_case
from tf_agc import AutomaticGainControl, native, reference

pytestmark = pytest.mark.usefixtures("native_required")

# Each layout and each mode with every activation, without the product of both.
_LAYOUT_AND_MODE = pytest.mark.parametrize(
    ("data_format", "mode"), [("channels_last", "eager"), ("channels_first", "function")]
)
# A bias and a shortcut are in all cases but those that ask for others: nothing else is left out by them.
_BOTH = {"bias": True, "shortcut": True}


def _loss(outputs, case):
    """A scalar with mixed second derivatives in every pair of outputs; smooth in both."""
    y, mean = outputs
    return tf.reduce_sum(y * case.dy) + tf.reduce_sum(tf.exp(0.1 * y)) * tf.reduce_sum(tf.sin(mean) * case.dmean)


def _pack(case):
    """All inputs in one vector, so that one Hessian has every mixed derivative."""
    return tf.concat([tf.reshape(value, [-1]) for value in case.inputs.values()], axis=0)


def _unpack(vector, case):
    parts = tf.split(vector, [tf.size(value) for value in case.inputs.values()])
    return [tf.reshape(part, value.shape) for part, value in zip(parts, case.inputs.values(), strict=True)]


@pytest.mark.parametrize("optional", OPTIONAL)
@_LAYOUT_AND_MODE
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "leaky_relu 0", "elu 0.7"])
def test_hessian(activation, data_format, optional, mode):
    activation, _, alpha = activation.partition(" ")
    alpha = float(alpha) if alpha else None
    bias, shortcut = OPTIONAL[optional]
    case = make_case(
        (2, 3, 2, 2), "float64", activation, data_format, alpha=alpha, seed=1, bias=bias, shortcut=shortcut
    )
    vector = _pack(case)

    def hessian(agc, mode):
        def product(vector, direction):
            with tf.GradientTape() as outer:
                outer.watch(vector)
                with tf.GradientTape() as inner:
                    inner.watch(vector)
                    loss = _loss(case.call(agc, _unpack(vector, case)), case)
                gradient = inner.gradient(loss, vector)
            return outer.gradient(gradient, vector, output_gradients=direction)

        product = tf.function(product) if mode == "function" else product
        return np.stack([product(vector, row) for row in tf.eye(vector.shape[0], dtype=vector.dtype)])

    got, want = hessian(native.agc, mode), hessian(reference.agc, "function")
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10 * np.abs(want).max())
    np.testing.assert_allclose(got, got.T, rtol=1e-10, atol=1e-10 * np.abs(want).max())


def _nested(agc, case, order):
    """Gradients of every order up to `order`, each of a random projection of the one before."""
    rng = np.random.default_rng(2)
    inputs = [*case.inputs.values()]
    results = []

    def differentiate(order):
        if order == 0:
            y, mean = case.call(agc, inputs)
            return tf.reduce_sum(y * case.dy) + tf.reduce_sum(tf.square(y)) + tf.reduce_sum(mean * mean * mean)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = differentiate(order - 1)
        gradients = tape.gradient(value, inputs)
        results.append(gradients)
        # Weights around 1: a projection without the sums' own direction would hide an error there.
        return tf.add_n([tf.reduce_sum(g * tf.constant(1 + rng.standard_normal(g.shape), g.dtype)) for g in gradients])

    differentiate(order)
    return results


@_LAYOUT_AND_MODE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_third_order(activation, data_format, mode):
    case = make_case((2, 4, 3, 5), "float64", activation, data_format, seed=2, **_BOTH)

    def run(agc):
        derivatives = lambda: _nested(agc, case, 3)  # noqa: E731
        return (tf.function(derivatives) if mode == "function" else derivatives)()

    assert_close(run(native.agc), run(reference.agc), 1e-12)


@pytest.mark.parametrize("optional", ["neither", "both"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_order_in_every_dtype(activation, dtype, optional):
    bias, shortcut = OPTIONAL[optional]
    case = make_case((3, 5, 4, 7), dtype, activation, seed=3, bias=bias, shortcut=shortcut)
    dtypes = [value.dtype for value in (*case.inputs.values(), case.dy)]

    def derivatives(agc, dtype):
        u = tf.float64 if dtype == "float64" else tf.float32
        dy = tf.cast(case.dy, dtype)
        inputs = [tf.cast(value, u if value.shape.rank == 1 else dtype) for value in case.inputs.values()]
        with tf.GradientTape() as outer:
            outer.watch([*inputs, dy])
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                y, mean = case.call(agc, inputs)
            gradients = inner.gradient([y, mean], inputs, output_gradients=[dy, tf.cast(case.dmean, u)])
            # sum of squares, in U: every entry matters, and half does not overflow.
            norm = tf.add_n([tf.reduce_sum(tf.square(tf.cast(g, u))) for g in (*gradients, y)])
        results = outer.gradient(norm, [*inputs, dy])
        assert dtype == "float64" or [result.dtype for result in results] == dtypes
        return results

    assert_close(derivatives(native.agc, dtype), derivatives(reference.agc, "float64"), 16 * EPSILON[dtype])


@pytest.mark.parametrize("shape", [[None] * 4, None], ids=["sizes", "rank"])
@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_second_order_of_unknown_shapes(data_format, shape):
    case = make_case((2, 4, 3, 5), "float64", "elu", data_format, **_BOTH)

    def second(agc):
        @tf.function(input_signature=[tf.TensorSpec(shape, tf.float64)] * 2)
        def compute(x, shortcut):
            inputs = [x, case.gain, case.mean_scale, case.bias, shortcut]
            with tf.GradientTape() as outer:
                outer.watch(inputs)
                with tf.GradientTape() as inner:
                    inner.watch([x, shortcut])
                    loss = _loss(case.call(agc, inputs), case)
                norm = tf.add_n([tf.reduce_sum(tf.square(one)) for one in inner.gradient(loss, [x, shortcut])])
            return outer.gradient(norm, inputs)

        return compute(case.x, case.shortcut)

    assert_close(second(native.agc), second(reference.agc), 1e-12)


def test_empty_batch():
    for optional in ({}, _BOTH):
        case = make_case((0, 4, 4, 3), "float32", "elu", **optional)
        for value, gradient in zip(case.inputs.values(), _nested(native.agc, case, 2)[-1], strict=True):
            np.testing.assert_array_equal(gradient, np.zeros(value.shape))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gain_of_0_is_finite(activation):
    # relu, relu6 and linear are exact there where nothing is added, documented for the others: no NaN, no infinity.
    for optional in ({}, _BOTH):
        case = make_case((2, 4, 3, 2), "float64", activation, **optional)
        case.gain = tf.constant([0.0, 1.5], tf.float64)
        got, want = _nested(native.agc, case, 2), _nested(reference.agc, case, 2)
        if activation in ("leaky_relu", "elu") or activation != "linear" and optional:
            assert all(np.isfinite(g).all() for g in tf.nest.flatten(got))
        else:
            assert_close(got, want, 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_overflow_of_the_second_order_is_not_hidden(activation):
    case = make_case((2, 4, 3), "float32", activation)
    infinite = tf.tensor_scatter_nd_update(tf.ones_like(case.x), [[0, 1, 2]], [np.inf])

    def gradients(agc):
        with tf.GradientTape() as outer:
            outer.watch([case.dy, case.gain])
            with tf.GradientTape() as inner:
                inner.watch(case.x)
                y, _ = agc(case.x, case.gain, case.mean_scale, *case.attributes)
            dx = inner.gradient(y, case.x, output_gradients=case.dy)
        return outer.gradient(dx, [case.dy, case.gain], output_gradients=infinite)

    ddy, dgain = gradients(native.agc)
    # The infinity is in its map's mean and so everywhere in that map, dead positions included.
    assert not np.isfinite(ddy[0, :, 2]).any()
    np.testing.assert_array_equal(np.isfinite(dgain), [True, True, False])
    for got, want in zip((ddy, dgain), gradients(reference.agc), strict=True):
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_penalty_training(dtype, mode, fresh_keras):
    """WGAN-GP (arXiv 1704.00028): the loss has the norm of the critic's gradient by its input."""

    def train(name):
        keras.utils.set_random_seed(0)
        critic = keras.Sequential([keras.Input((8, 8, 3), dtype=dtype)])
        for activation in ("relu", "leaky_relu", "elu", "relu6", None):
            critic.add(keras.layers.Conv2D(4, 3, padding="same", use_bias=False, dtype=dtype))
            critic.add(AutomaticGainControl(activation, dtype=dtype))
        critic.add(keras.layers.Flatten(dtype=dtype))
        critic.add(keras.layers.Dense(1, dtype=dtype))
        variables = [variable.value for variable in critic.trainable_variables]

        def step(real, fake, mix):
            with tf.GradientTape() as tape:
                between = mix * real + (1 - mix) * fake
                with tf.GradientTape() as inner:
                    inner.watch(between)
                    score = critic(between)
                gradient = inner.gradient(score, between)
                norm = tf.sqrt(tf.reduce_sum(tf.square(gradient), axis=[1, 2, 3]))
                penalty = tf.reduce_mean(tf.square(norm - 1))
                loss = tf.reduce_mean(critic(fake)) - tf.reduce_mean(critic(real)) + 10 * penalty
            gradients = tape.gradient(loss, variables)
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.assign_sub(0.01 * gradient)
            return loss, penalty

        step = tf.function(step) if mode == "function" else step
        rng = np.random.default_rng(0)
        with tf_agc.implementation(name):
            losses = []
            for _ in range(3):
                real, fake = (tf.constant(rng.standard_normal((4, 8, 8, 3)), dtype) for _ in range(2))
                losses.append(step(real, fake, tf.constant(rng.uniform(size=(4, 1, 1, 1)), dtype)))
        return losses, variables

    assert_close(train("native"), train("reference"), 1e-10 if dtype == "float64" else 1e-4)


# TensorFlow has no rule for the tangent of a custom op: it differentiates the gradient by dy.
@_LAYOUT_AND_MODE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode(activation, data_format, mode):
    case = make_case((2, 4, 3, 5), "float64", activation, data_format, seed=4, **_BOTH)
    inputs = [*case.inputs.values()]
    rng = np.random.default_rng(0)
    tangents = [tf.constant(rng.standard_normal(value.shape)) for value in inputs]

    def run(agc):
        def compute():
            with tf.autodiff.ForwardAccumulator(inputs, tangents) as accumulator:
                with tf.GradientTape() as tape:
                    tape.watch(inputs)
                    outputs = case.call(agc, inputs)
                    loss = _loss(outputs, case)
                gradients = tape.gradient(loss, inputs)
            # Forward over reverse: a product with the Hessian.
            return [accumulator.jvp(value) for value in (*outputs, *gradients)]

        return (tf.function(compute) if mode == "function" else compute)()

    assert_close(run(native.agc), run(reference.agc), 1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_forward_mode_in_every_dtype(dtype):
    case = make_case((2, 4, 3, 5), dtype, "relu", **_BOTH)

    def run(agc, dtype):
        u = tf.float64 if dtype == "float64" else tf.float32
        inputs = [tf.cast(value, u if value.shape.rank == 1 else dtype) for value in case.inputs.values()]
        tangents = [tf.cast(1 + value, value.dtype) for value in inputs]
        with tf.autodiff.ForwardAccumulator(inputs, tangents) as accumulator:
            outputs = case.call(agc, inputs)
        return accumulator.jvp(outputs)

    assert_close(run(native.agc, dtype), run(reference.agc, "float64"), 8 * EPSILON[dtype])


def test_second_order_in_a_v1_graph():
    case = make_case((2, 4, 3, 5), "float64", "leaky_relu", **_BOTH)

    def run(agc):
        with tf.Graph().as_default():
            x, shortcut = (tf.compat.v1.placeholder(tf.float64, [None, None, None, 5]) for _ in range(2))
            parameters = [tf.constant(value.numpy()) for value in (case.gain, case.mean_scale, case.bias)]
            inputs = [x, *parameters, shortcut]
            y, mean = case.call(agc, inputs)
            loss = tf.reduce_sum(tf.exp(0.1 * y)) * tf.reduce_sum(tf.sin(mean))
            first = tf.gradients(loss, inputs)
            norm = tf.add_n([tf.reduce_sum(tf.square(gradient)) for gradient in first])
            second = tf.gradients(norm, inputs)
            assert [one.shape.as_list() for one in second] == [value.shape.as_list() for value in inputs]
            hessian = tf.hessians(loss, inputs[1])
            with tf.compat.v1.Session() as session:
                feeds = {x: case.x.numpy(), shortcut: case.shortcut.numpy()}
                return session.run([*first, *second, *hessian], feeds)

    assert_close(run(native.agc), run(reference.agc), 1e-12)


def test_alpha_is_the_same_in_every_order(mode):
    # Eager execution hands a gradient function the double that was passed in, not the op's float.
    case = make_case((2, 4, 5), "float64", "leaky_relu", alpha=0.1)
    derivatives = lambda agc: _nested(agc, case, 2)[-1][1]  # noqa: E731
    run = tf.function(derivatives) if mode == "function" else derivatives
    np.testing.assert_allclose(run(native.agc), run(reference.agc), rtol=1e-12)


@pytest.mark.parametrize("activation", ["linear", "elu"])
def test_second_order_under_xla(activation):
    if not native.XLA_STATUS.available:
        pytest.skip(native.XLA_STATUS.reason)
    case = make_case((2, 4, 3, 5), "float64", activation, **_BOTH)
    compiled = tf.function(lambda: _nested(native.agc, case, 2), jit_compile=True)
    assert_close(compiled(), _nested(reference.agc, case, 2), 1e-12)
