"""`tf_agc.calibrate`: sets the initial gains and biases of a model from one batch.

Only what is done with the layers' inputs lives here. The pass that shows them is `tf_agc.forward_pass`'s; where
residual branches end is `tf_agc.branches`'s; the map means are the reference's.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import ml_dtypes  # a dependency of TensorFlow and Keras; NumPy's finfo knows no bfloat16
import numpy as np
import rich.console  # Keras's own dependency
import rich.progress
import tensorflow as tf

from tf_agc import branches, forward_pass, reference
from tf_agc import layer as agc_layer
from tf_agc.table import format_table

# The deviation of a residual branch, as a share of that of what it is added to: docs/evidence.md.
BRANCH_FACTOR = 0.5
# It was measured in networks of so many residual branches. What all of them together can make of a signal grows with
# the power of their number, so that each one gets less where there are more.
_BRANCHES = 7

# Elements of a map that are worked on at once: the pass should take little more memory than the maps themselves.
_ELEMENTS_AT_ONCE = 2**17


@dataclasses.dataclass
class CalibratedLayer:
    """What `calibrate` did to one AutomaticGainControl layer, or to a convolution that ends a residual branch.

    Attributes:
        layer: the layer's path in the model.
        calls: how often the forward pass called it; 0 where it was never reached.
        std_before: the pre-activation standard deviation before, one value a channel; shape [C].
        gain: the gain now; shape [C].
        kept: indices of the channels that were constant on the batch and keep their gain and bias.
        constrained: indices of the channels whose new gain was changed by the layer's `gain_constraint`, or whose new
            bias by its `bias_constraint`.
        constraints: which of the two did so to any channel.
        bias: the bias now, which centres each channel on the batch; shape [C], or [0] where the layer has none.
        shortcut: where the layer ends a residual branch, what gave it its deviation: "its shortcut", or that of an Add
            layer or operation; empty elsewhere.
    """

    layer: str
    calls: int = 0
    std_before: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    gain: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    kept: list[int] = dataclasses.field(default_factory=list)
    constrained: list[int] = dataclasses.field(default_factory=list)
    constraints: list[str] = dataclasses.field(default_factory=list)
    bias: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    shortcut: str = ""

    def _cells(self) -> list[str]:
        if not self.calls:
            return [self.layer, "-", "-", "-", "not reached: nothing changed"]
        notes = []
        if self.bias.size:
            notes.append(f"centred, bias {self.bias.min():.3g} .. {self.bias.max():.3g}")
        if self.shortcut:
            notes.append(f"ends a branch, measured by {self.shortcut}")
        if self.kept:
            notes.append(f"{len(self.kept)} constant, gain kept: {_first(self.kept)}")
        if self.constrained:
            constraints = " or ".join(self.constraints)
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


def calibrate(
    model: keras.Model,
    batch: Any,
    target_std: float | Mapping[str, float] = 1.0,
    branch_factor: float | None = None,
) -> CalibrationTable:
    """Sets every AutomaticGainControl layer's gain, and bias, from one batch, in one eager forward pass.

    Each layer is calibrated when the pass reaches it, so later layers see calibrated earlier ones:
    its gain becomes, channel by channel and with the sign that it had (0 becomes positive), the one
    that gives the pre-activation output `gain * (x - mean_scale * mean(x))` a standard deviation of
    `target_std` over the samples and positions of the batch. Without it a deep plain network may
    diverge. The bias of a layer with `use_bias` becomes minus the mean of that output, so that every
    channel is centred; what a `shortcut` adds counts for neither.

    The end of a residual branch gets half (`branch_factor`) of the deviation of what it is added to (both
    averaged over the channels), and less in deep networks, as a block should start as a small change of its
    input. It is a layer that is called with a `shortcut`; in functional models also a linear
    AutomaticGainControl, or a standardized convolution with `use_gain`, that an Add layer or operation reads,
    be it through dropout.

    The model runs as in inference (`training=False`). Nothing but gains and biases changes: other
    non-trainable state (moving averages, states of recurrent layers, seeds) is put back, unless it
    is hidden from Keras, as in a layer's own `tf.Variable`. A layer that the pass calls several
    times (shared, or inside TimeDistributed) is calibrated on its first call. Channels whose output is
    constant on the batch (dead ones; at a mean scale of 1 also maps of one value each) keep their gain
    and bias. A layer's `gain_constraint` and `bias_constraint` have the last word, as in training. On
    an error nothing changes. On a terminal a progress bar shows which layer the pass is at.

    Args:
        model: a built model, compiled or not, of any kind. Its layers may be nested anywhere.
        batch: one batch of the model's inputs (without targets), as `model(batch)` takes it; any
            floating or integer dtypes, with at least one sample. More samples and positions give
            better estimates.
        target_std: the standard deviation to reach, positive: a number for all layers but the ends of
            residual branches, or a dict from the paths of some layers (as in the table that is
            returned), ends among them, to numbers, which leaves 1 for the others.
        branch_factor: the share of its shortcut's deviation that the end of a residual branch gets, positive; None:
            0.5, and in functional models of more than 7 branches that start at what they are added to, 3.5 over their
            number.

    Returns:
        A list with one row for each layer, in order of execution; layers that were not reached come
        last. Printing it shows a table.

    Raises:
        TypeError: model is not a Keras model, or batch is a data set or nothing that becomes tensors.
        ValueError: the model is not built or has no such layer; the batch is empty or not finite;
            a layer's input is not finite (the message names the layer); target_std or branch_factor is not
            positive, or target_std names a layer that is none of the model's.
        RuntimeError: a layer is only called in traced code (the message names it).
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}")
    for std in target_std.values() if isinstance(target_std, Mapping) else [target_std]:
        _check_positive("target_std", std)
    if branch_factor is not None:
        _check_positive("branch_factor", branch_factor)
    if not model.built:
        raise ValueError(
            f"model '{model.name}' is not built: call it on a batch, or call its build() with an "
            "input shape, before calibrating it"
        )
    layers = forward_pass.agc_layers(model)
    if not layers:
        raise ValueError(f"model '{model.name}' has no AutomaticGainControl layer to calibrate")
    named, target_std = (dict(target_std), 1.0) if isinstance(target_std, Mapping) else ({}, float(target_std))
    if unknown := sorted(named.keys() - {layer.path or layer.name for layer in layers}):
        raise ValueError(
            f"target_std must name AutomaticGainControl layers of model '{model.name}' by their paths, got {unknown}"
        )
    batch = forward_pass.convert_batch(batch)
    if branch_factor is None:
        branch_factor = BRANCH_FACTOR * min(1, _BRANCHES / max(1, branches.count(model)))

    console = rich.console.Console(stderr=True)
    bar = rich.progress.Progress(console=console, transient=True, disable=not console.is_terminal)
    calibration = _Calibration(target_std, named, branch_factor, bar, len(layers))
    ends = [branch for branch in branches.find(model) if (branch.end.path or branch.end.name) not in named]
    try:
        with bar, branches.observed(ends, calibration.observe_branch):
            forward_pass.run(model, batch, agc_layer.observer, calibration.observe)
        calibration.check_all_eager()
    except BaseException:
        calibration.undo()
        raise
    return calibration.table(layers)


