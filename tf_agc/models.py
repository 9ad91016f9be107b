"""Small reference networks whose normalization is an argument.

Networks only: data, training and measurements live in tools/.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tf_agc.calibration import BRANCH_FACTOR
from tf_agc.layer import AutomaticGainControl
from tf_agc.standardized import StandardizedConv2D


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a network a normalization stands.

    Attributes:
        activation: what follows it; None: nothing.
        scale: its initial scale, below 1 at the end of a residual branch of the recipe.
        pooled: whether a global pooling reads its maps.
    """

    activation: str | None
    scale: float = 1.0
    pooled: bool = False


# Makes the layers for a normalization at a place, followed by its activation. The last one is the activation, or an
# AutomaticGainControl that computes it: a residual junction adds the shortcut there.
Normalization = Callable[[Place], Sequence[keras.layers.Layer]]


def _activation(place: Place) -> list[keras.layers.Layer]:
    return [keras.layers.Activation(place.activation)] if place.activation else []


def _scale(place: Place) -> keras.initializers.Initializer:
    return keras.initializers.Constant(place.scale)


def _agc(place: Place) -> list[keras.layers.Layer]:
    mean_scale = "zeros" if place.pooled else None
    return [AutomaticGainControl(place.activation, gain_initializer=_scale(place), mean_scale_initializer=mean_scale)]


def _agc_alone(place: Place) -> list[keras.layers.Layer]:
    # As the first version of the layer: all of the mean goes, no bias.
    return [
        AutomaticGainControl(
            place.activation, gain_initializer=_scale(place), mean_scale_initializer="ones", use_bias=False
        )
    ]


def _batch_norm(place: Place) -> list[keras.layers.Layer]:
    # With Keras's default momentum of 0.99 the running averages lag behind in a short training.
    return [keras.layers.BatchNormalization(momentum=0.9, gamma_initializer=_scale(place)), *_activation(place)]


def _group_norm(place: Place) -> list[keras.layers.Layer]:
    return [keras.layers.GroupNormalization(groups=8, gamma_initializer=_scale(place)), *_activation(place)]


def _layer_norm(place: Place) -> list[keras.layers.Layer]:
    # Over the channels of one position, as in ConvNeXt.
    return [keras.layers.LayerNormalization(gamma_initializer=_scale(place)), *_activation(place)]


NORMALIZATIONS: dict[str, Normalization] = {
    "agc": _agc,
    "agc_alone": _agc_alone,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "none": _activation,
}


def residual_cnn(
    input_shape: Sequence[int],
    classes: int,
    normalization: str | Normalization = "agc",
    filters: Sequence[int] = (16, 32, 64),
    blocks: int = 1,
    standardized: bool | None = None,
) -> keras.Model:
    """Returns a residual network with pre-activation blocks (He et al., arXiv 1603.05027).

    Every normalization is followed by relu, so AGC is fused with it everywhere.

    Args:
        input_shape: height, width and channels of an image; pixel values are 0 to 255.
        classes: number of logits.
        normalization: a name in `NORMALIZATIONS`, or a callable that takes a `Place` and
            returns the layers for the normalization followed by its activation, the last of
            which is the activation itself or an AutomaticGainControl with it.
        filters: channels of each stage; the first stage keeps the image's size, each further
            one halves it.
        blocks: residual blocks in each stage.
        standardized: whether convolutions are standardized, and residual branches start at half of what
            they are added to; None: with "agc" alone.

    Returns:
        A model from images [N, height, width, channels] to logits [N, classes].
    """
    net = _Parts(normalization, standardized)
    inputs, x = net.start(input_shape)
    x = net.conv(x, filters[0])
    for stage, channels in enumerate(filters):
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            y = net.normalize(x, "relu")
            resized = strides > 1 or x.shape[-1] != channels
            shortcut = net.conv(y, channels, kernel_size=1, strides=strides) if resized else x
            y = net.conv(y, channels, strides=strides)
            y = net.normalize(y, "relu")
            y = net.conv(y, channels, ends_branch=True)
            x = keras.layers.Add()([shortcut, y])
    x = net.normalize(x, "relu", pooled=True)
    return net.finish(inputs, x, classes, "residual_cnn")


def plain_cnn(
    input_shape: Sequence[int],
    classes: int,
    normalization: str | Normalization = "agc",
    filters: Sequence[int] = (16, 32, 64),
    convolutions: int = 2,
    standardized: bool | None = None,
) -> keras.Model:
    """Returns a network without shortcuts: convolution, normalization and relu, again and again.

    Args:
        input_shape, classes, normalization, filters: as in `residual_cnn`.
        convolutions: in each stage; three stages of two make the 6-layer network.
        standardized: as in `residual_cnn`.

    Returns:
        As `residual_cnn`.
    """
    net = _Parts(normalization, standardized)
    inputs, x = net.start(input_shape)
    for stage, channels in enumerate(filters):
        for index in range(convolutions):
            x = net.conv(x, channels, strides=2 if stage > 0 and index == 0 else 1)
            last = (stage, index) == (len(filters) - 1, convolutions - 1)
            x = net.normalize(x, "relu", pooled=last)
    return net.finish(inputs, x, classes, "plain_cnn")


