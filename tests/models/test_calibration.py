"""`calibrate`: the standard deviation it reaches, in every kind of model, and what it leaves alone."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_agc
from tf_agc import AutomaticGainControl, calibrate, calibration
from tf_agc import layer as agc_layer
from tf_agc.calibration import CalibrationTable

pytestmark = pytest.mark.usefixtures("fresh_keras")


def _batch(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


_X = _batch(8, 9, 10, 3)


def _conv(channels=5, **arguments):
    return keras.layers.Conv2D(channels, 3, padding="same", **arguments)


def _z_std(model, batch):
    """Standard deviation of z per channel, for each call of an AGC layer, seen from outside."""
    seen = []

    def observe(layer, x, shortcut):
        z = tf_agc.agc(x, layer.gain, layer.mean_scale, data_format=layer.data_format)
        axis = 1 if layer.data_format == "channels_first" else 3
        others = [a for a in range(4) if a != axis]
        seen.append(np.std(tf.cast(z, tf.float64), axis=tuple(others)))

    token = agc_layer.observer.set(observe)
    try:
        model(batch, training=False)
    finally:
        agc_layer.observer.reset(token)
    return seen


# No leading underscores: TensorFlow refuses the name scopes that Keras makes of them.
class Block(keras.layers.Layer):
    def __init__(self, activation="relu", **arguments):
        super().__init__(**arguments)
        self.conv, self.agc = _conv(), AutomaticGainControl(activation)

    def call(self, x):
        return self.agc(self.conv(x))


class Subclassed(keras.Model):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        # Created in another order than they run.
        self.second, self.first = Block(), Block("elu")

    def call(self, x):
        return self.second(self.first(x))


class WithFunction(Subclassed):
    @tf.function
    def call(self, x):
        return super().call(x)


def _sequential():
    return keras.Sequential(
        [
            keras.Input((9, 10, 3)),
            *(_conv(), AutomaticGainControl("relu")),
            *(_conv(), AutomaticGainControl("tanh")),
            *(_conv(), AutomaticGainControl("leaky_relu", train_mean_scale=False)),
        ]
    )


def _functional():
    inputs = keras.Input((None, None, 3))
    x = AutomaticGainControl("relu")(_conv()(inputs))
    branch = AutomaticGainControl()(_conv()(x))
    return keras.Model(inputs, keras.layers.Concatenate()([x, branch]))


def _nested():
    inputs = keras.Input((9, 10, 3))
    inner = keras.Sequential([keras.Input((9, 10, 5)), Block(), keras.layers.Dropout(0.5)])
    return keras.Model(inputs, inner(AutomaticGainControl("relu6")(_conv()(inputs))))


def _built(model):
    model(_X[:1])
    return model


_MODELS = {
    "sequential": (_sequential, 3),
    "functional": (_functional, 2),
    "subclassed": (lambda: _built(Subclassed()), 2),
    "call in a tf.function": (lambda: _built(WithFunction()), 2),
    "nested": (_nested, 2),
}


@pytest.mark.parametrize("kind", _MODELS)
def test_models(kind):
    make, layers = _MODELS[kind]
    model = make()
    table = calibrate(model, _X)
    assert len(table) == layers and all(row.calls == 1 and not row.kept for row in table)
    stds = _z_std(model, _X) if kind != "call in a tf.function" else []
    for std in stds:
        np.testing.assert_allclose(std, np.ones(5), rtol=1e-4)
    # Again: nothing is left to do.
    again = calibrate(model, _X)
    for row, before in zip(again, table, strict=True):
        np.testing.assert_allclose(row.std_before, np.ones(5), rtol=1e-4)
        np.testing.assert_allclose(row.gain, before.gain, rtol=1e-4)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16", "float16"])
def test_a_bias_centres_every_channel_before_the_shortcut_is_added(data_format, policy):
    half = keras.initializers.Constant(0.5)  # of the mean is left, so that there is something to centre
    layer = AutomaticGainControl(
        "relu", data_format, mean_scale_initializer=half, use_bias=True, bias_initializer="ones", dtype=policy
    )
    x = _X + np.array([1.0, -2.0, 30.0], np.float32)
    x = x if data_format == "channels_last" else np.moveaxis(x, -1, 1)
    inputs = [keras.Input(x.shape[1:]), keras.Input(x.shape[1:])]
    model = keras.Model(inputs, layer(*inputs))
    (row,) = calibrate(model, [x, x], target_std={layer.path: 0.5})
    weights = [tf.cast(weight, tf.float32) for weight in (layer.gain, layer.mean_scale, layer.bias)]
    z = tf_agc.agc(tf.cast(tf.cast(x, layer.compute_dtype), tf.float32), *weights, data_format=data_format).numpy()
    others = (0, 1, 2) if data_format == "channels_last" else (0, 2, 3)
    # Of a weight in 16 bits, its rounding is left.
    tolerance = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(policy, 1e-5)
    np.testing.assert_allclose(z.std(others), np.full(3, 0.5), rtol=2 * tolerance)
    np.testing.assert_allclose(z.mean(others), np.zeros(3), atol=2 * tolerance * np.abs(row.bias).max())
    np.testing.assert_array_equal(row.bias, weights[2])
    assert f"centred, bias {row.bias.min():.3g} .. {row.bias.max():.3g}" in str(CalibrationTable([row]))


def test_a_bias_of_channels_that_are_centred_already_is_0():
    layer = AutomaticGainControl(mean_scale_initializer="ones", bias_initializer="ones")
    table = calibrate(keras.Sequential([keras.Input(_X.shape[1:]), layer]), _X + np.float32(0.1))
    assert "centred, bias 0 .. 0" in str(table)
    np.testing.assert_array_equal(layer.bias, [0, 0, 0])


def test_constant_channels_keep_their_bias_and_constraints_have_the_last_word():
    layer = AutomaticGainControl(
        mean_scale_initializer="zeros", use_bias=True, bias_initializer="ones", bias_constraint="non_neg"
    )
    x = np.array(_X)
    x[..., 0] = 3.0
    x[..., 1] += 2.0
    x[..., 2] -= 2.0
    (row,) = calibrate(keras.Sequential([keras.Input(x.shape[1:]), layer]), x)
    assert (row.kept, row.constrained) == ([0], [1])
    assert row.bias[0] == 1 and row.bias[1] == 0 and row.bias[2] > 1
    text = str(CalibrationTable([row]))
    assert "1 constant, gain kept: 0" in text and "1 changed by bias_constraint: 1" in text


def test_an_error_puts_biases_back_too():
    inputs = keras.Input((9, 10, 3))
    first = AutomaticGainControl(use_bias=True, mean_scale_initializer="zeros")
    model = keras.Model(inputs, AutomaticGainControl(name="last")(first(inputs) / 0.0))
    with pytest.raises(ValueError, match="the input of layer 'last' is not finite"):
        calibrate(model, _X + 1)
    np.testing.assert_array_equal(first.get_weights(), [[1] * 3, [0] * 3, [0] * 3])


def test_target_std():
    model = _sequential()
    calibrate(model, _X, target_std=0.25)
    for std in _z_std(model, _X):
        np.testing.assert_allclose(std, np.full(5, 0.25), rtol=1e-4)
    layers = [layer for layer in model.layers if isinstance(layer, AutomaticGainControl)]
    calibrate(model, _X, target_std={layers[1].path: 3})
    for std, expected in zip(_z_std(model, _X), (1, 3, 1), strict=True):
        np.testing.assert_allclose(std, np.full(5, expected), rtol=1e-4)


def _deviation(x):
    return np.sqrt(np.mean(np.var(np.asarray(x, np.float64), axis=(0, 1, 2))))


def _junction(x, shortcut):
    return AutomaticGainControl("relu", name="end")(x, shortcut), "end"


def _added(x, shortcut):
    x = AutomaticGainControl(use_bias=True, mean_scale_initializer="zeros", name="end")(x)
    return keras.layers.Add()([keras.layers.Dropout(0.5)(x), shortcut]), "end"


def _operation(x, shortcut):
    return shortcut + tf_agc.StandardizedConv2D(5, 3, padding="same", use_gain=True, name="end")(x), "end"


def _projected(x, shortcut):
    """The branch is on the longer way."""
    shortcut = AutomaticGainControl(name="projection")(shortcut)
    return keras.layers.Add()([shortcut, AutomaticGainControl(name="end")(x)]), "end"


@pytest.mark.parametrize("factor", [None, 0.25])
@pytest.mark.parametrize("join", [_junction, _added, _operation, _projected])
def test_a_branch_gets_half_of_its_shortcut(join, factor):
    inputs = keras.Input((9, 10, 3))
    first = 3.0 * AutomaticGainControl("relu")(_conv()(inputs))
    x = AutomaticGainControl("relu")(_conv()(first))
    outputs, end = join(_conv()(x), first)
    inner = keras.Model(inputs, [outputs, first])
    # In a nested model as in the outermost one.
    model = keras.Model(inputs, inner(inputs))
    layer = inner.get_layer(end)
    table = calibrate(model, 7 + 2 * _X, **{} if factor is None else {"branch_factor": factor})
    (row,) = [row for row in table if row.layer.endswith(end)]
    assert "ends a branch" in str(table) and row.shortcut
    np.testing.assert_array_equal(row.gain, np.ravel(layer.gain))
    shortcut = inner.get_layer("projection").output if join is _projected else first
    branch = layer.output
    if join is _junction:
        z = AutomaticGainControl()  # the layer without its shortcut and its activation
        z.build(layer.input[0].shape)
        branch = z(layer.input[0])
        z.set_weights(layer.get_weights())
    branch, shortcut = keras.Model(inner.input, [branch, shortcut])(7 + 2 * _X)
    np.testing.assert_allclose(_deviation(branch), (factor or 0.5) * _deviation(shortcut), rtol=1e-4)
    if isinstance(layer, AutomaticGainControl):
        np.testing.assert_allclose(np.mean(branch, (0, 1, 2)), np.zeros(5), atol=1e-5)
    # Again: nothing is left to do, and nothing is left behind.
    gain = layer.gain.numpy()
    calibrate(model, 7 + 2 * _X, **{} if factor is None else {"branch_factor": factor})
    np.testing.assert_allclose(layer.gain, gain, rtol=1e-4)
    assert all("call" not in vars(each) for each in inner.layers)


def test_a_branch_gets_less_in_a_deep_network():
    """Of 14 that start at what they are added to, twice the number that get a half; a projected shortcut is none."""
    x = keras.Input((9, 10, 3))
    y = AutomaticGainControl(name="projected")(_conv(3)(x), AutomaticGainControl()(_conv(3)(x)))
    for number in range(14):
        z = _conv(3)(keras.layers.ReLU()(y))
        y = AutomaticGainControl()(z, y) if number % 2 else y + AutomaticGainControl(name=f"end{number}")(z)
    model = keras.Model(x, y)
    calibrate(model, _X)
    shortcut, branch = (each.output for each in (model.get_layer("projected"), model.get_layer("end0")))
    shortcut, branch = keras.Model(x, [shortcut, branch])(_X)
    np.testing.assert_allclose(_deviation(branch), 0.25 * _deviation(shortcut), rtol=1e-4)


def test_what_is_no_branch():
    """Read elsewhere too, not linear, constrained, called twice, a sum of three."""
    x = keras.Input((9, 10, 3))
    a, b, c, d = (AutomaticGainControl(name=name) for name in "abcd")
    e = AutomaticGainControl("relu", name="e")
    f = AutomaticGainControl(gain_constraint="unit_norm", name="f")
    read_twice = a(x)
    sums = [
        *(x + read_twice, read_twice * 2.0),
        *(x + keras.layers.Dropout(0.5)(b(x)), keras.layers.Add()([2.0 * x, b(x)])),
        keras.layers.Add()([x, c(x), d(x)]),
        *(x + e(x), x + f(x)),
    ]
    table = calibrate(keras.Model(x, sums), _X)
    assert sorted(row.layer for row in table) == list("abcdef") and not any(row.shortcut for row in table)


def test_an_error_puts_branches_back_too():
    x = keras.Input((9, 10, 3))
    y = x + tf_agc.StandardizedConv2D(3, 3, padding="same", use_gain=True, name="end")(AutomaticGainControl()(x))
    model = keras.Model(x, AutomaticGainControl(name="last")(y / 0.0))
    with pytest.raises(ValueError, match="the input of layer 'last' is not finite"):
        calibrate(model, _X)
    np.testing.assert_array_equal(model.get_layer("end").gain, [1, 1, 1])


def test_a_method_of_the_users_stays_on_an_add():
    x = keras.Input((9, 10, 3))
    add = keras.layers.Add()
    model = keras.Model(x, add([x, AutomaticGainControl(name="end")(_conv(3)(x))]))
    calls = []

    def call(tensors):
        calls.append(tensors)
        return tensors[0] + tensors[1]

    add.call = call
    assert [row.shortcut for row in calibrate(model, _X)] == [f"that of {add.name}"]
    assert add.call is call and len(calls) == 1


def test_what_another_thread_adds_meanwhile_is_its_own():
    class InAnotherThread(keras.layers.Layer):
        """Calls the model in another thread, once."""

        def call(self, x):
            if tf.executing_eagerly() and not results:
                results.append(None)
                thread = threading.Thread(target=lambda: results.append(model(100 * _X).numpy()))
                thread.start()
                thread.join(60)
            return x

    x = keras.Input((9, 10, 3))
    branch = AutomaticGainControl(name="end")(x)  # the first of the two that is called
    model = keras.Model(x, branch + InAnotherThread()(x))
    results = [None]
    (expected,) = (row.gain for row in calibrate(model, _X) if row.shortcut)
    model.get_layer("end").gain.assign([1, 1, 1])
    results.clear()
    calibrate(model, _X)
    assert len(results) == 2
    np.testing.assert_array_equal(model.get_layer("end").gain, expected)


def test_samples_are_measured_a_few_at_a_time(monkeypatch):
    x = tf.constant(5 + 2 * _X)
    expected = [np.mean(x.numpy().astype("float64"), (0, 1, 2)), np.var(x.numpy().astype("float64"), (0, 1, 2))]
    for elements in (1, 9 * 10 * 3 * 3, 2**20):  # one sample, parts of 3, 3 and 2, and all of them
        monkeypatch.setattr(calibration, "_ELEMENTS_AT_ONCE", elements)
        np.testing.assert_allclose(calibration._moments(x, -1), expected, rtol=1e-12)


def test_order_of_execution():
    model = _built(Subclassed(name="model"))
    assert [row.layer.split("/")[-2] for row in calibrate(model, _X)] == [
        model.first.name,
        model.second.name,
    ]


def test_signs_are_kept_and_0_becomes_positive():
    model = keras.Sequential([keras.Input((9, 10, 3)), AutomaticGainControl("relu")])
    model.layers[0].gain.assign([-3.0, 2.0, 0.0])
    (row,) = calibrate(model, _X)
    np.testing.assert_array_equal(np.sign(model.layers[0].gain), [-1, 1, 1])
    np.testing.assert_array_equal(row.gain, model.layers[0].gain)


def test_mean_scale_0_counts_the_standard_deviation_not_the_mean():
    layer = AutomaticGainControl(mean_scale_initializer="zeros")
    model = keras.Sequential([keras.Input((9, 10, 3)), layer])
    calibrate(model, _X + 100)
    np.testing.assert_allclose(layer.gain, 1 / np.std(_X, axis=(0, 1, 2)), rtol=1e-3)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_policies(policy):
    layer = AutomaticGainControl("relu", dtype=policy)
    model = keras.Sequential([keras.Input((9, 10, 3)), _conv(5, dtype=policy), layer])
    calibrate(model, _X)
    (std,) = _z_std(model, _X)
    np.testing.assert_allclose(std, np.ones(5), rtol=0.01)


def test_channels_first():
    layer = AutomaticGainControl("relu", data_format="channels_first")
    model = keras.Sequential([keras.Input((3, 9, 10)), layer])
    calibrate(model, 7 * np.moveaxis(_X, -1, 1))
    np.testing.assert_allclose(_z_std(model, 7 * np.moveaxis(_X, -1, 1))[0], np.ones(3), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_dead_and_constant_channels_keep_their_gain(dtype):
    x = _X.copy()
    x[..., 0] = 0
    # Constant maps that differ from sample to sample: u is 0, up to rounding.
    x[..., 2] = np.linspace(-1000, 1000, 8)[:, None, None]
    gain = keras.initializers.Constant(-7.0)
    layer = AutomaticGainControl("relu", gain_initializer=gain, mean_scale_initializer="ones", dtype=dtype)
    model = keras.Sequential([keras.Input((9, 10, 3)), layer])
    (row,) = calibrate(model, x)
    assert row.kept == [0, 2]
    np.testing.assert_array_equal(layer.gain.numpy()[[0, 2]], [-7, -7])
    np.testing.assert_allclose(layer.gain.numpy()[1], -1 / x[..., 1].std(), rtol=0.01)
    assert "2 constant, gain kept: 0, 2" in str(calibrate(model, x))


def test_constant_maps_that_differ_are_not_constant_where_part_of_their_mean_stays():
    x = _X.copy()
    x[..., 2] = np.linspace(-1000, 1000, 8)[:, None, None]
    layer = AutomaticGainControl()
    (row,) = calibrate(keras.Sequential([keras.Input((9, 10, 3)), layer]), x)
    assert row.kept == []
    np.testing.assert_allclose(layer.gain[2], 1 / (0.75 * x[..., 2].std()), rtol=1e-4)


def test_the_constraint_has_the_last_word():
    class AtMostOne(keras.constraints.Constraint):
        def __call__(self, gain):
            return tf.minimum(gain, 1.0)

    layer = AutomaticGainControl("relu", gain_constraint=AtMostOne())
    model = keras.Sequential([keras.Input((9, 10, 3)), layer])
    x = _X * np.array([0.1, 10, 0.01], np.float32)
    table = calibrate(model, x)
    assert table[0].constrained == [0, 2]
    np.testing.assert_array_equal(layer.gain.numpy()[[0, 2]], [1, 1])
    np.testing.assert_allclose(layer.gain.numpy()[1], 1 / x[..., 1].std(), rtol=0.01)
    np.testing.assert_array_equal(table[0].gain, layer.gain)
    assert "2 changed by gain_constraint: 0, 2" in str(table)


def test_rounding_noise_is_constant():
    noise = np.random.default_rng(0).choice([0, 2.0**-14], _X.shape)  # one float32 step at 1000
    model = keras.Sequential([keras.Input((9, 10, 3)), AutomaticGainControl()])
    (row,) = calibrate(model, (1000 + noise).astype(np.float32))
    assert row.kept == [0, 1, 2]


def test_shared_layer_is_calibrated_on_its_first_call():
    inputs = keras.Input((9, 10, 3))
    shared = AutomaticGainControl()
    model = keras.Model(inputs, shared(5 * shared(inputs)))
    (row,) = calibrate(model, _X)
    assert row.calls == 2
    first, second = _z_std(model, _X)
    np.testing.assert_allclose(first, np.ones(3), rtol=1e-4)
    np.testing.assert_allclose(second, 5 / np.std(_X, axis=(0, 1, 2)), rtol=0.05)


def test_time_distributed():
    block = keras.Sequential([keras.Input((9, 10, 3)), _conv(), AutomaticGainControl("relu")])
    inputs = keras.Input((4, 9, 10, 3))
    model = keras.Model(inputs, keras.layers.TimeDistributed(block)(inputs))
    (row,) = calibrate(model, _batch(2, 4, 9, 10, 3))
    assert row.calls == 4 and row.gain.shape == (5,)


def test_several_inputs():
    a, b = keras.Input((9, 10, 3), name="a"), keras.Input((9, 10, 3), name="b")
    outputs = keras.layers.Multiply()([AutomaticGainControl()(a), AutomaticGainControl()(b)])
    model = keras.Model({"a": a, "b": b}, outputs)
    first, second = calibrate(model, {"a": _X, "b": 10 * _X})
    np.testing.assert_allclose(first.gain, 10 * second.gain, rtol=1e-4)


class Sum(keras.layers.Layer):
    def call(self, inputs):
        first, second = inputs
        return first if second is None else first + second

    def compute_output_shape(self, shapes):
        return shapes[0]


@pytest.mark.parametrize("container", [list, tuple, lambda inputs: dict(zip(("a", "b"), inputs, strict=True))])
def test_none_for_an_optional_input(container):
    a, b = keras.Input((9, 10, 3), name="a"), keras.Input((9, 10, 3), name="b", optional=True)
    model = keras.Model([a, b], AutomaticGainControl()(Sum()([a, b])))
    (row,) = calibrate(model, container([2 * _X, None]))
    np.testing.assert_allclose(row.gain, 0.5 / _X.std(axis=(0, 1, 2)), rtol=0.1)
    (row,) = calibrate(model, container([2 * _X, 2 * _X]))
    np.testing.assert_allclose(row.gain, 0.25 / _X.std(axis=(0, 1, 2)), rtol=0.1)
    with pytest.raises(ValueError, match=r"batch must have at least one sample, got shapes \[\]"):
        calibrate(model, container([None, None]))


def test_sparse_and_ragged_batches():
    inputs = keras.Input((30,), sparse=True)
    model = keras.Model(inputs, AutomaticGainControl()(keras.layers.Reshape((5, 6))(keras.layers.Dense(30)(inputs))))
    assert calibrate(model, tf.sparse.from_dense(np.eye(4, 30, dtype=np.float32)))[0].calls == 1
    with pytest.raises(ValueError, match="batch must be finite, got NaN or Inf"):
        calibrate(model, tf.sparse.from_dense(np.diag(np.full(30, np.nan, np.float32))))

    class Ragged(keras.Model):
        def __init__(self):
            super().__init__()
            self.agc = AutomaticGainControl()

        def call(self, x):
            return self.agc(x.to_tensor()[..., None])

    model, batch = Ragged(), tf.ragged.constant([[1.0, 2.0, 3.0], [4.0, 5.0]])
    model(batch)
    assert calibrate(model, batch)[0].calls == 1


def test_compiled_and_trained_model():
    model = _sequential()
    model.compile("sgd", "mse")
    x = np.concatenate([_X, _X])
    model.fit(x, np.zeros((16, 9, 10, 5)), verbose=0)
    calibrate(model, _X)
    for std in _z_std(model, _X):
        np.testing.assert_allclose(std, np.ones(5), rtol=1e-4)
    # The traced functions read the new gains.
    np.testing.assert_allclose(model.predict(_X, verbose=0), model(_X), rtol=1e-4, atol=1e-4)


def test_nothing_else_changes():
    inputs = keras.Input(batch_shape=(8, 9, 10, 3))
    x = keras.layers.RandomFlip(seed=1)(inputs)
    x = keras.layers.BatchNormalization()(_conv()(x))
    x = keras.layers.Dropout(0.5, seed=1)(AutomaticGainControl("relu")(x))
    x = keras.layers.Reshape((9, 50))(x)
    gru = keras.layers.GRU(2, stateful=True)
    model = keras.Model(inputs, gru(x))
    model.compile("adam", "mse")
    model(_X)
    state = gru.states[0].numpy()
    (layer,) = [layer for layer in model.layers if isinstance(layer, AutomaticGainControl)]
    before = {v.path: v.numpy().copy() for v in model.variables + model.optimizer.variables}
    calibrate(model, _X)
    after = {v.path: v.numpy() for v in model.variables + model.optimizer.variables}
    changed = {path for path, value in before.items() if not np.array_equal(value, after[path])}
    assert changed == {layer.gain.path, layer.bias.path}
    assert state.any()
    np.testing.assert_array_equal(gru.states[0], state)  # which is none of the model's variables
    assert agc_layer.observer.get() is None and not tf.config.functions_run_eagerly()


def test_a_frozen_layer_is_calibrated_too():
    model = keras.Sequential([keras.Input((9, 10, 3)), AutomaticGainControl()])
    model.trainable = False
    calibrate(model, 5 * _X)
    np.testing.assert_allclose(_z_std(model, 5 * _X)[0], np.ones(3), rtol=1e-4)


def test_table():
    text = str(calibrate(_sequential(), _X))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "channels", "std", "before", "gain"]
    assert len(lines) == 4 and "automatic_gain_control" in lines[1]
    assert all(line == line.rstrip() for line in lines)


def test_layers_that_are_not_reached():
    class Training(keras.Model):
        def __init__(self):
            super().__init__()
            self.always, self.seldom = AutomaticGainControl(), AutomaticGainControl(name="seldom")

        def call(self, x, training=False):
            return self.seldom(x) if training else self.always(x)

    model = Training()
    model(_X, training=True)
    model(_X)
    table = calibrate(model, 3 * _X)
    assert [row.calls for row in table] == [1, 0] and "seldom" in table[1].layer
    assert "not reached: nothing changed" in str(table)
    np.testing.assert_array_equal(model.seldom.gain, np.ones(3))


class Fails(keras.layers.Layer):
    def call(self, x):
        if tf.executing_eagerly():
            raise ArithmeticError("broken on purpose")
        return x


def test_an_exception_leaves_no_trace():
    agc = AutomaticGainControl()
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((9, 10, 3)), norm, agc, Fails()])
    before = [weight.copy() for weight in model.get_weights()]
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        calibrate(model, 5 * _X)
    for weight, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)
    assert agc_layer.observer.get() is None and not tf.config.functions_run_eagerly()


def test_errors():
    model = _sequential()
    with pytest.raises(TypeError, match="model must be a keras.Model, got Conv2D"):
        calibrate(_conv(), _X)
    with pytest.raises(ValueError, match="'plain' has no AutomaticGainControl layer to calibrate"):
        calibrate(keras.Sequential([keras.Input((9, 10, 3)), _conv()], name="plain"), _X)
    for unbuilt in (Subclassed(name="new"), keras.Sequential([AutomaticGainControl()], name="new")):
        with pytest.raises(ValueError, match="model 'new' is not built: call it on a batch"):
            calibrate(unbuilt, _X)
    with pytest.raises(ValueError, match=r"batch must have at least one sample, got shapes \[\[0, 9"):
        calibrate(model, _X[:0])
    with pytest.raises(ValueError, match="batch must be finite, got NaN or Inf"):
        calibrate(model, np.where(_X > 3, np.nan, _X))
    with pytest.raises(TypeError, match="batch must be one batch of inputs, got a tf.data.Dataset"):
        calibrate(model, tf.data.Dataset.from_tensors(_X))
    with pytest.raises(TypeError, match="batch must be one batch of inputs, as arrays or tensors, got NoneType"):
        calibrate(model, None)
    for bad in (0.0, -1.0, np.nan, np.inf, "a", None):
        with pytest.raises(ValueError, match=f"target_std must be a number, finite and > 0, got {bad!r}"):
            calibrate(model, _X, target_std=bad)
        with pytest.raises(ValueError, match=f"target_std must be a number, finite and > 0, got {bad!r}"):
            calibrate(model, _X, target_std={model.layers[-1].path: bad})
    for bad in (0.0, -1.0, np.nan, np.inf, "a"):
        with pytest.raises(ValueError, match=f"branch_factor must be a number, finite and > 0, got {bad!r}"):
            calibrate(model, _X, branch_factor=bad)
    with pytest.raises(ValueError, match=r"target_std must name .* of model '.*' by their paths, got \['x', 'y'\]"):
        calibrate(model, _X, target_std={"y": 1, "x": 1})
    calibrate(model, _X, target_std=np.float32(2))


def test_not_finite_inside_names_the_layer():
    model = keras.Sequential(
        [
            keras.Input((9, 10, 3)),
            AutomaticGainControl(name="fine"),
            keras.layers.Rescaling(1e30),
            keras.layers.Rescaling(1e30),
            AutomaticGainControl(name="broken"),
        ]
    )
    with pytest.raises(ValueError, match="the input of layer '.*broken' is not finite on this batch"):
        calibrate(model, _X)
    np.testing.assert_array_equal(model.get_layer("fine").gain, np.ones(3))


def test_only_in_traced_code_names_the_layer():
    class Mapped(keras.Model):
        def __init__(self):
            super().__init__()
            self.agc = AutomaticGainControl(name="hidden")

        def call(self, x):
            return tf.vectorized_map(lambda sample: self.agc(sample[None])[0], x)

    model = Mapped()
    model.agc.build((None, 9, 10, 3))
    model(_X)
    with pytest.raises(RuntimeError, match="layer 'hidden' is only called in traced code"):
        calibrate(model, _X)


def test_a_deep_network_with_gain_4_keeps_its_scale():
    layers = [keras.Input((16, 16, 3))]
    for _ in range(12):
        gain = keras.initializers.Constant(4.0)
        layers += [_conv(8), AutomaticGainControl("relu", gain_initializer=gain)]
    model = keras.Sequential(layers)
    x = _batch(4, 16, 16, 3)
    assert np.std(model(x)) > 100
    calibrate(model, x)
    assert 0.1 < np.std(model(x)) < 1
