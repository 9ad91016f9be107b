"""Converted copies train: with Adam at 1e-3 their loss falls as that of the originals does, and never blows up."""

import keras
import pytest

import tf_agc
from study import converted

pytestmark = pytest.mark.usefixtures("fresh_keras")
layers = keras.layers
_STEPS = 30


def _norm(x, activation=True):
    x = layers.BatchNormalization()(x)
    return layers.ReLU()(x) if activation else x


def _conv(x, channels, size=3, **arguments):
    return layers.Conv2D(channels, size, padding="same", use_bias=False, **arguments)(x)


def _residual(x):
    x = _norm(_conv(x, 32, strides=2))
    for _ in range(6):
        y = _norm(_conv(_norm(_conv(x, 32)), 32), activation=False)
        x = layers.ReLU()(layers.Add()([y, x]))
    return x


def _mobile(x):
    x = _norm(_conv(x, 24, strides=2))
    for _ in range(4):
        y = _norm(_conv(x, 96, 1))
        y = _norm(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y))
        scale = layers.GlobalAveragePooling2D(keepdims=True)(y)
        y = layers.Multiply()([y, layers.Conv2D(96, 1, activation="sigmoid")(scale)])
        x = layers.Add()([x, _norm(_conv(y, 24, 1), activation=False)])
    return _norm(_conv(x, 256, 1))


def _dense(x):
    x = _conv(x, 16, strides=2)
    for _ in range(3):
        y = _conv(_norm(_conv(_norm(x), 64, 1)), 16)
        x = layers.Concatenate()([x, y])
    return _norm(x)


def _losses(model, images, labels):
    keras.utils.set_random_seed(0)
    optimizer = keras.optimizers.Adam(1e-3, global_clipnorm=1.0)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    losses = []
    for _ in range(_STEPS):
        losses.append(float(model.train_on_batch(images, labels)))
        model.reset_metrics()
    return losses


@pytest.mark.parametrize("network", [_residual, _mobile, _dense])
def test_the_loss_falls_as_far_as_that_of_the_original(network):
    keras.utils.set_random_seed(0)
    images, labels = converted.gratings(16)
    images = images / 127.5 - 1
    inputs = keras.Input(images.shape[1:])
    model = keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(network(inputs))))
    copy = tf_agc.convert(model, calibrate_with=images)
    original, losses = _losses(model, images, labels), _losses(copy, images, labels)
    assert original[-1] < 0.5 * original[0]  # else this would say nothing
    assert losses[-1] < original[-1] + 0.1
    assert max(losses) < 2 * losses[0]