def resnet(
    input_shape: Sequence[int],
    classes: int,
    normalization: str | Normalization = "agc",
    filters: Sequence[int] = (16, 32, 64),
    blocks: Sequence[int] = (3, 3, 3),
    bottleneck: bool = False,
    large_images: bool = False,
    standardized: bool | None = None,
) -> keras.Model:
    """Returns the original residual network, activation after addition (He et al., arXiv 1512.03385).

    The defaults make ResNet-20. A block ends with normalization, addition of the shortcut and relu, which AGC
    computes in one; a shortcut that changes the size is normalized too.

    Args:
        input_shape, classes, normalization, filters: as in `residual_cnn`.
        blocks: residual blocks of each stage.
        bottleneck: three convolutions a block, 1x1, 3x3 and 1x1, the last with four times the channels.
        large_images: quarter the image first, with a 7x7 convolution and a pooling.
        standardized: as in `residual_cnn`.

    Returns:
        As `residual_cnn`.
    """
    net = _Parts(normalization, standardized)
    inputs, x = net.start(input_shape)
    if large_images:
        x = net.normalize(net.conv(x, filters[0], kernel_size=7, strides=2), "relu")
        x = keras.layers.MaxPooling2D(3, 2, padding="same")(x)
    else:
        x = net.normalize(net.conv(x, filters[0]), "relu")
    for stage, channels in enumerate(filters):
        for block in range(blocks[stage]):
            strides = 2 if stage > 0 and block == 0 else 1
            outputs = 4 * channels if bottleneck else channels
            if bottleneck:
                y = net.normalize(net.conv(x, channels, kernel_size=1), "relu")
                y = net.normalize(net.conv(y, channels, strides=strides), "relu")
                y = net.conv(y, outputs, kernel_size=1)
            else:
                y = net.normalize(net.conv(x, channels, strides=strides), "relu")
                y = net.conv(y, outputs)
            if strides > 1 or x.shape[-1] != outputs:
                x = net.normalize(net.conv(x, outputs, kernel_size=1, strides=strides), None)
            last = (stage, block) == (len(filters) - 1, blocks[stage] - 1)
            x = net.join(y, shortcut=x, pooled=last)
    return net.finish(inputs, x, classes, "resnet")


class _Parts:
    """What the networks are put together from, with one normalization throughout."""

    def __init__(self, normalization: str | Normalization, standardized: bool | None) -> None:
        self._normalization = _normalization(normalization)
        self._standardized = self._normalization is _agc if standardized is None else standardized

    def start(self, input_shape: Sequence[int]) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        inputs = keras.Input(tuple(input_shape), name="image")
        return inputs, keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)

    def conv(
        self,
        x: keras.KerasTensor,
        channels: int,
        kernel_size: int = 3,
        strides: int = 1,
        ends_branch: bool = False,
    ) -> keras.KerasTensor:
        arguments: dict[str, Any] = {
            "padding": "same",
            # A normalization that follows would remove the bias or has one of its own.
            "use_bias": self._normalization is _activation,
            "kernel_initializer": "he_normal",
        }
        if not self._standardized:
            return keras.layers.Conv2D(channels, kernel_size, strides, **arguments)(x)
        if ends_branch:
            arguments |= {"use_gain": True, "gain_initializer": keras.initializers.Constant(BRANCH_FACTOR)}
        return StandardizedConv2D(channels, kernel_size, strides, **arguments)(x)

    def normalize(self, x: keras.KerasTensor, activation: str | None, pooled: bool = False) -> keras.KerasTensor:
        for layer in self._normalization(Place(activation, pooled=pooled)):
            x = layer(x)
        return x

    def join(self, x: keras.KerasTensor, shortcut: keras.KerasTensor, pooled: bool) -> keras.KerasTensor:
        """The end of a branch: normalization, addition of the shortcut, relu."""
        place = Place("relu", BRANCH_FACTOR if self._standardized else 1.0, pooled)
        *layers, last = self._normalization(place)
        for layer in layers:
            x = layer(x)
        if isinstance(last, AutomaticGainControl):
            return last(x, shortcut)
        return last(keras.layers.Add()([shortcut, x]))

    def finish(self, inputs: keras.KerasTensor, x: keras.KerasTensor, classes: int, name: str) -> keras.Model:
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, keras.layers.Dense(classes, name="logits")(x), name=name)


def _normalization(normalization: str | Normalization) -> Normalization:
    if callable(normalization):
        return normalization
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"normalization must be one of {', '.join(NORMALIZATIONS)} or a callable, got {normalization!r}"
        )
    return NORMALIZATIONS[normalization]
