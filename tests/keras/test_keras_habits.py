"""What Keras users do around a layer: ways to train, masks, maps of every rank, other tensors, summaries, saving.

The layer alone is tested in test_layer.py, saved models in fresh processes in test_saving.py.
"""

import ast
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_agc
from agc_testing import assert_close
from tf_agc import AutomaticGainControl

pytestmark = pytest.mark.usefixtures("fresh_keras")

_X = np.random.default_rng(0).standard_normal((16, 6, 7, 3)).astype(np.float32)
_Y = _X.sum(axis=(1, 2))[:, :1]


def _model(normalization=AutomaticGainControl, policy=None):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 7, 3)),
            keras.layers.Conv2D(4, 3, use_bias=False, dtype=policy),
            normalization(dtype=policy),
            keras.layers.Activation("elu", dtype=policy),
            keras.layers.Flatten(dtype=policy),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )


def _trained(model, optimizer, batch_size=4, epochs=2, **arguments):
    model.compile(optimizer, "mse", **arguments)
    model.fit(_X, _Y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
    return model.trainable_variables


def test_loss_scaling_survives_an_overflow():
    model = _model(policy="mixed_float16")
    gain = model.layers[1].gain
    # A scale that no half gradient stands: such steps must be left out, and the scale halved until they fit.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=2.0**40)
    model.compile(optimizer, "mse")
    model.train_on_batch(_X, _Y)
    np.testing.assert_array_equal(gain, np.ones(4))
    assert optimizer.dynamic_scale == 2.0**39
    for _ in range(40):
        model.train_on_batch(_X, _Y)
    assert 1 < optimizer.dynamic_scale < 2.0**20 and optimizer.iterations > 5
    assert np.isfinite(gain).all() and not np.array_equal(gain, np.ones(4))


def test_scaled_float16_trains_as_float32_does():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=16.0)
    half = _trained(_model(policy="mixed_float16"), scaled)
    single = _trained(_model(), keras.optimizers.SGD(0.01))
    assert_close([v.value for v in half], [v.value for v in single], 0.02)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_steps_per_execution(jit_compile):
    one = _trained(_model(), keras.optimizers.SGD(0.01), jit_compile=jit_compile)
    three = _trained(_model(), keras.optimizers.SGD(0.01), jit_compile=jit_compile, steps_per_execution=3)
    assert_close([v.value for v in three], [v.value for v in one], 1e-5)


@pytest.mark.parametrize(
    ("normalization", "equal"), [(AutomaticGainControl, True), (keras.layers.BatchNormalization, False)]
)
def test_gradient_accumulation_equals_the_whole_batch(normalization, equal):
    small = keras.optimizers.SGD(0.01, gradient_accumulation_steps=4)
    small = _trained(_model(normalization), small, batch_size=2, epochs=3)
    whole = _trained(_model(normalization), keras.optimizers.SGD(0.01), batch_size=8, epochs=3)
    difference = max(np.abs(a.numpy() - b.numpy()).max() for a, b in zip(small, whole, strict=True))
    assert difference < 1e-5 if equal else difference > 1e-3


