"""`tf_agc.agc`: conversions, defaults and every error that Python raises."""

import re
from decimal import Decimal
from fractions import Fraction

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_agc
from agc_testing import ALPHA_ARGUMENT, DTYPES
from tf_agc import reference

_X = np.random.default_rng(0).standard_normal((2, 4, 5, 3)).astype(np.float32)


def _want(gain, mean_scale, activation, alpha, x=_X, data_format="channels_last", **optional):
    u = tf.float64 if tf.as_dtype(x.dtype) == tf.float64 else tf.float32
    parameters = tf.cast(gain, u), tf.cast(mean_scale, u)
    return reference.agc(tf.constant(x), *parameters, activation, alpha, data_format, **optional)[0]


@pytest.mark.parametrize(
    "activation, alpha, used",
    [
        (None, None, ("linear", 0.0)),
        ("linear", None, ("linear", 0.0)),
        ("relu", None, ("relu", 0.0)),
        ("relu6", None, ("relu6", 0.0)),
        ("leaky_relu", None, ("leaky_relu", 0.2)),
        ("elu", None, ("elu", 1.0)),
        ("leaky_relu", 0.3, ("leaky_relu", 0.3)),
        ("elu", np.float64(0.5), ("elu", 0.5)),
        ("elu", 0, ("elu", 0.0)),
    ],
)
def test_activations(activation, alpha, used, mode):
    gain, mean_scale = [2.0, -1.0, 0.5], [1.0, 0.5, 0.0]

    def agc(x):
        number = {} if alpha is None else {ALPHA_ARGUMENT[activation]: alpha}
        return tf_agc.agc(x, gain, mean_scale, activation=activation, **number)

    got = tf.function(agc)(_X) if mode == "function" else agc(_X)
    np.testing.assert_allclose(got, _want(gain, mean_scale, *used), rtol=1e-5, atol=1e-5)


