"""Standardized convolutions: their kernels against float64, and everything else as Keras's own layers have it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_agc
from tf_agc import standardized

pytestmark = pytest.mark.usefixtures("fresh_keras")

# Name, Keras's layer, its arguments, the shape of a batch (channels_last), the axes that a filter sums over.
_CASES = [
    (tf_agc.StandardizedConv1D, keras.layers.Conv1D, {"filters": 5, "kernel_size": 3}, (2, 9, 3), (0, 1)),
    (
        tf_agc.StandardizedConv1D,
        keras.layers.Conv1D,
        {"filters": 5, "kernel_size": 3, "padding": "causal", "dilation_rate": 2},
        (2, 9, 3),
        (0, 1),
    ),
    (
        tf_agc.StandardizedConv2D,
        keras.layers.Conv2D,
        {"filters": 6, "kernel_size": (3, 2), "strides": 2, "padding": "same", "groups": 2},
        (2, 7, 5, 4),
        (0, 1, 2),
    ),
    (tf_agc.StandardizedConv3D, keras.layers.Conv3D, {"filters": 3, "kernel_size": 2}, (1, 4, 5, 3, 2), (0, 1, 2, 3)),
    (
        tf_agc.StandardizedDepthwiseConv2D,
        keras.layers.DepthwiseConv2D,
        {"kernel_size": 3, "depth_multiplier": 2, "activation": "relu"},
        (2, 7, 5, 3),
        (0, 1),
    ),
]
_IDS = ["1d", "causal", "2d groups", "3d", "depthwise"]
_OF_EVERY_KIND = pytest.mark.parametrize("kind, peer, arguments, shape, axes", _CASES, ids=_IDS)


def _batch(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _standardized64(kernel, axes, gain=1.0):
    """The definition, in NumPy's float64."""
    kernel = np.asarray(kernel, np.float64)
    centred = kernel - kernel.mean(axes, keepdims=True)
    return np.sqrt(2) * centred / np.sqrt((centred**2).sum(axes, keepdims=True) + 1e-8) * gain


def _peer(layer, peer, arguments, axes, x):
    """Keras's layer with the kernel that convolves."""
    other = peer(**arguments, dtype="float64")
    other.build(x.shape)
    gain = 1.0 if layer.gain is None else np.asarray(layer.gain, np.float64)
    other.kernel.assign(_standardized64(layer.kernel, axes, gain))
    other.bias.assign(layer.bias)
    return other


@_OF_EVERY_KIND
@pytest.mark.parametrize("use_gain", [False, True], ids=["no gain", "gain"])
@pytest.mark.parametrize("policy", ["float64", "float32", "mixed_bfloat16", "mixed_float16"])
def test_is_keras_layer_with_a_standardized_kernel(kind, peer, arguments, shape, axes, use_gain, policy):
    layer = kind(
        **arguments,
        use_gain=use_gain,
        gain_initializer=keras.initializers.RandomUniform(0.5, 2, seed=1),
        bias_initializer="random_normal",
        dtype=policy,
    )
    x = _batch(shape).astype("float16")  # exact in every type but bfloat16
    x = np.asarray(tf.cast(tf.cast(x, layer.compute_dtype), "float64"))
    y = layer(x)
    assert y.dtype == layer.compute_dtype and all(weight.dtype == layer.variable_dtype for weight in layer.weights)
    expected = _peer(layer, peer, arguments, axes, x)(x)
    tolerance = {"float64": 1e-12, "float32": 1e-5, "mixed_bfloat16": 3e-2, "mixed_float16": 4e-3}[policy]
    np.testing.assert_allclose(tf.cast(y, "float64"), expected, rtol=0, atol=tolerance * np.abs(expected).max())
    for run in (tf.function(layer), tf.function(layer, jit_compile=policy == "float32")):
        np.testing.assert_allclose(
            tf.cast(run(tf.cast(x, layer.compute_dtype)), "float64"),
            expected,
            rtol=0,
            atol=tolerance * np.abs(expected).max(),
        )