def test_exponential_moving_average():
    weights = []
    model = _model()
    model.compile(keras.optimizers.SGD(0.01), "mse")
    for start in range(0, 16, 4):
        model.train_on_batch(_X[start : start + 4], _Y[start : start + 4])
        weights.append([variable.numpy() for variable in model.trainable_variables])
    average = weights[0]
    for later in weights[1:]:
        average = [0.8 * old + 0.2 * new for old, new in zip(average, later, strict=True)]
    optimizer = keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.8)
    averaged = _trained(_model(), optimizer, epochs=1)  # overwritten with the averages when fit ends
    assert_close([v.value for v in averaged], average, 1e-5)
    assert not np.allclose(averaged[1], weights[-1][1], atol=1e-4)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "option",
    [
        {"clipnorm": 1.0},
        {"clipvalue": 0.1},
        {"global_clipnorm": 1.0},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 1},
        {"gradient_accumulation_steps": 2},
        {"weight_decay": 0.1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_every_option_of_optimizers_under_every_policy(policy, option):
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((6, 7, 3))
        x = shortcut = keras.layers.Conv2D(4, 1, use_bias=False)(inputs)
        norm = AutomaticGainControl("relu", use_bias=True, mean_scale_initializer=keras.initializers.Constant(0.5))
        outputs = keras.layers.Dense(1)(keras.layers.GlobalMaxPooling2D()(norm(x, shortcut)))
        model = keras.Model(inputs, outputs)
        # Steps that 16 bits hold, and no loss scaling, which would leave out the first ones.
        model.compile(keras.optimizers.SGD(0.1, **option), "mse", jit_compile=False, auto_scale_loss=False)
        before = model.get_weights()
        for _ in range(3):  # after two, clipped steps to and fro may have ended where they began
            model.train_on_batch((_X + 1) / 3, np.ones_like(_Y))  # maps with a mean, for the mean scale
    finally:
        keras.config.set_dtype_policy("float32")
    assert {weight.name for weight in norm.trainable_weights} == {"gain", "mean_scale", "bias"}
    for weight, old in zip(model.weights, before, strict=True):
        value = weight.numpy().astype("float64")
        assert np.isfinite(value).all() and not np.array_equal(value, old), weight.path


def test_masks_reach_the_layers_behind():
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(10, 4, mask_zero=True)(inputs)
    x = AutomaticGainControl("relu")(x)
    model = keras.Model(inputs, [x, keras.layers.GlobalAveragePooling1D()(x)])
    tokens = np.array([[3, 1, 4, 0, 0], [1, 5, 9, 2, 6]])
    maps, means = (output.numpy() for output in model(tokens))
    weights = (tokens != 0)[..., None]
    np.testing.assert_allclose(means, (maps * weights).sum(1) / weights.sum(1), rtol=1e-5)
    assert not np.allclose(means[0], maps[0].mean(0), rtol=0.1)
    # The mean of the layer itself takes in masked positions, as its documentation says.
    embedded = model.layers[1](tokens)
    np.testing.assert_allclose(maps, tf_agc.agc(embedded, 1.0, 0.25, activation="relu"), rtol=1e-6)


@pytest.mark.parametrize("steps", [3, None])
def test_time_distributed_in_a_model(steps):
    inputs = keras.Input((steps, 6, 7, 3))
    block = keras.Sequential([keras.layers.Conv2D(4, 3, activation="relu"), AutomaticGainControl("leaky_relu")])
    model = keras.Model(inputs, keras.layers.TimeDistributed(block)(inputs))
    x = _X[:12].reshape(4, 3, 6, 7, 3)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = model.fit(x, np.zeros((4, 3, 4, 5, 4)), epochs=2, verbose=0).history["loss"]
    assert losses[1] < losses[0]
    np.testing.assert_allclose(model.predict(x, verbose=0)[1, 2], block(x[1])[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_maps_of_every_rank_train_as_the_reference_does(axes):
    conv = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}[axes]
    x = np.random.default_rng(0).standard_normal((4, 6, 5, 4)[: axes + 1] + (3,)).astype(np.float32)
    trained = []
    for name in ("native", "reference"):
        keras.utils.set_random_seed(0)
        with tf_agc.implementation(name):
            model = keras.Sequential(
                [keras.Input((*[None] * axes, 3)), conv(4, 3), AutomaticGainControl("relu"), conv(1, 1)]
            )
            model.compile(keras.optimizers.SGD(0.1), "mse")
            y = np.ones((4, *(size - 2 for size in x.shape[1:-1]), 1))
            losses = model.fit(x, y, epochs=3, verbose=0).history["loss"]
        assert losses[-1] < losses[0]
        trained.append([variable.numpy() for variable in model.trainable_variables])
    assert_close(*trained, 1e-4)


def test_sparse_and_ragged_inputs_of_models_are_refused():
    sparse = tf.sparse.from_dense(_X[0])
    ragged = tf.RaggedTensor.from_row_lengths(tf.ones([5, 3]), [2, 3])
    for kind, x in (("SparseTensor", sparse), ("RaggedTensor", ragged)):
        # On the first call: when the model is made, Keras takes products of dense tensors with numbers for sparse ones.
        inputs = keras.Input((None, 3), sparse=x is sparse, ragged=x is ragged)
        model = keras.Model(inputs, AutomaticGainControl()(inputs))
        model.compile("sgd", "mse")
        message = re.escape(
            f"x must be a dense tensor, got a {kind} (to_tensor() and tf.sparse.to_dense() convert; padding zeros "
            "count as values)"
        )
        for call in (model, lambda x, model=model: model.fit(x, tf.ones(x.shape[:1]), verbose=0)):
            with pytest.raises(TypeError, match=message):
                call(x)
    # Sparse data of a model made for dense inputs, Keras itself makes dense; ragged data it leaves as they are.
    model = keras.Sequential([keras.Input((None, 3)), AutomaticGainControl()])
    np.testing.assert_allclose(model(sparse), model(_X[0]), rtol=1e-6)
    with pytest.raises(TypeError, match="x must be a dense tensor, got a RaggedTensor"):
        model.predict(ragged, verbose=0)


def test_summary():
    inputs = keras.Input((32, 32, 3))
    layer = AutomaticGainControl("relu", train_mean_scale=False, name="agc")
    lines = []
    keras.Model(inputs, layer(keras.layers.Conv2D(64, 3)(inputs))).summary(print_fn=lines.append)
    text = "\n".join(lines)
    (row,) = [line for line in text.splitlines() if "agc" in line]
    assert re.search(r"agc \(AutomaticGainControl\) .* \(None, 30, 30, 64\) .* 192 ", row)
    assert "Non-trainable params: 64 " in text


def test_plot_model(tmp_path):
    inputs = keras.Input((9, 10, 3))
    outputs = AutomaticGainControl("leaky_relu", negative_slope=0.1, name="agc")(inputs)
    model = keras.Model(inputs, outputs)
    show = {"show_shapes": True, "show_dtype": True, "show_layer_activations": True, "show_trainable": True}
    text = keras.utils.model_to_dot(model, **show).to_string()
    for expected in (
        "<b>agc</b> (AutomaticGainControl)",
        "Activation: <b>leaky_relu</b>",
        "Input shape: <b>(None, 9, 10",
    ):
        assert expected in text
    keras.utils.plot_model(model, tmp_path / "model.png", **show)  # needs the program dot
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_weight_decay_leaves_out_what_training_md_says():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (names,) = re.findall(r"exclude_from_weight_decay\(var_names=(\[.*\])\)", page)
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=ast.literal_eval(names))
    model = _model()
    optimizer.build(model.trainable_variables)
    for variable in model.trainable_variables:
        variable.assign_add(tf.ones_like(variable))  # none is 0
    started = [variable.numpy() for variable in model.trainable_variables]
    optimizer.apply([tf.zeros_like(variable) for variable in model.trainable_variables])
    decayed = [
        (variable.path.split("/")[-1], not np.array_equal(variable, value))
        for variable, value in zip(model.trainable_variables, started, strict=True)
    ]
    layer, classifier = [("gain", False), ("mean_scale", False), ("bias", False)], [("kernel", True), ("bias", False)]
    assert decayed == [("kernel", True), *layer, *classifier]


# No leading underscore: TensorFlow refuses the name scopes that Keras makes of it.
@keras.saving.register_keras_serializable(package="test_keras_habits")
class Block(keras.layers.Layer):
    """The two ways in which custom layers hold others: made from arguments, and handed in."""

    def __init__(self, filters, norm, **arguments):
        super().__init__(**arguments)
        self.filters, self.norm = filters, norm
        self.conv = keras.layers.Conv2D(filters, 3, padding="same")
        self.last = AutomaticGainControl()

    def build(self, input_shape):
        self.conv.build(input_shape)
        for layer in (self.norm, self.last):
            if not layer.built:  # the one handed in is, when it comes from a file
                layer.build((*input_shape[:-1], self.filters))

    def call(self, x):
        return self.last(self.norm(self.conv(x)))

    def get_config(self):
        norm = keras.saving.serialize_keras_object(self.norm)
        return {**super().get_config(), "filters": self.filters, "norm": norm}

    @classmethod
    def from_config(cls, config):
        norm = keras.saving.deserialize_keras_object(config.pop("norm"))
        return cls(norm=norm, **config)


def _with_blocks():
    norm = AutomaticGainControl("elu", alpha=0.7, gain_regularizer=keras.regularizers.L2(0.1), train_mean_scale=False)
    inputs = keras.Input((6, 7, 3))
    x = Block(4, norm)(inputs)
    x = keras.Sequential([Block(2, AutomaticGainControl("tanh", data_format="channels_last"))])(x)
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalMaxPooling2D()(x)))


def test_saving_inside_custom_layers(tmp_path):
    model = _with_blocks()
    _trained(model, keras.optimizers.SGD(0.01, momentum=0.9))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(_X, verbose=0), model.predict(_X, verbose=0))
    norm = loaded.layers[1].norm
    assert isinstance(norm, AutomaticGainControl) and norm.get_config() == model.layers[1].norm.get_config()
    assert norm.alpha == 0.7 and not norm.mean_scale.trainable and norm.gain_regularizer is not None

    model.save_weights(tmp_path / "model.weights.h5")
    other = _with_blocks()
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other.predict(_X, verbose=0), model.predict(_X, verbose=0))

    # Training goes on as it would have: the optimizer's state belongs to the same weights.
    for one in (model, loaded):
        one.fit(_X, _Y, shuffle=False, verbose=0)
    assert_close([v.value for v in loaded.weights], [v.value for v in model.weights], 1e-6)
