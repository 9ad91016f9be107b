"""`tf_agc.calibrate`: sets the initial gains and biases of a model from one batch.

Only what is done with the layers' inputs lives here; the pass that shows them is `tf_agc.forward_pass`'s, and the map
means are the reference's.
"""

import dataclasses
import math
import numbers
from typing import Any

import keras
import ml_dtypes  # a dependency of TensorFlow and Keras; NumPy's finfo knows no bfloat16
import numpy as np
import tensorflow as tf

from tf_agc import forward_pass, functional, reference
from tf_agc import layer as agc_layer
from tf_agc.table import format_table


@dataclasses.dataclass
class CalibratedLayer:
    """What `calibrate` did to one AutomaticGainControl layer.

    Attributes:
        layer: the layer's path in the model.
        calls: how often the forward pass called it; 0 where it was never reached.
        std_before: the pre-activation standard deviation before, one value a channel; shape [C].
        gain: the gain now; shape [C].
        kept: indices of the channels that were constant on the batch and keep their gain and bias.
        constrained: indices of the channels whose new gain was changed by the layer's `gain_constraint`, or whose new
            bias by its `bias_constraint`.
        bias: the bias now, which centres each channel on the batch; shape [C], or [0] where the layer has none.
    """

    layer: str
    calls: int = 0
    std_before: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    gain: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    kept: list[int] = dataclasses.field(default_factory=list)
    constrained: list[int] = dataclasses.field(default_factory=list)
    bias: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def _cells(self) -> list[str]:
        if not self.calls:
            return [self.layer, "-", "-", "-", "not reached: nothing changed"]
        notes = []
        if self.bias.size:
            notes.append(f"centred, bias {self.bias.min():.3g} .. {self.bias.max():.3g}")
        if self.kept:
            notes.append(f"{len(self.kept)} constant, gain kept: {_first(self.kept)}")
        if self.constrained:
            constraints = "gain_constraint or bias_constraint" if self.bias.size else "gain_constraint"
            notes.append(f"{len(self.constrained)} changed by {constraints}: {_first(self.constrained)}")
        if self.calls > 1:
            notes.append(f"called {self.calls} times, calibrated on the first")
        return [
            self.layer,
            str(self.gain.size),
            f"{self.std_before.min():.3g} .. {self.std_before.max():.3g}",
            f"{self.gain.min():.3g} .. {self.gain.max():.3g}",
            "; ".join(notes),
        ]