@_OF_EVERY_KIND
def test_filters_have_mean_0_and_norm_sqrt_2(kind, peer, arguments, shape, axes):
    layer = (
        kind(**arguments, kernel_initializer="ones", dtype="float64")
        if "filters" in arguments
        else kind(**arguments, dtype="float64")
    )
    layer.build(shape)
    layer.kernel.assign(3 + _batch(layer.kernel.shape))
    kernel = layer.standardized_kernel().numpy()
    np.testing.assert_allclose(kernel.mean(axes), np.zeros(kernel.mean(axes).shape), atol=1e-15)
    np.testing.assert_allclose((kernel**2).sum(axes), np.full(kernel.mean(axes).shape, 2.0), rtol=1e-7)


def test_a_constant_filter_is_0_and_has_a_finite_gradient():
    layer = tf_agc.StandardizedConv2D(2, 3, kernel_initializer="ones")
    x = tf.constant(_batch((2, 5, 5, 3)), tf.float32)
    with tf.GradientTape() as tape:
        y = layer(x)
        loss = tf.reduce_sum(y * y + y)
    assert np.all(y.numpy() == 0)
    assert np.all(np.isfinite(tape.gradient(loss, layer.kernel.value)))


def test_the_gradient_goes_through_mean_and_norm():
    kernel = tf.constant(_batch((3, 2, 4, 5)))
    weights = tf.constant(_batch(kernel.shape, seed=1))
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        loss = tf.reduce_sum(weights * standardized.standardize(kernel, (0, 1, 2)))
    gradient = tape.gradient(loss, kernel).numpy()
    step = 1e-6
    for index in [(0, 0, 0, 0), (2, 1, 3, 4), (1, 0, 2, 3)]:
        moved = [kernel.numpy(), kernel.numpy()]
        moved[0][index] += step
        moved[1][index] -= step
        above, below = (np.sum(weights.numpy() * _standardized64(each, (0, 1, 2))) for each in moved)
        np.testing.assert_allclose(gradient[index], (above - below) / (2 * step), rtol=1e-6)
    # A filter's level and scale change nothing: no gradient along them.
    np.testing.assert_allclose(gradient.sum((0, 1, 2)), np.zeros(5), atol=1e-12)
    centred = kernel.numpy() - kernel.numpy().mean((0, 1, 2))
    np.testing.assert_allclose((gradient * centred).sum((0, 1, 2)), np.zeros(5), atol=1e-7)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_derivatives_of_every_order_are_those_of_the_definition(graph):
    kernel = tf.constant(_batch((3, 2, 4, 5)))
    direction = tf.constant(_batch(kernel.shape, seed=1))

    def definition(kernel):
        centred = kernel - tf.reduce_mean(kernel, (0, 1, 2), keepdims=True)
        return np.sqrt(2) * centred / tf.sqrt(tf.reduce_sum(centred**2, (0, 1, 2), keepdims=True) + 1e-8)

    def derivatives(function):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(kernel)
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                y = function(kernel)
                loss = tf.reduce_sum(direction * y + y**3)
            first = tape.gradient(loss, kernel)
        with tf.autodiff.ForwardAccumulator(kernel, direction) as forward:
            y = function(kernel)
        second = outer.gradient(first, kernel, direction)
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            some = function(kernel)[0, 0]
        return [first, second, forward.jvp(y), tape.jacobian(some, kernel)]

    run = tf.function(derivatives) if graph else derivatives
    for got, expected in zip(
        run(lambda kernel: standardized.standardize(kernel, (0, 1, 2))), derivatives(definition), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [tf_agc.StandardizedConv2D, tf_agc.StandardizedDepthwiseConv2D])
def test_channels_first(kind):
    arguments = {"kernel_size": 3, "use_gain": True, "use_bias": True} | (
        {"filters": 5} if kind is tf_agc.StandardizedConv2D else {}
    )
    x = _batch((2, 7, 6, 3)).astype("float32")
    last, first = kind(**arguments), kind(**arguments, data_format="channels_first")
    expected = last(x)
    first.build((2, 3, 7, 6))
    first.set_weights(last.get_weights())
    # TensorFlow's depthwise convolution has channels_first on GPUs alone: XLA stands in.
    y = tf.function(first, jit_compile=True)(tf.constant(np.moveaxis(x, 3, 1)))
    np.testing.assert_allclose(np.moveaxis(y.numpy(), 1, 3), expected, atol=1e-5)


