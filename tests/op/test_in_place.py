"""When the kernels write over their inputs, counted in the kernels, and when they must not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from agc_testing import ACTIVATIONS, make_case
from tf_agc import AutomaticGainControl, native, reference

pytestmark = pytest.mark.usefixtures("native_required", "fresh_keras")

_ATTRIBUTES = "relu", 0.0, "channels_last"


def _blocks(number=8, use_bias=True):
    layers = [keras.Input((8, 8, 4))]
    for _ in range(number):
        layers += [keras.layers.Conv2D(4, 3, padding="same", use_bias=False)]
        layers += [AutomaticGainControl("relu", use_bias=use_bias)]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()])


@pytest.mark.parametrize("use_bias", [True, False])
def test_training_graph_of_8_blocks(counters, use_bias):
    model = _blocks(use_bias=use_bias)
    optimizer = keras.optimizers.SGD(0.01)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    x = tf.random.normal([4, 8, 8, 4])
    step(x)
    counters.reset()
    step(x)
    counts = counters.read()
    assert counts["forward"] == counts["backward"] == 8
    assert counts["forward_in_place"] == 8
    assert counts["dx_over_dy"] + counts["dx_over_kept"] >= 7


def test_fit_and_predict(counters):
    model = _blocks(3)
    model.compile("sgd", "mse", jit_compile=False)  # on a GPU Keras would choose XLA, which has counters of its own
    x = np.random.default_rng(0).standard_normal((8, 8, 8, 4)).astype(np.float32)
    counters.reset()
    model.fit(x, np.zeros((8, 4)), batch_size=4, verbose=0)
    counts = counters.read()
    assert counts["forward"] == counts["backward"] == counts["forward_in_place"] == 6
    counters.reset()
    model.predict(x, batch_size=8, verbose=0)
    assert counters.read()["forward_in_place"] == 3


def test_linear_keeps_its_input_while_training(counters):
    # The gain's gradient reads x: writing y over it would be wrong, and TensorFlow knows.
    case = make_case((2, 6, 5, 8), "float32", "linear")

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch([x, case.gain])
            y, _ = native.agc(x + 1.0, case.gain, case.mean_scale, *case.attributes)
        return tape.gradient(y, [x, case.gain], output_gradients=case.dy)

    step(case.x)
    counts = counters.read()
    assert (counts["forward"], counts["forward_in_place"], counts["backward"]) == (1, 0, 1)


def test_fused_gradient_does_not_read_x():
    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = native.agc(x, tf.ones([8]), tf.ones([8]), *_ATTRIBUTES)
        return tape.gradient(y, x)

    graph = step.get_concrete_function(tf.TensorSpec([2, 4, 8])).graph
    x = graph.inputs[0]
    assert [consumer.type for consumer in x.consumers()] == ["TfAgc>Agc"]


_BOTH = {"bias": True, "shortcut": True}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_gradient_of_a_fused_activation_reads_x_and_none_of_linear_the_shortcut(activation):
    case = make_case((2, 6, 5, 8), "float32", activation, **_BOTH)

    @tf.function
    def step(x, shortcut, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, case.gain, shortcut])
            y, _ = case.call(native.agc, [x, case.gain, case.mean_scale, case.bias, shortcut])
        return tape.gradient(y, [x, case.gain, shortcut], output_gradients=dy)

    graph = step.get_concrete_function(case.x, case.shortcut, case.dy).graph
    x, shortcut, dy, *_ = graph.inputs
    readers = {name: [reader.type for reader in value.consumers()] for name, value in (("x", x), ("s", shortcut))}
    alone, both = ["TfAgc>Agc"], ["TfAgc>Agc", "TfAgc>AgcGrad"]
    assert readers == ({"x": both, "s": alone} if activation == "linear" else {"x": alone, "s": both})
    if activation == "linear":  # nothing is computed or written for the shortcut's gradient
        of_shortcut = graph.outputs[2].op
        assert of_shortcut.type == "Identity" and of_shortcut.inputs[0] is dy


@pytest.mark.parametrize("dead", ["x", "shortcut", "x shortcut", ""])
@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_y_over_x_or_else_over_the_shortcut(activation, dead, counters):
    case = make_case((2, 6, 5, 8), "float32", activation, **_BOTH)
    maps = {"x": case.x, "shortcut": case.shortcut}
    before = {name: value.numpy().copy() for name, value in maps.items()}

    @tf.function
    def agc(x, shortcut, one):
        # Arguments live on, products do not.
        x, shortcut = (
            value * one if name in dead.split() else value for name, value in (("x", x), ("shortcut", shortcut))
        )
        return case.call(native.agc, [x, case.gain, case.mean_scale, case.bias, shortcut])

    want = case.call(native.agc, case.inputs.values())
    counters.reset()
    for got, wanted in zip(agc(case.x, case.shortcut, tf.constant(1.0)), want, strict=True):
        np.testing.assert_array_equal(got, wanted)
    counts = counters.read()
    assert counts["forward"] == 1
    assert counts["forward_in_place"] == ("x" in dead.split())
    assert counts["forward_over_shortcut"] == (dead == "shortcut")
    for name, value in maps.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("activation", "shortcut_dies", "want"),
    [
        # dy becomes dshortcut, and dx takes the place of the shortcut or else of y.
        ("relu", True, {"forward_in_place": 1, "dshortcut_over_dy": 1}),
        ("relu", False, {"forward_in_place": 1, "dshortcut_over_dy": 1, "dx_over_kept": 1}),
        # dshortcut is dy itself, which dx must leave alone, and x is kept.
        ("linear", True, {"forward_over_shortcut": 1, "dx_over_kept": 1}),
        ("linear", False, {"dx_over_kept": 1}),
    ],
)
def test_a_junction_in_training(activation, shortcut_dies, want, counters):
    case = make_case((5, 33, 31, 67), "float32", activation, **_BOTH)

    def step(x, shortcut, dy, one):
        x, dy = x * one, dy * one
        shortcut = shortcut * one if shortcut_dies else shortcut
        inputs = [x, case.gain, case.mean_scale, case.bias, shortcut]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y, _ = case.call(native.agc, inputs)
        return tape.gradient(y, inputs, output_gradients=dy)

    arguments = case.x, case.shortcut, case.dy, tf.constant(1.0)
    copies = step(*arguments)  # eager mode never writes in place
    counters.reset()
    got = tf.function(step)(*arguments)
    counts = counters.read()
    assert counts == dict.fromkeys(counts, 0) | {"forward": 1, "backward": 1} | want
    for one, other in zip(got, copies, strict=True):
        np.testing.assert_array_equal(one, other)  # the same bits


def test_training_graph_of_4_residual_blocks(counters):
    filters = [tf.Variable(tf.random.stateless_normal([3, 3, 4, 4], [i, 0]) / 6) for i in range(8)]
    gains = [tf.Variable(tf.ones([4])) for _ in filters]

    def agc(x, gain, shortcut=None):
        return native.agc(x, gain, tf.ones([4]), *_ATTRIBUTES, bias=tf.zeros([4]), shortcut=shortcut)[0]

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            for i in range(0, 8, 2):
                inner = agc(tf.nn.conv2d(x, filters[i], 1, "SAME"), gains[i])
                x = agc(tf.nn.conv2d(inner, filters[i + 1], 1, "SAME"), gains[i + 1], shortcut=x)
            loss = tf.reduce_mean(x**2)
        return tape.gradient(loss, [*filters, *gains])

    step(tf.random.stateless_normal([4, 8, 8, 4], [8, 0]))
    counts = counters.read()
    assert counts["forward"] == counts["forward_in_place"] == counts["backward"] == 8
    assert counts["dshortcut_over_dy"] == 4 and counts["dx_over_dy"] + counts["dx_over_kept"] >= 4


def test_eager_inputs_are_never_overwritten(counters):
    case = make_case((2, 6, 5, 8), **_BOTH)
    before = {name: value.numpy().copy() for name, value in vars(case).items() if tf.is_tensor(value)}
    with tf.GradientTape() as tape:
        tape.watch([case.x, case.shortcut])
        y, mean = case.call(native.agc, case.inputs.values())
    y_before = y.numpy().copy()
    tape.gradient([y, mean], [case.x, case.shortcut], output_gradients=[case.dy, case.dmean])
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(case, name), value)
    np.testing.assert_array_equal(y, y_before)
    assert counters.read()["backward"] == 1


@pytest.mark.parametrize("name", ["x", "shortcut"])
@pytest.mark.parametrize("source", ["argument", "constant", "variable", "captured"])
def test_inputs_that_live_on_are_never_overwritten(source, name, counters):
    value = make_case((2, 6, 5, 8)).x
    before = value.numpy().copy()
    variable = tf.Variable(value)
    ones = tf.ones([8])

    def call(agc, maps):
        others = {"x": maps + 1.0, "shortcut": None} | {name: maps}
        return agc(others["x"], ones * 2, ones, *_ATTRIBUTES, shortcut=others["shortcut"])[0]

    @tf.function
    def agc(argument):
        maps = {
            "argument": lambda: argument,
            "constant": lambda: tf.constant(before),
            "variable": variable.read_value,
            "captured": lambda: value,
        }[source]()
        return call(native.agc, maps)

    first, second = agc(value).numpy(), agc(value).numpy()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(value, before)
    np.testing.assert_array_equal(variable, before)
    np.testing.assert_allclose(first, call(reference.agc, tf.constant(before)), rtol=1e-5, atol=1e-5)
    assert counters.read()["forward"] == 2


@pytest.mark.parametrize("as_shortcut", [False, True])
def test_an_intermediate_that_others_read_is_not_overwritten(as_shortcut, counters):
    ones = tf.ones([8])

    @tf.function
    def agc(x):
        shared = tf.exp(x)
        y, _ = native.agc(shared, ones, ones, *_ATTRIBUTES, shortcut=shared if as_shortcut else None)
        with tf.control_dependencies([y]):  # read after the op has run
            return y, tf.identity(shared)

    x = make_case((2, 6, 5, 8)).x
    y, shared = agc(x)
    np.testing.assert_allclose(shared, tf.exp(x), rtol=1e-6)
    want, _ = reference.agc(tf.exp(x), ones, ones, *_ATTRIBUTES, shortcut=tf.exp(x) if as_shortcut else None)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    assert counters.read()["forward_in_place"] == counters.read()["forward_over_shortcut"] == 0


def test_results_in_place_are_those_of_a_copy(counters):
    # Eager mode never writes in place, a function does: the same bits.
    case = make_case((5, 33, 31, 67))

    @tf.function
    def in_place(x, dy, one):
        x, dy = x * one, dy * one  # a constant 1 would be optimized away
        with tf.GradientTape() as tape:
            tape.watch([x, case.gain, case.mean_scale])
            y, _ = native.agc(x, case.gain, case.mean_scale, *case.attributes)
        return tape.gradient(y, [x, case.gain, case.mean_scale], output_gradients=dy)

    got = in_place(case.x, case.dy, tf.constant(1.0))
    counts = counters.read()
    assert counts["forward_in_place"] == 1
    assert counts["dx_over_dy"] + counts["dx_over_kept"] == 1
    with tf.GradientTape() as tape:
        tape.watch([case.x, case.gain, case.mean_scale])
        y, _ = native.agc(case.x, case.gain, case.mean_scale, *case.attributes)
    want = tape.gradient(y, [case.x, case.gain, case.mean_scale], output_gradients=case.dy)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
