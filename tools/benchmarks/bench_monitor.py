"""`bench.py monitor`: what GainMonitor costs in a real `fit`, per record and as a share of an epoch.

What is measured and how; options and the table are bench.py's. The networks are bench_model.py's.
"""

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time

import keras
import numpy as np

import tf_agc
from benchmarks import bench_model

_EPOCHS = 5
_QUICK_EPOCHS = 3
_STEPS = 10
_MONITORED = 32  # samples in GainMonitor's batch


@dataclasses.dataclass(frozen=True)
class Row:
    """One network; milliseconds are medians, spreads half the distance between the quartiles.

    Attributes:
        layers: AutomaticGainControl layers.
        step_ms: a training step in epochs without GainMonitor.
        monitored_step_ms: a training step in the epochs with it that were trained in turns, its records left out.
        record_ms: one record.
        record_cpu_in_steps: CPU time of one record over that of one step; other work on the machine disturbs it least.
    """

    network: str
    batch: int
    layers: int
    step_ms: float
    step_spread_ms: float
    monitored_step_ms: float
    record_ms: float
    record_spread_ms: float
    record_cpu_in_steps: float

    def share(self, steps: int) -> float:
        """A record's share of the CPU time of an epoch of so many steps."""
        return self.record_cpu_in_steps / (steps + self.record_cpu_in_steps)

    def steps_for(self, share: float) -> int:
        """The steps of the shortest epoch in which a record's share is at most `share`."""
        return math.ceil(self.record_cpu_in_steps * (1 / share - 1))


class _Timer(keras.callbacks.Callback):
    """(wall clock, CPU time) at both ends of an epoch, as a callback in its place in the list sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = self.end = (0.0, 0.0)

    def on_epoch_begin(self, epoch, logs=None):
        self.begin = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        self.end = time.perf_counter(), time.process_time()


def measure(name: str, quick: bool) -> Row:
    """Trains epochs with and without the callback, in turns."""
    network = bench_model.NETWORKS[name]
    images, labels = network.data()
    model = bench_model.compiled(network, "agc")
    data = np.concatenate([images] * _STEPS), np.concatenate([labels] * _STEPS)
    with tempfile.TemporaryDirectory() as directory:
        monitor = tf_agc.GainMonitor(pathlib.Path(directory), images[:_MONITORED])
        steps: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        records: list[tuple[float, float]] = []
        for epoch in range(2 * (_QUICK_EPOCHS if quick else _EPOCHS) + 2):
            monitored = epoch % 2 == 1
            before, after = _Timer(), _Timer()
            callbacks = [before, monitor, after] if monitored else [before, after]
            epochs = {"initial_epoch": epoch, "epochs": epoch + 1}
            model.fit(*data, batch_size=network.batch, **epochs, verbose=0, callbacks=callbacks)
            if epoch > 1:  # the first epochs trace and allocate
                steps[monitored].append(_difference(before.end, after.begin))
                if monitored:
                    records.append(_difference(after.end, before.end))
    layers = sum(isinstance(layer, tf_agc.AutomaticGainControl) for layer in model.layers)
    step, step_spread = _middle([wall / _STEPS for wall, _ in steps[False]])
    record, record_spread = _middle([wall for wall, _ in records])
    cpu = statistics.median(cpu for _, cpu in records) / statistics.median(cpu / _STEPS for _, cpu in steps[False])
    with_monitor, _ = _middle([wall / _STEPS for wall, _ in steps[True]])
    return Row(name, network.batch, layers, step, step_spread, with_monitor, record, record_spread, cpu)


def _difference(late: tuple[float, float], early: tuple[float, float]) -> tuple[float, float]:
    return late[0] - early[0], late[1] - early[1]


def _middle(seconds: list[float]) -> tuple[float, float]:
    lower, middle, upper = statistics.quantiles(seconds, n=4)
    return 1e3 * middle, 1e3 * (upper - lower) / 2
