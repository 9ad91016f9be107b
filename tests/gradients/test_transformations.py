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
    """Different inputs for every element."""
    rng = np.random.default_rng(7)
    values = case.inputs.values()
    return [tf.cast(rng.uniform(0.5, 2, (number, *value.shape)), value.dtype) * value for value in values]


def _gradients(agc, case, inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y, mean = case.call(agc, inputs)
    return [y, mean, *tape.gradient([y, mean], inputs, output_gradients=[case.dy, case.dmean])]


_BOTH = {"bias": True, "shortcut": True}


@pytest.mark.parametrize(
    ("mapped", "optional"),
    [
        *itertools.product(["x", "gain", "mean_scale"], [{}]),
        ("bias", {"bias": True}),
        ("shortcut", {"shortcut": True}),
        *itertools.product(["x", "bias", "shortcut", "x gain mean_scale bias shortcut"], [_BOTH]),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["linear", "elu"])
@_LAYOUT_AND_MODE
def test_vectorized_map(activation, data_format, mapped, optional, mode):
    case = make_case((3, 4, 5, 6), "float64", activation, data_format, **optional)

    def one(agc):
        def gradients(element):
            shared = case.inputs.items()
            inputs = [
                own if name in mapped.split() else other for own, (name, other) in zip(element, shared, strict=True)
            ]
            return _gradients(agc, case, inputs)

        return gradients

    got = _run(lambda: _vectorized(one(native.agc), _elements(case)), mode)
    assert_close(got, _one_by_one(one(reference.agc), _elements(case)), 1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_vectorized_map_in_every_dtype(dtype):
    case = make_case((3, 4, 5, 6), dtype, "relu", **_BOTH)

    def one(element):
        return _gradients(native.agc, case, [element[0], *[*case.inputs.values()][1:]])

    # The same kernels on the same numbers: the maps have the same bits.
    got, want = _vectorized(one, _elements(case)), _one_by_one(one, _elements(case))
    for index in (0, 2, 6):  # y, dx, dshortcut
        np.testing.assert_array_equal(got[index], want[index])
    assert [value.dtype for value in got] == [value.dtype for value in want]
    assert_close(got, want, 8 * EPSILON["float32"])


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_vectorized_map_of_rank_8(data_format):
    # The op takes no rank 9: the mapped axis must go into another one.
    case = make_case((2, 1, 2, 1, 3, 1, 2, 3), "float64", "relu", data_format, **_BOTH)

    def one(element):
        return _gradients(native.agc, case, element)

    assert_close(_vectorized(one, _elements(case)), _one_by_one(one, _elements(case)), 1e-12)


def test_nested_vectorized_map():
    case = make_case((2, 3, 4, 5), "float64", "leaky_relu", **_BOTH)
    _, gains, _, _, shortcuts = _elements(case)

    def nested(apply):
        def outer(element):
            def inner(own):
                return _gradients(native.agc, case, [element[0], own[0], case.mean_scale, case.bias, own[1]])

            return apply(inner, [gains, shortcuts])

        return apply(outer, [_elements(case)[0]])

    assert_close(nested(_vectorized), nested(_one_by_one), 1e-12)


def test_gradient_through_vectorized_map(mode):
    case = make_case((2, 3, 4, 5), "float64", "elu", **_BOTH)
    elements = _elements(case)
    elements[2:3] = []

    def through(agc, apply):
        def compute():
            sources = [*elements, case.mean_scale]
            with tf.GradientTape() as tape:
                tape.watch(sources)
                y, _ = apply(lambda e: case.call(agc, [*e[:2], case.mean_scale, *e[2:]]), elements)
                loss = tf.reduce_sum(tf.square(y))
            return tape.gradient(loss, sources)

        return compute

    got = _run(through(native.agc, _vectorized), mode)
    assert_close(got, through(reference.agc, _one_by_one)(), 1e-12)


def test_vectorized_map_of_unknown_sizes_and_of_no_elements():
    case = make_case((2, 3, 4, 5), "float32", "relu", **_BOTH)
    maps, channels = tf.TensorSpec([None] * 5), tf.TensorSpec([None, None])

    @tf.function(input_signature=[maps, channels, channels, channels, maps])
    def compute(*elements):
        return _vectorized(lambda element: case.call(native.agc, element)[0], [*elements])

    elements = _elements(case)
    assert_close(compute(*elements)[1], case.call(native.agc, [value[1] for value in elements])[0], 1e-6)
    assert compute(*[value[:0] for value in elements]).shape == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("read", ["dx", "dshortcut", "dgain", "dbias", "all"])
def test_vectorized_gradients_that_nobody_reads_are_dropped(read, counters):
    # Maps' gradients have the mapped axis in the batch, the parameters' have it in the channels.
    case = make_case((2, 3, 4, 5), "float32", "relu", **_BOTH)
    names = ["y", "mean", *(f"d{name}" for name in case.inputs)]
    which = slice(2, None) if read == "all" else slice(names.index(read), names.index(read) + 1)

    def one(element):
        return _gradients(native.agc, case, [element[0], *[*case.inputs.values()][1:]])[which]

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
    case = make_case((2, 3, 2, 2), "float64", activation, data_format, **_BOTH)
    inputs = [*case.inputs.values()]

    def jacobians(agc):
        def compute():
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(inputs)
                y, mean = case.call(agc, inputs)
            of_maps = [tape.batch_jacobian(y, maps) for maps in (case.x, case.shortcut)]
            return [tape.jacobian(y, inputs), tape.jacobian(mean, case.x), *of_maps]

        return compute

    assert_close(_run(jacobians(native.agc), mode), _run(jacobians(reference.agc), "function"), 1e-12)


def test_hessian_as_the_jacobian_of_a_gradient(no_fallback):
    case = make_case((2, 3, 2, 2), "float64", "elu", **_BOTH)
    inputs = [*case.inputs.values()]

    def hessian(agc):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                y, mean = case.call(agc, inputs)
                loss = tf.reduce_sum(tf.square(y)) * tf.reduce_sum(mean * case.dmean)
            gradients = inner.gradient(loss, inputs)
        return [outer.jacobian(gradient, inputs) for gradient in gradients]

    assert_close(tf.function(hessian)(native.agc), tf.function(hessian)(reference.agc), 1e-10)


# ---- Loops, branches, recomputation ----


def _map_fn(agc, case):
    def one(element):
        return tuple(case.call(agc, element))

    elements = tuple(tf.stack([value, value * 2]) for value in case.inputs.values())
    return tf.map_fn(one, elements, fn_output_signature=(case.x.dtype, case.gain.dtype))


def _while_loop(agc, case):
    def body(i, x, total):
        y, mean = case.call(agc, [x, *[*case.inputs.values()][1:]])
        return i + 1, y + x, total + mean

    _, x, total = tf.while_loop(lambda i, *_: i < 3, body, [0, case.x, tf.zeros_like(case.dmean)])
    return x, total


def _cond(agc, case):
    def branch(scale):
        return lambda: case.call(agc, [case.x * scale, *[*case.inputs.values()][1:]])

    one, other = (tf.cond(tf.reduce_sum(case.gain) > bound, branch(1), branch(3)) for bound in (-1e9, 1e9))
    return one[0] * other[0], one[1] * other[1]


def _recompute_grad(agc, case):
    @tf.recompute_grad
    def block(x, *others):
        for _ in range(2):
            x, mean = case.call(agc, [x, *others])
        return x, mean

    return block(*case.inputs.values())


# tf.recompute_grad refuses a second order, of whatever it recomputes.
@pytest.mark.parametrize(
    ("transformation", "order"),
    [*itertools.product([_map_fn, _while_loop, _cond], [1, 2]), (_recompute_grad, 1)],
)
def test_loops_branches_and_recomputation(transformation, order, mode):
    case = make_case((2, 3, 4, 5), "float64", "leaky_relu", **_BOTH)
    inputs = [*case.inputs.values()]

    def gradients(agc):
        def compute():
            with tf.GradientTape() as outer:
                outer.watch(inputs)
                with tf.GradientTape() as inner:
                    inner.watch(inputs)
                    y, mean = transformation(agc, case)
                    loss = tf.reduce_sum(y * case.dy) + tf.reduce_sum(tf.square(mean) * case.dmean)
                first = inner.gradient(loss, inputs)
                # y, too: the first derivatives alone do not depend on a bias.
                norm = tf.add_n([tf.reduce_sum(tf.square(value)) for value in (*first, y)])
            return first if order == 1 else outer.gradient(norm, inputs)

        return compute

    assert_close(_run(gradients(native.agc), mode), _run(gradients(reference.agc), mode), 1e-12)


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_gradients_of_what_is_gathered(activation, mode):
    # They come as IndexedSlices.
    case = make_case((4, 3, 5), "float64", activation, **_BOTH)
    inputs = [*case.inputs.values()]

    def gradients(agc):
        def compute():
            with tf.GradientTape() as outer:
                outer.watch(inputs)
                with tf.GradientTape() as inner:
                    inner.watch(inputs)
                    y, mean = case.call(agc, inputs)
                    gathered = [tf.gather(tf.square(y), [2, 0, 2]), tf.gather(y, [1]), tf.gather(mean, [1, 1])]
                first = inner.gradient(gathered, inputs)
                gathered = [tf.gather(gradient, [1, 1, 0]) for gradient in first]
            return first, outer.gradient(gathered, inputs)

        return compute

    assert_close(_run(gradients(native.agc), mode), gradients(reference.agc)(), 1e-12)
