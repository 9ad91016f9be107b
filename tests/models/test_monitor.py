"""`GainMonitor`: what it records, in every kind of training, and what it leaves alone; the picture of `plot_gains`."""

import copy
import csv
import os
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure

from tf_agc import AutomaticGainControl, GainMonitor, plot_gains
from tf_agc import layer as agc_layer

pytestmark = pytest.mark.usefixtures("fresh_keras")

_X = np.random.default_rng(0).standard_normal((8, 6, 7, 3)).astype(np.float32)
PNG = b"\x89PNG\r\n\x1a\n"


def _conv(channels=5, **arguments):
    return keras.layers.Conv2D(channels, 3, padding="same", **arguments)


def _sequential(**arguments):
    layers = [keras.Input((6, 7, 3))]
    for activation in ("relu", "tanh", None):
        layers += [_conv(), AutomaticGainControl(activation, name=f"agc_{activation}", **arguments)]
    return keras.Sequential([*layers, keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(2)])


def _fit(model, callbacks, epochs=1, x=_X, compiled=False, target=None, **arguments):
    if not compiled:
        model.compile(keras.optimizers.SGD(0.1), "mse")
    y = np.zeros((len(x), *model.compute_output_shape((None, *x.shape[1:]))[1:])) if target is None else target
    return model.fit(x, y, epochs=epochs, batch_size=2, shuffle=False, verbose=0, callbacks=callbacks, **arguments)


