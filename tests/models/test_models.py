"""The reference networks: each normalization builds, trains and has the parameters that it should."""

import keras
import numpy as np
import pytest

import tf_agc
from tf_agc import models

FILTERS = (8, 16)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1)).astype("float32")
LABELS = np.arange(12) % 3

# 3x3 convolutions 1-8, 8-8, 8-8, 8-16, 16-16, the 1x1 shortcut 8-16, and the classifier 16-3.
CONVOLUTIONS = 9 * (1 * 8 + 8 * 8 + 8 * 8 + 8 * 16 + 16 * 16) + 8 * 16
CLASSIFIER = 16 * 3 + 3
# Channels that are normalized: twice in each block, and before the classifier.
NORMALIZED = (8 + 8) + (8 + 16) + 16
BIASES = 8 + 8 + 8 + 16 + 16 + 16


def _resnet_of_bottlenecks(*arguments, **options):
    return models.resnet(*arguments, blocks=(1, 1), bottleneck=True, **options)


def _resnet(*arguments, **options):
    return models.resnet(*arguments, blocks=(1, 1), **options)


@pytest.mark.parametrize("normalization", models.NORMALIZATIONS)
@pytest.mark.parametrize("make", [models.residual_cnn, models.plain_cnn, _resnet, _resnet_of_bottlenecks])
def test_every_normalization_trains(fresh_keras, make, normalization):
    model = make((8, 8, 1), 3, normalization, FILTERS)
    if normalization.startswith("agc"):
        tf_agc.calibrate(model, IMAGES)
    model.compile(
        keras.optimizers.SGD(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    before = [variable.numpy() for variable in model.trainable_variables]
    losses = [model.train_on_batch(IMAGES, LABELS) for _ in range(10)]
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    for old, variable in zip(before, model.trainable_variables, strict=True):
        assert not np.array_equal(old, variable.numpy()), f"{variable.path} was not trained"
    assert np.all(np.isfinite(model(IMAGES)))


@pytest.mark.parametrize(
    ("normalization", "trainable", "averages"),
    [
        # Gain, mean scale and bias; and the gains at the ends of the branches.
        ("agc", 3 * NORMALIZED + 8 + 16, 0),
        ("agc_alone", 2 * NORMALIZED, 0),
        ("batch_norm", 2 * NORMALIZED, 2 * NORMALIZED),
        ("group_norm", 2 * NORMALIZED, 0),
        ("layer_norm", 2 * NORMALIZED, 0),
        ("none", BIASES, 0),
    ],
)
def test_parameter_counts(normalization, trainable, averages):
    model = models.residual_cnn((8, 8, 1), 3, normalization, FILTERS)
    counts = [
        sum(variable.numpy().size for variable in variables)
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    assert counts == [CONVOLUTIONS + CLASSIFIER + trainable, averages]


@pytest.mark.parametrize(
    ("model", "convolutions"),
    [
        (models.plain_cnn((32, 32, 3), 10), 6),
        # Two of each ResNet-20's convolutions are on shortcuts, and do not count among its layers.
        (models.residual_cnn((32, 32, 3), 10, blocks=3), 19 + 2),
        (models.resnet((32, 32, 3), 10), 19 + 2),
        (models.resnet((64, 64, 3), 10, "agc", (64, 128, 256, 512), (3, 4, 6, 3), True, True), 49 + 4),
    ],
    ids=["plain", "pre-activation", "post-activation", "ResNet-50"],
)
def test_networks_have_the_depth_of_their_name(model, convolutions):
    assert sum(isinstance(layer, keras.layers.Conv2D) for layer in model.layers) == convolutions


def test_post_activation_junctions_are_one_layer():
    model = models.resnet((8, 8, 1), 3, "agc", FILTERS, blocks=(1, 1))
    layers = [layer for layer in model.layers if isinstance(layer, tf_agc.AutomaticGainControl)]
    joined = [layer for layer in layers if isinstance(layer.input, list)]
    linear = [layer for layer in layers if layer.activation is keras.activations.linear]
    assert (len(layers), len(joined), len(linear)) == (1 + 2 * 2 + 1, 2, 1)  # linear on the projected shortcut
    assert {layer.activation for layer in joined} == {keras.activations.relu}
    assert not [layer for layer in model.layers if isinstance(layer, (keras.layers.Add, keras.layers.Activation))]


@pytest.mark.parametrize("normalization", ["agc", "batch_norm"])
def test_a_junction_computes_what_three_layers_do(fresh_keras, normalization):
    model = models.resnet((8, 8, 1), 3, normalization, FILTERS, blocks=(1, 1))
    joined = [layer for layer in model.layers if isinstance(layer, (tf_agc.AutomaticGainControl, keras.layers.Add))]
    last = [layer for layer in joined if isinstance(layer.input, list)][-1]
    outputs = last.output
    if normalization == "agc":
        linear = tf_agc.AutomaticGainControl(
            gain_initializer=keras.initializers.Constant(0.5), mean_scale_initializer="zeros"
        )
        branch, shortcut = last.input
        parts = [linear(branch), shortcut]
    else:
        parts = last.input
        outputs = next(layer for layer in model.layers if last.output in [layer.input]).output
    want = keras.layers.ReLU()(keras.layers.Add()(parts))
    y, want = keras.Model(model.input, [outputs, want])(IMAGES)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert np.any(y == 0) and np.any(y > 0)


def test_a_callable_makes_the_normalization():
    def normalization(place):
        return [keras.layers.UnitNormalization(), keras.layers.Activation(place.activation)]

    model = models.residual_cnn((8, 8, 1), 3, normalization, FILTERS)
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.UnitNormalization)]
    assert len(layers) == 5
    assert model(IMAGES).shape == (12, 3)


@pytest.mark.parametrize("make", [models.residual_cnn, models.plain_cnn, _resnet, _resnet_of_bottlenecks])
@pytest.mark.parametrize(("normalization", "standardized"), [("agc", None), ("batch_norm", True), ("agc", False)])
def test_the_recipe_by_place(make, normalization, standardized):
    """Standardized convolutions; no mean is lost before the pooling; a branch starts at half."""
    model = make((8, 8, 1), 3, normalization, FILTERS, **{} if standardized is None else {"standardized": standardized})
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    recipe = standardized is not False
    assert all(isinstance(layer, tf_agc.StandardizedConv2D) == recipe for layer in convolutions)
    gains = [layer.gain.numpy() for layer in convolutions if recipe and layer.gain is not None]
    assert len(gains) == (2 if recipe and make is models.residual_cnn else 0) and all(
        np.all(each == 0.5) for each in gains
    )
    pooling = next(layer for layer in model.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D))
    if normalization == "agc":
        layers = [layer for layer in model.layers if isinstance(layer, tf_agc.AutomaticGainControl)]
        scales = {layer.name: set(layer.mean_scale.numpy().tolist()) for layer in layers}
        assert scales.pop(layers[-1].name) == {0} and all(values == {0.25} for values in scales.values())
        assert layers[-1].output is pooling.input
        joined = [layer for layer in layers if isinstance(layer.input, list)]
        assert {layer.gain.numpy()[0] for layer in joined} <= {0.5 if recipe else 1.0}
    else:
        gammas = [
            layer.gamma.numpy()[0] for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)
        ]
        assert gammas.count(0.5) == (2 if make in (_resnet, _resnet_of_bottlenecks) else 0)


@pytest.mark.parametrize("blocks", [1, 2])
def test_agc_is_always_fused_with_relu(blocks):
    model = models.residual_cnn((8, 8, 1), 3, "agc", FILTERS, blocks)
    layers = [layer for layer in model.layers if isinstance(layer, tf_agc.AutomaticGainControl)]
    assert len(layers) == 2 * len(FILTERS) * blocks + 1
    assert {layer.activation for layer in layers} == {keras.activations.relu}


def test_unknown_normalization():
    with pytest.raises(
        ValueError,
        match="normalization must be one of agc, agc_alone, batch_norm, group_norm, layer_norm, none "
        "or a callable, got 'batchnorm'",
    ):
        models.residual_cnn((8, 8, 1), 3, "batchnorm")
