"""Which activations of Keras and TensorFlow the op computes itself: for the layer, and for `convert`.

A mapping of names alone: the activations themselves are in `tf_agc.reference` and the kernels.
"""

import math
from collections.abc import Callable
from typing import Any

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
    getattr(module, name): name for module in (tf.nn, keras.ops) for name in KERAS_FUNCTIONS if name != "linear"
}


def find_fused(activation: Any) -> tuple[str, float | None] | None:
    """What the op computes in place of an activation: its name there, and its alpha where it has one of its own.

    Args:
        activation: a function, or a layer or an operation of Keras.

    Returns:
        Name and alpha, None for the default one; or None where the op cannot compute the same.
    """
    try:
        if activation in _NAMES:
            return _NAMES[activation], None
    except TypeError:  # a callable that cannot be hashed
        return None
    if not type(activation).__module__.startswith("keras.") or getattr(activation, "activity_regularizer", None):
        return None
    name, alpha = None, None
    # By name, as Keras exports no classes of its operations. ReLU is a layer and an operation.
    match type(activation).__name__:
        case "Activation":
            return find_fused(activation.activation)
        case "Relu":
            name = "relu"
        case "Relu6":
            name = "relu6"
        case "ReLU" if activation.threshold == 0:
            if activation.max_value is None:
                name, alpha = ("leaky_relu", activation.negative_slope) if activation.negative_slope else ("relu", None)
            elif activation.max_value == 6 and not activation.negative_slope:
                name = "relu6"
        case "LeakyReLU" | "LeakyRelu":
            name, alpha = "leaky_relu", activation.negative_slope
        case "ELU" | "Elu":
            name, alpha = "elu", activation.alpha
    if name is None or (alpha is not None and not 0 <= alpha < math.inf):
        return None
    return name, None if alpha is None else float(alpha)
