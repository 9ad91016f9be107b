"""`convert`: compared with the model that one would write by hand, in every kind of model."""

import contextlib
import functools
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_agc
from tf_agc import AutomaticGainControl, conversion_table

# What becomes of convolutions is tested in test_conversion_plan.py.
convert = functools.partial(tf_agc.convert, standardize=False)


def _batch(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


_X = _batch(4, 8, 9, 3)


@pytest.fixture
def fresh(fresh_keras):
    """Names and weights do not depend on the order of tests, and no warning passes unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _conv(name=None, channels=5):
    return layers.Conv2D(channels, 3, padding="same", name=name)


def _norm(name=None, **arguments):
    return layers.BatchNormalization(name=name, **arguments)


def _agc(activation=None, **arguments):
    """With what convert gives it: the place of a BatchNormalization has a bias, and lets most of the mean through."""
    arguments = {"use_bias": True, "mean_scale_initializer": keras.initializers.Constant(0.25), **arguments}
    return AutomaticGainControl(activation, **arguments)


def _agc_layers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, AutomaticGainControl)]


def _norm_layers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


def _randomize(model):
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(0.5 + rng.random(weight.shape))


def _state(model):
    """All that convert must not change, in a form that can be compared."""
    compiled = model.compiled and (model.optimizer, model.loss)
    calls = [(len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in model._flatten_layers()]
    return model.to_json(), [weight.numpy().tolist() for weight in model.weights], compiled, calls


def _assert_same(model, expected, x):
    """Both models compute the same from the same weights, the AGC's own ones aside: they are fresh."""
    assert [weight.shape for weight in model.weights] == [weight.shape for weight in expected.weights]
    expected.set_weights(model.get_weights())
    tf.nest.map_structure(np.testing.assert_array_equal, model(x), expected(x))


@contextlib.contextmanager
def _warning(*lines):
    """Exactly one warning, with exactly these lines after its first one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    (warning,) = [warning for warning in caught if "convert did not carry over" in str(warning.message)]
    assert warning.filename == __file__
    header, *rest = str(warning.message).split("\n  ")
    assert re.fullmatch("convert did not carry over all of model '.*':", header)
    assert rest == list(lines)


# Activations: the layer or operation behind BatchNormalization, and the AGC's arguments (None: not fused).
def _behind(name):
    ops, activations = keras.ops, keras.activations
    return {
        "ReLU": (layers.ReLU(), ("relu", None)),
        "ReLU max_value=6": (layers.ReLU(6), ("relu6", None)),
        "ReLU negative_slope": (layers.ReLU(negative_slope=0.3), ("leaky_relu", 0.3)),
        "ReLU threshold": (layers.ReLU(threshold=1), None),
        "ReLU max_value=5": (layers.ReLU(5), None),
        "ReLU 6 with a slope": (layers.ReLU(6, negative_slope=0.1), None),
        "LeakyReLU": (layers.LeakyReLU(), ("leaky_relu", 0.3)),
        "ELU": (layers.ELU(0.7), ("elu", 0.7)),
        "ELU alpha<0": (layers.ELU(-0.5), None),
        "relu": (layers.Activation("relu"), ("relu", None)),
        "relu6": (layers.Activation("relu6"), ("relu6", None)),
        "leaky_relu": (layers.Activation("leaky_relu"), ("leaky_relu", None)),
        "elu": (layers.Activation("elu"), ("elu", None)),
        "linear": (layers.Activation("linear"), None),
        "swish": (layers.Activation("swish"), None),
        "PReLU": (layers.PReLU(), None),
        "own function": (layers.Activation(_relu_of_our_own), None),
        "own layer": (ReLU(), None),
        "regularized": (layers.ReLU(activity_regularizer="l2"), None),
        "other dtype": (layers.ReLU(dtype="float64"), None),
        "ops.relu": (ops.relu, ("relu", None)),
        "ops.relu6": (ops.relu6, ("relu6", None)),
        "ops.leaky_relu": (lambda x: ops.leaky_relu(x, 0.1), ("leaky_relu", 0.1)),
        "ops.elu": (lambda x: ops.elu(x, 0.5), ("elu", 0.5)),
        "ops.tanh": (ops.tanh, None),
        "activations.relu": (activations.relu, ("relu", None)),
        "activations.relu with a slope": (lambda x: activations.relu(x, 0.2), ("leaky_relu", 0.2)),
        "activations.relu with a threshold": (lambda x: activations.relu(x, threshold=1), None),
        "activations.relu6": (activations.relu6, ("relu6", None)),
        "activations.leaky_relu": (activations.leaky_relu, ("leaky_relu", 0.2)),
        "activations.elu": (activations.elu, ("elu", 1.0)),
    }[name]


@keras.saving.register_keras_serializable("test_conversion", name="relu")
def _relu_of_our_own(x):
    return 2 * tf.nn.relu(x)


class ReLU(layers.Layer):
    """Named like Keras's, and another one."""

    def call(self, x):
        return 2 * tf.nn.relu(x)


_BEHIND = [
    *("ReLU", "ReLU max_value=6", "ReLU negative_slope", "ReLU threshold", "ReLU max_value=5", "ReLU 6 with a slope"),
    *("LeakyReLU", "ELU", "ELU alpha<0", "relu", "relu6", "leaky_relu", "elu", "linear", "swish", "PReLU"),
    *("own function", "own layer", "regularized", "other dtype"),
    *("ops.relu", "ops.relu6", "ops.leaky_relu", "ops.elu", "ops.tanh"),
    *("activations.relu", "activations.relu with a slope", "activations.relu with a threshold"),
    *("activations.relu6", "activations.leaky_relu", "activations.elu"),
]


@pytest.mark.parametrize("name", _BEHIND)
def test_activations(name, fresh):
    activation, fused = _behind(name)
    inputs = keras.Input((8, 9, 3))
    model = keras.Model(inputs, 3 * activation(_norm("norm")(inputs)))
    converted = convert(model)
    layer = converted.get_layer("norm")
    assert isinstance(layer, AutomaticGainControl)
    assert (layer._fused, layer.negative_slope or layer.alpha) == (fused or ("linear", None))
    (row,) = conversion_table(model)
    assert len(converted.operations) == len(model.operations) - bool(fused)
    assert row.activation == (fused[0] if fused else "linear") and len(row.fused) == bool(fused)

    inputs = keras.Input((8, 9, 3))
    expected = keras.Model(inputs, 3 * _behind(name)[0](_agc()(inputs)))
    _randomize(converted)
    expected.set_weights(converted.get_weights())
    np.testing.assert_allclose(converted(_X), expected(_X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ReLU max_value=6", "ELU", "leaky_relu", "swish", "other dtype"])
def test_activations_in_sequential_models(name, fresh):
    activation, fused = _behind(name)
    model = keras.Sequential([keras.Input((8, 9, 3)), _norm("norm"), activation, layers.Rescaling(3.0)])
    converted = convert(model)
    assert len(converted.layers) == 2 if fused else 3
    expected = keras.Sequential([keras.Input((8, 9, 3)), _agc(), _behind(name)[0], layers.Rescaling(3.0)])
    _randomize(converted)
    expected.set_weights(converted.get_weights())
    np.testing.assert_allclose(converted(_X), expected(_X), rtol=1e-6, atol=1e-6)


def _residual(norm_relu, junction):
    """A model by hand: `norm_relu(name, x)` and `junction(x, shortcut)` make the layers."""
    inputs = keras.Input((8, 9, 3), name="image")
    x = shortcut = norm_relu("first", _conv("conv1")(inputs))
    x = junction(_conv("conv2")(x), shortcut)
    x = layers.GlobalMaxPooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(2, name="logits")(x), name="residual")


def _with_batch_normalization():
    return _residual(
        lambda name, x: layers.ReLU(name=f"{name}_relu")(_norm(name)(x)),
        lambda x, shortcut: layers.ReLU(name="last")(layers.Add(name="add")([_norm("second")(x), shortcut])),
    )


def test_a_residual_model(fresh):
    model = _with_batch_normalization()
    _randomize(model)
    before = _state(model)
    converted = convert(model)
    assert _state(model) == before
    expected = _residual(
        lambda name, x: _agc("relu", name=name)(x),
        lambda x, shortcut: _agc("relu", name="second")(x, shortcut=shortcut),
    )
    assert converted.to_json() == expected.to_json()
    for layer in converted.layers:
        if isinstance(layer, AutomaticGainControl):
            assert [np.unique(weight).tolist() for weight in layer.get_weights()] == [[1], [0.25], [0]]
        else:
            for weight, old in zip(layer.weights, model.get_layer(layer.name).weights, strict=True):
                np.testing.assert_array_equal(weight, old)
                assert weight is not old
    _assert_same(converted, expected, _X)


def test_the_table_and_its_text(fresh):
    model = _with_batch_normalization()
    before = _state(model)
    table = conversion_table(model)
    assert _state(model) == before
    assert [(row.layer, row.activation, row.fused, row.reason) for row in table] == [
        ("first", "relu", ["first_relu"], ""),
        ("second", "relu", ["add", "last"], ""),
    ]
    assert str(table).splitlines() == [
        "layer   becomes",
        "first   AGC, relu  with first_relu; standardizes conv1",
        "second  AGC, relu  with add, last; standardizes conv2",
    ]
    assert conversion_table(keras.Sequential([keras.Input((3,)), layers.Dense(2)])) == []


def test_training_the_copy_does_not_touch_the_original(fresh):
    model = keras.Sequential([keras.Input((8, 9, 3)), _conv(), _norm(), layers.ReLU(), layers.Flatten()])
    model.compile("sgd", "mse")
    before = _state(model)
    converted = convert(model, calibrate_with=_X)
    assert not converted.compiled
    converted.compile(keras.optimizers.SGD(0.1, clipnorm=1.0), "mse", jit_compile=True)
    weights = converted.get_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        history = converted.fit(_X, _batch(4, 360), epochs=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    changed = [not np.array_equal(a, b) for a, b in zip(weights, converted.get_weights(), strict=True)]
    assert sum(changed) >= len(changed) - 1  # the bias in front of a mean_scale of 1 has no gradient at first
    assert _state(model) == before


def test_calibrate_with(fresh):
    converted = convert(_with_batch_normalization(), calibrate_with=_X)
    assert all(np.all(layer.gain != 1) for layer in _agc_layers(converted))
    first, second = tf_agc.calibrate(converted, _X)
    np.testing.assert_allclose(first.std_before, np.ones(5), rtol=1e-4)
    # Of a branch, half of the deviation of its shortcut, which relu has made smaller than 1.
    assert 0.2 < np.min(second.std_before) and np.max(second.std_before) < 0.5


def test_a_batch_that_calibrate_refuses(fresh):
    model = _with_batch_normalization()
    with pytest.raises(ValueError, match="batch must be finite, got NaN or Inf"):
        convert(model, calibrate_with=np.full_like(_X, np.nan))


def test_a_loss_that_keras_cannot_restore(fresh):
    model = _with_batch_normalization()
    model.compile("sgd", lambda y, z: tf.reduce_mean((y - z) ** 2))
    assert isinstance(convert(model).get_layer("first"), AutomaticGainControl)


# What is fused, and where the activation stays.
def test_a_second_reader_keeps_the_activation(fresh):
    inputs = keras.Input((8, 9, 3))
    x = _norm("norm")(inputs)
    model = keras.Model(inputs, layers.Add()([x, layers.ReLU()(x)]))
    assert conversion_table(model)[0].activation == "linear"
    assert np.min(convert(model)(_X)) < 0


def test_an_activity_regularizer_is_kept_and_sees_what_it_saw(fresh):
    def make(norm):
        inputs = keras.Input((8, 9, 3))
        return keras.Model(inputs, layers.ReLU()(norm(inputs)))

    converted = convert(make(_norm(activity_regularizer="l1")))
    assert [layer._fused for layer in _agc_layers(converted)] == ["linear"]
    expected = make(_agc(activity_regularizer="l1"))
    _assert_same(converted, expected, _X)
    assert converted.losses == expected.losses and converted.losses[0] > 0


def test_an_output_of_the_model_keeps_the_activation(fresh):
    inputs = keras.Input((8, 9, 3))
    x = _norm("norm")(inputs)
    y = layers.ReLU(name="relu")(x)
    model = keras.Model(inputs, {"x": x, "y": y})
    converted = convert(model)
    assert converted.output_names == model.output_names
    outputs = converted(_X)
    assert np.min(outputs["x"]) < 0
    np.testing.assert_array_equal(outputs["y"], tf.nn.relu(outputs["x"]))


def test_names_of_several_outputs_are_kept(fresh):
    inputs = keras.Input((8, 9, 3))
    outputs = [layers.ReLU(name=name)(_norm()(inputs)) for name in ("a", "b")]
    model = keras.Model(inputs, outputs)
    assert convert(model).output_names == ["a", "b"]
    assert [row.activation for row in conversion_table(model)] == ["linear", "linear"]
    # As the one output, it is fused: blocks of a nested model end so.
    assert [row.activation for row in conversion_table(keras.Model(inputs, outputs[0]))] == ["relu"]


@pytest.mark.parametrize("calls", ["one each", "in a row"])
def test_a_shared_activation(calls, fresh):
    """Only those of its calls vanish that follow a BatchNormalization."""

    def make(norm, norm_and_activation):
        inputs = keras.Input((8, 9, 3))
        shared = layers.LeakyReLU(0.5)
        x = norm_and_activation(inputs, shared)
        x = shared(x) if calls == "in a row" else shared(layers.Rescaling(2.0)(x))
        return keras.Model(inputs, norm_and_activation(x, shared))

    model = make(_norm, lambda x, shared: shared(_norm()(x)))
    expected = make(_norm, lambda x, shared: _agc("leaky_relu", negative_slope=0.5)(x))
    converted = convert(model)
    assert [layer.negative_slope for layer in _agc_layers(converted)] == [0.5, 0.5]
    _assert_same(converted, expected, _X)


def _shared_norm(norm, first, second):
    inputs = keras.Input((8, 9, 3))
    return keras.Model(inputs, second(norm(_conv("conv", 3)(first(norm(inputs))))))


def test_a_shared_layer_stays_shared_and_is_fused_if_all_calls_are(fresh):
    model = _shared_norm(_norm(), layers.ReLU(name="a"), layers.Activation("relu", name="b"))
    (row,) = conversion_table(model)
    assert (row.activation, row.fused) == ("relu", ["a", "b"])
    converted = convert(model)
    assert len(_agc_layers(converted)) == 1
    identity = layers.Identity()
    _assert_same(converted, _shared_norm(_agc("relu"), identity, identity), _X)


def test_a_shared_layer_with_different_activations_is_linear(fresh):
    model = _shared_norm(_norm(), layers.ReLU(), layers.ELU())
    assert [row.activation for row in conversion_table(model)] == ["linear"]
    _assert_same(convert(model), _shared_norm(_agc(), layers.ReLU(), layers.ELU()), _X)


def test_a_shared_layer_with_one_map_of_one_position_is_left_alone(fresh):
    norm = _norm("norm")
    inputs = keras.Input((8, 9, 3))
    pooled = layers.GlobalAveragePooling2D(keepdims=True)(norm(inputs))
    model = keras.Model(inputs, _norm("other")(layers.Add()([norm(pooled), inputs])))
    with _warning("norm: left alone, a map of one position is its own mean: input shape (None, 1, 1, 3)"):
        converted = convert(model)
    assert len(_norm_layers(converted)) == 1 and len(_agc_layers(converted)) == 1


def _halved(name, size=None):
    """A model that halves its maps between two BatchNormalization layers."""
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(4, 3, strides=2, padding="same")(_norm("first")(inputs))
    return keras.Model(inputs, layers.ReLU()(_norm("second")(x)), name=name)


@pytest.mark.parametrize("outer", ["functional", "Sequential", "TimeDistributed", "two levels", "called by name"])
def test_a_size_that_only_the_outer_model_knows(outer, fresh):
    """The nested model's own Input has no size, and its second BatchNormalization gets 1x1 maps."""
    inner, shape = _halved("inner"), (5, 2, 2, 3) if outer == "TimeDistributed" else (2, 2, 3)
    inputs, path = keras.Input(shape), "inner"
    if outer == "functional":
        model = keras.Model(inputs, 2 * inner(inputs))
    elif outer == "Sequential":
        model = keras.Sequential([inputs, inner])
    elif outer == "TimeDistributed":
        model, path = keras.Model(inputs, layers.TimeDistributed(inner, name="steps")(inputs)), "steps/inner"
    elif outer == "two levels":
        between = keras.Input((None, None, 3))
        between = keras.Model(between, inner(layers.Rescaling(2.0)(between)), name="between")
        model, path = keras.Model(inputs, between(inputs)), "between/inner"
    else:
        model = keras.Model(inputs, inner(training=False, inputs=inputs))
    _randomize(model)
    before = _state(model)
    with _warning(f"{path}/second: left alone, a map of one position is its own mean: input shape (None, 1, 1, 4)"):
        converted = convert(model, calibrate_with=_batch(3, *shape))
    assert _state(model) == before
    assert [layer.name for layer in _agc_layers(converted)] == ["first"]
    samples = converted(_batch(2, *shape))
    assert not np.allclose(samples[0], samples[1])


def test_every_call_of_a_shared_model_counts(fresh):
    inner, inputs = _halved("inner"), [keras.Input((size, size, 3)) for size in (8, 2, 4)]
    model = keras.Model(inputs, [inner(x) for x in inputs])
    assert [(row.layer, bool(row.reason)) for row in conversion_table(model)] == [
        ("inner/first", False),
        ("inner/second", True),
    ]
    inputs = [keras.Input((size, size, 3)) for size in (8, 4)]
    (_, row) = conversion_table(keras.Model(inputs, [inner(x) for x in inputs]))
    assert (row.activation, len(row.fused)) == ("relu", 1)


def test_a_size_that_only_the_nested_model_knows(fresh):
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, _halved("inner", size=2)(inputs))
    with _warning("inner/second: left alone, a map of one position is its own mean: input shape (None, 1, 1, 4)"):
        convert(model)


def test_a_size_that_only_the_batch_knows(fresh):
    model = _halved("model")
    converted = convert(model, calibrate_with=_batch(8, 2, 2, 3))
    # Of a map of one position three quarters are left.
    assert converted(_batch(8, 2, 2, 3)).shape == (8, 1, 1, 4)
    assert np.min(np.std(converted(_batch(8, 2, 2, 3)), axis=0)) > 0.1


def test_none_for_an_optional_input(fresh):
    class First(layers.Layer):
        def call(self, inputs):
            first, second = inputs
            return first if second is None else first + second

        def compute_output_shape(self, shapes):
            return shapes[0]

        def get_config(self):
            return super().get_config()

    inputs = [keras.Input((4, 4, 3)), keras.Input((4, 4, 3), optional=True)]
    model = keras.Model(inputs, layers.BatchNormalization()(First()(inputs)))
    x = _batch(3, 4, 4, 3)
    converted = convert(model, calibrate_with=[x, None])
    np.testing.assert_allclose(np.std(converted([x, None]), axis=(0, 1, 2)), np.ones(3), rtol=1e-3)


# Kinds of models.
def _block(norm):
    return keras.Sequential([_conv("conv"), norm, layers.ReLU(name="relu")], name="block")


def test_nested_and_shared_models(fresh):
    """Three levels; a model that is used twice; one without a known size; one that Sequential starts with."""

    def make(norm):
        inner = keras.Input((None, None, 5), name="inner_input")
        shared = _block(norm("norm"))
        encoder = keras.Model(inner, norm("last")(shared(inner)), name="encoder")
        inputs = [keras.Input((8, 9, 5), name=name) for name in ("a", "b")]
        both = layers.Add(name="add")([encoder(x) for x in inputs] + [shared(inputs[0])])
        model = keras.Model(inputs, both, name="siamese")
        return keras.Sequential([keras.Input((8, 9, 5)), encoder], name="outer"), model

    outer, siamese = make(_norm)
    hand = make(lambda name: _agc("relu" if name == "norm" else None, name=name))
    x = _batch(2, 8, 9, 5)
    for model, expected, batch in zip((outer, siamese), hand, (x, [x, -x]), strict=True):
        _randomize(model)
        before = _state(model)
        converted = convert(model)
        assert _state(model) == before
        expected.get_layer("encoder").get_layer("block").layers[-1].activation = None
        assert [layer.name for layer in converted.layers] == [layer.name for layer in model.layers]
        assert len(_agc_layers(converted)) == 2
        table = conversion_table(model)
        assert [(row.layer, row.fused) for row in table] == [("encoder/block/norm", ["relu"]), ("encoder/last", [])]
        _assert_same(converted, expected, batch)
    assert siamese.get_layer("encoder").get_layer("block") is siamese.get_layer("block")
    converted = convert(siamese)
    assert converted.get_layer("encoder").get_layer("block") is converted.get_layer("block")


def test_an_activation_outside_of_the_nested_model_is_not_fused(fresh):
    inner = keras.Sequential([keras.Input((8, 9, 3)), _norm("norm")], name="inner")
    model = keras.Sequential([keras.Input((8, 9, 3)), inner, layers.ReLU()])
    assert [row.activation for row in conversion_table(model)] == ["linear"]
    assert np.min(convert(model)(_X)) == 0


def test_structures_of_inputs_and_outputs(fresh):
    inputs = {"a": keras.Input((8, 9, 3), name="a"), "b": (keras.Input((8, 9, 3), name="b"),)}
    a, b = _norm()(inputs["a"]), _norm()(inputs["b"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # Keras's, about names in nested structures
        model = keras.Model(inputs, {"sum": [a + b], "parts": (a, {"b": b})})
        converted = convert(model)
        outputs = converted({"a": _X, "b": (2 * _X,)})
    keras.tree.assert_same_structure(outputs, model.output)
    assert [x.name for x in converted.inputs] == [x.name for x in model.inputs]
    np.testing.assert_allclose(outputs["sum"][0], 3 * (_X - 0.25 * _X.mean((1, 2), keepdims=True)), atol=1e-5)


def test_inputs_keep_what_they_are(fresh):
    optional = keras.Input((8, 9, 3), optional=True)
    model = keras.Model([optional], _norm()(optional))
    (layer,) = [layer for layer in convert(model).layers if isinstance(layer, layers.InputLayer)]
    assert layer.optional and layer.name == model.layers[0].name
    inputs = keras.Input(batch_shape=(4, 8, 9, 3), dtype="uint8", name="pixels")
    model = keras.Model(inputs, _norm()(layers.Rescaling(1 / 255)(inputs)))
    sequential = keras.Sequential([inputs, layers.Rescaling(1 / 255), _norm()])
    for converted in (convert(model), convert(sequential)):
        assert (converted.inputs[0].shape, converted.inputs[0].dtype) == ((4, 8, 9, 3), "uint8")


@pytest.mark.parametrize("wrapped", ["layer", "model"])
def test_time_distributed(wrapped, fresh):
    def make(norm, relu):
        inner = norm if wrapped == "layer" else keras.Sequential([keras.Input((8, 9, 3)), _conv(), norm, *relu])
        inputs = keras.Input((2, 8, 9, 3))
        return keras.Model(inputs, layers.TimeDistributed(inner, name="steps")(inputs))

    model = make(_norm("norm"), [layers.ReLU()])
    (row,) = conversion_table(model)
    assert (row.layer.split("/")[0], row.activation) == ("steps", "linear" if wrapped == "layer" else "relu")
    expected = make(_agc("relu" if wrapped == "model" else None), [])
    _assert_same(convert(model), expected, _batch(3, 2, 8, 9, 3))


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("spatial", [(6,), (5, 6), (3, 4, 5)])
def test_axes(data_format, spatial, fresh):
    shape = (*spatial, 3) if data_format == "channels_last" else (3, *spatial)
    axes = (-1, len(shape)) if data_format == "channels_last" else (1, -len(shape))
    for axis in axes:
        converted = convert(keras.Sequential([keras.Input(shape), _norm("norm", axis=axis)]))
        layer = converted.get_layer("norm")
        assert layer.data_format == data_format
        x = _batch(2, *shape)
        y, _ = tf_agc.reference.agc(tf.constant(x), tf.ones(3), tf.fill([3], 0.25), "linear", 0.0, data_format)
        np.testing.assert_allclose(converted(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_dtype_policies(policy, fresh):
    inputs = keras.Input((8, 9, 3))
    x = layers.ReLU(dtype=policy)(_norm("norm", dtype=policy)(_conv("conv")(inputs)))
    converted = convert(keras.Model(inputs, layers.Activation("linear", dtype="float32")(x)))
    layer = converted.get_layer("norm")
    assert layer.dtype_policy.name == policy and layer._fused == "relu"
    assert layer.gain.dtype == ("float64" if policy == "float64" else "float32")
    converted.compile("sgd", "mse")
    assert np.isfinite(converted.train_on_batch(_X, np.zeros((4, 8, 9, 5))))


def test_frozen_layers_and_models(fresh):
    block = _block(_norm("norm"))
    inputs = keras.Input((8, 9, 3))
    model = keras.Model(inputs, _norm("last")(layers.ReLU()(_norm("frozen")(block(inputs)))))
    model.get_layer("frozen").trainable = False
    block.trainable = False
    block.get_layer("conv").trainable = True
    converted = convert(model)
    assert not converted.get_layer("frozen").trainable and converted.get_layer("last").trainable
    assert [converted.get_layer("block").trainable] + [
        converted.get_layer("block").get_layer(name).trainable for name in ("conv", "norm")
    ] == [False, True, False]
    paths = ["block/conv/kernel", "block/conv/bias", "last/gain", "last/mean_scale", "last/bias"]
    assert [weight.path for weight in converted.trainable_weights] == paths


def test_arguments_of_a_call(fresh):
    inputs = keras.Input((8, 9, 3))
    x = _norm()(inputs=inputs, training=False)
    model = keras.Model(inputs, _norm()(layers.ReLU()(inputs=x), training=True))
    (first, second) = _agc_layers(convert(model))
    assert (first._fused, second._fused) == ("relu", "linear")


class WithTrainStep(keras.Model):
    """As Keras's guides write them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = 0

    def train_step(self, data):
        self.steps += 1
        return super().train_step(data)


class SequentialOfOurs(keras.Sequential):
    pass


def test_classes_that_take_inputs_and_outputs_are_kept(fresh):
    inputs = keras.Input((8, 9, 3))
    model = WithTrainStep(inputs, layers.ReLU()(_norm()(inputs)), name="mine")
    converted = convert(model)
    assert type(converted) is WithTrainStep and converted.name == "mine"
    converted.compile("sgd", "mse", run_eagerly=True)
    converted.train_on_batch(_X, _X)
    assert (converted.steps, model.steps) == (1, 0)
    assert type(convert(SequentialOfOurs([inputs, _norm()]))) is SequentialOfOurs


class Backbone(keras.Model):
    """Its get_config is that of a functional model, and not what its constructor takes."""

    def __init__(self, filters, **kwargs):
        inputs = keras.Input((8, 9, 3))
        super().__init__(inputs, _norm("norm")(_conv("conv", filters)(inputs)), **kwargs)


def test_a_class_that_cannot_make_its_model_again_becomes_a_plain_model(fresh):
    inputs = keras.Input((8, 9, 3))
    model = keras.Model(inputs, Backbone(4, name="backbone")(inputs))
    (reason,) = [row.reason for row in conversion_table(model) if row.reason]
    assert reason.startswith("copied without its class Backbone, which cannot make it again: Unable to revive model")
    with _warning(f"backbone: {reason}"):
        converted = convert(model)
    assert [layer.name for layer in converted.get_layer("backbone").layers[1:]] == ["conv", "norm"]


class OfABackbone(Backbone):
    """Takes anything, and hands it on to a constructor that does not take inputs and outputs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class NeedsMore(keras.Model):
    def __init__(self, filters, *args, **kwargs):
        super().__init__(*args, **kwargs)


class NeedsMoreByName(keras.Model):
    def __init__(self, *args, filters, **kwargs):
        super().__init__(*args, **kwargs)


def _needs_more(kind):
    inputs = keras.Input((8, 9, 3))
    arguments = (8,) if kind is NeedsMore else ()
    named = {"filters": 8} if kind is NeedsMoreByName else {}
    return kind(*arguments, inputs, _norm("norm")(_conv("conv")(inputs)), name="mine", **named)


@pytest.mark.parametrize("kind", [OfABackbone, NeedsMore, NeedsMoreByName])
def test_a_class_that_hands_arguments_on_to_its_own_constructor(kind, fresh):
    model = OfABackbone(4, name="mine") if kind is OfABackbone else _needs_more(kind)
    missing = {
        OfABackbone: "Backbone.__init__() missing 1 required positional argument: 'filters'",
        NeedsMore: "NeedsMore.__init__() missing 1 required positional argument: 'filters'",
        NeedsMoreByName: "NeedsMoreByName.__init__() missing 1 required keyword-only argument: 'filters'",
    }[kind]
    reason = f"copied without its class {kind.__name__}, which cannot make it again: {missing}"
    table = [(row.layer, row.reason) for row in conversion_table(model)]
    if kind is NeedsMore and keras.__version__.startswith("3.12."):  # which tries another way
        assert table[1][1].startswith(reason.replace(missing, "Unable to revive model from config."))
        reason = table[1][1]
    assert table == [("norm", ""), ("mine", reason)]
    with _warning(f"mine: {reason}"):
        converted = convert(model)
    assert not isinstance(converted, kind) and isinstance(converted.get_layer("norm"), AutomaticGainControl)


class NeedsDepth(keras.Model):
    def __init__(self, inputs, outputs, name=None, *, depth):
        super().__init__(inputs, outputs, name=name)


class PopsDepth(keras.Model):
    def __init__(self, *args, **kwargs):
        kwargs.pop("depth")
        super().__init__(*args, **kwargs)


class TakesMore(keras.Model):
    def __init__(self, inputs, outputs, **kwargs):
        super().__init__(inputs, outputs, **kwargs)


class TakesLayers(keras.Sequential):
    def __init__(self, layers, name):
        super().__init__(layers, name=name)


def test_constructors_by_their_signature(fresh):
    inputs = keras.Input((8, 9, 3))
    assert type(convert(TakesMore(inputs, _norm()(inputs), name="mine"))) is TakesMore
    assert type(convert(TakesLayers([inputs, _norm()], "mine"))) is TakesLayers
    assert conversion_table(NeedsDepth(inputs, _norm()(inputs), name="mine", depth=2))[-1].layer == "mine"
    with pytest.raises(ValueError, match=r"layer 'mine' \(PopsDepth\) cannot be copied: missing argument 'depth'"):
        convert(PopsDepth(inputs, _norm()(inputs), name="mine", depth=2))


class Stubborn(keras.Model):
    """Takes what Keras's own models take, and is made only once."""

    made = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Stubborn.made += 1
        if Stubborn.made > 1:
            raise TypeError("one is enough")


def test_a_constructor_that_fails(fresh):
    inputs = keras.Input((8, 9, 3))
    Stubborn.made = 0
    model = Stubborn(inputs, _norm()(inputs), name="mine")
    with pytest.raises(ValueError, match=r"layer 'mine' \(Stubborn\) cannot be copied: one is enough"):
        convert(model)


# Other layers: what is copied with them.
@keras.saving.register_keras_serializable("test_conversion")
class Scale(layers.Layer):
    """Weights of its own, in a layer of its own, and one that is not trained."""

    def __init__(self, units, **arguments):
        super().__init__(**arguments)
        self.units = units
        self.inner = layers.Dense(units)

    def build(self, shape):
        self.inner.build(shape)
        self.offset = self.add_weight(name="offset", shape=(self.units,), trainable=False)

    def call(self, x):
        return self.inner(x) + self.offset

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_other_layers_keep_weights_and_state(fresh):
    factor = 3.0
    normalization = layers.Normalization(name="normalization")
    normalization.adapt(100 + _X)
    inputs = keras.Input((8, 9, 3))
    x = Scale(5, name="scale")(normalization(inputs))
    x = layers.Lambda(lambda x: tf.abs(x) * factor, name="lambda")(x)
    x = layers.SeparableConv2D(5, 3, name="separable")(x[:, 1:])
    x = layers.Dropout(0.5, seed=7, name="dropout")(_norm("norm")(x))
    x = layers.Bidirectional(layers.LSTM(2), name="lstm")(layers.Reshape((-1, 5))(x))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 2, name="attention")(x[:, None], x[:, None]))
    model.get_layer("scale").inner.trainable = False
    for layer in model.layers:
        if layer is not normalization:
            _randomize(layer)
    converted = convert(model)
    assert not converted.get_layer("scale").inner.trainable
    for layer in model.layers:
        if layer.name != "norm":
            copy = converted.get_layer(layer.name)
            assert type(copy) is type(layer)
            for new, old in zip(copy.get_weights(), layer.get_weights(), strict=True):
                np.testing.assert_array_equal(new, old)
    # Up to the BatchNormalization, the same values.
    part, copied_part = (keras.Model(m.input, m.get_layer("separable").output) for m in (model, converted))
    np.testing.assert_array_equal(part(100 + _X), copied_part(100 + _X))


def test_a_vocabulary_is_copied(fresh):
    vectorize = layers.TextVectorization(output_sequence_length=4, name="vectorize")
    vectorize.adapt(["to be or not to be"])
    model = keras.Sequential(
        [keras.Input((), dtype="string"), vectorize, layers.Embedding(10, 3, name="embedding"), _norm("norm")]
    )
    converted = convert(model)
    assert converted.get_layer("vectorize").get_vocabulary() == vectorize.get_vocabulary()
    np.testing.assert_array_equal(
        converted.get_layer("vectorize")(["not to be"]), model.get_layer("vectorize")(["not to be"])
    )


# What is left alone.
@keras.saving.register_keras_serializable("test_conversion")
class Hides(layers.Layer):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        norm = self.norm = _norm("hidden")
        self.norm = lambda x: norm(x)

    def build(self, shape):
        self._layers[0].build(shape)

    def call(self, x):
        return self.norm(x)


@keras.saving.register_keras_serializable("test_conversion")
class OtherCall(layers.BatchNormalization):
    def call(self, x):
        return super().call(x, training=False)


@keras.saving.register_keras_serializable("test_conversion")
class OtherDefaults(layers.BatchNormalization):
    def __init__(self, momentum=0.9, **arguments):
        super().__init__(momentum=momentum, **arguments)


def test_what_is_left_alone_and_why(fresh):
    inputs = keras.Input((8, 9, 3))
    mask = keras.Input((8, 9), dtype="bool")
    warnings.simplefilter("ignore")  # Keras says where it drops the mask
    x = OtherDefaults(name="converted")(inputs)
    x = OtherCall(name="other_call")(Hides(name="hides")(x))
    x = _norm("masked")(_norm("rows", axis=2)(x), mask=mask)
    pooled = _norm("pooled")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    dense = _norm("flat")(layers.Dense(3)(layers.Flatten()(x)))
    many = _norm("many")(layers.Reshape((1, 1, 1, 1, 1, 8, 9, 3))(x))
    model = keras.Model([inputs, mask], [pooled, dense, many], name="model")
    _randomize(model)
    before = _state(model)
    lines = [
        "hides/hidden: left alone, it is not in an attribute of the Hides that calls it",
        "other_call: left alone, its class OtherCall has a call() of its own",
        "rows: left alone, its axis=2 is neither the first nor the last one of a sample",
        "masked: left alone, it is called with a mask, and AGC averages over all positions",
        "flat: left alone, AGC takes 1 to 6 spatial axes: input shape (None, 3)",
        "many: left alone, AGC takes 1 to 6 spatial axes: input shape (None, 1, 1, 1, 1, 1, 8, 9, 3)",
        "pooled: left alone, a map of one position is its own mean: input shape (None, 1, 1, 3)",
    ]
    table = conversion_table(model)
    told = [f"{row.layer}: {row.reason}" for row in table if row.reason]
    assert sorted(told) == sorted(lines)
    alike = [line for line in told if line.startswith(("flat", "many"))]
    names = ", ".join(line.split(":")[0] for line in alike)
    told[told.index(alike[0])] = f"left alone, AGC takes 1 to 6 spatial axes (2 layers): {names}"
    with _warning(*(line for line in told if line not in alike)):
        converted = convert(model)
    assert _state(model) == before
    assert [layer.name for layer in _agc_layers(converted)] == ["converted"]
    for layer in model.layers:
        if layer.name != "converted":
            for new, old in zip(converted.get_layer(layer.name).get_weights(), layer.get_weights(), strict=True):
                np.testing.assert_array_equal(new, old)


def test_a_mask_that_an_earlier_layer_made(fresh):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Embedding(9, 3, mask_zero=True), _norm("masked"), _norm("last")]
    )
    assert all("it is called with a mask" in row.reason for row in conversion_table(model))
    inputs = keras.Input((6, 3))
    model = keras.Model(
        inputs, layers.GlobalAveragePooling1D()(_norm("masked")(layers.Masking()(_norm("first")(inputs))))
    )
    with _warning("masked: left alone, it is called with a mask, and AGC averages over all positions"):
        converted = convert(model)
    assert np.isfinite(converted(_batch(4, 6, 3))).all()


# Errors.
class NoConfig(layers.Layer):
    def __init__(self, function):
        super().__init__(name="no_config")
        self.function = function

    def call(self, x):
        return self.function(x)


def test_errors(fresh):
    inputs = keras.Input((8, 9, 3))
    with pytest.raises(TypeError, match="model must be a keras.Model, got Conv2D"):
        convert(_conv())
    with pytest.raises(ValueError, match="model 'new' is not built: call it on a batch, or call its build"):
        convert(keras.Sequential([_norm()], name="new"))
    with pytest.raises(ValueError, match="model 'plain' has no BatchNormalization layer to convert"):
        convert(keras.Sequential([inputs, _conv()], name="plain"))
    dense = keras.Sequential([keras.Input((3,)), _norm("norm")], name="dense")
    with pytest.raises(
        ValueError,
        match=r"'dense' has no BatchNormalization layer that can be replaced:\n  norm: left alone, AGC takes 1 to 6",
    ):
        convert(dense)
    model = keras.Sequential([inputs, _norm(), NoConfig(lambda x: x)])
    with pytest.raises(ValueError, match=r"(?s)layer 'no_config' \(NoConfig\) cannot be copied: .*implement `get_"):
        convert(model)


# Networks of keras.applications.
_APPLICATIONS = {
    # name: size, BatchNormalization layers, fused ones, junctions among these, averaged ones, ones whose maps are 1x1
    "ResNet50": (64, 53, 49, 16, 1, 0),
    # In both a depthwise convolution makes one position of a map of 2x2: that is an average, too.
    "MobileNetV2": (32, 52, 35, 8, 1, 12),
    "EfficientNetB0": (32, 49, 0, 0, 12, 15),  # its activation is swish
    "DenseNet121": (64, 121, 121, 0, 1, 0),
}


@pytest.mark.parametrize("name", _APPLICATIONS)
def test_keras_applications(name, tmp_path):
    size, norms, fused, junctions, averaged, left = _APPLICATIONS[name]
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    x = 127.5 * (1 + np.clip(_batch(2, size, size, 3), -1, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = convert(model, calibrate_with=x)

    table = conversion_table(model)
    assert (len(table), sum(bool(row.fused) for row in table)) == (norms, fused)
    adds = {layer.name for layer in model.layers if isinstance(layer, layers.Add)}
    assert sum(not adds.isdisjoint(row.fused) for row in table) == junctions
    assert sum(bool(row.averaged_by) for row in table) == averaged
    reasons = [row.reason for row in table if row.reason]
    assert len(reasons) == left == len(_norm_layers(converted))
    assert all("a map of one position is its own mean: input shape (None, 1, 1," in reason for reason in reasons)
    assert len([w for w in caught if "convert did not carry over" in str(w.message)]) == bool(left)
    assert not [w for w in caught if "do not depend on its inputs" in str(w.message)]
    assert len(_agc_layers(converted)) == norms - left
    assert len(converted.layers) == len(model.layers) - sum(len(row.fused) for row in table)
    for layer in converted.layers:
        if not isinstance(layer, AutomaticGainControl):
            for new, old in zip(layer.get_weights(), model.get_layer(layer.name).get_weights(), strict=True):
                np.testing.assert_array_equal(new, old)

    # Eager but for one of them: tracing would take most of this test's time.
    optimizer, eager = keras.optimizers.SGD(0.01, clipnorm=1.0), name != "MobileNetV2"
    converted.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=eager)
    before = converted.get_weights()
    loss = converted.train_on_batch(x, np.array([3, 7]))
    assert np.isfinite(loss)
    after = converted.get_weights()
    assert all(np.isfinite(weight).all() for weight in after)
    gains = {id(layer.gain) for layer in _agc_layers(converted)}
    changed = [
        not np.array_equal(a, b)
        for weight, a, b in zip(converted.weights, before, after, strict=True)
        if id(weight) in gains
    ]
    assert all(changed)

    converted.save(tmp_path / "converted.keras")
    loaded = keras.saving.load_model(tmp_path / "converted.keras")
    np.testing.assert_array_equal(loaded(x), converted(x))