@_OF_EVERY_KIND
@pytest.mark.parametrize("use_gain", [False, True], ids=["no gain", "gain"])
def test_saving(kind, peer, arguments, shape, axes, use_gain, tmp_path):
    layer = kind(**arguments, use_gain=use_gain, gain_initializer="random_uniform", bias_initializer="random_normal")
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is kind and loaded.layers[0].get_config() == layer.get_config()
    x = _batch(shape).astype("float32")
    np.testing.assert_array_equal(loaded(x), model(x))
    model.save_weights(tmp_path / "model.weights.h5")
    other = kind.from_config(layer.get_config())
    other_model = keras.Sequential([keras.Input(shape[1:]), other])
    other_model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other_model(x), model(x))


def test_weights_of_keras_layer_are_its_raw_kernel():
    plain = keras.Sequential([keras.Input((7, 5, 3)), keras.layers.Conv2D(4, 3)])
    model = keras.Sequential([keras.Input((7, 5, 3)), tf_agc.StandardizedConv2D(4, 3)])
    model.set_weights(plain.get_weights())
    np.testing.assert_array_equal(model.layers[0].kernel, plain.layers[0].kernel)


@pytest.mark.parametrize("lora_rank", [None, 2], ids=["later", "in the constructor"])
def test_lora(lora_rank, tmp_path):
    layer = tf_agc.StandardizedConv2D(4, 3, use_gain=True, lora_rank=lora_rank)
    model = keras.Sequential([keras.Input((7, 5, 3)), layer])
    x = _batch((2, 7, 5, 3)).astype("float32")
    before = model(x)
    if lora_rank is None:
        layer.enable_lora(2)
    np.testing.assert_allclose(model(x), before, atol=1e-6)
    layer.lora_kernel_b.assign(tf.ones(layer.lora_kernel_b.shape))
    y = model(x)
    merged = _peer(layer, keras.layers.Conv2D, {"filters": 4, "kernel_size": 3}, (0, 1, 2), x)
    np.testing.assert_allclose(y, merged(x), atol=1e-5)
    assert np.max(np.abs(y - before)) > 1e-3
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.models.load_model(tmp_path / "model.keras")(x), y, atol=1e-5)


def test_training_moves_the_raw_kernel_alone_where_there_is_no_gain():
    layer = tf_agc.StandardizedConv2D(4, 3, padding="same", use_bias=False)
    model = keras.Sequential([keras.Input((7, 5, 3)), layer, keras.layers.GlobalMaxPooling2D()])
    model.compile("sgd", "mse")
    before = layer.kernel.numpy()
    model.fit(_batch((8, 7, 5, 3)), _batch((8, 4), seed=1), verbose=0)
    assert np.max(np.abs(layer.kernel.numpy() - before)) > 1e-5
    assert len(model.weights) == 1


@pytest.mark.parametrize(
    "layer, shape, text",
    [
        (
            lambda: tf_agc.StandardizedConv2D(4, 1),
            (2, 5, 5, 1),
            "The filters of StandardizedConv2D must have more than one input each, as nothing is left of one input's "
            "weight without its mean. Received: kernel_size=(1, 1), input_shape=(2, 5, 5, 1)",
        ),
        (
            lambda: tf_agc.StandardizedConv1D(4, 1, groups=2),
            (2, 5, 2),
            "The filters of StandardizedConv1D must have more than one input each, as nothing is left of one input's "
            "weight without its mean. Received: kernel_size=(1,), input_shape=(2, 5, 2)",
        ),
        (
            lambda: tf_agc.StandardizedDepthwiseConv2D(1),
            (2, 5, 5, 3),
            "The filters of StandardizedDepthwiseConv2D must have more than one input each, as nothing is left of one "
            "input's weight without its mean. Received: kernel_size=(1, 1), input_shape=(2, 5, 5, 3)",
        ),
    ],
)
def test_filters_of_one_input_are_refused(layer, shape, text):
    with pytest.raises(ValueError) as error:
        layer().build(shape)
    assert text in str(error.value)


def test_inputs_of_another_dtype_within_time_distributed():
    """Keras casts to the compute dtype of the outer layer alone."""
    layer = tf_agc.StandardizedConv2D(4, 3, dtype="mixed_bfloat16")
    x = _batch((2, 3, 7, 5, 3)).astype(np.float32)
    got = keras.layers.TimeDistributed(layer)(x)
    expected = tf.nn.conv2d(x[:, 1], tf.cast(layer.standardized_kernel(), tf.float32), 1, "VALID")
    assert got.dtype == "float32"
    np.testing.assert_allclose(got[:, 1], expected, rtol=1e-5, atol=1e-5)