def _first(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")


def _float64(variable: keras.Variable) -> np.ndarray:
    return variable.numpy().astype(np.float64)


class CalibrationTable(list[CalibratedLayer]):
    """One row for each layer, in the order of execution; `print` shows it as a table."""

    def __str__(self) -> str:
        return format_table([["layer", "channels", "std before", "gain", ""], *(row._cells() for row in self)])


def calibrate(model: keras.Model, batch: Any, target_std: float = 1.0) -> CalibrationTable:
    """Sets every AutomaticGainControl layer's gain, and bias, from one batch, in one eager forward pass.

    Each layer is calibrated when the pass reaches it, so later layers see calibrated earlier ones:
    its gain becomes, channel by channel and with the sign that it had (0 becomes positive), the one
    that gives the pre-activation output `gain * (x - mean_scale * mean(x))` a standard deviation of
    `target_std` over the samples and positions of the batch. Without it a deep plain network may
    diverge. The bias of a layer with `use_bias` becomes minus the mean of that output, so that every
    channel is centred; what a `shortcut` adds counts for neither.

    The model runs as in inference (`training=False`). Nothing but gains and biases changes: other
    non-trainable state (moving averages, states of recurrent layers, seeds) is put back, unless it
    is hidden from Keras, as in a layer's own `tf.Variable`. A layer that the pass calls several
    times (shared, or inside TimeDistributed) is calibrated on its first call. Channels that are
    constant on the batch (dead, or maps of one value) keep their gain and bias. A layer's
    `gain_constraint` and `bias_constraint` have the last word, as in training. On an error nothing
    changes.

    Args:
        model: a built model, compiled or not, of any kind. Its layers may be nested anywhere.
        batch: one batch of the model's inputs (without targets), as `model(batch)` takes it; any
            floating or integer dtypes, with at least one sample. More samples and positions give
            better estimates.
        target_std: the standard deviation to reach; positive.

    Returns:
        A list with one row for each layer, in order of execution; layers that were not reached come
        last. Printing it shows a table.

    Raises:
        TypeError: model is not a Keras model, or batch is a data set or nothing that becomes tensors.
        ValueError: the model is not built or has no such layer; the batch is empty or not finite;
            a layer's input is not finite (the message names the layer); target_std is not positive.
        RuntimeError: a layer is only called in traced code (the message names it).
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}")
    if not (isinstance(target_std, numbers.Real) and math.isfinite(target_std) and target_std > 0):
        raise ValueError(f"target_std must be a number, finite and > 0, got {target_std!r}")
    if not model.built:
        raise ValueError(
            f"model '{model.name}' is not built: call it on a batch, or call its build() with an "
            "input shape, before calibrating it"
        )
    layers = forward_pass.agc_layers(model)
    if not layers:
        raise ValueError(f"model '{model.name}' has no AutomaticGainControl layer to calibrate")
    batch = forward_pass.convert_batch(batch)

    calibration = _Calibration(target_std)
    try:
        forward_pass.run(model, batch, agc_layer.observer, calibration.observe)
        calibration.check_all_eager()
    except BaseException:
        calibration.undo()
        raise
    return calibration.table(layers)


class _Calibration:
    """The rows of one pass; calibrates each layer on its first call."""

    def __init__(self, target_std: float) -> None:
        self._target_std = target_std
        self._rows: dict[int, CalibratedLayer] = {}
        self._changed: list[tuple[keras.Variable, np.ndarray]] = []
        self._traced: dict[int, agc_layer.AutomaticGainControl] = {}

    def observe(self, layer: agc_layer.AutomaticGainControl, x: tf.Tensor) -> None:
        if not tf.executing_eagerly():
            self._traced[id(layer)] = layer
            return
        if id(layer) not in self._rows:
            self._rows[id(layer)] = self._calibrate(layer, tf.convert_to_tensor(x))
        self._rows[id(layer)].calls += 1

    def _calibrate(self, layer: agc_layer.AutomaticGainControl, x: tf.Tensor) -> CalibratedLayer:
        name = layer.path or layer.name
        if not bool(tf.reduce_all(tf.math.is_finite(x))):
            raise ValueError(f"the input of layer '{name}' is not finite on this batch")
        x64 = tf.cast(x, tf.float64)
        ones = tf.ones(layer.gain.shape, tf.float64)
        mean_scale = tf.cast(tf.convert_to_tensor(layer.mean_scale), tf.float64)
        u, _ = reference.agc(x64, ones, mean_scale, "linear", 0.0, layer.data_format)

        channels = functional.channel_axis(layer.data_format) % x.shape.rank
        others = [axis for axis in range(x.shape.rank) if axis != channels]
        mean_u, variance_u = (moment.numpy() for moment in tf.nn.moments(u, others))
        std_u = np.sqrt(variance_u)
        largest = tf.reduce_max(tf.abs(x64), axis=others).numpy()

        # What differs from a constant by rounding alone is a constant: a gain of 1 / rounding noise
        # would blow it up. Sums before this layer round a few times more than float32's epsilon.
        epsilon = max(float(ml_dtypes.finfo(x.dtype.as_numpy_dtype).eps), 1e-6)
        constant = std_u <= epsilon * largest

        before = _float64(layer.gain)
        sign = np.where(before < 0, -1.0, 1.0)
        gain = np.where(constant, before, sign * self._target_std / np.where(constant, 1, std_u))
        changed = self._assign(layer.gain, gain, layer.gain_constraint)
        bias = np.zeros(0)
        if layer.bias is not None:
            # A mean that float32 would round away is rounding noise, as where all of the map's mean was subtracted.
            mean_u = np.where(np.abs(mean_u) <= np.finfo(np.float32).eps * std_u, 0, mean_u)
            centring = np.where(constant, _float64(layer.bias), 0 - _float64(layer.gain) * mean_u)  # no -0
            changed |= self._assign(layer.bias, centring, layer.bias_constraint)
            bias = _float64(layer.bias)
        return CalibratedLayer(
            layer=name,
            std_before=np.abs(before) * std_u,
            gain=_float64(layer.gain),
            kept=np.flatnonzero(constant).tolist(),
            constrained=np.flatnonzero(changed).tolist(),
            bias=bias,
        )

    def _assign(self, variable: keras.Variable, value: np.ndarray, constraint: Any) -> np.ndarray:
        """Returns for each channel whether the constraint changed the value."""
        self._changed.append((variable, variable.numpy()))
        variable.assign(value)
        unconstrained = variable.numpy()
        if constraint is not None:
            variable.assign(constraint(variable))
        return variable.numpy() != unconstrained

    def check_all_eager(self) -> None:
        for key, layer in self._traced.items():
            if key not in self._rows:
                raise RuntimeError(
                    f"layer '{layer.path or layer.name}' is only called in traced code "
                    "(tf.map_fn, tf.vectorized_map, a data pipeline), where it cannot be calibrated"
                )

    def undo(self) -> None:
        for variable, before in self._changed:
            variable.assign(before)

    def table(self, layers: list[agc_layer.AutomaticGainControl]) -> CalibrationTable:
        missed = [CalibratedLayer(layer.path or layer.name) for layer in layers if id(layer) not in self._rows]
        return CalibrationTable([*self._rows.values(), *missed])
