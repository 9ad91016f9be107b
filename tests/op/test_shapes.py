"""The ops' shape functions: what is known when a graph is built, and what is refused there."""

import pytest
import tensorflow as tf

from tf_agc import native

pytestmark = pytest.mark.usefixtures("native_required")


def _shapes(x, gain, mean_scale=None, data_format="channels_last", dtype=tf.float32, **optional):
    """Static shapes of y and mean; bias and shortcut are absent where they have no shape in `optional`."""
    parameter = tf.float64 if dtype == tf.float64 else tf.float32
    specs = [
        tf.TensorSpec(x, dtype),
        tf.TensorSpec(gain, parameter),
        tf.TensorSpec(mean_scale, parameter),
    ]
    specs += [tf.TensorSpec(shape, parameter if name == "bias" else dtype) for name, shape in optional.items()]

    @tf.function
    def function(x, gain, mean_scale, *others):
        named = dict(zip(optional, others, strict=True))
        return native.agc(x, gain, mean_scale, "relu", 0.0, data_format, **named)

    outputs = function.get_concrete_function(*specs).output_shapes
    return [shape.as_list() if shape.rank is not None else None for shape in outputs]


@pytest.mark.parametrize(
    "x, gain, mean_scale, y, mean",
    [
        ([2, 5, 6, 7], [7], [7], [2, 5, 6, 7], [2, 7]),
        ([2, 5, 6, 7], None, None, [2, 5, 6, 7], [2, 7]),
        ([None, None, None, 7], [None], None, [None, None, None, 7], [None, 7]),
        ([None, None, None, None], [7], None, [None, None, None, 7], [None, 7]),
        ([None, None, None, None], None, [7], [None, None, None, 7], [None, 7]),
        ([None, 5, None, None], None, None, [None, 5, None, None], [None, None]),
        ([2, 5, 7], [7], [7], [2, 5, 7], [2, 7]),
        ([2, 1, 2, 3, 4, 5, 6, 7], [7], [7], [2, 1, 2, 3, 4, 5, 6, 7], [2, 7]),
        (None, [7], None, None, [None, 7]),
        (None, None, None, None, [None, None]),
        ([0, 5, 7], [7], [7], [0, 5, 7], [0, 7]),
    ],
)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_forward(x, gain, mean_scale, y, mean, data_format):
    if data_format == "channels_first":
        x, y = ([s[0], s[-1], *s[1:-1]] if s else None for s in (x, y))
    assert _shapes(x, gain, mean_scale, data_format) == [y, mean]


@pytest.mark.parametrize(
    "x, optional, y, mean",
    [
        ([None, 5, None], {"bias": [7]}, [None, 5, 7], [None, 7]),
        ([None, 5, None], {"bias": None}, [None, 5, None], [None, None]),
        ([None, 5, None], {"shortcut": [2, None, 7]}, [2, 5, 7], [2, 7]),
        (None, {"bias": [7], "shortcut": [2, 5, None]}, [2, 5, 7], [2, 7]),
        (None, {"bias": [None], "shortcut": None}, None, [None, None]),
    ],
)
def test_forward_with_bias_and_shortcut(x, optional, y, mean):
    assert _shapes(x, None, **optional) == [y, mean]


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float64])
def test_dtypes(dtype):
    assert _shapes([2, None, 7], None, None, dtype=dtype) == [[2, None, 7], [2, 7]]
    assert _shapes([2, None, 7], None, None, dtype=dtype, bias=None, shortcut=None) == [[2, None, 7], [2, 7]]


@pytest.mark.parametrize(
    "x, gain, mean_scale, message",
    [
        ([2, 7], [7], [7], "rank"),
        ([1] * 9, [1], [1], "rank"),
        ([2, 5, 7], [6], [7], "gain|6"),
        ([2, 5, 7], [7], [6], "mean_scale|6"),
        ([2, 5, 7], [], [7], "gain|rank 1"),
        ([2, 5, 7], [7], [7, 1], "mean_scale|rank 1"),
        ([None, None, None], [7], [6], "7.*6|6.*7"),
    ],
)
def test_refused_while_the_graph_is_built(x, gain, mean_scale, message):
    with pytest.raises(ValueError, match=message):
        _shapes(x, gain, mean_scale)


