"""The reference against the formulas of docs, written out in NumPy; kernels are not tested here."""

import re

import numpy as np
import pytest
import tensorflow as tf

from agc_testing import ACTIVATIONS, DATA_FORMATS, DTYPES, OPTIONAL
from tf_agc import reference


def _written_out(x, gain, mean_scale, bias, shortcut, activation, alpha):
    """y and mean of a float64 array (N, ..., C), one map at a time; 0 for a bias or a shortcut that is absent."""
    y, mean = np.empty_like(x), np.empty((x.shape[0], x.shape[-1]))
    for n in range(x.shape[0]):
        for c in range(x.shape[-1]):
            mean[n, c] = x[n, ..., c].sum() / x[n, ..., c].size
            z = gain[c] * (x[n, ..., c] - mean_scale[c] * mean[n, c]) + bias[c] + shortcut[n, ..., c]
            y[n, ..., c] = {
                "linear": z,
                "relu": np.maximum(z, 0),
                "relu6": np.clip(z, 0, 6),
                "leaky_relu": np.where(z > 0, z, alpha * z),
                "elu": np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0))),
            }[activation]
    return y, mean


@pytest.mark.parametrize("optional", OPTIONAL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("rank", range(3, 9))
def test_is_the_formula(rank, data_format, activation, optional):
    rng = np.random.default_rng(rank)
    shape = (2, *[3, 2, 1, 2, 3, 2][: rank - 2], 5)
    x, shortcut = 3 * rng.standard_normal((2, *shape))
    gain, mean_scale, bias = rng.standard_normal((3, 5))
    has_bias, has_shortcut = OPTIONAL[optional]
    want, want_mean = _written_out(x, gain, mean_scale, bias * has_bias, shortcut * has_shortcut, activation, 0.25)
    first = data_format == "channels_first"
    x, shortcut = (tf.constant(np.moveaxis(maps, -1, 1) if first else maps) for maps in (x, shortcut))
    got, mean = reference.agc(
        x,
        tf.constant(gain),
        tf.constant(mean_scale),
        activation,
        0.25,
        data_format,
        bias=tf.constant(bias) if has_bias else None,
        shortcut=shortcut if has_shortcut else None,
    )
    got = np.moveaxis(got.numpy(), 1, -1) if first else got.numpy()
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(mean.numpy(), want_mean, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    u = "float64" if dtype == "float64" else "float32"
    ones = tf.ones([4], u)
    x = tf.ones([2, 3, 4], dtype)
    y, mean = reference.agc(x, ones, ones, "elu", 0.5, "channels_last", bias=ones, shortcut=x)
    assert (y.dtype.name, mean.dtype.name) == (dtype, u)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("shape", [None, [None] * 4, [None, None, 6, None], [2, 6, 6, 6]])
def test_unknown_shapes(shape, data_format):
    x, p = tf.random.normal([2, 6, 6, 6]), tf.range(6.0)
    function = tf.function(lambda x: reference.agc(x, p, p / 6, "relu", 0.0, data_format))
    concrete = function.get_concrete_function(tf.TensorSpec(shape, tf.float32))
    if shape is not None:  # the parameters tell the channels
        axis = -1 if data_format == "channels_last" else 1
        known = [*shape]
        known[axis] = 6
        assert concrete.output_shapes[0].as_list() == known
    want = reference.agc(x, p, p / 6, "relu", 0.0, data_format)
    for got, wanted in zip(concrete(x), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("x_shape", [None, [None, 4, None], [2, 4, 3]])
@pytest.mark.parametrize("shortcut_shape", [None, [None, None, 3], [2, 4, 3]])
def test_unknown_shapes_of_a_shortcut(x_shape, shortcut_shape):
    # Differences on purpose, so that nothing else than the shortcut's own check can refuse.
    p = tf.range(3.0)
    agc = tf.function(
        lambda x, shortcut: reference.agc(x, p, p, "relu", 0.0, "channels_last", bias=p, shortcut=shortcut)[0],
        input_signature=[tf.TensorSpec(x_shape), tf.TensorSpec(shortcut_shape)],
    )
    x, shortcut = tf.random.normal([2, 2, 4, 3])
    want, _ = reference.agc(x, p, p, "relu", 0.0, "channels_last", bias=p, shortcut=shortcut)
    np.testing.assert_allclose(agc(x, shortcut), want, rtol=1e-6, atol=1e-6)
    wrong = [[1, 4, 3], [2, 1, 3]]  # each would be broadcast
    wrong += [[3], [4, 3], [1, 2, 4, 3]] if shortcut_shape is None else []
    for shape in wrong:
        if shortcut_shape is None or shortcut_shape[0] is None:
            message = re.escape(f"[shortcut must have the shape of x] [2 4 3] [got] [{' '.join(map(str, shape))}]")
            with pytest.raises(tf.errors.InvalidArgumentError, match=message):
                agc(x, tf.ones(shape))


def test_stock_inference_ops_only():
    stock = {"Placeholder", "Const", "Identity", "NoOp", "Shape", "StridedSlice", "Pack", "Range", "Squeeze"}
    stock |= {"Fill", "ConcatV2", "Reshape", "Mean", "Mul", "Sub", "Cast", "Greater", "SelectV2"}
    stock |= {"Relu", "Relu6", "LeakyRelu", "Elu", "Rank", "Assert", "All", "Equal", "LogicalOr"}
    stock |= {"GreaterEqual", "LessEqual", "LogicalAnd", "AddV2"}
    for activation in ACTIVATIONS:
        for shape in ([None, None, None, 3], None):
            graph = tf.function(
                lambda x, shortcut, activation=activation: reference.agc(
                    x, *[tf.ones([3])] * 2, activation, 0.3, "channels_last", bias=tf.ones([3]), shortcut=shortcut
                )
            ).get_concrete_function(*[tf.TensorSpec(shape, tf.bfloat16)] * 2)
            used = {operation.type for operation in graph.graph.get_operations()}
            assert used <= stock, used - stock


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "elu"])
def test_alpha_0_is_relu_and_nan_stays(activation):
    x = tf.constant([[[np.nan], [1.0]], [[-np.inf], [2.0]], [[5.0], [-5.0]]])
    zero = tf.zeros([1])
    y, _ = reference.agc(x, zero + 1, zero, activation, 0.0, "channels_last")
    # mean_scale 0: 0 * mean is NaN where the mean is not finite.
    assert np.isnan(y[0]).all() and np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[2], [[5.0], [0.0]])


