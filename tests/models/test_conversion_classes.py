"""`convert` of classes that make their layers themselves: custom layers, subclassed models, models like KerasHub's."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tf_agc import AutomaticGainControl, StandardizedConv2D, conversion_table, convert, export_saved_model

_X = np.random.default_rng(0).standard_normal((4, 8, 9, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def fresh(fresh_keras):
    """Names and weights do not depend on the order of tests, and no warning passes unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _registered(kind):
    return keras.saving.register_keras_serializable("test_conversion_classes")(kind)


def _kinds(model, kind):
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


def _randomize(model):
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(0.5 + rng.random(weight.shape))


def _state(model):
    calls = [(len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in model._flatten_layers()]
    return model.get_config(), [weight.numpy().tolist() for weight in model.weights], calls


def _saved_and_loaded(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's of Keras
        model.save(tmp_path / "model.keras")
        return keras.saving.load_model(tmp_path / "model.keras")


def _convert_and_check(model, tmp_path, agc, standardized, x=_X):
    """The copy has the class, shares nothing, trains, and is what it was after it was saved and loaded."""
    _randomize(model)
    before = _state(model)
    converted = convert(model)
    assert _state(model) == before
    assert isinstance(converted, type(model)) and type(converted).__name__ == type(model).__name__
    assert not _kinds(converted, layers.BatchNormalization)
    assert len(_kinds(converted, AutomaticGainControl)) == agc
    assert not {id(weight) for weight in model.weights} & {id(weight) for weight in converted.weights}
    assert len(_kinds(converted, StandardizedConv2D)) == standardized
    old = {id(weight): weight.numpy() for weight in model.weights}
    kept = [layer for layer in _kinds(model, layers.Conv2D | layers.Dense)]
    copied = [layer for layer in _kinds(converted, layers.Conv2D | layers.Dense)]
    for layer, copy in zip(kept, copied, strict=True):
        for weight, new in zip(layer.weights, copy.weights, strict=True):
            expected = old[id(weight)]
            if isinstance(copy, StandardizedConv2D) and weight is layer.kernel:
                expected = expected - np.mean(expected, (0, 1, 2))
                expected *= np.sqrt(2) / np.sqrt(np.sum(np.square(expected), (0, 1, 2)))
            np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-6)
    _randomize(converted)
    loaded = _saved_and_loaded(converted, tmp_path)
    assert isinstance(loaded, type(model))
    keras.tree.map_structure(np.testing.assert_array_equal, loaded(x), converted(x))
    again = _saved_and_loaded(loaded, tmp_path)
    keras.tree.map_structure(np.testing.assert_array_equal, again(x), converted(x))
    converted.compile("sgd", "mse", run_eagerly=True)
    outputs = keras.tree.map_structure(np.zeros_like, model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert np.isfinite(converted.train_on_batch(x, outputs))
    assert _state(model)[:2] == before[:2]
    return converted


@_registered
class Residual(keras.Model):
    """A functional model with a constructor, attributes, a loss and methods of its own, as KerasHub's."""

    def __init__(self, filters, factor=2.0, **kwargs):
        inputs = keras.Input((8, 9, 3))
        self_conv = layers.Conv2D(filters, 3, padding="same", name="conv")
        x = layers.ReLU(name="relu1")(layers.BatchNormalization(name="norm1")(self_conv(inputs)))
        y = layers.Conv2D(filters, 3, padding="same", name="conv2")(x)
        y = layers.BatchNormalization(name="norm2")(y)
        y = ops.relu(layers.Add(name="add")([x, y]))
        super().__init__(inputs, y, **kwargs)
        self.filters, self.factor = filters, factor
        self.first, self.norms = self_conv, [self.get_layer("norm1"), {"last": self.get_layer("norm2")}]
        self.pyramid_outputs = {"P1": x, "P2": y}
        self.own_loss = keras.losses.Huber()

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.factor * self.own_loss(y, y_pred)

    def get_config(self):
        return {"name": self.name, "filters": self.filters, "factor": self.factor}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def test_a_model_with_a_constructor_of_its_own(tmp_path):
    model = Residual(5, factor=3.0, name="mine")
    assert [(row.layer, row.fused, row.reason) for row in conversion_table(model)] == [
        ("norm1", ["relu1"], ""),
        ("norm2", ["add", "relu"], ""),
    ]
    converted = _convert_and_check(model, tmp_path, agc=2, standardized=2)
    assert (converted.name, converted.factor) == ("mine", 3.0)
    assert [layer.name for layer in converted.layers[1:]] == ["conv", "norm1", "conv2", "norm2"]
    assert converted.first is converted.get_layer("conv")
    assert converted.norms == [converted.get_layer("norm1"), {"last": converted.get_layer("norm2")}]
    # Tensors in attributes are those of the copy: what is made of them shares its layers.
    pyramid = keras.Model(converted.input, converted.pyramid_outputs)
    assert pyramid.get_layer("norm2") is converted.get_layer("norm2")
    outputs = pyramid(_X)
    np.testing.assert_array_equal(outputs["P2"], converted(_X))
    assert np.min(outputs["P1"]) == 0
    np.testing.assert_allclose(
        converted.compute_loss(y=np.zeros((4, 8, 9, 5)), y_pred=converted(_X)),
        3 * keras.losses.Huber()(np.zeros((4, 8, 9, 5)), converted(_X)),
        rtol=1e-6,
    )


@pytest.mark.parametrize("make", [lambda: Residual(3), lambda: TwoLayers(3)])
def test_exports(make, tmp_path):
    converted = convert(make())
    _randomize(converted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_saved_model(converted, tmp_path / "model")
    served = tf.saved_model.load(tmp_path / "model/1").signatures["serving_default"]
    (outputs,) = served(tf.constant(_X)).values()
    np.testing.assert_allclose(outputs, converted(_X), rtol=1e-4, atol=1e-4)


def test_it_computes_what_the_plain_model_does(tmp_path):
    model = Residual(5)
    converted, plain = convert(model), convert(keras.Model(model.input, model.output))
    _randomize(converted)
    plain.set_weights(converted.get_weights())
    np.testing.assert_array_equal(plain(_X), converted(_X))


def test_nested_in_a_functional_model(tmp_path):
    inputs = keras.Input((8, 9, 3))
    backbone = Residual(5, name="backbone")
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D(name="pool")(backbone(inputs))))
    assert [(row.layer, row.averaged_by) for row in conversion_table(model)] == [
        ("backbone/norm1", ""),
        ("backbone/norm2", "pool"),
    ]
    converted = _convert_and_check(model, tmp_path, agc=2, standardized=2)
    assert isinstance(converted.get_layer("backbone"), Residual)


def test_frozen_layers():
    inputs = keras.Input((8, 9, 3))
    backbone = Residual(5, name="backbone")
    backbone.trainable = False
    backbone.get_layer("norm2").trainable = True
    model = keras.Model(inputs, layers.Dense(2)(backbone(inputs)))
    converted = convert(model)
    copy = converted.get_layer("backbone")
    assert [copy.trainable] + [copy.get_layer(name).trainable for name in ("conv", "norm1", "norm2")] == [
        *(False, False, False, True)
    ]


@_registered
class Detector(keras.Model):
    """Calls a part of another model, which it holds."""

    def __init__(self, backbone, **kwargs):
        part = keras.Model(backbone.input, backbone.pyramid_outputs, name="part")
        images = keras.Input((8, 9, 3))
        x = part(images)["P1"]
        x = layers.ReLU()(layers.BatchNormalization(name="head")(layers.Conv2D(2, 3)(x)))
        super().__init__(images, x, **kwargs)
        self.backbone = backbone

    def get_config(self):
        return {"name": self.name, "backbone": keras.saving.serialize_keras_object(self.backbone)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "backbone": keras.saving.deserialize_keras_object(config["backbone"])})


