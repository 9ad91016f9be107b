"""That looking at a model, converting and exporting leave the process as it was, and other threads alone.

What is set there for the whole process: TensorFlow's switches, Keras's configuration, seeds, the environment.
"""

import os
import random
import threading
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_agc import AutomaticGainControl, GainMonitor, calibrate, convert, export_saved_model

pytestmark = pytest.mark.usefixtures("fresh_keras")

_X = np.random.default_rng(0).standard_normal((4, 6, 5, 3)).astype(np.float32)


class Hidden(keras.layers.Layer):
    """An AutomaticGainControl layer that a tf.function hides; meets another thread where it runs eagerly."""

    def __init__(self, meet=lambda: None):
        super().__init__()
        self.agc, self.meet = AutomaticGainControl("relu"), meet

    def build(self, input_shape):
        self.agc.build(input_shape)

    def compute_output_shape(self, input_shape):
        return input_shape

    @tf.function
    def call(self, x):
        if tf.executing_eagerly():
            self.meet()
        return self.agc(x)


def _model(layer=None):
    layer = layer or Hidden()
    layers = [keras.layers.Conv2D(3, 3), layer, keras.layers.Dropout(0.5), keras.layers.GlobalAveragePooling2D()]
    return keras.Sequential([keras.Input((6, 5, 3)), *layers])


def _normalized():
    layers = [keras.layers.Conv2D(3, 3), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    return keras.Sequential([keras.Input((6, 5, 3)), *layers, keras.layers.GlobalAveragePooling2D()])


def _state():
    return {
        "functions run eagerly": tf.config.functions_run_eagerly(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "filters": list(warnings.filters),
        "log level": tf.get_logger().level,
        "dtype policy": keras.config.dtype_policy().name,
        "floatx": keras.config.floatx(),
        "image data format": keras.config.image_data_format(),
        "traceback filtering": keras.config.is_traceback_filtering_enabled(),
        "NumPy's errors": np.geterr(),
        "NumPy's seed": np.random.get_state()[1].tolist(),
        "soft placement": tf.config.get_soft_device_placement(),
    }


def _calibrate(directory, model):
    assert all(row.calls == 1 for row in calibrate(model, _X))


def _monitor(directory, model):
    model.compile("sgd", "mse")
    model.fit(_X, np.zeros((4, 3)), batch_size=1, verbose=0, callbacks=[GainMonitor(directory, _X, update_freq=1)])
    rows = (directory / "gains.csv").read_text().splitlines()
    # Every one with an output, none with a bias.
    assert len(rows) == 6 and not any(row.endswith(",,,,") for row in rows)


def _convert(directory, model):
    convert(model, calibrate_with=_X)


def _export(directory, model):
    export_saved_model(model, directory / "net")


_WORK = {"calibrate": _calibrate, "GainMonitor": _monitor, "convert": _convert, "export": _export}


def _make(kind):
    return _normalized() if kind == "convert" else _model()


@pytest.mark.parametrize("kind", _WORK)
def test_the_process_stays_as_it_was(tmp_path, kind):
    model = _make(kind)
    before, of_python = _state(), random.getstate()
    _WORK[kind](tmp_path, model)
    assert _state() == before
    if kind != "convert":  # which makes layers, as building any model does: those without a seed draw one
        assert random.getstate() == of_python


def test_another_thread_runs_its_graphs_meanwhile(tmp_path):
    inside, leave = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def meet():
        inside.wait()
        leave.wait()

    model = _model(Hidden(meet))
    ran_eagerly = []

    @tf.function
    def function(x):
        ran_eagerly.append(tf.executing_eagerly())
        return x + 1

    table = []
    thread = threading.Thread(target=lambda: table.extend(calibrate(model, _X)))
    thread.start()
    inside.wait()  # the layer is running eagerly, and waits
    function(tf.constant(1.0))
    model(_X)  # the same model's, here
    flag = tf.config.functions_run_eagerly()
    leave.wait()
    thread.join()
    assert ran_eagerly == [False] and flag is False
    assert [row.calls for row in table] == [1]


def test_eight_threads_at_once(tmp_path):
    kinds = [*_WORK] * 2
    models = [_make(kind) for kind in kinds]
    begin = threading.Barrier(len(kinds) + 1, timeout=60)
    before, errors, working = _state(), [], threading.Event()

    def work(index):
        directory = tmp_path / str(index)
        directory.mkdir()
        begin.wait()
        try:
            for _ in range(2 if kinds[index] == "calibrate" else 1):
                _WORK[kinds[index]](directory, models[index])
        except BaseException as error:
            errors.append((kinds[index], error))

    ran_eagerly = []

    def watch():
        begin.wait()
        while working.is_set():
            function = tf.function(lambda x: (ran_eagerly.append(tf.executing_eagerly()), x + 1)[1])
            function(tf.constant(1.0))

    working.set()
    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=work, args=[index]) for index in range(len(kinds))]
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    working.clear()
    watcher.join()
    assert errors == [] and _state() == before
    assert ran_eagerly and not any(ran_eagerly)


def test_the_user_may_run_functions_eagerly():
    model = _model()
    tf.config.run_functions_eagerly(True)
    try:
        calibrate(model, _X)
        assert tf.config.functions_run_eagerly()
    finally:
        tf.config.run_functions_eagerly(False)


def test_vectorized_map_in_a_pass():
    # TensorFlow's own tf.functions stay graphs there.
    class Mapped(keras.layers.Layer):
        def call(self, x):
            return tf.vectorized_map(lambda sample: tf.function(tf.abs)(sample) + tf.reduce_mean(sample), x)

    model = keras.Sequential([keras.Input((6, 5, 3)), AutomaticGainControl(), Mapped()])
    assert [row.calls for row in calibrate(model, _X)] == [1]
