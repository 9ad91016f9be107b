"""`tf_agc.agc`: checks and converts arguments, then calls the chosen implementation.

The sentences of the errors are the kernel's own, wherever Python can already know. No arithmetic.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from tf_agc import native, reference
from tf_agc.implementation import resolve

ACTIVATIONS = ("linear", "relu", "relu6", "leaky_relu", "elu")
# Keras's name of the number that an activation takes, whose it is, and its default.
_ALPHA = {"negative_slope": ("leaky_relu", 0.2), "alpha": ("elu", 1.0)}
DATA_FORMATS = ("channels_last", "channels_first")
_DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


_Function = TypeVar("_Function", bound=Callable[..., Any])
# TensorFlow has no types: without this one, `agc` would have none either.
_do_not_convert: Callable[[_Function], _Function] = tf.autograph.experimental.do_not_convert


# AutoGraph has nothing to convert here, and would slow every trace down and lengthen tracebacks.
@_do_not_convert
def agc(
    x: Any,
    gain: Any,
    mean_scale: Any,
    bias: Any = None,
    shortcut: Any = None,
    activation: str | None = None,
    negative_slope: float | None = None,
    alpha: float | None = None,
    data_format: str = "channels_last",
) -> tf.Tensor:
    """Automatic gain control: subtracts a scaled mean from every map and scales the difference.

    For sample n, channel c and the positions p of a map, where bias and shortcut may be absent:

        m[n, c]    = mean over p of x[n, p, c]
        y[n, p, c] = act(gain[c] * (x[n, p, c] - mean_scale[c] * m[n, c]) + bias[c] + shortcut[n, p, c])

    Source: B. Ruff, "Deep Control", arXiv 1706.03907 (not adaptive gradient clipping); bias and
    shortcut are ours. Means are accumulated in float32 or better and results rounded to the dtype
    of x. NaN and Inf go through. A fused activation keeps y (and shortcut) for the backward pass
    and the linear op keeps x; at a gain of exactly 0, activations therefore give that gain a gradient
    of 0, and near it, in 16 bits and with a shortcut, a noisy one.

    Args:
        x: tensor or what converts to one; float16, bfloat16, float32 or float64; shape
            [N, ..., C] or [N, C, ...] with 1 to 6 spatial axes. An empty batch is allowed.
        gain: shape [C], or a scalar for every channel; float64 where x is, else float32. Python
            numbers, lists and NumPy arrays are converted.
        mean_scale: as gain. 1 removes the mean, 0 keeps it.
        bias: as gain, or None: nothing is added.
        shortcut: dtype and shape of x, without broadcasting; or None: nothing is added.
        activation: None or "linear", which are the same, "relu", "relu6", "leaky_relu" or "elu".
        negative_slope: leaky_relu's slope below 0 (None: 0.2); a finite number >= 0, rounded to float32.
        alpha: elu's scale below 0 (None: 1.0); likewise.
        data_format: "channels_last" or "channels_first".

    Returns:
        y: the dtype and shape of x.

    Raises:
        TypeError: x or shortcut is ragged, sparse or not floating; gain, mean_scale, bias or shortcut has another
            dtype than the one above; negative_slope or alpha is not a number.
        ValueError: another activation, negative_slope, alpha or data_format; a static shape that does not fit.
        tf.errors.InvalidArgumentError: the same for a shape that is only known when it runs.
        RuntimeError: `implementation("native")` where the native library is not available.
    """
    activation = "linear" if activation is None else activation
    alpha = resolve_alpha(activation, negative_slope, alpha)
    # A string first: an array compares element by element, and a tensor in a graph not at all.
    if not isinstance(data_format, str) or data_format not in DATA_FORMATS:
        raise ValueError(f'data_format must be "channels_last" or "channels_first", got {data_format!r}')
    x = _convert_x(x)
    _check_shape(x.shape, data_format)
    axis = reference.channel_axis(data_format)
    gain = _convert_parameter("gain", gain, x, axis)
    mean_scale = _convert_parameter("mean_scale", mean_scale, x, axis)
    if bias is not None:
        bias = _convert_parameter("bias", bias, x, axis)
    if shortcut is not None:
        shortcut = _convert_shortcut(shortcut, x)

    name, _ = resolve()
    compute = native.agc if name == "native" else reference.agc
    y, _ = compute(x, gain, mean_scale, activation, alpha, data_format, bias=bias, shortcut=shortcut)
    return y


def spatial_sizes(shape: Any, data_format: str) -> tuple[int | None, ...]:
    """The sizes of a shape without batch and channels."""
    return tuple(shape[1:-1] if data_format == "channels_last" else shape[2:])


def resolve_alpha(activation: str, negative_slope: float | None = None, alpha: float | None = None) -> float:
    """The one number that the implementations take, whatever Keras calls it; 0 where an activation has none.

    Raises:
        TypeError: a number is none.
        ValueError: an unknown activation, a number for one without, or a negative or infinite one.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    resolved = 0.0
    for name, value in (("negative_slope", negative_slope), ("alpha", alpha)):
        owner, default = _ALPHA[name]
        if activation == owner:
            resolved = default if value is None else _convert_alpha(name, value)
        elif value is not None:
            raise ValueError(
                f"{name} must be None for the activation {activation!r}: only 'leaky_relu' has a negative_slope, "
                f"and only 'elu' an alpha, got {value!r}"
            )
    return resolved