def test_a_model_that_holds_another_and_calls_a_part_of_it(tmp_path):
    model = Detector(Residual(5, name="backbone"))
    converted = _convert_and_check(model, tmp_path, agc=3, standardized=3)
    part, backbone = converted.get_layer("part"), converted.backbone
    assert part.get_layer("norm1") is backbone.get_layer("norm1")
    assert isinstance(backbone, Residual)
    np.testing.assert_array_equal(part(_X)["P2"], backbone(_X))


@_registered
class TwoLayers(keras.Sequential):
    def __init__(self, filters=4, **kwargs):
        norm, relu = layers.BatchNormalization(name="norm"), layers.ReLU(name="relu")
        super().__init__([keras.Input((8, 9, 3)), layers.Conv2D(filters, 3, name="conv"), norm, relu], **kwargs)
        self.filters, self.norm = filters, norm

    def get_config(self):
        return {"name": self.name, "filters": self.filters}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def test_a_sequential_model_with_a_constructor_of_its_own(tmp_path):
    converted = _convert_and_check(TwoLayers(5), tmp_path, agc=1, standardized=1)
    assert [layer.name for layer in converted.layers] == ["conv", "norm"]
    assert converted.norm is converted.layers[1] and converted.norm._fused == "relu"


@_registered
class Block(layers.Layer):
    """A custom layer, which builds what it holds."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.conv = layers.Conv2D(filters, 3, padding="same", name="conv")
        self.norm = layers.BatchNormalization(name="norm")

    def build(self, shape):
        self.conv.build(shape)
        self.norm.build((*shape[:-1], self.filters))

    def call(self, x, training=None):
        return ops.relu(self.norm(self.conv(x), training=training))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


@_registered
class LazyBlock(layers.Layer):
    """Leaves building to Keras, and has lists."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = [layers.Conv2D(3, 3), [layers.BatchNormalization(name="norm"), layers.ReLU()]]
        self.by_name = {"last": (layers.BatchNormalization(name="last"),)}

    def call(self, x):
        conv, (norm, relu) = self.steps
        return self.by_name["last"][0](relu(norm(conv(x))))