@pytest.mark.parametrize(
    "optional",
    [
        {"bias": [6]},
        {"bias": [1]},
        {"bias": []},
        {"bias": [2, 5, 7]},
        {"shortcut": [7]},
        {"shortcut": [1, 5, 7]},
        {"shortcut": [2, 5, 7, 1]},
        {"bias": [7], "shortcut": [2, 6, 7]},
    ],
    ids=str,
)
def test_bias_and_shortcut_refused_while_the_graph_is_built(optional):
    with pytest.raises(ValueError, match="Dimension|Shape"):
        _shapes([2, 5, 7], [7], [7], **optional)


def _grad_shapes(dy, kept, gain=None, data_format="N...C", dmean=None, mean=None, bias=(), shortcut=()):
    """Static shapes of the outputs, one after the other; bias and shortcut are lists of none or one."""
    specs = [tf.TensorSpec(shape) for shape in (dy, dmean, kept, mean, gain, None, *bias, *shortcut)]

    @tf.function
    def function(*inputs):
        optional = inputs[6 : 6 + len(bias)], inputs[6 + len(bias) :]
        results = native._ops.tf_agc_agc_grad(
            *inputs[:6], *optional, activation="relu", alpha=0.0, data_format=data_format
        )
        return tf.nest.flatten(results)

    outputs = function.get_concrete_function(*specs).output_shapes
    return [shape.as_list() if shape.rank is not None else None for shape in outputs]


@pytest.mark.parametrize(
    "dy, kept, gain, dx, parameter",
    [
        ([2, 5, 7], [2, 5, 7], [7], [2, 5, 7], [7]),
        ([None, 5, None], [2, None, None], [7], [2, 5, 7], [7]),
        ([2, 5, None], None, [7], [2, 5, 7], [7]),
        (None, [2, 5, 7], None, [2, 5, 7], [7]),
        (None, None, [7], None, [7]),
        (None, None, None, None, [None]),
    ],
)
def test_backward(dy, kept, gain, dx, parameter):
    assert _grad_shapes(dy, kept, gain) == [dx, parameter, parameter]


def test_backward_with_bias_and_shortcut():
    known, unknown = [2, 5, 7], [None, None, None]
    assert _grad_shapes(known, unknown, bias=[None]) == [known, [7], [7], [7]]
    assert _grad_shapes(unknown, None, shortcut=[known]) == [known, [7], [7], known]
    assert _grad_shapes(None, None, bias=[[7]], shortcut=[None]) == [None, [7], [7], [7], None]


def test_backward_channels_first():
    assert _grad_shapes([2, 7, None], None, data_format="NC...") == [[2, 7, None], [7], [7]]


@pytest.mark.parametrize(
    "arguments",
    [
        {"dy": [2, 5, 7], "kept": [2, 6, 7]},
        {"dy": [2, 5, 7], "kept": None, "gain": [6]},
        {"dy": [2, 7], "kept": None},
        {"dy": [2, 5, 7], "kept": None, "dmean": [2, 6]},
        {"dy": [2, 5, 7], "kept": None, "mean": [3, 7]},
        {"dy": [2, 5, 7], "kept": None, "mean": [2, 5, 7]},
        {"dy": [2, 5, 7], "kept": None, "bias": [[6]]},
        {"dy": [2, 5, 7], "kept": None, "shortcut": [[2, 1, 7]]},
        {"dy": [2, 5, 7], "kept": None, "bias": [[7]] * 2},
    ],
    ids=str,
)
def test_backward_refused_while_the_graph_is_built(arguments):
    with pytest.raises(ValueError):
        _grad_shapes(**arguments)


def test_gradient_keeps_shapes_in_a_graph():
    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 7])])
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = native.agc(x, tf.ones([7]), tf.ones([7]), "relu", 0.0, "channels_last")
        return tape.gradient(y, x)

    assert step.get_concrete_function().output_shapes.as_list() == [None, None, None, 7]
