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
from agc_testing import ALPHA, ALPHA_ARGUMENT, parameter_dtype
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
                expected_num_trainable_weights=3,
                expected_num_non_trainable_weights=0,
                expected_num_losses=0,
                supports_masking=True,
            )

    def test_options(self):
        self.run_layer_test(
            AutomaticGainControl,
            {
                "activation": "leaky_relu",
                "negative_slope": 0.1,
                "data_format": "channels_first",
                "gain_initializer": keras.initializers.Constant(-2.0),
                "mean_scale_initializer": "random_uniform",
                "gain_regularizer": keras.regularizers.L2(0.01),
                "mean_scale_regularizer": "l1",
                "gain_constraint": keras.constraints.MaxNorm(3.0),
                "mean_scale_constraint": "non_neg",
                "train_mean_scale": False,
                "use_bias": True,
                "bias_initializer": "random_normal",
                "bias_regularizer": "l2",
                "bias_constraint": keras.constraints.MaxNorm(1.0),
            },
            input_shape=(2, 3, 7),
            expected_output_shape=(2, 3, 7),
            expected_num_trainable_weights=2,
            expected_num_non_trainable_weights=1,
            expected_num_losses=2,  # of the trainable weights
            supports_masking=True,
        )

    def test_shortcut(self):
        for activation in (None, "elu", "tanh"):
            self.run_layer_test(
                AutomaticGainControl,
                {"activation": activation, "use_bias": True, "train_gain": False},
                input_shape={"inputs_shape": (2, 4, 5, 3), "shortcut_shape": (2, 4, 5, 3)},
                expected_output_shape=(2, 4, 5, 3),
                expected_num_trainable_weights=2,
                expected_num_non_trainable_weights=1,
                supports_masking=True,
                run_training_check=False,  # it hands over all inputs as one argument
            )

    def test_volumes(self):
        self.run_layer_test(
            AutomaticGainControl,
            {"activation": keras.activations.elu, "use_bias": False},
            input_shape=(2, 3, 4, 2, 5),
            expected_output_shape=(2, 3, 4, 2, 5),
            expected_num_trainable_weights=2,
            expected_num_non_trainable_weights=0,
            expected_num_losses=0,
            supports_masking=True,
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
        (keras.ops.relu6, None, "relu6"),
        (tf.nn.relu, None, "relu"),
        (tf.nn.relu6, None, "relu6"),
        (tf.nn.leaky_relu, None, "leaky_relu"),
        (tf.nn.leaky_relu, 0.05, "leaky_relu"),
        (tf.nn.elu, None, "elu"),
        (keras.layers.Activation("relu"), None, "relu"),
        (keras.layers.ReLU(), None, "relu"),
        (keras.layers.ReLU(max_value=6), None, "relu6"),
        (keras.layers.ReLU(negative_slope=0.2), None, "leaky_relu"),
        (keras.layers.LeakyReLU(), None, "leaky_relu"),
        (keras.layers.ELU(), None, "elu"),
        (keras.layers.ELU(0.3), None, "elu"),
    ],
)
def test_fused_activations(activation, alpha, used, counters):
    number = {} if alpha is None else {ALPHA_ARGUMENT[used]: alpha}
    layer = AutomaticGainControl(activation, **number, mean_scale_initializer="zeros")
    got = layer(_X)
    if isinstance(activation, (keras.layers.LeakyReLU, keras.layers.ELU)):
        alpha = activation.negative_slope if used == "leaky_relu" else activation.alpha
    alpha = ALPHA[used] if alpha is None else alpha
    want, _ = reference.agc(tf.constant(_X), tf.ones([3]), tf.zeros([3]), used, alpha, "channels_last")
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    if alpha == ALPHA[used]:  # what Keras gives, with its own defaults
        plain = keras.activations.get(activation)(tf.constant(_X))
        np.testing.assert_allclose(got, plain, rtol=1e-6, atol=1e-6)
    config = layer.get_config()
    assert config["activation"] == used  # no layer within a layer, and no function of another library
    revived = AutomaticGainControl.from_config(config)
    revived.build(_X.shape)
    np.testing.assert_array_equal(revived(_X), got)
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
        keras.layers.ReLU(threshold=0.5),
        keras.layers.PReLU(shared_axes=[1, 2]),
        lambda x: x**2,
        _Unhashable(),
    ],
    # No addresses: every process of pytest-xdist must find the same names.
    ids=["tanh", "softmax", "function", "partial", "layer", "layer with weights", "lambda", "unhashable"],
)
def test_other_activations(activation):
    linear, layer = AutomaticGainControl(), AutomaticGainControl(activation)
    got, z = layer(_X), linear(_X)
    np.testing.assert_allclose(got, keras.activations.get(activation)(z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_bias", [None, False])
def test_names_order_paths_and_initial_values_of_weights(use_bias):
    layer = AutomaticGainControl(name="agc", **{} if use_bias is None else {"use_bias": use_bias})
    layer.build((None, 4, 5, 3))
    values = {"agc/gain": 1, "agc/mean_scale": 0.25} | ({"agc/bias": 0} if use_bias is None else {})
    assert [weight.path for weight in layer.weights] == [weight.path for weight in layer.trainable_weights]
    assert [weight.path for weight in layer.weights] == list(values)
    np.testing.assert_array_equal(layer.get_weights(), [[value] * 3 for value in values.values()])


@pytest.mark.parametrize("name", ["gain", "mean_scale"])
def test_fixed_weights(name, tmp_path):
    arguments = {f"train_{name}": False, "use_bias": True}
    layer = AutomaticGainControl("relu", mean_scale_initializer="random_normal", **arguments)
    inputs = keras.Input((4, 5, 3))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (layer, loaded.layers[-1], keras.models.clone_model(model).layers[-1]):
        one.trainable = False
        one.trainable = True
        assert [weight.name for weight in one.non_trainable_weights] == [name]
        assert len(one.trainable_weights) == 2
    loaded.compile(keras.optimizers.SGD(0.1), "mse")
    loaded.fit(_X, _X, verbose=0)
    for weight, old in zip(loaded.layers[-1].weights, model.layers[-1].weights, strict=True):
        assert np.array_equal(weight, old) == (weight.name == name)


def test_the_order_of_weights_is_the_same_whatever_is_trained():
    values = [np.full(3, value, np.float32) for value in (2, 3, 4)]
    for arguments in ({}, {"train_gain": False}, {"train_mean_scale": False}, {"trainable": False}):
        layer = AutomaticGainControl(use_bias=True, **arguments)
        assert layer.weights == []
        model = keras.Sequential([keras.Input((4, 5, 3)), layer])
        model.set_weights(values)
        np.testing.assert_array_equal([layer.gain, layer.mean_scale, layer.bias], values)
        for one in (model, layer):
            np.testing.assert_array_equal(one.get_weights(), values)
            assert [weight.name for weight in one.weights] == ["gain", "mean_scale", "bias"]


def test_a_fixed_gain_may_be_zero():
    layer = AutomaticGainControl("relu", gain_initializer="zeros", gain_constraint="non_neg", train_gain=False)
    np.testing.assert_array_equal(layer(_X, _X), np.maximum(_X, 0))


def test_weights_are_loaded_by_name(tmp_path):
    def model(**arguments):
        layers = [keras.Input((4, 5, 3)), AutomaticGainControl(use_bias=True, name="norm", **arguments)]
        return keras.Sequential(layers)

    saved = model()
    saved.layers[0].set_weights([np.full(3, value, np.float32) for value in (2, 3, 4)])
    saved.save_weights(tmp_path / "model.weights.h5")
    other = model(train_gain=False)
    other.load_weights(tmp_path / "model.weights.h5")
    layer = other.layers[0]
    np.testing.assert_array_equal([layer.gain, layer.mean_scale, layer.bias], [[2] * 3, [3] * 3, [4] * 3])


def test_weights_of_another_kind_of_layer_are_refused(tmp_path):
    class Block(keras.layers.Layer):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm  # under this name in the file, whatever it is

        def build(self, input_shape):
            self.norm.build(input_shape)

        def call(self, x):
            return self.norm(x)

    def model(norm):
        return keras.Sequential([keras.Input((4, 5, 3)), Block(norm)])

    # Two weights of shape [C] and three, as AutomaticGainControl has without a bias and with one.
    model(keras.layers.BatchNormalization(center=False, scale=False)).save_weights(tmp_path / "two.weights.h5")
    model(keras.layers.BatchNormalization(scale=False)).save_weights(tmp_path / "three.weights.h5")
    without = {"use_bias": False, "name": "norm"}
    model(AutomaticGainControl(**without)).save_weights(tmp_path / "agc.weights.h5")
    for layer, file, message in (
        (AutomaticGainControl(**without), "two", ("gain, mean_scale", "0, 1")),
        (AutomaticGainControl(name="norm"), "three", ("gain, mean_scale, bias", "0, 1, 2")),
        (AutomaticGainControl(name="norm"), "agc", ("gain, mean_scale, bias", "gain, mean_scale")),
    ):
        message = (
            f"Layer 'norm' expects the weights {message[0]} of an AutomaticGainControl with the same arguments. "
            f"Received: {message[1]}"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            model(layer).load_weights(tmp_path / f"{file}.weights.h5")


def _expected(activation, x, weights, shortcut):
    gain, mean_scale, *bias = (tf.convert_to_tensor(weight) for weight in weights)
    bias = bias[0] if bias else None
    y, _ = reference.agc(x, gain, mean_scale, activation, ALPHA[activation], "channels_last", bias=bias,
                         shortcut=shortcut)  # fmt: skip
    return y


@pytest.mark.parametrize("activation", ["linear", "relu", "relu6", "leaky_relu", "elu", "tanh"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_bias_and_shortcut(activation, use_bias, tmp_path):
    class Subclassed(keras.Model):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def call(self, inputs):
            x, shortcut = inputs
            return self.layer(x, shortcut=shortcut)

    random = keras.initializers.RandomNormal(stddev=1.0)
    layer = AutomaticGainControl(
        activation, gain_initializer=random, use_bias=use_bias, bias_initializer=random, mean_scale_initializer=random
    )
    shortcut = np.random.default_rng(1).standard_normal(_X.shape).astype(np.float32)
    inputs = [keras.Input((None, 5, 3)), keras.Input((None, 5, 3))]
    assert layer(*inputs).shape == (None, None, 5, 3)
    want = _expected("linear" if activation == "tanh" else activation, tf.constant(_X), layer.weights, shortcut)
    want = tf.nn.tanh(want) if activation == "tanh" else want
    functional = keras.Model(inputs, layer(inputs[0], shortcut=inputs[1]))
    functional.save(tmp_path / "model.keras")
    clone = keras.models.clone_model(functional)
    clone.set_weights(functional.get_weights())
    got = {
        "eager": layer(_X, shortcut),
        "keyword": layer(inputs=_X, shortcut=shortcut),
        "function": tf.function(layer)(_X, shortcut),
        "functional": functional([_X, shortcut]),
        "predict": functional.predict([_X, shortcut], verbose=0),
        "subclassed": Subclassed(layer).predict([_X, shortcut], verbose=0),
        "loaded": keras.saving.load_model(tmp_path / "model.keras")([_X, shortcut]),
        "cloned": clone([_X, shortcut]),
    }
    for name, y in got.items():
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6, err_msg=name)
    # None is no shortcut, and a Sequential model has none.
    alone = layer(_X)
    assert not np.allclose(alone, want, atol=0.1)
    np.testing.assert_array_equal(layer(_X, None), alone)
    np.testing.assert_array_equal(keras.Sequential([layer])(_X), alone)


def test_training_with_bias_and_shortcut():
    inputs = [keras.Input((4, 5, 3)), keras.Input((4, 5, 3))]
    layer = AutomaticGainControl("relu", use_bias=True)
    model = keras.Model(inputs, layer(*inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = model.fit([_X, 0 * _X], np.ones_like(_X), epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert not np.allclose(layer.bias, 0, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 4, 5, 1), (2, 1, 1, 3), (1, 4, 5, 3), (4, 5, 3)])
def test_a_shortcut_of_another_shape(shape):
    message = (
        "Argument `shortcut` must be one tensor with the shape of the inputs to AutomaticGainControl, as it is not "
        "broadcast. Received: inputs.shape=(2, 4, 5, 3), shortcut.shape={}"
    )
    with pytest.raises(ValueError, match=re.escape(message.format(shape))):
        AutomaticGainControl()(_X, np.ones(shape, np.float32))
    with pytest.raises(ValueError, match=re.escape(message.format(shape))):
        AutomaticGainControl()(keras.Input(batch_shape=_X.shape), keras.Input(batch_shape=shape))
    with pytest.raises(ValueError, match=re.escape(message.format(shape))):
        AutomaticGainControl().compute_output_shape(_X.shape, shape)
    if len(shape) == 4:  # what only shows when it runs
        unknown = tf.function(AutomaticGainControl(), input_signature=[tf.TensorSpec([None, None, None, 3]),
                                                                       tf.TensorSpec([None] * 4)])  # fmt: skip
        with pytest.raises(tf.errors.InvalidArgumentError, match="shortcut must have the shape of x"):
            unknown(_X, np.ones(shape, np.float32))
    several = [keras.Input(batch_shape=_X.shape)] * 2
    with pytest.raises(ValueError, match=re.escape(f"shortcut.shape=[{_X.shape}, {_X.shape}]")):
        AutomaticGainControl()(several[0], several)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "bool"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize("autocast", [True, False])
def test_other_dtypes_are_cast_to_the_compute_dtype(dtype, policy, autocast):
    layer = AutomaticGainControl("relu", dtype=policy, autocast=autocast)
    x, shortcut = _X.astype(dtype), (3 * _X[::-1]).astype(dtype)
    symbolic = layer(*[keras.Input(_X.shape[1:], dtype=dtype)] * 2)
    y = layer(x, shortcut)
    assert y.dtype == symbolic.dtype == layer.compute_dtype
    cast = [tf.cast(value, layer.compute_dtype) for value in (x, shortcut)]
    want = tf_agc.agc(cast[0], 1.0, 0.25, shortcut=cast[1], activation="relu")
    np.testing.assert_array_equal(tf.cast(y, "float64"), tf.cast(want, "float64"))


class _ConstraintOf(keras.constraints.Constraint):
    """Keras 3.12 takes no function."""

    def __init__(self, function):
        self._function = function

    def __call__(self, weight):
        return self._function(weight)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "constraint",
    [
        _ConstraintOf(lambda gain: tf.clip_by_value(gain, -1, 0)),
        _ConstraintOf(lambda gain: tf.where(tf.abs(gain) < 1e-4, tf.zeros_like(gain), gain)),  # pruning
        _ConstraintOf(lambda gain: tf.cast(tf.nn.relu(gain + tf.zeros([], gain.dtype)), gain.dtype)),
    ],
    ids=["negative", "small", "positive"],
)
def test_constraints_are_tried_on_all_kinds_of_weights(constraint, policy, channels):
    with pytest.warns(UserWarning, match="can make gains exactly 0"):
        AutomaticGainControl("relu", gain_constraint=constraint, dtype=policy).build((None, 4, channels))


def test_a_constraint_that_fails_says_so_when_it_is_used():
    def constraint(gain):  # takes the weights' own dtype alone
        tf.debugging.assert_equal(tf.reduce_any(gain < 0), False, "gains must be positive")
        return tf.maximum(gain, tf.constant(0.1, "bfloat16"))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = AutomaticGainControl("relu", gain_constraint=_ConstraintOf(constraint), dtype="bfloat16")
        layer.build((None, 4, 3))
    with pytest.raises(tf.errors.InvalidArgumentError, match="gains must be positive"):
        layer.gain_constraint(-layer.gain.value)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu"])
@pytest.mark.parametrize(
    "constraint", ["non_neg", _ConstraintOf(lambda gain: tf.clip_by_value(gain, 0, 2))], ids=["non_neg", "clip"]
)
def test_constraints_that_can_give_a_gain_of_zero(activation, constraint):
    message = (
        "The gain_constraint of AutomaticGainControl can make gains exactly 0, and with the activation "
        f"'{activation}' they stay 0 for good"
    )
    with pytest.warns(UserWarning, match=message):
        AutomaticGainControl(activation, gain_constraint=constraint)(_X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutomaticGainControl(None, gain_constraint=constraint)(_X)
        AutomaticGainControl("tanh", gain_constraint=constraint)(_X)
        AutomaticGainControl(activation, gain_constraint=keras.constraints.MinMaxNorm(0.1, 3.0))(_X)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu"])
def test_a_gain_of_zero_recovers_where_the_activation_is_a_layer_behind(activation):
    gradients = []
    for layers in (
        [AutomaticGainControl(activation, use_bias=True)],
        [AutomaticGainControl(use_bias=True), keras.layers.Activation(activation)],
    ):
        model = keras.Sequential([keras.Input(_X.shape[1:]), *layers])
        gain, bias = layers[0].gain, layers[0].bias
        gain.assign([0, 0, 0])
        bias.assign([1, 1, 1])
        with tf.GradientTape() as tape, tf_agc.implementation("native"):
            loss = tf.reduce_sum(model(_X) * _X)
        gradients.append(tape.gradient(loss, gain.value).numpy())
    fused, behind = gradients
    np.testing.assert_array_equal(fused, [0, 0, 0])
    assert np.all(behind != 0)


def test_an_activation_that_changes_the_shape():
    message = re.escape(
        "Argument `activation` must keep the shape of what it is applied to. Received: activation=glu, which makes "
        "(None, 4, 5, 2) of (None, 4, 5, 4)"
    )
    with pytest.raises(ValueError, match=message):
        AutomaticGainControl("glu")(keras.Input((4, 5, 4)))
    with pytest.raises(ValueError, match="activation=glu, which makes"):
        AutomaticGainControl("glu")(np.ones((2, 4, 5, 4), np.float32))
    with pytest.raises(ValueError, match=re.escape("activation=<lambda>, which makes (None, 4, 5) of")):
        AutomaticGainControl(lambda z: tf.reduce_max(z, -1))(keras.Input((4, 5, 4)))
    with pytest.raises(
        ValueError, match=re.escape("activation=<lambda>, which makes [(None, 4, 5, 3), (None, 4, 5, 3)")
    ):
        AutomaticGainControl(lambda z: [z, z])(keras.Input((4, 5, 3)))


class Halving(keras.layers.Layer):
    def call(self, x):
        return x[..., ::2]


def test_a_layer_that_changes_the_shape_as_activation():
    message = (
        re.escape("<Halving name=halving, built=") + ".*" + re.escape(", which makes (None, 4, 5, 2) of (None, 4,")
    )
    with pytest.raises(ValueError, match=message):
        AutomaticGainControl(Halving(name="halving"))(keras.Input((4, 5, 3)))
    with pytest.raises(ValueError, match=re.escape("which makes (2, 4, 5, 2) of (2, 4, 5, 3)")):
        AutomaticGainControl(Halving())(_X)


def test_an_activation_that_changes_a_size_that_was_unknown():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, AutomaticGainControl(lambda z: z[:, ::2])(inputs))
    with pytest.raises(ValueError, match=re.escape("activation=<lambda>, which makes (2, 2, 5, 3) of (2, 4, 5, 3)")):
        model(_X)


def test_an_activation_that_only_runs_on_values():
    def eager_only(z):
        return tf.nn.tanh(z) if float(tf.reduce_max(z)) < 100 else z

    np.testing.assert_array_equal(AutomaticGainControl(eager_only)(_X), AutomaticGainControl("tanh")(_X))
    # Nothing is known of the shape, nor can it be compared.
    unknown = tf.function(AutomaticGainControl(lambda z: tf.py_function(tf.nn.tanh, [z], z.dtype)))
    np.testing.assert_array_equal(unknown(_X), AutomaticGainControl("tanh")(_X))


def test_names_of_other_layers_stay_theirs():
    AutomaticGainControl("tanh")(_X)
    assert keras.layers.Lambda(tf.nn.relu).name == "lambda"


@pytest.mark.parametrize(
    "policy, weights",
    [
        ("float32", "float32"),
        ("mixed_float16", "float32"),
        ("mixed_bfloat16", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float64", "float64"),
    ],
)
def test_dtype_policies(policy, weights, counters):
    random = keras.initializers.RandomNormal(stddev=0.5)
    layer = AutomaticGainControl("relu", dtype=policy, gain_initializer=random, bias_initializer=random)
    inputs = keras.Input((4, 5, 3))
    compute_dtype = policy.removeprefix("mixed_")
    assert layer(inputs).dtype == compute_dtype
    y = layer(_X)
    assert y.dtype == compute_dtype
    assert layer.gain.dtype == layer.mean_scale.dtype == layer.bias.dtype == weights
    gain, mean_scale, bias = (tf.cast(weight, parameter_dtype(compute_dtype)) for weight in layer.weights)
    want = tf_agc.agc(tf.cast(_X, compute_dtype), gain, mean_scale, bias, activation="relu")
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
    np.testing.assert_allclose(got, tf_agc.agc(_X, 1.0, 0.25, activation="relu"), rtol=1e-6, atol=1e-6)
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
    layer = AutomaticGainControl("leaky_relu", negative_slope=0.3, gain_initializer="random_normal")
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
    assert (config["activation"], config["negative_slope"], config["alpha"]) == ("tanh", None, None)
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
         "alpha must be None for the activation 'relu': only 'leaky_relu' has a negative_slope, and only 'elu' an "
         "alpha, got 0.1"),
        ({"activation": "leaky_relu", "alpha": 0.1}, "alpha must be None for the activation 'leaky_relu': only "),
        ({"activation": "elu", "negative_slope": 0.1}, "negative_slope must be None for the activation 'elu': only "),
        ({"activation": "tanh", "alpha": 0.1},
         "Argument `negative_slope` is only valid for the activation 'leaky_relu', and `alpha` for 'elu'. "
         "Received: activation=tanh, negative_slope=None, alpha=0.1"),
        ({"activation": "tanh", "negative_slope": 0.1}, "Received: activation=tanh, negative_slope=0.1, alpha=None"),
        ({"activation": keras.layers.ELU(0.5), "alpha": 0.1},
         "Arguments `negative_slope` and `alpha` must be None where the activation is a layer, which has one of its "
         "own. Received: activation=<ELU"),
        ({"activation": keras.layers.LeakyReLU(), "negative_slope": 0.1},
         "Arguments `negative_slope` and `alpha` must be None where the activation is a layer, which has one of its "
         "own. Received: activation=<LeakyReLU"),
        ({"activation": keras.layers.ReLU(), "negative_slope": 0.1},
         "negative_slope must be None for the activation 'relu': only "),
        ({"activation": "elu", "alpha": -1}, "alpha must be finite and >= 0, got -1"),
        ({"activation": "leaky_relu", "negative_slope": -1}, "negative_slope must be finite and >= 0, got -1"),
        ({"activation": "elu", "gain_initializer": "zeros"},
         "Argument `gain_initializer` must not be zeros with the activation 'elu'"),
        ({"activation": "leaky_relu", "gain_initializer": keras.initializers.Constant(0.0)},
         "Argument `gain_initializer` must not be zeros with the activation 'leaky_relu'"),
        ({"activation": keras.layers.ReLU},
         "Argument `activation` must be a name, a function or a layer, not a class: pass an instance of it. "
         "Received: activation=<class 'keras"),
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


@pytest.mark.parametrize("sequence", [list, tuple])
def test_called_like_an_add_layer(sequence):
    message = (
        "AutomaticGainControl expects one tensor, and what is added to it as `shortcut=`. Received a list or tuple of "
        f"tensors: input_shape={sequence([(2, 4, 4, 3)] * 2)}"
    )
    for tensors in ([tf.ones([2, 4, 4, 3])] * 2, [keras.Input(batch_shape=(2, 4, 4, 3))] * 2):
        with pytest.raises(ValueError, match=re.escape(message)):
            AutomaticGainControl()(sequence(tensors))


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

    def layer(mean_scale, **arguments):
        return AutomaticGainControl(data_format=data_format, mean_scale_initializer=mean_scale, **arguments)

    for ones in ("ones", keras.initializers.Constant(1.0)):
        with pytest.raises(ValueError, match="at a mean_scale of 1 nothing is left of them.*" + message):
            layer(ones, train_mean_scale=False).build(shape)
        with pytest.warns(UserWarning, match="at a mean_scale of 1 initially nothing is left.*" + message):
            layer(ones).build(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(None, train_mean_scale=False).build(shape)
        layer(keras.initializers.Constant(0.5), train_mean_scale=False).build(shape)
        fixed = layer("ones", train_mean_scale=False)
        fixed.build((None, None, 1, 3) if data_format == "channels_last" else (None, 3, None, 1))


@pytest.mark.parametrize("mode", ["eager", "fit", "calibrate"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_one_position_that_only_a_call_knows(data_format, mode):
    free, shape = ((None, None, 3), (2, 1, 1, 3)) if data_format == "channels_last" else ((3, None, None), (2, 3, 1, 1))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    layer = AutomaticGainControl(data_format=data_format, mean_scale_initializer="ones", name="agc")
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
        for mean_scale in (None, keras.initializers.Constant(0.5)):
            other = AutomaticGainControl(data_format=data_format, mean_scale_initializer=mean_scale)
            keras.Sequential([keras.Input(free), other])(x)


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
