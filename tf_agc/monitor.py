"""`tf_agc.GainMonitor` records what a model's AutomaticGainControl layers do in training.

When it records and what lives here. The file's format is `tf_agc.gain_log`'s, the pass that shows the layers' outputs
`tf_agc.forward_pass`'s.
"""

import itertools
import math
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Container
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_agc import forward_pass, gain_log, reference
from tf_agc import layer as agc_layer


class GainMonitor(keras.callbacks.Callback):
    """Records what every AutomaticGainControl layer does in training, as CSV and for TensorBoard.

    Before the first step and after every epoch, these quantities of each layer:

    - gain and mean scale, and bias where it has one;
    - output standard deviation: of the layer's output (behind its activation), over samples and positions;
    - sparsity: the fraction of the output's values that are exactly 0.

    Each has one value a channel. `gains.csv` has one row for each record and layer, with their mean, minimum and
    maximum over the channels: `epoch`, `step`, `iterations`, `layer`, `gain_mean`, `gain_min`, `gain_max`,
    `mean_scale_mean`, ..., `output_std_mean`, ..., `sparsity_mean`, ..., `bias_mean`, .... `epoch` counts from 0 as in
    Keras's logs, `step` is the number of batches trained so far; the last execution of an epoch counts as a whole one
    where it cannot be seen how long it was (with `steps_per_execution`, data of unknown length, and loss scaling or an
    optimizer that is not called once for each batch). `iterations` is the optimizer's own count. TensorBoard shows the
    means as scalars and the channels as histograms over `step`, where the package `tensorboard` is installed (`pip
    install "tf-agc[plot]"`); otherwise a warning says that only the CSV file is written.

    Outputs are those of one fixed batch, in an eager forward pass as in inference (`training=False`) that leaves the
    model's state as it was, unless it is hidden from Keras, as in a layer's own `tf.Variable`: records can be compared
    with each other, and training goes on as it would without them. All kinds of models are taken, and `jit_compile`,
    mixed precision, `steps_per_execution` and `MirroredStrategy`. Calls of a shared layer, or inside TimeDistributed,
    are counted together. Layers that the pass does not reach, or only in traced code (tf.map_fn, tf.vectorized_map),
    come last and have no output values.

    A record costs one eager forward pass of the batch; 32 samples are plenty.

    Args:
        log_dir: a local directory, made if needed; `gains.csv` and TensorBoard's event files go there.
        batch: one batch of the model's inputs (without targets), as `model(batch)` takes it; finite, with at least one
            sample.
        update_freq: `"epoch"`, or a number of steps >= 1 after which, counted within each epoch, there is a record too;
            with `steps_per_execution`, at the first execution that begins after so many.
        append: whether an existing `gains.csv` is continued. Its place is where the optimizer's count says that the
            model is: after `BackupAndRestore` (or another restored optimizer) what the log has beyond it is cut off,
            with a warning, and stays in TensorBoard's files alone. With an optimizer that has not counted yet, a new
            monitor's place is the last record with the model's gains, mean scales and biases, or step 0 where there is
            none; with one that does not count, the log goes on from its last step. Without
            `append` an existing file is an error, also for a copy of a callback (`copy.deepcopy`, Keras Tuner) whose
            first training wrote it.

    Raises:
        TypeError: batch is a data set, or nothing that becomes tensors; log_dir is no path.
        ValueError: batch is empty or not finite; another update_freq; log_dir is empty or not local. Before the first
            step: the model has no such layer, or is another one than in the monitor's first training, or the
            `gains.csv` to continue was not written by GainMonitor, or by an earlier one, or not to its end.
        FileExistsError: before the first step, where `gains.csv` exists and append is False.
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], batch: Any, update_freq: str | int = "epoch", append: bool = False
    ) -> None:
        super().__init__()
        is_steps = isinstance(update_freq, int) and not isinstance(update_freq, bool) and update_freq >= 1
        if update_freq != "epoch" and not is_steps:
            raise ValueError(f"update_freq must be 'epoch' or a number of steps >= 1, got {update_freq!r}")
        directory = gain_log.as_text("log_dir", log_dir)
        if not directory or "://" in directory:
            raise ValueError(f"log_dir must be a local directory, got {directory!r}")
        self.log_dir = pathlib.Path(directory)
        self.update_freq = update_freq
        self.append = append
        self._batch = forward_pass.convert_batch(batch)
        self._recorded_model: keras.Model | None = None
        self._finds_place = True
        self._epoch = 0
        self._epoch_start = 0  # steps before this epoch
        self._epoch_batches = 0  # of this epoch, up to the execution that ended last, if that was a whole one
        self._epoch_updates = 0  # the optimizer's count before this epoch
        self._step = 0  # steps before the execution that began last
        self._recorded_step: int | None = None
        self._recorded_iterations = 0
        self._tensorboard = _tensorboard_summaries()
        self._writer: tf.summary.SummaryWriter | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._finds_place = True
        first = self._recorded_model
        if first is not None and first is not self.model:
            raise ValueError(
                f"this GainMonitor records the model '{first.name}' of its first training, got another model, "
                f"'{self.model.name}': make a GainMonitor for it, with another log_dir"
            )
        path = self.log_dir / gain_log.CSV_NAME
        if first is None and gain_log.is_written(path):
            if not self.append:
                raise FileExistsError(
                    f"{path} exists: choose another log_dir, or continue it with append=True. Where a tuner trains "
                    "copies of this callback, make a GainMonitor for each trial, with a log_dir of its own"
                )
            gain_log.read(path)  # errors before the first step, not after it
        self._recorded_model = self.model

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._finds_place:  # not in on_train_begin, where other callbacks may restore the model
            self._finds_place = False
            self._find_place()
        self._epoch, self._step = epoch, self._epoch_start
        self._epoch_batches, self._epoch_updates = 0, _updates(self.model)
        if self._step != self._recorded_step:
            self._record()

    def _find_place(self) -> None:
        """Sets the step that the model is at, as a training begins, and cuts off what the log has beyond it."""
        self._epoch_start, self._recorded_step = self._step, None
        path = self.log_dir / gain_log.CSV_NAME
        if not gain_log.is_written(path):
            return
        rows, iterations = gain_log.read(path), _iterations(self.model)
        place: dict[str, Any] | None = rows[-1]
        self._epoch_start = max(self._step, rows[-1]["step"])
        evidence, certain = "as its optimizer counts", True
        if not iterations and not self._step and _counts(self.model):
            # A new optimizer for a trained model, or a new start, as after a training that ended before its first
            # backup: the weights tell.
            place = _last_with_weights(rows, layer_statistics(self.model, self._batch))
            self._epoch_start = place["step"] if place else 0
            evidence, certain = "by its gains and its optimizer's count of 0", False
        elif iterations:
            # The count begins anew with another optimizer: only the records of the last one can be compared with it.
            counts = [row["iterations"] for row in rows]
            first = max((i for i in range(1, len(rows)) if counts[i] < counts[i - 1]), default=0)
            place = next((row for row in reversed(rows[first:]) if row["iterations"] <= iterations), rows[first])
            self._epoch_start = max(0, place["step"] + iterations - place["iterations"])
        if place and (place["step"], place["iterations"]) == (self._epoch_start, iterations):
            self._recorded_step, self._recorded_iterations = self._epoch_start, iterations
        if rows[-1]["step"] > self._epoch_start:
            copy = ""
            if not certain:  # as after another compile() and some training without a monitor: nothing is lost
                names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
                whole = next(name for name in names if not name.exists())
                shutil.copy2(path, whole)
                copy = f" ({whole.name} has them all)"
            warnings.warn(
                f"{path} has records up to step {rows[-1]['step']}, and the model is at step {self._epoch_start}, "
                f"{evidence}: the records beyond it are cut off{copy}",
                stacklevel=2,
            )
        gain_log.cut(path, self._epoch_start + (self._recorded_step is not None))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        before, self._step = self._step - self._epoch_start, self._epoch_start + batch
        if isinstance(self.update_freq, int) and batch // self.update_freq > before // self.update_freq:
            self._step = self._epoch_start + self._trained(batch)
            self._record()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._epoch_batches = batch + 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # Not from what began last: where the length of the data is unknown, that is one that finds no batch any more.
        batches = min(self._epoch_batches, self.params.get("steps") or self._epoch_batches)
        self._step = self._epoch_start = self._epoch_start + self._trained(batches)
        if self._step == self._recorded_step and self._recorded_iterations != _iterations(self.model):
            # At the end of data of unknown length the count may rise once more, without a batch.
            gain_log.cut(self.log_dir / gain_log.CSV_NAME, self._step)
            self._recorded_step = None
        if self._step != self._recorded_step:
            self._record()

    def _trained(self, batches: int) -> int:
        """How many batches of this epoch were trained: `batches`, if the last execution was a whole one.

        At the end of data of unknown length it may not have been, and only the optimizer's count tells. Executions of
        one step do without that: their count may rise once more at the end of the data, without a batch.
        """
        longest = self.model.steps_per_execution
        updates = _updates(self.model) - self._epoch_updates if longest > 1 else 0
        return updates if max(0, batches - longest) < updates < batches else batches

    def on_train_end(self, logs: Any = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _record(self) -> None:
        self._recorded_step, self._recorded_iterations = self._step, _iterations(self.model)
        record = layer_statistics(self.model, self._batch)
        self._write_csv(record)
        if self._tensorboard is not None:
            self._write_summaries(record, *self._tensorboard)

    def _write_csv(self, record: dict[str, dict[str, np.ndarray]]) -> None:
        path = self.log_dir / gain_log.CSV_NAME
        self.log_dir.mkdir(parents=True, exist_ok=True)
        rows: list[list[Any]] = [] if gain_log.is_written(path) else [gain_log.COLUMNS]
        for layer, values in record.items():
            cells = [
                f"{over(values[name]):.6g}" if name in values else ""
                for name in gain_log.QUANTITIES
                for over in gain_log.OVER_CHANNELS.values()
            ]
            rows.append([self._epoch, self._step, self._recorded_iterations, layer, *cells])
        # Opened for each record, and written at once: no file is left open, or with half a record, when training fails.
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(gain_log.as_csv(rows))

    def _write_summaries(
        self, record: dict[str, dict[str, np.ndarray]], scalar_pb: Callable[..., Any], histogram_pb: Callable[..., Any]
    ) -> None:
        summaries = []
        for layer, values in record.items():
            for name, channels in values.items():
                summaries.append(scalar_pb(f"{name}/{layer}", np.mean(channels)))
                if np.isfinite(channels).all():  # others have no buckets
                    summaries.append(histogram_pb(f"{name}/{layer}/channels", channels))
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self.log_dir))
        # tf.summary.histogram takes 10 ms for each of them. Serialized messages, one behind the other, are one message.
        with self._writer.as_default():
            tf.summary.experimental.write_raw_pb(b"".join(pb.SerializeToString() for pb in summaries), self._step)
        self._writer.flush()


def layer_statistics(model: keras.Model, batch: Any) -> dict[str, dict[str, np.ndarray]]:
    """What `GainMonitor` records of a model at one moment.

    Args:
        model: a model with AutomaticGainControl layers.
        batch: as in `GainMonitor`, its leaves tensors.

    Returns:
        For each layer, by its path and in the order of execution, "gain", "mean_scale", "bias" where it has one and,
        where the pass reached the layer, "output_std" and "sparsity", each of shape [C].

    Raises:
        ValueError: the model has no such layer.
    """
    outputs = _Outputs()
    forward_pass.run(model, batch, agc_layer.output_observer, outputs.observe)
    layers = forward_pass.agc_layers(model)
    if not layers:
        raise ValueError(f"model '{model.name}' has no AutomaticGainControl layer to monitor")
    record: dict[str, dict[str, np.ndarray]] = {}
    for layer in outputs.in_order(layers):
        if layer.built:
            record[_unique(layer.path or layer.name, record)] = outputs.values(layer)
    return record


class _Outputs:
    """The outputs' statistics in one pass: for each layer, one entry a call."""

    def __init__(self) -> None:
        self._calls: dict[agc_layer.AutomaticGainControl, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]] = {}

    def observe(self, layer: agc_layer.AutomaticGainControl, outputs: tf.Tensor) -> None:
        if not tf.executing_eagerly():
            return
        channels = reference.channel_axis(layer.data_format) % outputs.shape.rank
        others = [axis for axis in range(outputs.shape.rank) if axis != channels]
        # Half types would overflow in the squares.
        wide = outputs if outputs.dtype == tf.float64 else tf.cast(outputs, tf.float32)
        mean, variance = tf.nn.moments(wide, others)
        zeros = tf.reduce_mean(tf.cast(tf.equal(outputs, 0), tf.float32), others)
        values = int(tf.size(outputs)) // outputs.shape[channels]
        self._calls.setdefault(layer, []).append((values, mean.numpy(), variance.numpy(), zeros.numpy()))

    def in_order(self, layers: list[agc_layer.AutomaticGainControl]) -> list[agc_layer.AutomaticGainControl]:
        """In the order of execution, with the layers that were not reached at the end."""
        return [*self._calls, *(layer for layer in layers if layer not in self._calls)]

    def values(self, layer: agc_layer.AutomaticGainControl) -> dict[str, np.ndarray]:
        """The quantities of a layer that are known, each of shape [C]."""
        weights = {"gain": layer.gain, "mean_scale": layer.mean_scale, "bias": layer.bias}
        known = {name: _wide(weight.numpy()) for name, weight in weights.items() if weight is not None}
        if layer in self._calls:
            sizes, means, variances, zeros = map(np.array, zip(*self._calls[layer], strict=True))
            mean = np.average(means, axis=0, weights=sizes)
            with np.errstate(invalid="ignore"):  # infinite outputs have the variance NaN
                variance = np.average(variances + (means - mean) ** 2, axis=0, weights=sizes)
            known["output_std"] = np.sqrt(variance)
            known["sparsity"] = np.average(zeros, axis=0, weights=sizes)
        return known


