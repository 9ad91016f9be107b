"""TensorFlow's transformations of code with the native op: batching, loops, branches, recomputation.

Whatever a transformation gives for the reference, it must give for the native op.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.ops.parallel_for import pfor

import tf_agc
from agc_testing import ACTIVATIONS, DATA_FORMATS, EPSILON, assert_close, make_case
from tf_agc import AutomaticGainControl, native, reference

pytestmark = pytest.mark.usefixtures("native_required", "fresh_keras")


@pytest.fixture
def no_fallback(monkeypatch):
    """Fails where vectorization would run an op in a loop; some callers have no option for that."""

    def fail(pfor_input, **_):
        raise AssertionError(f"{pfor_input.op_type} was not vectorized")

    monkeypatch.setattr(pfor, "_fallback_converter", fail)


def _run(function, mode):
    return tf.function(function)() if mode == "function" else function()


# Each layout and each mode, without the product of both.
_LAYOUT_AND_MODE = pytest.mark.parametrize(
    ("data_format", "mode"), [("channels_last", "eager"), ("channels_first", "function")]
)

# ---- vectorized_map ----


def _vectorized(function, elements):
    return tf.vectorized_map(function, elements, fallback_to_while_loop=False)


def _one_by_one(function, elements):
    results = [function(list(element)) for element in zip(*map(tf.unstack, elements), strict=True)]
    return [tf.stack(values) for values in zip(*results, strict=True)]


def _elements(case, number=4):
    """Different x, gain and mean_scale for every element."""
    rng = np.random.default_rng(7)
    values = (case.x, case.gain, case.mean_scale)
    return [tf.cast(rng.uniform(0.5, 2, (number, *value.shape)), value.dtype) * value for value in values]


def _gradients(agc, case, inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y, mean = agc(*inputs, *case.attributes)
    return [y, mean, *tape.gradient([y, mean], inputs, output_gradients=[case.dy, case.dmean])]


@pytest.mark.parametrize("mapped", ["x", "gain", "mean_scale", "x gain mean_scale"])
@pytest.mark.parametrize("activation", ["linear", "elu"])
@_LAYOUT_AND_MODE
def test_vectorized_map(activation, data_format, mapped, mode):
    case = make_case((3, 4, 5, 6), "float64", activation, data_format)

    def one(agc):
        def gradients(element):
            shared = (case.x, case.gain, case.mean_scale)
            names = ("x", "gain", "mean_scale")
            inputs = [
                own if name in mapped.split() else other
                for name, own, other in zip(names, element, shared, strict=True)
            ]
            return _gradients(agc, case, inputs)

        return gradients

    got = _run(lambda: _vectorized(one(native.agc), _elements(case)), mode)
    assert_close(got, _one_by_one(one(reference.agc), _elements(case)), 1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_vectorized_map_in_every_dtype(dtype):
    case = make_case((3, 4, 5, 6), dtype, "relu")

    def one(element):
        return _gradients(native.agc, case, [element[0], case.gain, case.mean_scale])

    # The same kernels on the same numbers: the maps have the same bits.
    got, want = _vectorized(one, _elements(case)), _one_by_one(one, _elements(case))
    for index in (0, 2):  # y, dx
        np.testing.assert_array_equal(got[index], want[index])
    assert [value.dtype for value in got] == [value.dtype for value in want]
    assert_close(got, want, 8 * EPSILON["float32"])


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_vectorized_map_of_rank_8(data_format):
    # The op takes no rank 9: the mapped axis must go into another one.
    case = make_case((2, 1, 2, 1, 3, 1, 2, 3), "float64", "relu", data_format)

    def one(element):
        return _gradients(native.agc, case, element)

    assert_close(_vectorized(one, _elements(case)), _one_by_one(one, _elements(case)), 1e-12)


def test_nested_vectorized_map():
    case = make_case((2, 3, 4, 5), "float64", "leaky_relu")
    gains = _elements(case)[1]

    def nested(apply):
        def outer(element):
            def inner(gain):
                return _gradients(native.agc, case, [element[0], gain[0], case.mean_scale])

            return apply(inner, [gains])

        return apply(outer, [_elements(case)[0]])

    assert_close(nested(_vectorized), nested(_one_by_one), 1e-12)


def test_gradient_through_vectorized_map(mode):
    case = make_case((2, 3, 4, 5), "float64", "elu")
    elements = _elements(case)

    def through(agc, apply):
        def compute():
            with tf.GradientTape() as tape:
                tape.watch([*elements, case.mean_scale])
                y, _ = apply(lambda e: agc(e[0], e[1], case.mean_scale, *case.attributes), elements)
                loss = tf.reduce_sum(tf.square(y))
            return tape.gradient(loss, [*elements[:2], case.mean_scale])

        return compute

    got = _run(through(native.agc, _vectorized), mode)
    assert_close(got, through(reference.agc, _one_by_one)(), 1e-12)


def test_vectorized_map_of_unknown_sizes_and_of_no_elements():
    case = make_case((2, 3, 4, 5), "float32", "relu")

    @tf.function(input_signature=[tf.TensorSpec([None] * 5), tf.TensorSpec([None, None])])
    def compute(x, gain):
        return _vectorized(lambda e: native.agc(e[0], e[1], case.mean_scale, *case.attributes)[0], [x, gain])

    x, gain, _ = _elements(case)
    assert_close(compute(x, gain)[1], native.agc(x[1], gain[1], case.mean_scale, *case.attributes)[0], 1e-6)
    assert compute(x[:0], gain[:0]).shape == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("read", ["dx", "dgain", "all"])
def test_vectorized_gradients_that_nobody_reads_are_dropped(read, counters):
    # dx has the mapped axis in the batch, the parameters' gradients have it in the channels.
    case = make_case((2, 3, 4, 5), "float32", "relu")
    which = {"dx": slice(2, 3), "dgain": slice(3, 4), "all": slice(2, 5)}[read]

    def one(element):
        return _gradients(native.agc, case, [element[0], case.gain, case.mean_scale])[which]

    _vectorized(one, _elements(case))
    counts = counters.read()
    assert (counts["forward"], counts["backward"]) == (1, 2 if read == "all" else 1)


def test_gradients_of_each_example(no_fallback):
    model = keras.Sequential([keras.Input((6, 6, 2))])
    for activation in ("relu", None):
        model.add(keras.layers.Conv2D(3, 3, use_bias=False))
        model.add(AutomaticGainControl(activation, mean_scale_initializer=keras.initializers.Constant(0.5)))
    variables = [variable.value for variable in model.trainable_variables]

    def one(element):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(element[0][tf.newaxis])))
        return tape.gradient(loss, variables)

    x = [tf.constant(np.random.default_rng(0).standard_normal((5, 6, 6, 2)), tf.float32)]
    got = tf.vectorized_map(one, x)
    with tf_agc.implementation("reference"):
        want = _one_by_one(one, x)
    assert_close(got, want, 1e-4)


# ---- Jacobians ----


@pytest.mark.parametrize("activation", ACTIVATIONS)
@_LAYOUT_AND_MODE
def test_jacobians(activation, data_format, mode, no_fallback):
    case = make_case((2, 3, 2, 2), "float64", activation, data_format)
    inputs = [case.x, case.gain, case.mean_scale]

    def jacobians(agc):
        def compute():
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(inputs)
                y, mean = agc(*inputs, *case.attributes)
            return [tape.jacobian(y, inputs), tape.jacobian(mean, case.x), tape.batch_jacobian(y, case.x)]

        return compute

    assert_close(_run(jacobians(native.agc), mode), _run(jacobians(reference.agc), "function"), 1e-12)


def test_hessian_as_the_jacobian_of_a_gradient(no_fallback):
    case = make_case((2, 3, 2, 2), "float64", "elu")
    inputs = [case.x, case.gain, case.mean_scale]

    def hessian(agc):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                y, mean = agc(*inputs, *case.attributes)
                loss = tf.reduce_sum(tf.square(y)) * tf.reduce_sum(mean * case.dmean)
            dx, dgain, _ = inner.gradient(loss, inputs)
        return [outer.jacobian(dx, inputs), outer.jacobian(dgain, inputs)]

    assert_close(tf.function(hessian)(native.agc), tf.function(hessian)(reference.agc), 1e-10)


# ---- Loops, branches, recomputation ----


def _map_fn(agc, case):
    def one(element):
        return tuple(agc(*element, *case.attributes))

    elements = tuple(tf.stack([value, value * 2]) for value in (case.x, case.gain, case.mean_scale))
    return tf.map_fn(one, elements, fn_output_signature=(case.x.dtype, case.gain.dtype))


def _while_loop(agc, case):
    def body(i, x, total):
        y, mean = agc(x, case.gain, case.mean_scale, *case.attributes)
        return i + 1, y + x, total + mean

    _, x, total = tf.while_loop(lambda i, *_: i < 3, body, [0, case.x, tf.zeros_like(case.dmean)])
    return x, total


def _cond(agc, case):
    def branch(scale):
        return lambda: agc(case.x * scale, case.gain, case.mean_scale, *case.attributes)

    one, other = (tf.cond(tf.reduce_sum(case.gain) > bound, branch(1), branch(3)) for bound in (-1e9, 1e9))
    return one[0] * other[0], one[1] * other[1]


def _recompute_grad(agc, case):
    @tf.recompute_grad
    def block(x, gain, mean_scale):
        for _ in range(2):
            x, mean = agc(x, gain, mean_scale, *case.attributes)
        return x, mean

    return block(case.x, case.gain, case.mean_scale)


# tf.recompute_grad refuses a second order, of whatever it recomputes.
@pytest.mark.parametrize(
    ("transformation", "order"),
    [*itertools.product([_map_fn, _while_loop, _cond], [1, 2]), (_recompute_grad, 1)],
)
def test_loops_branches_and_recomputation(transformation, order, mode):
    case = make_case((2, 3, 4, 5), "float64", "leaky_relu")
    inputs = [case.x, case.gain, case.mean_scale]

    def gradients(agc):
        def compute():
            with tf.GradientTape() as outer:
                outer.watch(inputs)
                with tf.GradientTape() as inner:
                    inner.watch(inputs)
                    y, mean = transformation(agc, case)
                    loss = tf.reduce_sum(y * case.dy) + tf.reduce_sum(tf.square(mean) * case.dmean)
                first = inner.gradient(loss, inputs)
                norm = tf.add_n([tf.reduce_sum(tf.square(gradient)) for gradient in first])
            return first if order == 1 else outer.gradient(norm, inputs)

        return compute

    assert_close(_run(gradients(native.agc), mode), _run(gradients(reference.agc), mode), 1e-12)


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_gradients_of_what_is_gathered(activation, mode):
    # They come as IndexedSlices.
    case = make_case((4, 3, 5), "float64", activation)
    inputs = [case.x, case.gain, case.mean_scale]

    def gradients(agc):
        def compute():
            with tf.GradientTape() as outer:
                outer.watch(inputs)
                with tf.GradientTape() as inner:
                    inner.watch(inputs)
                    y, mean = agc(*inputs, *case.attributes)
                    gathered = [tf.gather(tf.square(y), [2, 0, 2]), tf.gather(y, [1]), tf.gather(mean, [1, 1])]
                first = inner.gradient(gathered, inputs)
                gathered = [tf.gather(gradient, [1, 1, 0]) for gradient in first]
            return first, outer.gradient(gathered, inputs)

        return compute

    assert_close(_run(gradients(native.agc), mode), gradients(reference.agc)(), 1e-12)
