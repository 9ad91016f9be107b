"""The registered gradients of TfAgc>Agc and TfAgc>AgcGrad: what reverse and forward mode differentiate through.

Made of our own two ops and stock ops, all of which have gradients: any order follows. What the first
gradient computes is in the kernels, not here; loading the library is `native`'s.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf


def register(ops: Any) -> None:
    """Registers both gradients, where they are not: TensorFlow keeps the first for the life of a process.

    They outlive the package's modules, which a notebook or a test may drop and import again.

    Args:
        ops: the module of generated op wrappers, as `tf.load_op_library` returns it.
    """
    for name, gradient in (("TfAgc>Agc", _agc_gradient), ("TfAgc>AgcGrad", _agc_grad_gradient)):
        with contextlib.suppress(KeyError):
            tf.RegisterGradient(name)(functools.partial(gradient, ops))


def _agc_gradient(ops: Any, op: tf.Operation, dy: tf.Tensor, dmean: tf.Tensor) -> Sequence[tf.Tensor]:
    x, gain, mean_scale, *optional = op.inputs
    bias, shortcut = _bias_and_shortcut(op, optional)
    y, mean = op.outputs
    kept = y
    linear = tf.compat.as_str(op.get_attr("activation")) == "linear"
    if linear:
        # Only linear keeps x: a gradient that reads x forbids TensorFlow to write y over it. x is
        # for the gain's gradient alone, so where a tape knows that nobody wants that (a v1 graph
        # does not know), anything of the right shape will do, and no map is kept at all.
        kept = dy if 1 in (getattr(op, "skip_input_indices", None) or ()) else x
    dx, dgain, dmean_scale, dbias, dshortcut = ops.tf_agc_agc_grad(
        dy,
        dmean,
        kept,
        mean,
        gain,
        mean_scale,
        bias,
        [] if linear else shortcut,
        activation=op.get_attr("activation"),
        alpha=op.get_attr("alpha"),
        data_format=op.get_attr("data_format"),
    )
    if linear:
        dshortcut = [dy for _ in shortcut]
    return [dx, dgain, dmean_scale, *dbias, *dshortcut]


def _bias_and_shortcut(op: tf.Operation, optional: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Parts what stands behind an op's other inputs, or outputs, into the two lists of none or one."""
    num_bias = op.get_attr("num_bias")
    return optional[:num_bias], optional[num_bias:]