def _wide(values: np.ndarray) -> np.ndarray:
    """Half types, in which a sum over channels would be rounded at each step, as float32."""
    return values if values.dtype == np.float64 else values.astype(np.float32)


def _counts(model: keras.Model) -> list[int]:
    """How often the model's optimizer was called, then the optimizer that it wraps, if there is one.

    Not `iterations`, which leaves out the batches whose gradients are only accumulated.
    """
    variables = getattr(getattr(model, "optimizer", None), "variables", ())
    return [int(variable.numpy()) for variable in variables if variable.name == "iteration"]


def _updates(model: keras.Model) -> int:
    """How many batches the optimizer was called for, 0 where it does not say (with loss scaling, or without one)."""
    return next(iter(_counts(model)), 0)


def _iterations(model: keras.Model) -> int:
    """The optimizer's count, which loss scaling lets rise only where no gradient overflows; 0 where there is none."""
    return max(_counts(model), default=0)


def _tensorboard_summaries() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    try:
        # tf.summary.scalar and histogram are these functions, each behind an op of its own.
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    except ImportError as error:
        warnings.warn(
            f"GainMonitor writes {gain_log.CSV_NAME} and nothing for TensorBoard, whose package tensorboard cannot be "
            f'imported ({error}): pip install "tf-agc[plot]"',
            stacklevel=3,
        )
        return None
    return scalar_pb, histogram_pb


def _unique(name: str, taken: Container[str]) -> str:
    """The name, numbered where it is taken: layers of two nested models may have one path."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)


def _last_with_weights(rows: list[dict[str, Any]], record: dict[str, dict[str, np.ndarray]]) -> dict[str, Any] | None:
    """A row of the last moment at which the layers had the weights that they have in `record`, None if there is none.

    Layers are compared in their order, as a model that was made again may have other names for them.
    """
    now = [
        [
            over(values[name]) if name in values else math.nan
            for name in gain_log.WEIGHTS
            for over in gain_log.OVER_CHANNELS.values()
        ]
        for values in reversed(record.values())
    ]
    columns = [f"{name}_{over}" for name in gain_log.WEIGHTS for over in gain_log.OVER_CHANNELS]
    for _, group in itertools.groupby(reversed(rows), lambda row: row["step"]):
        moment = list(group)
        then = [[row[column] for column in columns] for row in moment]
        # As far as the six digits go that are written.
        if len(then) == len(now) and np.allclose(then, now, rtol=1e-5, atol=0, equal_nan=True):
            return moment[0]
    return None
