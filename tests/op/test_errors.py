"""Every sentence that the kernels and shape functions refuse with; Python's are beside its modules."""

import re

import pytest
import tensorflow as tf

from agc_testing import python
from tf_agc import native

pytestmark = pytest.mark.usefixtures("native_required")


_SHAPES = {"x": (4, 5, 5, 64), "gain": (64,), "mean_scale": (64,), "bias": (64,), "shortcut": (4, 5, 5, 64)}
_OTHERS = {"activation": "relu", "alpha": 0.0, "data_format": "channels_last"}


def _arguments(changes):
    """Tensors and attributes of a call; bias and shortcut only where the changes have them."""
    shapes = {name: changes.get(name, shape) for name, shape in [*_SHAPES.items()][:3]}
    shapes |= {name: changes[name] for name in ("bias", "shortcut") if name in changes}
    assert changes.keys() <= {*_SHAPES, *_OTHERS}
    return {name: tf.ones(shape) for name, shape in shapes.items()}, {
        name: changes.get(name, value) for name, value in _OTHERS.items()
    }


def _forward(**changes):
    tensors, attributes = _arguments(changes)
    return native.agc(**tensors, **attributes)


_FORWARD = {
    "x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels), got shape [2,3]": {
        "x": (2, 3),
        "gain": (3,),
        "mean_scale": (3,),
    },
    "x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels), got shape [1,1,1,1,1,1,1,1,3]": {
        "x": (1,) * 8 + (3,),
        "gain": (3,),
        "mean_scale": (3,),
    },
    "gain must have shape [C] = [64], got [32]": {"gain": (32,)},
    "gain must have shape [C] = [64], got []": {"gain": ()},
    "gain must have shape [C] = [64], got [1,64]": {"gain": (1, 64)},
    "mean_scale must have shape [C] = [64], got [32]": {"mean_scale": (32,)},
    "mean_scale must have shape [C] = [5], got [64]": {
        "data_format": "channels_first",
        "gain": (5,),
    },
    "bias must have shape [C] = [64], got [32]": {"bias": (32,)},
    "bias must have shape [C] = [64], got []": {"bias": (), "shortcut": (4, 5, 5, 64)},
    "bias must have shape [C] = [64], got [4,5,5,64]": {"bias": (4, 5, 5, 64)},
    "shortcut must have the shape of x [4,5,5,64], got [4,5,1,64]": {"shortcut": (4, 5, 1, 64)},
    "shortcut must have the shape of x [4,5,5,64], got [64]": {"shortcut": (64,)},
    "shortcut must have the shape of x [4,5,5,64], got [4,25,64]": {"bias": (64,), "shortcut": (4, 25, 64)},
    "shortcut must have the shape of x [4,64,5,5], got [4,5,5,64]": {
        "x": (4, 64, 5, 5),
        "shortcut": (4, 5, 5, 64),
        "data_format": "channels_first",
    },
    "x has no positions (a spatial size is 0) but a batch of 4: the mean of an empty map is "
    "undefined, got shape [4,0,5,3]": {"x": (4, 0, 5, 3), "gain": (3,), "mean_scale": (3,)},
    "x has no positions (a spatial size is 0) but a batch of 4: the mean of an empty map is "
    "undefined, got shape [4,3,5,0]": {
        "x": (4, 3, 5, 0),
        "gain": (3,),
        "mean_scale": (3,),
        "data_format": "channels_first",
    },
    "alpha must be finite and >= 0, got -1": {"activation": "elu", "alpha": -1.0},
    # In every thread, also where it compares as 0, and is printed as -0.
    "alpha must be finite and >= 0, got -": {"activation": "leaky_relu", "alpha": -1e-45},
    "alpha must be finite and >= 0, got inf": {"activation": "leaky_relu", "alpha": float("inf")},
    "alpha must be finite and >= 0, got nan": {"activation": "leaky_relu", "alpha": float("nan")},
}