def _rows(log_dir):
    with (log_dir / "gains.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _check(row, layer, outputs):
    """A row against the weights of a layer now, and against outputs of shape [..., C]."""
    flat = np.asarray(outputs, np.float64).reshape(-1, np.shape(outputs)[-1])
    expected = {
        "gain": layer.gain.numpy(),
        "mean_scale": layer.mean_scale.numpy(),
        "output_std": flat.std(axis=0),
        "sparsity": (flat == 0).mean(axis=0),
    }
    if layer.bias is None:
        assert row["bias_mean"] == row["bias_min"] == row["bias_max"] == ""
    else:
        expected["bias"] = layer.bias.numpy()
    for name, channels in expected.items():
        for over in ("mean", "min", "max"):
            assert float(row[f"{name}_{over}"]) == pytest.approx(getattr(np, over)(channels), rel=1e-4, abs=1e-6)


def test_values(tmp_path):
    model = _sequential()
    model.get_layer("agc_relu").gain.assign([-1, 1, 2, 3, 4])
    _fit(model, GainMonitor(tmp_path, _X[:3]), epochs=2)
    rows = _rows(tmp_path)
    assert [(row["epoch"], row["step"]) for row in rows[::3]] == [("0", "0"), ("0", "4"), ("1", "8")]
    assert [row["layer"].split("/")[-1] for row in rows] == 3 * ["agc_relu", "agc_tanh", "agc_None"]
    assert (rows[0]["gain_mean"], rows[0]["gain_min"], rows[0]["gain_max"]) == ("1.8", "-1", "4")
    for row, name in zip(rows[-3:], ("agc_relu", "agc_tanh", "agc_None"), strict=True):
        layer = model.get_layer(name)
        _check(row, layer, keras.Model(model.inputs, layer.output).predict(_X[:3], verbose=0))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16", "float64"])
def test_bias_shortcut_and_weights_of_every_dtype(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((6, 7, 3))
        x = AutomaticGainControl("relu", use_bias=False, name="first")(_conv()(inputs))
        random = keras.initializers.RandomNormal(1.0, 0.1)
        last = AutomaticGainControl("relu", use_bias=True, bias_initializer=random, gain_initializer=random)
        model = keras.Model(inputs, last(_conv()(x), x))
        _fit(model, GainMonitor(tmp_path, _X))
    finally:
        keras.config.set_dtype_policy("float32")
    rows = _rows(tmp_path)
    outputs = model(_X)
    assert {row["layer"].split("/")[-1] for row in rows} == {"first", last.name}
    tolerance = 2e-2 if "float16" in policy else 1e-4
    for over in ("mean", "min", "max"):
        for name in ("gain", "bias"):
            want = getattr(np, over)(getattr(last, name).numpy().astype("float64"))
            assert float(rows[-1][f"{name}_{over}"]) == pytest.approx(want, rel=1e-3)
        got = float(rows[-1][f"output_std_{over}"])
        assert got == pytest.approx(getattr(np, over)(np.std(tf.cast(outputs, "float64"), (0, 1, 2))), rel=tolerance)
    assert rows[-2]["bias_mean"] == ""
    assert any(np.any(np.asarray(variable) != 1) for variable in (last.gain, last.mean_scale))
    assert plot_gains(tmp_path).read_bytes().startswith(PNG)


# No leading underscores: TensorFlow refuses the name scopes that Keras makes of them.
class Block(keras.layers.Layer):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.conv, self.agc = _conv(3), AutomaticGainControl("relu", name="agc")

    def call(self, x):
        return self.agc(self.conv(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        # Created in another order than they run.
        self.second, self.first = Block(name="second"), Block(name="first")

    def call(self, x):
        return self.second(self.first(x))

    def compute_output_shape(self, input_shape):
        return input_shape


class WithFunction(Subclassed):
    @tf.function
    def call(self, x):
        return super().call(x)


@pytest.mark.parametrize("kind", [Subclassed, WithFunction])
def test_subclassed_models_in_the_order_of_execution(tmp_path, kind):
    model = kind()
    _fit(model, GainMonitor(tmp_path, _X))
    rows = _rows(tmp_path)
    assert [row["layer"].split("/")[-2:] for row in rows[-2:]] == [["first", "agc"], ["second", "agc"]]
    _check(rows[-2], model.first.agc, model.first(_X))
    _check(rows[-1], model.second.agc, model.second(model.first(_X)))


def test_layers_of_one_path_are_told_apart(tmp_path):
    def inner():
        return keras.Sequential([keras.Input((6, 7, 3)), AutomaticGainControl(name="agc")])

    inputs = keras.Input((6, 7, 3))
    first, second = inner(), inner()
    model = keras.Model(inputs, second(first(inputs)))
    second.layers[0].gain.assign([5, 5, 5])
    _fit(model, GainMonitor(tmp_path, _X))
    rows = _rows(tmp_path)[:2]
    assert [row["gain_mean"] for row in rows] == ["1", "5"] and rows[0]["layer"] != rows[1]["layer"]


def test_shared_layers_count_all_calls(tmp_path):
    inputs = keras.Input((None, 7, 3))
    shared = AutomaticGainControl("relu", mean_scale_initializer="zeros")
    half = keras.layers.Cropping2D(((0, 2), (0, 0)))
    model = keras.Model(inputs, shared(half(5 + 3 * shared(inputs))))
    model.compile("sgd", "mse")
    model.fit(_X, np.zeros((8, 4, 7, 3)), verbose=0, callbacks=[GainMonitor(tmp_path, _X)])
    _, row = _rows(tmp_path)
    first = shared(_X).numpy()
    second = model.predict(_X, verbose=0)
    _check(row, shared, np.concatenate([first.reshape(-1, 3), second.reshape(-1, 3)]))


@pytest.mark.parametrize("steps", [4, None])
def test_time_distributed(tmp_path, steps):
    inputs = keras.Input((steps, 6, 3))
    distributed = keras.layers.TimeDistributed(AutomaticGainControl("relu"))
    model = keras.Model(inputs, distributed(inputs))
    x = np.random.default_rng(0).standard_normal((4, 4, 6, 3)).astype(np.float32)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0, callbacks=[GainMonitor(tmp_path, x)])
    _check(_rows(tmp_path)[-1], distributed.layer, model.predict(x, verbose=0))


def test_only_in_traced_code_or_not_at_all(tmp_path):
    class Mapped(keras.Model):
        def __init__(self):
            super().__init__()
            self.mapped, self.plain = AutomaticGainControl(name="mapped"), AutomaticGainControl(name="plain")
            self.training_only = AutomaticGainControl(name="training_only")

        def call(self, x, training=False):
            x = tf.vectorized_map(lambda sample: self.mapped(sample[None])[0], self.plain(x))
            return self.training_only(x) if training else x

    model = Mapped()
    model.mapped.build((None, 6, 7, 3))
    model(_X, training=True)
    model.compile("sgd", "mse")
    model.fit(_X, _X, verbose=0, callbacks=[GainMonitor(tmp_path, _X)])
    plain, *others = _rows(tmp_path)[-3:]
    assert plain["layer"].endswith("plain") and plain["output_std_mean"] != ""
    for row in others:
        assert row["output_std_mean"] == row["sparsity_max"] == "" and float(row["gain_mean"]) != 0
    plot_gains(tmp_path)  # draws what there is


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_data_formats(tmp_path, data_format):
    layer = AutomaticGainControl("relu", data_format=data_format)
    x = _X if data_format == "channels_last" else np.moveaxis(_X, -1, 1)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0, callbacks=[GainMonitor(tmp_path, x)])
    y = layer(x).numpy()
    _check(_rows(tmp_path)[-1], layer, y if data_format == "channels_last" else np.moveaxis(y, 1, -1))


def test_mixed_precision_does_not_overflow(tmp_path):
    layer = AutomaticGainControl(dtype="mixed_float16", gain_initializer=keras.initializers.Constant(1000.0))
    model = keras.Sequential([keras.Input((6, 7, 3)), layer])
    model.compile(keras.optimizers.SGD(1e-6), "mse")
    model.fit(_X, _X, verbose=0, callbacks=[GainMonitor(tmp_path, _X)])
    y = layer(_X)
    assert y.dtype == "float16" and tf.reduce_any(tf.math.is_inf(y * y))
    _check(_rows(tmp_path)[-1], layer, y)


def test_jit_compile(tmp_path, native_required):
    model = _sequential()
    model.compile("sgd", "mse", jit_compile=True)
    _fit(model, GainMonitor(tmp_path, _X), compiled=True)
    _check(_rows(tmp_path)[-3], model.get_layer("agc_relu"), model.layers[1](model.layers[0](_X)))


@pytest.mark.parametrize(
    ("steps_per_execution", "update_freq", "steps"),
    [
        (1, "epoch", [0, 4, 8]),
        (1, 2, [0, 2, 4, 6, 8]),
        (1, 1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 100, [0, 4, 8]),
        (3, "epoch", [0, 4, 8]),  # executions of 3 and 1 steps
        (3, 2, [0, 3, 4, 7, 8]),
    ],
)
def test_steps(tmp_path, steps_per_execution, update_freq, steps):
    model = keras.Sequential([keras.Input((6, 7, 3)), AutomaticGainControl()])
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    _fit(model, GainMonitor(tmp_path, _X, update_freq), epochs=2, compiled=True)
    assert [int(row["step"]) for row in _rows(tmp_path)] == steps


@pytest.mark.parametrize(
    ("steps_per_execution", "arguments", "update_freq", "steps"),
    [
        (1, {}, "epoch", [0, 7, 14]),
        (1, {}, 1, list(range(15))),
        (3, {}, "epoch", [0, 7, 14]),
        (3, {}, 3, [0, 3, 6, 7, 10, 13, 14]),
        (3, {"gradient_accumulation_steps": 2}, "epoch", [0, 7, 14]),
        (8, {}, "epoch", [0, 7, 14]),
    ],
)
def test_steps_of_data_of_unknown_length(tmp_path, steps_per_execution, arguments, update_freq, steps):
    model = keras.Sequential([keras.Input((6, 7, 3)), AutomaticGainControl()])
    optimizer = keras.optimizers.SGD(1e-3, **arguments)
    model.compile(optimizer, "mse", steps_per_execution=steps_per_execution)
    batch = tf.constant(_X[:2])
    data = tf.data.Dataset.from_tensors((batch, batch)).repeat(7).filter(lambda *_: True)
    model.fit(data, epochs=2, verbose=0, callbacks=[GainMonitor(tmp_path, _X, update_freq)])
    assert [int(row["step"]) for row in _rows(tmp_path)] == steps

    # Continued, with the state that the optimizer has.
    model.fit(data, epochs=1, verbose=0, callbacks=[GainMonitor(tmp_path, _X, append=True)])
    assert [int(row["step"]) for row in _rows(tmp_path)] == [*steps, 21]


def test_steps_with_loss_scaling(tmp_path):
    model = keras.Sequential([keras.Input((6, 7, 3)), AutomaticGainControl()])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3), initial_scale=1e38)
    model.compile(optimizer, "mse")
    batch = tf.constant(_X[:2])
    data = tf.data.Dataset.from_tensors((batch, 100 * batch)).repeat(7).filter(lambda *_: True)
    model.fit(data, epochs=2, verbose=0, callbacks=[GainMonitor(tmp_path, _X)])
    assert int(optimizer.iterations) < 14  # some were left out
    assert [int(row["step"]) for row in _rows(tmp_path)] == [0, 7, 14]


