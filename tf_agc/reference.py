"""The definition of automatic gain control, in stock TensorFlow ops.

It is the fallback, the portable export and what every kernel is tested against. Inference ops only
(no py_function, no custom gradient), so that any model server can run it; no choice between
implementations and no argument checks of the public API live here.
"""

from typing import Any

import numpy as np
import tensorflow as tf

RANKS = range(3, 9)  # batch, 1 to 6 spatial axes, channels


def channel_axis(data_format: str) -> int:
    """The axis of the channels, counted from the end for channels_last."""
    return -1 if data_format == "channels_last" else 1


def agc(
    x: tf.Tensor,
    gain: tf.Tensor | None,
    mean_scale: tf.Tensor,
    activation: str,
    alpha: float,
    data_format: str,
    *,
    bias: tf.Tensor | None = None,
    shortcut: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes y = act(gain * (x - mean_scale * mean(x)) + bias + shortcut), the mean taken per sample and channel.

    Source: B. Ruff, "Deep Control", arXiv 1706.03907; bias and shortcut are ours. Differentiable to any order by
    TensorFlow.

    Args:
        x: half, bfloat16, float32 or float64; shape [N, ..., C] or [N, C, ...], rank 3 to 8, known
            or not before it runs.
        gain: U; shape [C]. U is float64 where x is, else float32. None, where x has it already, multiplies nothing.
        mean_scale: U; shape [C].
        activation: "linear", "relu", "relu6", "leaky_relu" or "elu".
        alpha: slope of leaky_relu or scale of elu for z < 0; finite, >= 0; others ignore it.
        data_format: "channels_last" or "channels_first".
        bias: U; shape [C]; None adds nothing.
        shortcut: dtype and shape of x; None adds nothing.

    Returns:
        y: the dtype and shape of x.
        mean: U; shape [N, C].

    Raises:
        tf.errors.InvalidArgumentError: what was not known before it runs does not fit: the rank of x, a spatial size of
            0 where there are samples, a parameter that is not [C], a shortcut of another shape. XLA has no such checks.
    """
    x = _require_rank(x)
    x = _require_positions(x, data_format)
    if gain is not None:
        gain = _require_length("gain", gain, x, data_format)
    mean_scale = _require_length("mean_scale", mean_scale, x, data_format)
    if bias is not None:
        bias = _require_length("bias", bias, x, data_format)
    if shortcut is not None:
        shortcut = _require_shape("shortcut", shortcut, x)
    dtype = x.dtype
    compute_dtype = tf.float64 if dtype == tf.float64 else tf.float32
    x = tf.cast(x, compute_dtype)

    axis = channel_axis(data_format)
    mean = tf.reduce_mean(x, axis=_spatial_axes(x, axis), keepdims=True)
    z = x - _along_maps(mean_scale, x, axis) * mean
    if gain is not None:
        z = _along_maps(gain, x, axis) * z
    if bias is not None:
        z += _along_maps(bias, x, axis)
    if shortcut is not None:
        z += tf.cast(shortcut, compute_dtype)
    y = tf.cast(_activate(z, activation, alpha), dtype)
    y.set_shape(x.shape)  # broadcasting a size of 0 loses what is known
    return y, _without_positions(mean, axis)


def _along_maps(parameter: tf.Tensor, x: tf.Tensor, axis: int) -> tf.Tensor:
    """A parameter of shape [C] as it is broadcast over x, whose channels are on this axis."""
    if x.shape.rank is not None and x.shape[axis] is not None and parameter.shape == [x.shape[axis]]:
        # As few ops as there can be, for exports.
        return parameter if axis == -1 else tf.reshape(parameter, [-1, *[1] * (x.shape.rank - 2)])
    # To a shape that is known when it runs, so that a parameter of another length is an error, for XLA too.
    channels = tf.shape(x)[axis]
    ones = tf.ones([tf.rank(x) - 2], tf.int32)
    return tf.reshape(parameter, tf.concat([ones, [channels]] if axis == -1 else [[channels], ones], axis=0))


def _activate(z: tf.Tensor, activation: str, alpha: float) -> tf.Tensor:
    # The op's attribute is a float32: the same value here, or float64 results differ by 1e-9.
    alpha = float(np.float32(alpha))
    if activation in ("leaky_relu", "elu") and alpha == 0:
        activation = "relu"  # 0 * -inf would be NaN
    if activation == "linear":
        return z
    if activation == "relu":
        return tf.nn.relu(z)
    if activation == "relu6":
        return tf.nn.relu6(z)
    if activation == "leaky_relu":
        return tf.nn.leaky_relu(z, alpha=alpha)
    if activation == "elu":
        return tf.nn.elu(z) if alpha == 1 else tf.where(z > 0, z, alpha * tf.nn.elu(z))
    raise ValueError(f"unknown activation {activation!r}")


def _spatial_axes(x: tf.Tensor, axis: int) -> list[int] | tf.Tensor:
    rank = x.shape.rank if x.shape.rank is not None else tf.rank(x)
    first, last = (1, rank - 1) if axis == -1 else (2, rank)
    return list(range(first, last)) if isinstance(rank, int) else tf.range(first, last)


def _without_positions(mean: tf.Tensor, axis: int) -> tf.Tensor:
    """Of shape [N, C], from [N, 1, ..., C] or [N, C, 1, ...]."""
    if mean.shape.rank is not None:
        return tf.squeeze(mean, _spatial_axes(mean, axis))
    shape = tf.shape(mean)
    return tf.reshape(mean, tf.stack([shape[0], shape[axis]]))


def _require(condition: tf.Tensor, message: list[Any], tensor: tf.Tensor) -> tf.Tensor:
    """Returns the tensor, after an op that fails unless the condition holds."""
    check = tf.debugging.Assert(condition, message, summarize=16)  # of a whole shape
    if check is None:  # eager: it has run
        return tensor
    with tf.control_dependencies([check]):
        return tf.identity(tensor)


def _require_rank(x: tf.Tensor) -> tf.Tensor:
    if x.shape.rank is not None:
        return x  # checked by who calls
    rank = tf.rank(x)
    message = ["x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels), got shape", tf.shape(x)]
    return _require(tf.logical_and(rank >= RANKS[0], rank <= RANKS[-1]), message, x)


def _require_length(name: str, parameter: tf.Tensor, x: tf.Tensor, data_format: str) -> tf.Tensor:
    axis = channel_axis(data_format)
    channels = None if x.shape.rank is None else x.shape[axis]
    if channels is not None and parameter.shape.rank == 1 and parameter.shape[0] == channels:
        return parameter  # known: nothing to check when it runs
    shape, expected = tf.shape(parameter), tf.shape(x)[axis]
    fits = tf.logical_and(tf.equal(tf.rank(parameter), 1), tf.reduce_all(tf.equal(shape, expected)))
    return _require(fits, [f"{name} must have shape [C] =", [expected], "got", shape], parameter)


def _require_shape(name: str, maps: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """`maps` have the shape of x: broadcasting them would be a silent wrong answer."""
    if x.shape.is_fully_defined() and maps.shape == x.shape:
        return maps  # known: nothing to check when it runs
    message = [f"{name} must have the shape of x", tf.shape(x), "got", tf.shape(maps)]
    # First of all the rank: sizes of another number do not compare. Of both, as either may be a constant.
    same_rank = tf.equal(tf.rank(maps), tf.rank(x))
    maps, x = _require(same_rank, message, maps), _require(same_rank, message, x)
    return _require(tf.reduce_all(tf.equal(tf.shape(maps), tf.shape(x))), message, maps)


def _require_positions(x: tf.Tensor, data_format: str) -> tf.Tensor:
    spatial = slice(1, -1) if data_format == "channels_last" else slice(2, None)
    if x.shape.rank is not None and all(size for size in x.shape[spatial]):
        return x  # known and not 0: nothing to check when it runs
    shape = tf.shape(x)
    has_positions = tf.logical_or(tf.reduce_all(shape[spatial] > 0), shape[0] == 0)
    message = [
        "x has no positions (a spatial size is 0) but a batch of",
        shape[0],
        "the mean of an empty map is undefined, got shape",
        shape,
    ]
    return _require(has_positions, message, x)