@_registered
class Subclassed(keras.Model):
    """A model of code, with layers, custom layers and a Sequential model in attributes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block(4, name="block")
        self.stem = layers.BatchNormalization(name="stem")
        self.alias = self.stem
        self.encoder = keras.Sequential(
            [layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="inner"), layers.ReLU(name="relu")],
            name="encoder",
        )
        self.head = layers.Dense(2)

    def call(self, x):
        return self.head(self.encoder(self.block(self.stem(x))))


def test_a_custom_layer(tmp_path):
    inputs = keras.Input((8, 9, 3))
    model = keras.Model(inputs, layers.Dense(2)(Block(5, name="block")(layers.BatchNormalization(name="own")(inputs))))
    assert [(row.layer, row.activation, row.reason) for row in conversion_table(model)] == [
        ("own", "linear", ""),
        ("block/norm", "linear", ""),
    ]
    converted = _convert_and_check(model, tmp_path, agc=2, standardized=0)
    block = converted.get_layer("block")
    assert isinstance(block.norm, AutomaticGainControl)
    expected = ops.relu(block.norm(block.conv(_X)))
    np.testing.assert_array_equal(block(_X), expected)


def test_a_custom_layer_that_keras_builds(tmp_path):
    inputs = keras.Input((8, 9, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's, that the layer has no build()
        model = keras.Model(inputs, LazyBlock(name="lazy")(inputs))
        _randomize(model)
        if not np.array_equal(_saved_and_loaded(model, tmp_path)(_X), model(_X)):
            pytest.skip(f"Keras {keras.__version__} does not save the weights of layers in lists of lists")
        converted = _convert_and_check(model, tmp_path, agc=2, standardized=0)
    lazy = converted.get_layer("lazy")
    assert isinstance(lazy.steps[1][0], AutomaticGainControl)
    assert isinstance(lazy.by_name["last"][0], AutomaticGainControl)


def test_a_subclassed_model(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Subclassed(name="mine")
        model(_X)
        assert {row.layer: (row.activation, row.fused) for row in conversion_table(model)} == {
            "encoder/inner": ("relu", ["relu"]),
            "stem": ("linear", []),
            "block/norm": ("linear", []),
        }
        converted = _convert_and_check(model, tmp_path, agc=3, standardized=1)
    assert converted.alias is converted.stem and isinstance(converted.stem, AutomaticGainControl)
    assert [layer.name for layer in converted.encoder.layers] == ["conv", "inner"]


def test_a_subclassed_model_that_is_not_built():
    with pytest.raises(ValueError, match="model 'mine' is not built: call it on a batch"):
        convert(Subclassed(name="mine"))


@_registered
class Causal(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = layers.Conv1D(3, 3, padding="causal")
        self.norm = layers.BatchNormalization(name="norm")

    def build(self, shape):
        self.conv.build(shape)
        self.norm.build((*shape[:-1], 3))

    def call(self, x):
        return self.norm(self.conv(x))


def test_a_causal_custom_layer_is_left_alone():
    inputs = keras.Input((12, 3))
    model = keras.Model(inputs, layers.BatchNormalization(name="last")(Causal(name="causal")(inputs)))
    reasons = {row.layer: row.reason for row in conversion_table(model)}
    assert all(reason.endswith("causal is causal") for reason in reasons.values())
    assert list(reasons) == ["last", "causal/norm"]
    assert not any(row.reason for row in conversion_table(model, replace_causal=True))


def test_maps_of_one_position_in_code_are_left_alone():
    inputs = keras.Input((1, 1, 3))
    model = keras.Model(inputs, Block(5, name="block")(inputs))
    (row,) = conversion_table(model)
    assert row.reason == "left alone, a map of one position is its own mean: input shape (None, 1, 1, 5)"


@_registered
class Grows(layers.Layer):
    """Saved with another number of layers than it is made with."""

    def __init__(self, blocks=1, **kwargs):
        super().__init__(**kwargs)
        self.norms = [layers.BatchNormalization() for _ in range(blocks)]

    def build(self, shape):
        for norm in self.norms:
            norm.build(shape)

    def call(self, x):
        for norm in self.norms:
            x = norm(x)
        return x

    def get_config(self):
        return {"name": self.name}


def test_what_its_class_makes_otherwise_is_refused():
    inputs = keras.Input((8, 9, 3))
    model = keras.Model(inputs, Grows(2, name="grows")(inputs))
    with pytest.raises(ValueError, match=r"layer 'grows' \(Grows\) cannot be copied: "):
        convert(model)


@_registered
class ReadsGamma(Block):
    def call(self, x):
        return super().call(x) * self.norm.gamma


def test_code_that_needs_a_batch_normalization_is_refused():
    inputs = keras.Input((8, 9, 3))
    model = keras.Model(inputs, ReadsGamma(5, name="block")(inputs), name="model")
    with pytest.raises(ValueError) as error:
        convert(model)
    assert "model 'model' (Functional) cannot be converted, as the copy could be saved and not be loaded: " in str(
        error.value
    )
    assert "'AutomaticGainControl' object has no attribute 'gamma'" in str(error.value)


def test_classes_keep_what_they_were_for_others():
    """The class of the original is not changed, and a model of it can be made, saved and converted again."""
    model = Residual(5)
    converted = convert(model)
    assert type(model) is Residual and type(converted) is not Residual
    assert model.get_config() == Residual(5, name=model.name).get_config()
    twice = convert(keras.Model(converted.inputs, layers.BatchNormalization()(converted.outputs[0])))
    assert len(_kinds(twice, AutomaticGainControl)) == 3
