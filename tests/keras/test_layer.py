"""`AutomaticGainControl`: Keras's own checklist, dtypes, shapes, errors, training."""

import dataclasses
import functools
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

# Private: Keras ships the harness of its own layers inside its wheel, and nothing public like it.
from keras.src.testing import TestCase

import tf_agc
from agc_testing import ALPHA, parameter_dtype
from tf_agc import AutomaticGainControl, calibrate, native, reference

pytestmark = pytest.mark.usefixtures("fresh_keras")

_X = np.random.default_rng(0).standard_normal((2, 4, 5, 3)).astype(np.float32)


class KerasChecklistTest(TestCase):
    """Serialization, build, symbolic and eager calls, one training step, mixed precision."""

    def test_every_activation(self):
        for activation in (None, "relu", "relu6", "leaky_relu", "elu", "tanh"):
            self.run_layer_test(
                AutomaticGainControl,
                {"activation": activation},
                input_shape=(2, 4, 5, 3),
                expected_output_shape=(2, 4, 5, 3),
                expected_num_trainable_weights=2,
                expected_num_non_trainable_weights=0,
                expected_num_losses=0,
                supports_masking=True,
            )

    def test_options(self):
        self.run_layer_test(
            AutomaticGainControl,
            {
                "activation": "leaky_relu",
                "alpha": 0.1,
                "data_format": "channels_first",
                "gain_initializer": keras.initializers.Constant(-2.0),
                "mean_scale_initializer": "random_uniform",
                "gain_regularizer": keras.regularizers.L2(0.01),
                "mean_scale_regularizer": "l1",
                "gain_constraint": keras.constraints.MaxNorm(3.0),
                "mean_scale_constraint": "non_neg",
                "train_mean_scale": False,
            },
            input_shape=(2, 3, 7),
            expected_output_shape=(2, 3, 7),
            expected_num_trainable_weights=1,
            expected_num_non_trainable_weights=1,
            expected_num_losses=1,  # of the trainable weight
            supports_masking=True,
        )

    def test_volumes(self):
        self.run_layer_test(
            AutomaticGainControl,
            {"activation": keras.activations.elu},
            input_shape=(2, 3, 4, 2, 5),
            expected_output_shape=(2, 3, 4, 2, 5),
        )


@pytest.mark.parametrize(
    "activation, alpha, used",
    [
        (None, None, "linear"),
        ("linear", None, "linear"),
        ("relu", None, "relu"),
        ("leaky_relu", None, "leaky_relu"),
        ("leaky_relu", 0.05, "leaky_relu"),
        ("elu", 1.7, "elu"),
        (keras.activations.relu, None, "relu"),
        (keras.activations.relu6, None, "relu6"),
        (keras.activations.leaky_relu, None, "leaky_relu"),
        (keras.activations.elu, None, "elu"),
    ],
)
def test_fused_activations(activation, alpha, used, counters):
    layer = AutomaticGainControl(activation, alpha=alpha, mean_scale_initializer="zeros")
    got = layer(_X)
    alpha = ALPHA[used] if alpha is None else alpha
    want, _ = reference.agc(tf.constant(_X), tf.ones([3]), tf.zeros([3]), used, alpha, "channels_last")
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    if alpha == ALPHA[used]:  # what Keras gives, with its own defaults
        plain = keras.activations.get(activation)(tf.constant(_X))
        np.testing.assert_allclose(got, plain, rtol=1e-6, atol=1e-6)
    graph = tf.function(layer).get_concrete_function(tf.TensorSpec(_X.shape)).graph
    (op,) = [op for op in graph.get_operations() if op.type == "TfAgc>Agc"]
    assert op.get_attr("activation") == used.encode()


class _Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x * x


@pytest.mark.parametrize(
    "activation",
    [
        "tanh",
        "softmax",
        tf.nn.silu,
        functools.partial(keras.activations.relu, negative_slope=0.5),
        keras.layers.LeakyReLU(0.3),
        lambda x: x**2,
        _Unhashable(),
    ],
    # No addresses: every process of pytest-xdist must find the same names.
    ids=["tanh", "softmax", "function", "partial", "layer", "lambda", "unhashable"],
)
def test_other_activations(activation):
    linear, layer = AutomaticGainControl(), AutomaticGainControl(activation)
    got, z = layer(_X), linear(_X)
    np.testing.assert_allclose(got, keras.activations.get(activation)(z), rtol=1e-6, atol=1e-6)