class Stopping(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch >= 2


@pytest.mark.parametrize(("steps_per_execution", "step"), [(1, 3), (2, 4)])
def test_steps_of_a_training_that_is_stopped(tmp_path, steps_per_execution, step):
    model = keras.Sequential([keras.Input((6, 7, 3)), AutomaticGainControl()])
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    callbacks = [GainMonitor(tmp_path, _X), Stopping()]
    model.fit(_X, _X, batch_size=1, verbose=0, callbacks=callbacks)
    assert [int(row["step"]) for row in _rows(tmp_path)] == [0, step]


def _stateful():
    inputs = keras.Input(batch_shape=(2, 6, 7, 3))
    x = keras.layers.BatchNormalization()(_conv(4)(inputs))
    x = keras.layers.Dropout(0.5, seed=1)(AutomaticGainControl("relu")(x))
    x = keras.layers.Reshape((6, 28))(x)
    return keras.Model(inputs, keras.layers.GRU(3, stateful=True)(x))


def test_training_goes_on_as_without_it(tmp_path):
    weights = []
    for callbacks in ([], [GainMonitor(tmp_path, _X[:2], update_freq=1)]):
        keras.utils.set_random_seed(0)
        model = _stateful()
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        model.fit(_X, np.ones((8, 3)), epochs=2, batch_size=2, shuffle=False, verbose=0, callbacks=callbacks)
        variables = model.variables + model.optimizer.variables + model.layers[-1].states
        weights.append([variable.numpy() for variable in variables])
    for without, with_monitor in zip(*weights, strict=True):
        np.testing.assert_allclose(with_monitor, without, rtol=1e-5, atol=1e-6)
    assert agc_layer.output_observer.get() is None and not tf.config.functions_run_eagerly()


def test_fit_again_goes_on(tmp_path):
    model, monitor = _sequential(), GainMonitor(tmp_path, _X)
    _fit(model, monitor)
    _fit(model, monitor, epochs=2, compiled=True, initial_epoch=1)
    assert [(row["epoch"], row["step"]) for row in _rows(tmp_path)[::3]] == [("0", "0"), ("0", "4"), ("1", "8")]


def test_one_monitor_one_model(tmp_path):
    first, monitor = _sequential(), GainMonitor(tmp_path, _X)
    _fit(first, monitor)
    second = keras.models.clone_model(first)
    second.name = "second"
    message = (
        f"records the model '{first.name}' of its first training, got another model, 'second': make a GainMonitor for"
    )
    with pytest.raises(ValueError, match=message):
        _fit(second, monitor)
    _fit(first, monitor)
    assert [row["step"] for row in _rows(tmp_path)[::3]] == ["0", "4", "8"]


def test_an_existing_file_is_kept_or_continued(tmp_path):
    model = _sequential()
    _fit(model, GainMonitor(tmp_path / "new" / "log", _X))
    path = tmp_path / "new" / "log" / "gains.csv"
    before = path.read_text()
    with pytest.raises(FileExistsError, match=re.escape(f"{path} exists: choose another log_dir, or continue it with")):
        _fit(_sequential(), GainMonitor(path.parent, _X))
    assert path.read_text() == before

    _fit(model, GainMonitor(path.parent, _X, append=True))
    assert [row["step"] for row in _rows(path.parent)[::3]] == ["0", "4", "8"]
    assert path.read_text().startswith("".join(before.splitlines(keepends=True)[:4]))
    plot_gains(path)


class Cut(keras.callbacks.Callback):
    """Ends a training in the middle, as a machine that is taken away does."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("same_monitor", [False, True])
@pytest.mark.parametrize("loss_scale", [False, True])
def test_a_restored_training_goes_on_from_the_model(tmp_path, same_monitor, loss_scale):
    # 4 steps an epoch; saved after 5 steps, cut off after 7: in Keras epoch 1 then begins anew, at step 5.
    model = keras.Sequential([keras.Input((6, 7, 3)), AutomaticGainControl("relu")])
    optimizer = keras.optimizers.SGD(0.1)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0) if loss_scale else optimizer
    backup = {"backup_dir": str(tmp_path / "backup"), "save_freq": 5}
    monitor = GainMonitor(tmp_path, _X, update_freq=1, append=True)

    def fit(*callbacks):
        model.fit(_X, _X, batch_size=2, epochs=2, verbose=0, callbacks=[*callbacks])

    model.compile(optimizer, "mse")
    with pytest.raises(KeyboardInterrupt):
        fit(monitor, keras.callbacks.BackupAndRestore(**backup), Cut(7))
    before = _rows(tmp_path)
    assert [int(row["step"]) for row in before] == [0, 1, 2, 3, 4, 5, 6]
    if not same_monitor:
        monitor = GainMonitor(tmp_path, _X, update_freq=1, append=True)
    message = re.escape("gains.csv has records up to step 6, and the model is at step 5, as its optimizer counts: the ")
    with pytest.warns(UserWarning, match=message):
        fit(monitor, keras.callbacks.BackupAndRestore(**backup))
    rows = _rows(tmp_path)
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [int(row["iterations"]) for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert rows[:6] == before[:6]
    _check(rows[-1], model.layers[0], model(_X))
    assert sorted(os.listdir(tmp_path))[-1] == "gains.csv"  # nothing of its replacement stays behind


@pytest.mark.parametrize("gains", ["ones", "random_uniform"])
def test_a_training_that_ended_before_its_first_backup_begins_anew(tmp_path, gains):
    def fit(*callbacks):
        layer = AutomaticGainControl("relu", gain_initializer=gains)
        model = keras.Sequential([keras.Input((6, 7, 3)), layer])
        monitor = GainMonitor(tmp_path, _X, update_freq=1, append=True)
        _fit(model, [monitor, keras.callbacks.BackupAndRestore(str(tmp_path / "backup")), *callbacks], target=_X)
        return model

    with pytest.raises(KeyboardInterrupt):
        fit(Cut(3))
    before = _rows(tmp_path)
    assert [int(row["step"]) for row in before] == [0, 1, 2]
    message = (
        "records up to step 2, and the model is at step 0, by its gains and its optimizer's count of 0: the records "
        "beyond it are cut off"
    )
    whole = (tmp_path / "gains.csv").read_text()
    with pytest.warns(UserWarning, match=message):
        model = fit()
    assert (tmp_path / "gains.csv.1").read_text() == whole
    rows = _rows(tmp_path)
    assert [(int(row["step"]), int(row["iterations"])) for row in rows] == [(step, step) for step in range(5)]
    assert (rows[0]["gain_mean"] == before[0]["gain_mean"]) == (gains == "ones")
    _check(rows[-1], model.layers[0], model(_X))


def test_earlier_weights_and_another_optimizer_go_on_from_their_record(tmp_path):
    model = keras.Sequential([keras.Input((6, 7, 3)), AutomaticGainControl("relu")])
    file = str(tmp_path / "{epoch}.weights.h5")
    save = keras.callbacks.ModelCheckpoint(file, save_weights_only=True)
    _fit(model, [GainMonitor(tmp_path, _X), save], epochs=3, target=_X)
    before = _rows(tmp_path)
    model.load_weights(file.format(epoch=2))
    with pytest.warns(UserWarning, match="records up to step 12, and the model is at step 8, by its gains and its opt"):
        _fit(model, GainMonitor(tmp_path, _X, append=True), target=_X)
    rows = _rows(tmp_path)
    assert [(int(row["step"]), int(row["iterations"])) for row in rows] == [(0, 0), (4, 4), (8, 0), (12, 4)]
    assert rows[2]["gain_mean"] == before[2]["gain_mean"]


def test_another_optimizer_goes_on_from_the_last_step(tmp_path):
    model = keras.Sequential([keras.Input((6, 7, 3)), AutomaticGainControl()])
    for _ in range(2):
        _fit(model, GainMonitor(tmp_path, _X, append=True), epochs=2)  # compiles anew
    rows = _rows(tmp_path)
    assert [(int(row["step"]), int(row["iterations"])) for row in rows] == [(0, 0), (4, 4), (8, 0), (12, 4), (16, 8)]
    # Restored to a count that the first one had as well.
    model.optimizer.iterations.assign(6)
    with pytest.warns(UserWarning, match="records up to step 16, and the model is at step 14"):
        _fit(model, GainMonitor(tmp_path, _X, append=True), compiled=True)
    assert [int(row["step"]) for row in _rows(tmp_path)] == [0, 4, 8, 12, 14, 18]


def test_a_copied_callback_says_what_to_do(tmp_path):
    monitor = GainMonitor(tmp_path, _X)
    first, second = copy.deepcopy(monitor), copy.deepcopy(monitor)  # as Keras Tuner does for each trial
    _fit(_sequential(), first)
    message = "make a GainMonitor for each trial, with a log_dir of its own"
    with pytest.raises(FileExistsError, match=message):
        _fit(_sequential(), second)


def test_none_for_an_optional_input(tmp_path):
    model = _optional()
    x, y = _X[:, :, :, :1], np.zeros((8, 6, 7, 1))
    model.compile("sgd", "mse")
    model.fit([x, x], y, verbose=0, callbacks=[GainMonitor(tmp_path, [x, None])])
    row = _rows(tmp_path)[-1]
    _check(row, model.get_layer("agc"), model([x, None]))


def _optional():
    first, second = keras.Input((6, 7, 1)), keras.Input((6, 7, 1), optional=True)
    return keras.Model([first, second], AutomaticGainControl(name="agc")(Sum()([first, second])))


class Sum(keras.layers.Layer):
    def call(self, inputs):
        first, second = inputs
        return first if second is None else first + second

    def compute_output_shape(self, shapes):
        return shapes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "a,b\n1,2\n", "was not written by GainMonitor: its first line must be epoch,step,iterations,"),
        # A log from before there were columns for the bias.
        (lambda text: text.replace(",bias_mean,bias_min,bias_max", ""), "was not written by GainMonitor: its first"),
        (lambda text: "\udcff\udcfe", "was not written by GainMonitor: its first line must be epoch,step,iterations,"),
        (lambda text: text[:-1], "ends within a record: remove its last line"),
        (lambda text: text[:-30], "ends within a record: remove its last line"),
        (lambda text: text[: text.index("\n") + 1], "ends within a record"),
        (
            lambda text: text + "1,8,8,agc,1\n",
            "line 8 must have epoch, step, iterations, layer and 15 numbers, got ['1', '8', '8', 'agc', '1']: remove",
        ),
        (
            lambda text: text.replace("\n0,4", "\n0,x"),
            "line 5 must have epoch, step, iterations, layer and 15 numbers, got ['0', ",
        ),
    ],
)  # fmt: skip
def test_files_that_cannot_be_continued_or_drawn(tmp_path, change, message):
    _fit(_sequential(), GainMonitor(tmp_path, _X))
    path = tmp_path / "gains.csv"
    path.write_text(change(path.read_text()), errors="surrogateescape")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"{path}") + ",? " + re.escape(message)):
        _fit(_sequential(), GainMonitor(tmp_path, _X, append=True))
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_gains(tmp_path)
    assert path.read_bytes() == before and not (tmp_path / "gains.png").exists()


class Failing(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise ArithmeticError("broken on purpose")


def test_a_training_that_fails_leaves_whole_records(tmp_path):
    model = _sequential()
    model.compile("sgd", "mse")
    monitor = GainMonitor(tmp_path, _X)
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        model.fit(_X, np.zeros((8, 2)), epochs=5, verbose=0, callbacks=[Failing(), monitor])
    assert [int(row["step"]) for row in _rows(tmp_path)[::3]] == [0, 1]
    assert (tmp_path / "gains.csv").read_text().endswith("\n")
    assert _events(tmp_path).Scalars(f"gain/{_rows(tmp_path)[0]['layer']}")


def test_a_training_that_diverges_is_recorded(tmp_path):
    model = _sequential()
    model.get_layer("agc_relu").gain.assign([np.nan, np.inf, 1, 1, 1])
    _fit(model, GainMonitor(tmp_path, _X))
    row = _rows(tmp_path)[0]
    assert row["gain_mean"] == row["output_std_max"] == "nan"
    assert plot_gains(tmp_path).read_bytes().startswith(PNG)


def _events(log_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), {"tensors": 0})
    events.Reload()
    return _Events(events)


class _Events:
    """Scalars and histograms as [(step, array)], of a TensorBoard run."""

    def __init__(self, events):
        self._events = events

    def Scalars(self, tag):
        assert self._events.summary_metadata[tag].plugin_data.plugin_name == "scalars"
        return self._tensors(tag)

    def Histograms(self, tag):
        assert self._events.summary_metadata[tag].plugin_data.plugin_name == "histograms"
        return self._tensors(tag)

    def _tensors(self, tag):
        return [(event.step, tf.make_ndarray(event.tensor_proto)) for event in self._events.Tensors(tag)]


def test_tensorboard(tmp_path):
    model = _sequential()
    _fit(model, GainMonitor(tmp_path, _X), epochs=2)
    rows, events = _rows(tmp_path), _events(tmp_path)
    for name in ("gain", "mean_scale", "output_std", "sparsity", "bias"):
        for row in rows[:3]:
            layer = row["layer"]
            want = [(int(r["step"]), float(r[f"{name}_mean"])) for r in rows if r["layer"] == layer]
            got = events.Scalars(f"{name}/{layer}")
            assert [step for step, _ in got] == [step for step, _ in want]
            np.testing.assert_allclose([value for _, value in got], [value for _, value in want], rtol=1e-4)
            for _, buckets in events.Histograms(f"{name}/{layer}/channels"):  # left, right, count
                assert buckets[:, 2].sum() == 5
    last = events.Histograms(f"gain/{rows[0]['layer']}/channels")[-1][1]
    gain = model.get_layer("agc_relu").gain.numpy()
    np.testing.assert_allclose([last[0, 0], last[-1, 1]], [gain.min(), gain.max()], rtol=1e-5)


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.plugins.scalar.summary_v2", None)
    with pytest.warns(
        UserWarning,
        match=r'writes gains.csv and nothing for TensorBoard, whose package .*: pip install "tf-agc\[plot\]"',
    ) as got:
        monitor = GainMonitor(tmp_path, _X)
    assert got[0].filename == __file__
    _fit(_sequential(), monitor)
    assert len(_rows(tmp_path)) == 6 and os.listdir(tmp_path) == ["gains.csv"]


def test_errors(tmp_path):
    for bad in ("batch", 0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match=f"update_freq must be 'epoch' or a number of steps >= 1, got {bad!r}"):
            GainMonitor(tmp_path, _X, bad)
    with pytest.raises(ValueError, match="log_dir must be a local directory, got 'gs://bucket/log'"):
        GainMonitor("gs://bucket/log", _X)
    with pytest.raises(ValueError, match="batch must have at least one sample"):
        GainMonitor(tmp_path, _X[:0])
    with pytest.raises(TypeError, match="batch must be one batch of inputs, got a tf.data.Dataset"):
        GainMonitor(tmp_path, tf.data.Dataset.from_tensors(_X))
    with pytest.raises(TypeError, match="batch must be one batch of inputs, as arrays or tensors, got NoneType"):
        GainMonitor(tmp_path, None)
    for bad in (None, b"log", 3):
        with pytest.raises(TypeError, match=f"log_dir must be a path, as str or os.PathLike, got {bad!r}"):
            GainMonitor(bad, _X)
    with pytest.raises(ValueError, match="log_dir must be a local directory, got ''"):
        GainMonitor("", _X)
    plain = keras.Sequential([keras.Input((6, 7, 3)), _conv(3)], name="plain")
    with pytest.raises(ValueError, match="model 'plain' has no AutomaticGainControl layer to monitor"):
        _fit(plain, GainMonitor(tmp_path, _X))
    assert not os.listdir(tmp_path)


@pytest.fixture
def figures(monkeypatch):
    """Those that are drawn."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (figures.append(self), save(self, *args, **more))
    )
    return figures