def _agc_grad_gradient(ops: Any, op: tf.Operation, *gradients: Any) -> Sequence[tf.Tensor | None]:
    """The gradients of AgcGrad's inputs, from those of its outputs (ddx, ddgain, ddmean_scale, ddbias, ddshortcut).

    With L(v) = gain * (v - mean_scale * mean_p(v)), which is its own adjoint, AgcGrad computes

        dz          = dy * slope(kept)
        dx          = L(dz) + dmean / P
        dgain       = sum_np dz * u(kept)
        dmean_scale = -gain * sum_n mean * sum_p dz
        dbias       = sum_np dz
        dshortcut   = dz

    where u(kept) is (z(kept) - bias - shortcut) / gain, or kept - mean_scale * mean for linear, whose bias nothing
    reads. In U throughout: half and bfloat16 are rounded once, at the end.
    """
    dy, _, kept, mean, gain, mean_scale, *optional = op.inputs
    bias, shortcut = _bias_and_shortcut(op, optional)
    # From a tf.gather they come as IndexedSlices.
    ddx, ddgain, ddmean_scale, *optional = map(tf.convert_to_tensor, gradients)
    ddbias, ddshortcut = _bias_and_shortcut(op, optional)
    data_format = op.get_attr("data_format")
    channels_last = tf.compat.as_str(data_format) == "N...C"
    activation = _Activation(tf.compat.as_str(op.get_attr("activation")), op.get_attr("alpha"))

    # Maps lose their spatial axes: [N, P, C] or [N, C, P], whatever the rank, known or not.
    maps_shape = tf.shape(kept, out_type=tf.int64)  # a map may have more positions than int32 counts
    spatial = tf.reduce_prod(maps_shape[1:-1] if channels_last else maps_shape[2:], keepdims=True)
    parts = [maps_shape[:1], spatial, maps_shape[-1:]] if channels_last else [maps_shape[:2], spatial]
    flat_shape = tf.concat(parts, axis=0)
    positions = 1 if channels_last else -1  # the axis

    def flat(maps: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.cast(maps, gain.dtype), flat_shape)

    def unflat(maps: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.cast(maps, kept.dtype), maps_shape)

    def along_maps(values: tf.Tensor) -> tf.Tensor:  # of [N, C], or of [1, C] for every sample
        return tf.expand_dims(values, positions)

    ddx, dy, k = flat(ddx), flat(dy), flat(kept)
    dz = activation.times_slope(dy, k)
    dz_sum = tf.reduce_sum(dz, axis=positions)

    linear = {"activation": "linear", "alpha": 0.0, "data_format": data_format}
    w, ddx_mean = ops.tf_agc_agc(ddx, gain, mean_scale, [], [], **linear)
    w -= along_maps(gain * ddmean_scale * mean)
    d_mean = -gain * ddmean_scale * dz_sum
    # sum_np ddx * dx is sum_np dz * L(ddx): its gradients by L's parameters are AgcGrad's own.
    _, d_gain, d_mean_scale, _, _ = ops.tf_agc_agc_grad(
        dz, tf.zeros_like(mean), ddx, ddx_mean, gain, mean_scale, [], [], **linear
    )
    d_gain -= ddmean_scale * tf.reduce_sum(mean * dz_sum, axis=0)
    for one in ddbias:
        w += along_maps(one[tf.newaxis])
    for one in ddshortcut:
        w += flat(one)

    d_bias: list[tf.Tensor | None] = [None for _ in bias]
    d_shortcut: list[tf.Tensor] = []
    if activation.name == "linear":
        w += along_maps(ddgain[tf.newaxis]) * (k - along_maps(mean_scale * mean))
        d_kept = along_maps(ddgain[tf.newaxis]) * dz
        d_mean -= ddgain * mean_scale * dz_sum
        d_mean_scale -= ddgain * tf.reduce_sum(mean * dz_sum, axis=0)
    else:
        # dgain is sum_np dz * (z - bias - shortcut) / gain. At gain 0 the op gives 0, and so do its gradients.
        ratio = ddgain * tf.math.reciprocal_no_nan(gain)
        of_maps = along_maps(ratio[tf.newaxis])
        gain_u = activation.z(k)
        for one in bias:
            gain_u -= activation.where_alive(along_maps(one[tf.newaxis]) + tf.zeros_like(k), k)
        for one in shortcut:
            gain_u -= activation.where_alive(flat(one), k)
        w += of_maps * gain_u
        d_kept = dy * activation.kept_gradient(of_maps, w, k)
        d_gain -= ratio * op.outputs[1]
        d_bias = [-ratio * tf.reduce_sum(dz_sum, axis=0) for _ in bias]
        d_shortcut = [unflat(-of_maps * dz) for _ in shortcut]

    d_dy = activation.times_slope(w, k)
    return [unflat(d_dy), ddx_mean, unflat(d_kept), d_mean, d_gain, d_mean_scale, *d_bias, *d_shortcut]


class _Activation:
    """What the second derivatives need of an activation, from what was kept of it, k.

    The same selects as in cc/core/activations_per_level.h, so that both fall on the same side of every kink.
    """

    def __init__(self, name: str, alpha: float) -> None:
        # The attribute is a float32, but eager execution hands out the number that was passed in.
        self._alpha = float(np.float32(alpha))
        # alpha = 0 is relu, which needs no division by alpha.
        self.name = "relu" if name in ("leaky_relu", "elu") and self._alpha == 0 else name

    def times_slope(self, values: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
        """values * act'(z): a product and no select, so that 0 * Inf shows."""
        if self.name == "linear":
            return values
        if self.name == "relu":
            return values * tf.cast(k > 0, k.dtype)
        if self.name == "relu6":
            return values * tf.cast((k > 0) & (k < 6), k.dtype)
        below = self._alpha * tf.ones_like(k) if self.name == "leaky_relu" else tf.maximum(k + self._alpha, 0)
        return values * tf.where(k > 0, tf.ones_like(k), below)

    def where_alive(self, values: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
        """The values, and 0 where the slope is 0: what is infinite there has no part in anything."""
        return tf.where(self.times_slope(tf.ones_like(k), k) != 0, values, tf.zeros_like(values))

    def z(self, k: tf.Tensor) -> tf.Tensor:
        """z where it is not lost; where it is, the slope is 0 and this is finite."""
        if self.name == "leaky_relu":
            return tf.where(k > 0, k, k / self._alpha)
        if self.name == "elu":
            # Two selects: the logarithm and its derivative stay finite where they are not taken.
            lost = k <= -self._alpha
            z = tf.math.log1p(tf.where((k > 0) | lost, tf.zeros_like(k), k / self._alpha))
            return tf.where(k > 0, k, z)
        return k

    def kept_gradient(self, ratio: tf.Tensor, w: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
        """The derivative of w * slope(k) by k, where w contains ratio * z(k)."""
        if self.name == "leaky_relu":
            return ratio * tf.ones_like(k)
        if self.name == "elu":
            return ratio + tf.where(k > 0, tf.zeros_like(k), w)
        return self.times_slope(ratio, k)