def _convert_alpha(name: str, number: float) -> float:
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be a number or None, got {type(number).__name__}")
    try:
        value = float(number)
    except OverflowError:  # an integer or a fraction that no float64 holds
        value = math.inf if number > 0 else -math.inf
    # As the kernel sees it: a double may overflow to a float32 infinity.
    if not 0 <= value <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name} must be finite and >= 0, got {value:g}")
    # Whether a denormal float32 is 0 would depend on the thread that looks at it.
    return value if value >= float(np.finfo(np.float32).tiny) else 0.0


def _convert_maps(name: str, maps: Any) -> tf.Tensor:
    if isinstance(maps, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(
            f"{name} must be a dense tensor, got a {type(maps).__name__} (to_tensor() and "
            "tf.sparse.to_dense() convert; padding zeros count as values)"
        )
    return _convert(name, maps)


def _convert_x(x: Any) -> tf.Tensor:
    x = _convert_maps("x", x)
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"x must have dtype {', '.join(dtype.name for dtype in _DTYPES[:-1])} or "
            f"{_DTYPES[-1].name}, got {x.dtype.name}"
        )
    return x


def _convert_shortcut(shortcut: Any, x: tf.Tensor) -> tf.Tensor:
    shortcut = _convert_maps("shortcut", shortcut)
    if shortcut.dtype != x.dtype:
        raise TypeError(f"shortcut must have the dtype of x {x.dtype.name}, got {shortcut.dtype.name}")
    if not shortcut.shape.is_compatible_with(x.shape):
        raise ValueError(f"shortcut must have the shape of x {_brackets(x.shape)}, got {_brackets(shortcut.shape)}")
    return shortcut


def _convert(name: str, value: Any, dtype: tf.DType | None = None) -> tf.Tensor:
    """tf.convert_to_tensor, but that its errors name the argument."""
    try:
        if dtype is not None and isinstance(value, numbers.Real):
            value = float(value)  # TensorFlow takes no fractions
        return tf.convert_to_tensor(value, dtype)
    except (TypeError, ValueError, OverflowError, tf.errors.InvalidArgumentError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be a tensor or what converts to one, got {type(value).__name__}: {error}") from error


def _check_shape(shape: tf.TensorShape, data_format: str) -> None:
    if shape.rank is None:
        return
    if shape.rank not in reference.RANKS:
        raise ValueError(
            f"x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels), got shape {_brackets(shape)}"
        )
    if 0 in spatial_sizes(shape, data_format) and shape[0]:
        raise ValueError(
            f"x has no positions (a spatial size is 0) but a batch of {shape[0]}: the mean of an "
            f"empty map is undefined, got shape {_brackets(shape)}"
        )


def _convert_parameter(name: str, value: Any, x: tf.Tensor, axis: int) -> tf.Tensor:
    dtype = tf.float64 if x.dtype == tf.float64 else tf.float32
    if isinstance(value, (np.ndarray, np.generic)):
        value = _convert(name, value)
        # NumPy's float64 is a default more often than a wish: cast it like Python's numbers.
        if value.dtype.is_floating or value.dtype.is_integer:
            value = tf.cast(value, dtype)
    elif isinstance(value, (numbers.Real, list, tuple)):
        value = _convert(name, value, dtype)
    else:
        value = _convert(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype.name} for x of dtype {x.dtype.name}, got {value.dtype.name}")
    if value.shape.rank == 0:
        return tf.fill([tf.shape(x)[axis]], value)
    channels = None if x.shape.rank is None else x.shape[axis]
    if not value.shape.is_compatible_with([channels]):
        expected = "?" if channels is None else channels
        raise ValueError(f"{name} must have shape [C] = [{expected}], got {_brackets(value.shape)}")
    return value


def _brackets(shape: tf.TensorShape) -> str:
    """A shape as the kernel prints it: [4,0,5,3], with ? where a size is not known."""
    return f"[{','.join('?' if size is None else str(size) for size in shape)}]"