def test_names_order_and_paths_of_weights():
    layer = AutomaticGainControl(name="agc")
    layer.build((None, 4, 5, 3))
    assert [weight.path for weight in layer.weights] == ["agc/gain", "agc/mean_scale"]
    assert [weight.shape for weight in layer.weights] == [(3,), (3,)]
    np.testing.assert_array_equal(layer.get_weights(), np.ones((2, 3)))


def test_train_mean_scale():
    layer = AutomaticGainControl(train_mean_scale=False)
    layer.build((None, 4, 5, 3))
    assert layer.trainable_weights == [layer.gain]
    assert layer.non_trainable_weights == [layer.mean_scale]


@pytest.mark.parametrize(
    "policy, weights",
    [
        ("float32", "float32"),
        ("mixed_float16", "float32"),
        ("mixed_bfloat16", "float32"),
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float64", "float64"),
    ],
)
def test_dtype_policies(policy, weights, counters):
    layer = AutomaticGainControl("relu", dtype=policy, gain_initializer="random_normal")
    inputs = keras.Input((4, 5, 3))
    compute_dtype = policy.removeprefix("mixed_")
    assert layer(inputs).dtype == compute_dtype
    y = layer(_X)
    assert y.dtype == compute_dtype
    assert layer.gain.dtype == layer.mean_scale.dtype == weights == parameter_dtype(compute_dtype)
    want = tf_agc.agc(tf.cast(_X, compute_dtype), layer.gain, layer.mean_scale, activation="relu")
    np.testing.assert_array_equal(tf.cast(y, tf.float64), tf.cast(want, tf.float64))
    assert counters.read()["forward"] == 2


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_fit_under_policies(policy):
    layers = [
        keras.Input((6, 6, 3)),
        keras.layers.Conv2D(4, 3, dtype=policy),
        AutomaticGainControl("relu", dtype=policy),
        keras.layers.GlobalAveragePooling2D(dtype=policy),
        keras.layers.Dense(1, dtype=policy),
    ]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = [weight.numpy().copy() for weight in model.layers[1].weights]
    x = np.random.default_rng(0).standard_normal((8, 6, 6, 3))
    model.fit(x, x.sum((1, 2, 3))[:, None], epochs=2, verbose=0)
    for weight, old in zip(model.layers[1].weights, before, strict=True):
        assert np.isfinite(weight).all() and not np.array_equal(weight, old)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_data_formats_and_unknown_sizes(data_format):
    channels_last = data_format == "channels_last"
    shape = (None, None, 3) if channels_last else (3, None, None)
    inputs = keras.Input(shape)
    layer = AutomaticGainControl("relu", data_format=data_format)
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, *shape)
    assert layer.compute_output_shape((None, *shape)) == (None, *shape)
    x = _X if channels_last else np.moveaxis(_X, -1, 1)
    got = model(x) if channels_last else np.moveaxis(model(x).numpy(), 1, -1)
    np.testing.assert_allclose(got, tf_agc.agc(_X, 1.0, 1.0, activation="relu"), rtol=1e-6, atol=1e-6)
    # Other sizes, the same weights.
    assert model(x[:1, :, 1:, :]).shape == x[:1, :, 1:, :].shape


def test_data_format_of_the_keras_configuration():
    keras.config.set_image_data_format("channels_first")
    try:
        assert AutomaticGainControl().data_format == "channels_first"
        assert AutomaticGainControl(data_format="channels_last").data_format == "channels_last"
    finally:
        keras.config.set_image_data_format("channels_last")


def test_masks_are_passed_on():
    x = np.array([[[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]], np.float32)
    masked = keras.layers.Masking()(x)
    outputs = AutomaticGainControl("relu")(masked)
    np.testing.assert_array_equal(outputs._keras_mask, [[True, True, False]])


def test_models():
    def blocks():
        return [keras.layers.Conv2D(4, 3), AutomaticGainControl("relu"), keras.layers.Flatten()]

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = blocks()

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    inputs = keras.Input((4, 5, 3))
    outputs = inputs
    for block in blocks():
        outputs = block(outputs)
    x = np.concatenate([_X, _X])
    for model in (keras.Model(inputs, outputs), keras.Sequential(blocks()), Subclassed()):
        model.compile("sgd", "mse")
        y = np.zeros((4, 24))
        losses = model.fit(x, y, epochs=3, batch_size=2, verbose=0).history["loss"]
        assert losses[-1] < losses[0]
        assert model.evaluate(x, y, verbose=0) < losses[0]
        np.testing.assert_allclose(model.predict(x, verbose=0), model(x), rtol=1e-4, atol=1e-5)


def test_clone_model():
    inputs = keras.Input((4, 5, 3))
    layer = AutomaticGainControl("leaky_relu", alpha=0.3, gain_initializer="random_normal")
    model = keras.Model(inputs, layer(inputs))
    clone = keras.models.clone_model(model)
    assert clone.layers[1].get_config() == layer.get_config()
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(_X), model(_X))