def test_defaults():
    # Linear, channels_last.
    got = tf_agc.agc(_X, [2.0, 3, 4], [1.0, 1, 1])
    np.testing.assert_allclose(got, _want([2, 3, 4], [1, 1, 1], "linear", 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "gain",
    [
        3,
        3.0,
        Fraction(3),
        np.float64(3),
        np.array(3),
        tf.constant(3.0),
        [3, 3, 3],
        (3.0, 3.0, 3.0),
        [tf.constant(3.0)] * 3,
        np.array([3, 3, 3]),
        np.full(3, 3.0),
        tf.fill([3], 3.0),
        tf.Variable([3.0] * 3),
        keras.Variable([3.0] * 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_parameters_are_converted(gain, mode):
    def agc(x):
        return tf_agc.agc(x, gain, gain, gain, activation="relu")

    got = tf.function(agc)(_X) if mode == "function" else agc(_X)
    want = _want([3.0] * 3, [3.0] * 3, "relu", 0.0, bias=tf.fill([3], 3.0))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("convert", [tf.constant, np.asarray, np.ndarray.tolist, tf.Variable, keras.Variable])
def test_a_shortcut_is_converted(convert, data_format, mode):
    shortcut = np.random.default_rng(1).standard_normal(_X.shape).astype(np.float32)
    converted = convert(shortcut)

    def agc(x):
        return tf_agc.agc(x, 2.0, 0.5, shortcut=converted, activation="relu", data_format=data_format)

    got = tf.function(agc)(_X) if mode == "function" else agc(_X)
    channels = 3 if data_format == "channels_last" else 4
    both = [2.0] * channels, [0.5] * channels
    want = _want(*both, "relu", 0.0, data_format=data_format, shortcut=tf.constant(shortcut))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [None, [None] * 4])
def test_scalars_with_unknown_channels(shape):
    for data_format in ("channels_last", "channels_first"):
        agc = tf.function(
            lambda x, data_format=data_format: tf_agc.agc(x, 2.0, 1, 0.5, activation="relu", data_format=data_format),
            input_signature=[tf.TensorSpec(shape)],
        )
        channels = 3 if data_format == "channels_last" else 4
        bias = tf.fill([channels], 0.5)
        want = _want([2.0] * channels, [1.0] * channels, "relu", 0.0, data_format=data_format, bias=bias)
        np.testing.assert_allclose(agc(_X), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    x = tf.cast(_X, dtype)
    y = tf_agc.agc(x, 1.0, [1, 1, 1], np.ones(3), x, "relu")
    assert y.dtype == dtype and y.shape == _X.shape


def test_lists_and_numpy():
    np.testing.assert_allclose(tf_agc.agc([[[1.0], [3.0]]], 2.0, 1.0), [[[-2.0], [2.0]]])
    assert tf_agc.agc(_X.astype(np.float64), 2.0, 1.0).dtype == tf.float64


_ERRORS = [
    (TypeError, "x must have dtype float16, bfloat16, float32 or float64, got int32",
     {"x": tf.ones([2, 4, 3], tf.int32)}),
    (TypeError, "x must have dtype float16, bfloat16, float32 or float64, got complex64",
     {"x": tf.ones([2, 4, 3], tf.complex64)}),
    (TypeError, "x must be a dense tensor, got a RaggedTensor",
     {"x": tf.ragged.constant([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]] * 2])}),
    (TypeError, "x must be a dense tensor, got a SparseTensor",
     {"x": tf.sparse.from_dense(tf.ones([2, 4, 3]))}),
    (TypeError, "gain must have dtype float32 for x of dtype float32, got float16",
     {"gain": tf.ones([3], tf.float16)}),
    (TypeError, "gain must have dtype float32 for x of dtype float32, got float64",
     {"gain": tf.ones([3], tf.float64)}),
    (TypeError, "mean_scale must have dtype float64 for x of dtype float64, got float32",
     {"x": tf.ones([2, 4, 3], tf.float64), "mean_scale": tf.ones([3])}),
    (TypeError, "mean_scale must have dtype float32 for x of dtype bfloat16, got bfloat16",
     {"x": tf.ones([2, 4, 3], tf.bfloat16), "mean_scale": tf.ones([3], tf.bfloat16)}),
    (ValueError, "x must be a tensor or what converts to one, got list: ", {"x": [[[1.0, 2.0], [3.0]]]}),
    (ValueError, "x must be a tensor or what converts to one, got list: ",
     {"x": [tf.ones([4, 3]), tf.ones([4, 2])]}),
    ((TypeError, ValueError), "x must be a tensor or what converts to one, got object: ", {"x": object()}),
    (ValueError, "gain must be a tensor or what converts to one, got NoneType: ", {"gain": None}),
    (ValueError, "mean_scale must be a tensor or what converts to one, got list: ",
     {"mean_scale": [[1.0], [1.0, 2.0]]}),
    (ValueError, "bias must be a tensor or what converts to one, got list: ", {"bias": [[1.0], [1.0, 2.0]]}),
    (TypeError, "bias must have dtype float32 for x of dtype float32, got float64",
     {"bias": tf.ones([3], tf.float64)}),
    # Where the activation stood once.
    (TypeError, "bias must have dtype float32 for x of dtype float32, got string", {"bias": "relu"}),
    (ValueError, "bias must have shape [C] = [3], got [4]", {"bias": [1.0] * 4}),
    (ValueError, "bias must have shape [C] = [3], got [2,4,3]", {"bias": tf.ones([2, 4, 3])}),
    (TypeError, "shortcut must be a dense tensor, got a RaggedTensor",
     {"shortcut": tf.ragged.constant([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]] * 2])}),
    (TypeError, "shortcut must be a dense tensor, got a SparseTensor",
     {"shortcut": tf.sparse.from_dense(tf.ones([2, 4, 3]))}),
    (ValueError, "shortcut must be a tensor or what converts to one, got list: ", {"shortcut": [[[1.0, 2.0], [3.0]]]}),
    (TypeError, "shortcut must have the dtype of x float32, got float64", {"shortcut": np.ones((2, 4, 3))}),
    (TypeError, "shortcut must have the dtype of x bfloat16, got float32",
     {"x": tf.ones([2, 4, 3], tf.bfloat16), "shortcut": tf.ones([2, 4, 3])}),
    (TypeError, "shortcut must have the dtype of x float32, got int32", {"shortcut": tf.ones([2, 4, 3], tf.int32)}),
    (ValueError, "shortcut must have the shape of x [2,4,3], got [2,1,3]", {"shortcut": tf.ones([2, 1, 3])}),
    (ValueError, "shortcut must have the shape of x [2,4,3], got [1,2,4,3]", {"shortcut": tf.ones([1, 2, 4, 3])}),
    (ValueError, "shortcut must have the shape of x [2,4,3], got []", {"shortcut": 1.0}),
    ((TypeError, ValueError), "gain must be a tensor or what converts to one, got RaggedTensor: ",
     {"gain": tf.ragged.constant([[1.0], [1.0, 2.0]])}),
    ((TypeError, ValueError), "gain must be a tensor or what converts to one, got ndarray: ",
     {"gain": np.full(3, None)}),
    (TypeError, "gain must be a tensor or what converts to one, got list: ", {"gain": ["a"] * 3}),
    ((TypeError, ValueError), "gain must be a tensor or what converts to one, got list: ",
     {"gain": [10**400] * 3}),
    (ValueError, "gain must be a tensor or what converts to one, got int: ", {"gain": 10**400}),
    (TypeError, "gain must have dtype float32 for x of dtype float32, got string",
     {"gain": np.array(["a", "b", "c"])}),
    (TypeError, "gain must have dtype float32 for x of dtype float32, got complex128",
     {"gain": np.ones(3, complex)}),
    (TypeError, "alpha must be a number or None, got str", {"activation": "elu", "alpha": "1"}),
    (TypeError, "alpha must be a number or None, got bool", {"activation": "elu", "alpha": True}),
    (TypeError, "alpha must be a number or None, got Decimal",
     {"activation": "elu", "alpha": Decimal(1)}),
    (ValueError, "alpha must be finite and >= 0, got -1", {"activation": "elu", "alpha": -1}),
    (TypeError, "negative_slope must be a number or None, got str",
     {"activation": "leaky_relu", "negative_slope": "1"}),
    (ValueError, "negative_slope must be finite and >= 0, got inf",
     {"activation": "leaky_relu", "negative_slope": float("inf")}),
    (ValueError, "negative_slope must be finite and >= 0, got nan",
     {"activation": "leaky_relu", "negative_slope": float("nan")}),
    (ValueError, "alpha must be finite and >= 0, got 1e+39", {"activation": "elu", "alpha": 1e39}),
    (ValueError, "alpha must be finite and >= 0, got inf", {"activation": "elu", "alpha": 10**400}),
    (ValueError, "alpha must be finite and >= 0, got -inf", {"activation": "elu", "alpha": -(10**400)}),
    (ValueError, "alpha must be finite and >= 0, got -0.333333",
     {"activation": "elu", "alpha": Fraction(-1, 3)}),
    (ValueError, "alpha must be None for the activation 'relu': only 'leaky_relu' has a negative_slope, "
     "and only 'elu' an alpha, got 0.2", {"activation": "relu", "alpha": 0.2}),
    (ValueError, "alpha must be None for the activation 'linear'", {"activation": None, "alpha": 0}),
    (ValueError, "alpha must be None for the activation 'leaky_relu': only 'leaky_relu' has a "
     "negative_slope, and only 'elu' an alpha, got 0.2", {"activation": "leaky_relu", "alpha": 0.2}),
    (ValueError, "negative_slope must be None for the activation 'elu': only 'leaky_relu' has a "
     "negative_slope, and only 'elu' an alpha, got 0.2", {"activation": "elu", "negative_slope": 0.2}),
    (ValueError, "activation must be None or one of 'linear', 'relu', 'relu6', 'leaky_relu', 'elu', "
     "got 'tanh'", {"activation": "tanh"}),
    (ValueError, "activation must be None or one of", {"activation": keras.activations.relu}),
    (ValueError, 'data_format must be "channels_last" or "channels_first", got \'NHWC\'',
     {"data_format": "NHWC"}),
    (ValueError, 'data_format must be "channels_last" or "channels_first", got array(',
     {"data_format": np.array(["channels_last", "channels_first"])}),
    (ValueError, 'data_format must be "channels_last" or "channels_first", got <tf.Tensor',
     {"data_format": tf.constant("channels_last")}),
    (ValueError, "x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels), got shape [2,3]",
     {"x": tf.ones([2, 3])}),
    (ValueError, "x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels), got shape "
     "[1,1,1,1,1,1,1,1,3]", {"x": tf.ones([1] * 8 + [3])}),
    (ValueError, "x has no positions (a spatial size is 0) but a batch of 4: the mean of an empty "
     "map is undefined, got shape [4,0,5,3]", {"x": tf.ones([4, 0, 5, 3])}),
    (ValueError, "gain must have shape [C] = [3], got [4]", {"gain": [1.0] * 4}),
    (ValueError, "gain must have shape [C] = [3], got [1]", {"gain": [1.0]}),
    (ValueError, "mean_scale must have shape [C] = [3], got [1,3]", {"mean_scale": [[1.0] * 3]}),
    (ValueError, "gain must have shape [C] = [4], got [3]",
     {"data_format": "channels_first", "mean_scale": [1.0] * 4}),
]  # fmt: skip