@pytest.mark.parametrize("use_bias", [True, False])
def test_plot(tmp_path, figures, use_bias):
    _fit(_sequential(use_bias=use_bias), GainMonitor(tmp_path, _X, update_freq=1), epochs=4)
    assert plot_gains(tmp_path) == tmp_path / "gains.png"
    quantities = ["gain", "mean scale", "output standard deviation", "sparsity: fraction of zeros"]
    drawn = [axes.get_xlabel() for axes in figures[0].axes[:-1]]  # the last is the bar of colours
    assert drawn == quantities + (["bias"] if use_bias else [])
    assert plot_gains(tmp_path / "gains.csv", tmp_path / "other.PNG") == tmp_path / "other.PNG"
    for name in ("gains.png", "other.PNG"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


@pytest.mark.parametrize("centre", [1, 0])
@pytest.mark.parametrize("spread", [1e-5, 3e-4, 2e-3, 0.07, 0.5, 30, 4e5])
def test_labels_of_the_plot_do_not_overlap(tmp_path, figures, centre, spread):
    quantities = ("gain", "mean_scale", "output_std", "sparsity", "bias")
    header = "epoch,step,iterations,layer," + ",".join(
        f"{name}_{over}" for name in quantities for over in ("mean", "min", "max")
    )
    values = [f"{centre + spread * factor:.6g}" for factor in (0.1, -0.6, 1.0)]
    rows = [f"0,{step},{step},agc_{layer}," + ",".join(5 * values) for step in (0, 391) for layer in range(3)]
    (tmp_path / "gains.csv").write_text("\n".join([header, *rows]) + "\n")
    plot_gains(tmp_path)
    (figure,) = figures
    for axes in figure.axes[:5]:
        left, right = axes.get_xlim()
        ticks = [tick for tick in axes.xaxis.get_major_ticks() if left <= tick.get_loc() <= right]
        boxes = sorted((tick.label1.get_window_extent() for tick in ticks), key=lambda box: box.x0)
        assert len(boxes) >= 2
        for first, second in zip(boxes, boxes[1:], strict=False):
            assert first.x1 + 4 < second.x0


def test_plot_errors(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="log must be a directory with gains.csv, or that file, got .*gains.csv"
    ):
        plot_gains(tmp_path)
    with pytest.raises(TypeError, match="log must be a path, as str or os.PathLike, got None"):
        plot_gains(None)
    _fit(_sequential(), GainMonitor(tmp_path, _X))
    for name in ("gains.pdf", "gains"):
        with pytest.raises(ValueError, match=re.escape(f"path must end in .png, got '{tmp_path / name}'")):
            plot_gains(tmp_path, tmp_path / name)
    with pytest.raises(TypeError, match="path must be a path, as str or os.PathLike, got 3"):
        plot_gains(tmp_path, 3)
    picture = plot_gains(tmp_path)
    with pytest.raises(
        ValueError, match=re.escape(f"{picture} was not written by GainMonitor: its first line must be")
    ):
        plot_gains(picture)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'plot_gains needs the package matplotlib: pip install "tf-agc\[plot\]"'):
        plot_gains(tmp_path)