def test_time_distributed():
    x = np.stack([_X, 2 * _X, 3 * _X], axis=1)
    layer = keras.layers.TimeDistributed(AutomaticGainControl("relu"))
    np.testing.assert_allclose(layer(x)[:, 1], 2 * layer(x)[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_native, has_xla, supported", [(1, 1, True), (1, 0, False), (0, 0, True)])
def test_supports_jit(monkeypatch, has_native, has_xla, supported):
    # The reference alone is nothing but stock ops.
    for name, available in (("STATUS", has_native), ("XLA_STATUS", has_xla)):
        monkeypatch.setattr(native, name, dataclasses.replace(native.STATUS, available=bool(available)))
    assert AutomaticGainControl("relu").supports_jit == supported


def test_config():
    layer = AutomaticGainControl("tanh", train_mean_scale=False, name="agc", dtype="mixed_float16")
    config = layer.get_config()
    assert config["activation"] == "tanh" and config["alpha"] is None
    assert not {"implementation", "native"} & set(config)
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == "tf_agc>AutomaticGainControl"
    revived = keras.saving.deserialize_keras_object(serialized)
    assert revived.get_config() == config


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data_format": "NHWC"}, "Argument `data_format` must be 'channels_last', "
         "'channels_first' or None. Received: data_format=NHWC"),
        ({"activation": "relu", "alpha": 0.1},
         "alpha must be None for the activation 'relu': only 'leaky_relu' and 'elu' have one"),
        ({"activation": "tanh", "alpha": 0.1},
         "Argument `alpha` is only valid for the activations 'leaky_relu' and 'elu'. "
         "Received: activation=tanh, alpha=0.1"),
        ({"activation": "elu", "alpha": -1}, "alpha must be finite and >= 0, got -1"),
        ({"activation": "elu", "gain_initializer": "zeros"},
         "Argument `gain_initializer` must not be zeros with the activation 'elu'"),
        ({"activation": "leaky_relu", "gain_initializer": keras.initializers.Constant(0.0)},
         "Argument `gain_initializer` must not be zeros with the activation 'leaky_relu'"),
        ({"activation": "no_such"}, "Could not interpret activation function identifier: no_such"),
        ({"gain_initializer": "no_such"}, "Could not interpret initializer identifier: no_such"),
    ],
)  # fmt: skip
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AutomaticGainControl(**arguments)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "elu"])
@pytest.mark.parametrize("value", [0.0, np.zeros(3)])
def test_zero_gain_where_it_cannot_be_learned(activation, value):
    message = f"Argument `gain_initializer` must not be zeros with the activation '{activation}'"
    with pytest.raises(ValueError, match=message):
        AutomaticGainControl(activation, gain_initializer=keras.initializers.Constant(value))
    AutomaticGainControl(activation, gain_initializer=keras.initializers.Constant([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_zero_gain_where_it_can_be_learned(activation):
    layer = AutomaticGainControl(activation, gain_initializer="zeros")
    with tf.GradientTape() as tape:
        y = layer(_X)
        loss = tf.reduce_sum(y * _X)
    np.testing.assert_array_equal(y, np.zeros(_X.shape))
    assert np.all(tape.gradient(loss, layer.gain.value) > 0)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_integers_are_cast(dtype, policy):
    images = np.random.default_rng(0).integers(0, 100, _X.shape).astype(dtype)
    inputs = keras.Input(_X.shape[1:], dtype=dtype)
    model = keras.Model(inputs, AutomaticGainControl("relu", dtype=policy)(inputs))
    assert model.output.dtype == keras.DTypePolicy(policy).compute_dtype
    y = model.predict(images, verbose=0)
    layer = AutomaticGainControl("relu", dtype=policy)
    np.testing.assert_array_equal(y, layer(images.astype(np.float32)))


@pytest.mark.parametrize("shape", [(2, 3), (None,) * 8 + (3,)])
def test_wrong_rank(shape):
    message = (
        "AutomaticGainControl expects inputs of rank 3 to 8 (batch, 1 to 6 spatial axes, "
        f"channels). Received: input_shape={shape}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        AutomaticGainControl()(keras.Input(batch_shape=shape))
    with pytest.raises(ValueError, match=re.escape(message)):
        AutomaticGainControl().compute_output_shape(shape)


@pytest.mark.parametrize(
    "data_format, shape, axis",
    [("channels_last", (None, 4, 5, None), -1), ("channels_first", (None, None, 4, 5), 1)],
)
def test_unknown_channels(data_format, shape, axis):
    message = (
        f"The channel axis ({axis}) of the inputs to AutomaticGainControl must have a defined "
        f"size. Received: input_shape={shape}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        AutomaticGainControl(data_format=data_format)(keras.Input(batch_shape=shape))


def test_built_for_other_inputs():
    layer = AutomaticGainControl()
    layer(_X)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 3"):
        layer(np.ones((2, 4, 5, 4)))
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        layer(np.ones((2, 4, 3)))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_one_position(data_format):
    shape = (None, 1, 1, 3) if data_format == "channels_last" else (None, 3, 1, 1)
    message = re.escape(f"Received: input_shape={shape}, train_mean_scale=")
    fixed = AutomaticGainControl(data_format=data_format, train_mean_scale=False)
    with pytest.raises(ValueError, match="outputs are always 0.*" + message):
        fixed.build(shape)
    with pytest.warns(UserWarning, match="outputs are at first 0.*" + message):
        AutomaticGainControl(data_format=data_format).build(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = keras.initializers.Constant(0.5)
        AutomaticGainControl(data_format=data_format, train_mean_scale=False, mean_scale_initializer=half).build(shape)
        fixed = AutomaticGainControl(data_format=data_format, train_mean_scale=False)
        fixed.build((None, None, 1, 3) if data_format == "channels_last" else (None, 3, None, 1))


@pytest.mark.parametrize("mode", ["eager", "fit", "calibrate"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_one_position_that_only_a_call_knows(data_format, mode):
    free, shape = ((None, None, 3), (2, 1, 1, 3)) if data_format == "channels_last" else ((3, None, None), (2, 3, 1, 1))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    layer = AutomaticGainControl(data_format=data_format, name="agc")
    model = keras.Sequential([keras.Input(free), layer])
    model.compile("sgd", "mse")
    calls = {
        "eager": lambda: model(x),
        "fit": lambda: model.fit(x, x, verbose=0),
        "calibrate": lambda: calibrate(model, x),
    }
    message = "layer 'sequential.*agc' is called with have one position each, which is its .* Received: inputs.shape="
    with pytest.warns(UserWarning, match=message):
        result = calls[mode]()
    if mode == "eager":
        assert not np.any(result)
    if mode == "calibrate":
        assert result[0].kept == [0, 1, 2]
    with warnings.catch_warnings():  # once, and not for other maps, or where another mean scale was asked for
        warnings.simplefilter("error")
        model(x)
        model(np.repeat(x, 2, axis=1 if data_format == "channels_last" else 2))
        half = AutomaticGainControl(data_format=data_format, mean_scale_initializer=keras.initializers.Constant(0.5))
        keras.Sequential([keras.Input(free), half])(x)


def test_sparse_and_ragged_inputs_are_refused():
    layer = AutomaticGainControl()
    layer.build((None, 4, 3))
    with pytest.raises(TypeError, match="x must be a dense tensor, got a SparseTensor"):
        layer(tf.sparse.from_dense(tf.ones([2, 4, 3])))
    with pytest.raises((TypeError, ValueError), match="[rR]agged"):
        layer(tf.ragged.constant([[[1.0] * 3], [[1.0] * 3] * 2], ragged_rank=1))


def test_regularizers_and_constraints_act():
    layer = AutomaticGainControl(
        gain_initializer=keras.initializers.Constant(2.0),
        gain_regularizer=keras.regularizers.L2(0.5),
        mean_scale_constraint=keras.constraints.NonNeg(),
        mean_scale_initializer=keras.initializers.Constant(-1.0),
    )
    model = keras.Sequential([keras.Input((4, 5, 3)), layer])
    np.testing.assert_allclose(sum(model.losses), 3 * 0.5 * 4)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(_X, _X, verbose=0)
    np.testing.assert_array_equal(layer.mean_scale, np.zeros(3))