def test_alpha_is_a_float32_as_the_op_has_it():
    x = tf.constant([[[-3.0], [1.0]]], tf.float64)
    zero = tf.zeros([1], tf.float64)
    y, _ = reference.agc(x, zero + 1, zero, "leaky_relu", 0.1, "channels_last")
    assert y[0, 0, 0].numpy() == -3.0 * float(np.float32(0.1))


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_no_positions(data_format, mode):
    shape = (4, 0, 5, 3) if data_format == "channels_last" else (4, 3, 0, 5)

    def agc(x):
        return reference.agc(x, tf.ones([3]), tf.ones([3]), "relu", 0.0, data_format)

    if mode == "function":
        agc = tf.function(agc, input_signature=[tf.TensorSpec([None] * 4)])
    with pytest.raises(tf.errors.InvalidArgumentError, match="x has no positions .* of[^a-z]+4"):
        agc(tf.zeros(shape))
    y, mean = agc(tf.zeros((0, *shape[1:])))
    assert y.shape == (0, *shape[1:]) and mean.shape == (0, 3)


_RANK = "[x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels), got shape]"


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize(
    "x, gain, mean_scale, message",
    [
        ((3, 3), (3,), (3,), _RANK + " [3 3]"),
        ((3,), (3,), (3,), _RANK + " [3]"),
        ((), (3,), (3,), _RANK + " []"),
        ((3,) * 9, (3,), (3,), _RANK + " [3 3 3 3 3 3 3 3 3]"),
        ((2, 3, 3), (2,), (3,), "[gain must have shape [C] =] [3] [got] [2]"),
        ((2, 3, 3), (3, 1), (3,), "[gain must have shape [C] =] [3] [got] [3 1]"),
        ((2, 3, 3), (3, 3), (3,), "[gain must have shape [C] =] [3] [got] [3 3]"),
        ((2, 3, 3), (3,), (), "[mean_scale must have shape [C] =] [3] [got] []"),
    ],
)
def test_shapes_that_are_known_when_it_runs(data_format, x, gain, mean_scale, message):
    agc = tf.function(
        lambda x, gain, mean_scale: reference.agc(x, gain, mean_scale, "relu", 0.0, data_format)[0],
        input_signature=[tf.TensorSpec(None)] * 3,
    )
    assert agc(tf.ones([2, 3, 3]), tf.ones([3]), tf.ones([3])).shape == [2, 3, 3]
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        agc(tf.ones(x), tf.ones(gain), tf.ones(mean_scale))


def test_a_bias_of_another_length():
    p = tf.ones([3])
    agc = tf.function(
        lambda x, bias: reference.agc(x, p, p, "relu", 0.0, "channels_last", bias=bias)[0],
        input_signature=[tf.TensorSpec(None)] * 2,
    )
    for shape, printed in (((), "[]"), ((1,), "[1]"), ((3, 1), "[3 1]")):
        message = re.escape(f"[bias must have shape [C] =] [3] [got] {printed}")
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            agc(tf.ones([2, 4, 3]), tf.ones(shape))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_differentiable_twice(activation):
    x, shortcut = tf.random.stateless_normal([2, 2, 4, 3], [1, 2], dtype=tf.float64)
    p = tf.constant([0.7, -1.2, 2.0], tf.float64)

    def first(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = reference.agc(x, p, p, activation, 0.3, "channels_last", bias=p, shortcut=shortcut)
            loss = tf.reduce_sum(y**3)
        return tape.gradient(loss, x)

    computed, numeric = tf.test.compute_gradient(first, [x], delta=1e-5)
    np.testing.assert_allclose(computed[0], numeric[0], rtol=1e-5, atol=1e-5)