@pytest.mark.parametrize("message", _FORWARD, ids=range(len(_FORWARD)))
def test_forward_eager(message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        _forward(**_FORWARD[message])


@pytest.mark.parametrize("message", _FORWARD, ids=range(len(_FORWARD)))
def test_forward_of_unknown_shapes(message):
    # Nothing is known when the graph is built: the kernel says it.
    tensors, attributes = _arguments(_FORWARD[message])
    agc = tf.function(
        lambda *values: native.agc(**dict(zip(tensors, values, strict=True)), **attributes),
        input_signature=[tf.TensorSpec(None)] * len(tensors),
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        agc(*tensors.values())


def _backward(dy=(4, 5, 5, 64), dmean=(4, 64), kept=(4, 5, 5, 64), mean=(4, 64), gain=(64,), mean_scale=(64,),
              bias=(), shortcut=(), activation="relu", alpha=0.0, data_format="N...C"):  # fmt: skip
    return native._ops.tf_agc_agc_grad(
        *(tf.ones(shape) for shape in (dy, dmean, kept, mean, gain, mean_scale)),
        [tf.ones(shape) for shape in bias],
        [tf.ones(shape) for shape in shortcut],
        activation=activation,
        alpha=alpha,
        data_format=data_format,
    )


_BACKWARD = {
    "dy must have the shape of kept [4,5,5,64], got [4,5,6,64]": {"dy": (4, 5, 6, 64)},
    "dy must have the shape of kept [4,5,5,64], got [100,64]": {"dy": (100, 64)},
    "dmean must have shape [N, C] = [4,64], got [64,4]": {"dmean": (64, 4)},
    "mean must have shape [N, C] = [4,64], got [4,1,64]": {"mean": (4, 1, 64)},
    "gain must have shape [C] = [64], got [32]": {"gain": (32,)},
    "mean_scale must have shape [C] = [64], got []": {"mean_scale": ()},
    "bias must have shape [C] = [64], got [1]": {"bias": [(1,)]},
    "shortcut must have the shape of kept [4,5,5,64], got [1,5,5,64]": {"bias": [(64,)], "shortcut": [(1, 5, 5, 64)]},
    "shortcut must be absent where activation is linear: its gradient is dy": {
        "shortcut": [(4, 5, 5, 64)],
        "activation": "linear",
    },
    "bias must be absent or one tensor, got 2": {"bias": [(64,)] * 2},
    "shortcut must be absent or one tensor, got 3": {"shortcut": [(4, 5, 5, 64)] * 3},
    "dmean must have shape [N, C] = [4,5], got [4,64]": {"data_format": "NC..."},
    "alpha must be finite and >= 0, got -1": {"activation": "elu", "alpha": -1.0},
}


@pytest.mark.parametrize("message", _BACKWARD, ids=range(len(_BACKWARD)))
def test_backward(message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        _backward(**_BACKWARD[message])


@pytest.mark.parametrize("message", [message for message in _BACKWARD if "absent" in message])
def test_backward_refused_while_the_graph_is_built(message):
    with pytest.raises(ValueError, match=message):
        tf.function(lambda: _backward(**_BACKWARD[message])).get_concrete_function()


@pytest.mark.parametrize("name, number", [("bias", 2), ("shortcut", 5)])
def test_forward_with_more_than_one(name, number, mode):
    maps, ones = tf.ones([2, 4, 3]), tf.ones([3])
    lists = {"bias": [], "shortcut": [], name: [ones if name == "bias" else maps] * number}

    def call():
        return native._ops.tf_agc_agc(maps, ones, ones, **lists, activation="relu", alpha=0.0, data_format="N...C")

    call = tf.function(call) if mode == "function" else call
    error = ValueError if mode == "function" else tf.errors.InvalidArgumentError
    with pytest.raises(error, match=f"{name} must be absent or one tensor, got {number}"):
        call()


def test_backward_rank_and_positions():
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"must have rank 3 to 8 .*got shape \[4,64\]"):
        _backward(dy=(4, 64), kept=(4, 64))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"no positions .*got shape \[4,0,64\]"):
        _backward(dy=(4, 0, 64), kept=(4, 0, 64))


@pytest.mark.parametrize(
    "x_dtype, parameter_dtype",
    [("float64", "float32"), ("float32", "float64"), ("float16", "float64")],
)
def test_dtypes_of_parameters(x_dtype, parameter_dtype):
    parameter = tf.ones([3], parameter_dtype)
    with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.NotFoundError)):
        native.agc(tf.ones([2, 4, 3], x_dtype), parameter, parameter, "relu", 0.0, "channels_last")


@pytest.mark.parametrize("optional", [{"bias": "float64"}, {"shortcut": "float16"}], ids=str)
def test_dtypes_of_bias_and_shortcut(optional):
    ones = tf.ones([3])
    ((name, dtype),) = optional.items()
    wrong = {name: tf.ones([3] if name == "bias" else [2, 4, 3], dtype)}
    with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.NotFoundError)):
        native.agc(tf.ones([2, 4, 3]), ones, ones, "relu", 0.0, "channels_last", **wrong)


def test_integers_are_refused_by_tensorflow():
    with pytest.raises((tf.errors.InvalidArgumentError, TypeError)):
        native.agc(tf.ones([2, 4, 3], tf.int32), tf.ones([3]), tf.ones([3]), "relu", 0.0, "channels_last")


def test_unknown_activation_is_refused_by_tensorflow():
    with pytest.raises(tf.errors.InvalidArgumentError, match="tanh"):
        _forward(activation="tanh")


@pytest.mark.parametrize("jit", [False, True])
def test_sizes_without_elements_may_be_anything(jit):
    # Their product, 2**80, is 0 to 64 bits: it is not taken for a map without positions, nor computed.
    def agc(x, ones):
        return native.agc(x, ones, ones, "relu", 0.0, "channels_first")

    y, mean = tf.function(agc, jit_compile=jit)(tf.zeros([2, 0, 2**40, 2**40]), tf.ones([0]))
    assert y.shape == [2, 0, 2**40, 2**40] and mean.shape == [2, 0]


_WITHOUT_MEMORY = """
import resource
import tensorflow as tf
from tf_agc import native

tf.config.set_visible_devices([], "GPU")  # the limit is one of the CPU's memory
channels = 2**21
maps, means, parameters = tf.ones([64, 1, channels], tf.float16), tf.ones([64, channels]), tf.ones([channels])

def backward(maps, means, parameters):
    return native._ops.tf_agc_agc_grad(
        maps, means, maps, means, parameters, parameters, [], [], activation="relu", alpha=0.0, data_format="N...C"
    )

jit = JIT
call = tf.function(backward, jit_compile=True) if jit else backward
few = maps[:1], means[:1], parameters
if jit:
    call = call.get_concrete_function(maps, means, parameters)
else:
    call(*few)  # TensorFlow's own first allocations
with open("/proc/self/statm") as statm:
    pages = int(statm.read().split()[0])
# Enough for dx, not for the 2 GiB of the groups' sums.
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1792 * 2**20, resource.RLIM_INFINITY))
try:
    call(maps, means, parameters)
except tf.errors.ResourceExhaustedError as error:
    print(error.message)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(backward(*few)[0].shape)
"""


@pytest.mark.parametrize("jit", [False, True])
def test_no_memory_is_an_error_and_not_the_end(jit):
    done = python("-c", _WITHOUT_MEMORY.replace("JIT", str(jit)))
    message, shape = done.stdout.splitlines()
    assert "tf_agc got no memory for its sums" in message
    assert shape == "(1, 1, 2097152)"