@pytest.mark.parametrize("error, message, arguments", _ERRORS, ids=range(len(_ERRORS)))
def test_errors(error, message, arguments, mode):
    arguments = {"x": tf.ones([2, 4, 3]), "gain": [1.0] * 3, "mean_scale": [1.0] * 3, **arguments}
    agc = tf.function(lambda: tf_agc.agc(**arguments)) if mode == "function" else None
    with pytest.raises(error, match=re.escape(message)):
        agc() if agc else tf_agc.agc(**arguments)


def test_unknown_sizes_are_question_marks():
    agc = tf.function(
        lambda x, gain: tf_agc.agc(x, gain, 1.0),
        input_signature=[tf.TensorSpec([None, None, 3]), tf.TensorSpec([None, None])],
    )
    with pytest.raises(ValueError, match=re.escape("gain must have shape [C] = [3], got [?,?]")):
        agc(tf.ones([2, 4, 3]), tf.ones([1, 3]))
    agc = tf.function(
        lambda x, shortcut: tf_agc.agc(x, 1.0, 1.0, shortcut=shortcut),
        input_signature=[tf.TensorSpec([None, None, 3]), tf.TensorSpec([None, None])],
    )
    with pytest.raises(ValueError, match=re.escape("shortcut must have the shape of x [?,?,3], got [?,?]")):
        agc(tf.ones([2, 4, 3]), tf.ones([4, 3]))


def test_keras_tensors_are_refused_by_keras():
    with pytest.raises(ValueError, match="KerasTensor"):
        tf_agc.agc(keras.Input((4, 4, 3)), 1.0, 1.0)
    with pytest.raises(ValueError, match="shortcut must be a tensor or what converts to one, got KerasTensor"):
        tf_agc.agc(tf.ones([1, 4, 4, 3]), 1.0, 1.0, shortcut=keras.Input((4, 4, 3)))


def test_gradients_reach_scalars_and_variables():
    gain, variable, bias = tf.constant(2.0), tf.Variable([1.0, 0.5, 0.0]), tf.constant(0.5)
    with tf.GradientTape() as tape:
        tape.watch([gain, bias])
        loss = tf.reduce_sum(tf_agc.agc(_X, gain, variable, bias, activation="elu") ** 2)
    dgain, dvariable, dbias = tape.gradient(loss, [gain, variable, bias])
    assert dgain.shape == dbias.shape == [] and dvariable.shape == [3]
    assert np.abs(dgain) > 0 and np.abs(dvariable).min() > 0 and np.abs(dbias) > 0