def _check_positive(name: str, value: Any) -> None:
    if not (isinstance(value, numbers.Real) and math.isfinite(value) and float(value) > 0):
        raise ValueError(f"{name} must be a number, finite and > 0, got {value!r}")


class _Calibration:
    """The rows of one pass; calibrates each layer on its first call."""

    def __init__(
        self, target_std: float, named: dict[str, float], branch_factor: float, bar: rich.progress.Progress, layers: int
    ) -> None:
        self._target_std = target_std
        self._named = named
        self._branch_factor = branch_factor
        self._bar = bar
        self._task = bar.add_task("", total=layers)
        self._rows: dict[int, CalibratedLayer] = {}
        self._changed: list[tuple[keras.Variable, np.ndarray]] = []
        self._traced: dict[int, agc_layer.AutomaticGainControl] = {}

    def observe(self, layer: agc_layer.AutomaticGainControl, x: tf.Tensor, shortcut: tf.Tensor | None) -> None:
        if not tf.executing_eagerly():
            self._traced[id(layer)] = layer
            return
        if id(layer) not in self._rows:
            self._bar.update(self._task, description=layer.path or layer.name, advance=1)
            self._rows[id(layer)] = self._calibrate(layer, tf.convert_to_tensor(x), shortcut)
        self._rows[id(layer)].calls += 1

    def observe_branch(self, branch: branches.Branch, output: tf.Tensor, shortcut: tf.Tensor) -> tf.Tensor:
        """Gives the end of a branch half of the deviation of its shortcut; returns its output then."""
        if not tf.executing_eagerly():
            return output
        layer = branch.end
        axis = reference.channel_axis(layer.data_format)
        std, std_shortcut = _deviation(output, axis), _deviation(shortcut, axis)
        if not (std > 0 and std_shortcut > 0):
            return output
        factor = self._branch_factor * std_shortcut / std
        name, before = layer.path or layer.name, _float64(layer.gain)
        for variable in (layer.gain, layer.bias):
            if variable is not None:
                self._assign(variable, _float64(variable) * factor, None)
        row = self._rows.setdefault(id(layer), CalibratedLayer(name, calls=1, std_before=np.full(before.size, std)))
        row.gain, row.shortcut = _float64(layer.gain).reshape(-1), f"that of {branch.add.name}"
        if row.bias.size:
            row.bias = _float64(layer.bias)
        return output * tf.cast(factor, output.dtype)

    def _target(self, name: str, row: CalibratedLayer, shortcut: tf.Tensor | None, axis: int) -> float:
        if name in self._named or shortcut is None:
            return self._named.get(name, self._target_std)
        std = _deviation(shortcut, axis)
        if not std > 0:
            return self._target_std
        row.shortcut = "its shortcut"
        return self._branch_factor * std

    def _calibrate(
        self, layer: agc_layer.AutomaticGainControl, x: tf.Tensor, shortcut: tf.Tensor | None
    ) -> CalibratedLayer:
        name = layer.path or layer.name
        if not all(bool(tf.reduce_all(tf.math.is_finite(part))) for part in _parts(x)):
            raise ValueError(f"the input of layer '{name}' is not finite on this batch")
        ones = tf.ones(layer.gain.shape, tf.float64)
        mean_scale = tf.cast(tf.convert_to_tensor(layer.mean_scale), tf.float64)
        axis = reference.channel_axis(layer.data_format) % x.shape.rank

        def difference(part: tf.Tensor) -> tf.Tensor:
            return reference.agc(part, ones, mean_scale, "linear", 0.0, layer.data_format)[0]

        mean_u, variance_u = _moments(x, axis, difference)
        std_u = np.sqrt(variance_u)
        others = [other for other in range(x.shape.rank) if other != axis]
        maxima = [tf.cast(tf.reduce_max(tf.abs(part), axis=others), tf.float64).numpy() for part in _parts(x)]
        largest = np.max(maxima, axis=0)

        # What differs from a constant by rounding alone is a constant: a gain of 1 / rounding noise
        # would blow it up. Sums before this layer round a few times more than float32's epsilon.
        epsilon = max(float(ml_dtypes.finfo(x.dtype.as_numpy_dtype).eps), 1e-6)
        constant = std_u <= epsilon * largest

        row = CalibratedLayer(name)
        target = self._target(name, row, shortcut, axis)
        before = _float64(layer.gain)
        sign = np.where(before < 0, -1.0, 1.0)
        gain = np.where(constant, before, sign * target / np.where(constant, 1, std_u))
        changed = {"gain_constraint": self._assign(layer.gain, gain, layer.gain_constraint)}
        if layer.bias is not None:
            # A mean that float32 would round away is rounding noise, as where all of the map's mean was subtracted.
            mean_u = np.where(np.abs(mean_u) <= np.finfo(np.float32).eps * std_u, 0, mean_u)
            centring = np.where(constant, _float64(layer.bias), 0 - _float64(layer.gain) * mean_u)  # no -0
            changed["bias_constraint"] = self._assign(layer.bias, centring, layer.bias_constraint)
            row.bias = _float64(layer.bias)
        row.std_before, row.gain = np.abs(before) * std_u, _float64(layer.gain)
        row.kept = np.flatnonzero(constant).tolist()
        row.constrained = np.flatnonzero(np.any(list(changed.values()), axis=0)).tolist()
        row.constraints = [name for name, channels in changed.items() if channels.any()]
        return row

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


def _parts(x: tf.Tensor) -> Iterator[tf.Tensor]:
    """A few samples at a time."""
    samples = max(1, _ELEMENTS_AT_ONCE // max(1, int(tf.size(x[0]))))
    for first in range(0, len(x), samples):
        yield x[first : first + samples]


def _moments(
    x: tf.Tensor, axis: int, transformed: Callable[[tf.Tensor], tf.Tensor] = tf.identity
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel of what becomes of x, in float64; shape [C]."""
    others = [other for other in range(x.shape.rank) if other != axis % x.shape.rank]
    weights, means, variances = [], [], []
    for part in _parts(x):
        mean, variance = tf.nn.moments(transformed(tf.cast(part, tf.float64)), others)
        weights.append(len(part))
        means.append(mean.numpy())
        variances.append(variance.numpy())
    mean = np.average(means, axis=0, weights=weights)
    return mean, np.average(variances + (means - mean) ** 2, axis=0, weights=weights)


def _deviation(x: tf.Tensor, axis: int) -> float:
    """One number for a map: the root of its channels' mean variance."""
    _, variance = _moments(tf.convert_to_tensor(x), axis)
    return math.sqrt(np.mean(variance))
