"""Which activations of Keras and TensorFlow the op computes itself: for the layer, and for `convert`.

A mapping of names alone: the activations themselves are in `tf_agc.reference` and the kernels.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

# Keras's functions of the fused activations: with their default arguments they are the same, slopes included (Keras's
# leaky_relu has 0.2, unlike its LeakyReLU layer).
KERAS_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "linear": keras.activations.linear,
    "relu": keras.activations.relu,
    "relu6": keras.activations.relu6,
    "leaky_relu": keras.activations.leaky_relu,
    "elu": keras.activations.elu,
}

# By identity.
_NAMES = {function: name for name, function in KERAS_FUNCTIONS.items()} | {
    function: name
    for module in (tf.nn, keras.ops)
    for name in KERAS_FUNCTIONS
    if (function := getattr(module, name, None))
}


class FusedActivation(NamedTuple):
    """An activation as arguments of the layer; None stands for the default of a number."""

    activation: str
    negative_slope: float | None = None
    alpha: float | None = None


def find_fused(activation: Any) -> FusedActivation | None:
    """What the op computes in place of an activation: its name there, and the number where it has one of its own.

    Args:
        activation: a function, or a layer or an operation of Keras.

    Returns:
        The layer's arguments, or None where the op cannot compute the same.
    """
    try:
        if activation in _NAMES:
            return FusedActivation(_NAMES[activation])
    except TypeError:  # a callable that cannot be hashed
        return None
    if not type(activation).__module__.startswith("keras.") or getattr(activation, "activity_regularizer", None):
        return None
    fused = None
    # By name, as Keras exports no classes of its operations. ReLU is a layer and an operation.
    match type(activation).__name__:
        case "Activation":
            return find_fused(activation.activation)
        case "Relu":
            fused = FusedActivation("relu")
        case "Relu6":
            fused = FusedActivation("relu6")
        case "ReLU" if activation.threshold == 0:
            if activation.max_value is None:
                slope = activation.negative_slope
                fused = FusedActivation("leaky_relu", negative_slope=slope) if slope else FusedActivation("relu")
            elif activation.max_value == 6 and not activation.negative_slope:
                fused = FusedActivation("relu6")
        case "LeakyReLU" | "LeakyRelu":
            fused = FusedActivation("leaky_relu", negative_slope=activation.negative_slope)
        case "ELU" | "Elu":
            fused = FusedActivation("elu", alpha=activation.alpha)
    if fused is None:
        return None
    numbers = [None if number is None else float(number) for number in fused[1:]]
    if not all(number is None or 0 <= number < math.inf for number in numbers):
        return None
    return FusedActivation(fused.activation, *numbers)
