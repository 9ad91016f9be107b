"""Examples of GraphDefs with one node of ours, as nobody's program writes them, and what is expected of them.

A graph is made right and then changed: attributes, inputs, shapes, what is fed, or bytes of its serialized form. It
must not be imported, or be refused with one of the errors of `_REFUSALS` when it runs, or run; and what ran is
compared with the reference in float64, with the attributes and the inputs that the imported node really has,
within the bounds of agc_testing.py. No process, no option, no loop over examples here.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from hypothesis import strategies as st

import agc_testing
import tf_agc  # noqa: F401  loads the ops

NODE = "node"
INPUTS = {  # those that are always there
    "TfAgc>Agc": ("x", "gain", "mean_scale"),
    "TfAgc>AgcGrad": ("dy", "dmean", "kept", "mean", "gain", "mean_scale"),
}
_FORMATS = {"channels_last": "N...C", "channels_first": "NC..."}
_REFUSALS = (ValueError, TypeError, tf.errors.InvalidArgumentError)
# TensorFlow's own sentences about ops and attributes that it does not know, as NotFoundError or UnimplementedError.
_UNKNOWN = "Op type not registered|Attr .* is not found|Placeholder value is not supported for attributes not in OpDef"

Mutation = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """A right graph, and what is then changed in it.

    inputs: of each input in turn: "const", "placeholder" of its shape, or "unknown", a placeholder of unknown shape.
    mutations: what `_change` takes.
    raw: (place, byte) in the serialized graph: the byte is replaced, or removed where it is -1.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    activation: str
    data_format: str
    seed: int
    inputs: tuple[str, ...]
    in_function: bool
    mutations: tuple[Mutation, ...]
    raw: tuple[tuple[float, int], ...]
    optional: str = "neither"  # a key of agc_testing.OPTIONAL


def _some(values: st.SearchStrategy, most: int) -> st.SearchStrategy:
    return st.lists(values, max_size=most).map(tuple)


_NODES = st.sampled_from([NODE] * 4 + ["input0", "input1", "input2"])
_SHAPES = _some(st.one_of(st.integers(-1, 5), st.sampled_from([-2, 2**31, 2**40])), 9)
_TYPES = st.one_of(st.sampled_from([1, 2, 14, 19, 3, 7]), st.integers(0, 200))
_WORDS = st.one_of(
    st.sampled_from([*agc_testing.ACTIVATIONS, *_FORMATS.values(), "NHWC", "tanh", ""]),
    st.text("NC.elué\0", max_size=5),
)
_ALPHAS = st.sampled_from([0.0, 0.5, 1.7, -0.0, 1e-45, -1e-45, -1.0, -1.2e-38, math.nan, math.inf, -math.inf])
_VALUES = st.one_of(
    st.tuples(st.just("s"), st.one_of(_WORDS.map(lambda word: word.encode("utf-8", "replace")), st.binary(max_size=4))),
    st.tuples(st.just("f"), _ALPHAS),
    st.tuples(st.just("i"), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just("b"), st.booleans()),
    st.tuples(st.just("type"), _TYPES),
    st.tuples(st.just("shape"), _SHAPES),
    st.tuples(st.just("shapes"), _some(_SHAPES, 3)),
    st.tuples(st.just("words"), _some(st.binary(max_size=4), 2)),
    st.tuples(st.just("placeholder"), st.just("T")),
)
_ATTRIBUTES = st.sampled_from(["T", "U", "num_bias", "num_shortcut", "activation", "alpha", "data_format"])
_NAMES = st.one_of(_ATTRIBUTES, st.sampled_from(["dtype", "shape", "value", "_output_shapes", "_class", "more"]))
_MUTATIONS = st.one_of(
    st.tuples(st.just("attribute"), _NODES, _NAMES, _VALUES),
    st.tuples(st.just("attribute"), st.just(NODE), st.just("alpha"), st.tuples(st.just("f"), _ALPHAS)),
    st.tuples(
        st.just("attribute"),
        st.just(NODE),
        st.sampled_from(["activation", "data_format"]),
        st.tuples(st.just("s"), _WORDS.map(lambda word: word.encode("utf-8", "replace"))),
    ),
    st.tuples(st.just("attribute"), st.just(NODE), st.sampled_from(["T", "U"]), st.tuples(st.just("type"), _TYPES)),
    st.tuples(
        st.just("attribute"),
        st.just(NODE),
        st.sampled_from(["num_bias", "num_shortcut"]),
        st.tuples(st.just("i"), st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**63 - 1])),
    ),
    st.tuples(st.just("attribute"), _NODES, st.just("_output_shapes"), st.tuples(st.just("shapes"), _some(_SHAPES, 3))),
    st.tuples(st.just("attribute"), st.just("input0"), st.just("shape"), st.tuples(st.just("shape"), _SHAPES)),
    st.tuples(st.just("remove"), _NODES, _NAMES),
    st.tuples(
        st.just("input"),
        st.integers(0, 9),
        st.sampled_from(
            ["input0", "input1", "input2", "input0:1", "^input0", "node", "node:1", "nothing", "", ":", "-"]
        ),
    ),
    st.tuples(st.just("feed"), st.integers(0, 7), _some(st.integers(0, 5), 9)),
    st.tuples(st.just("op"), _NODES, st.sampled_from([*INPUTS, "TfAgc>Other", "Identity", ""])),
    st.tuples(st.just("device"), _NODES, st.sampled_from(["/cpu:0", "/gpu:7", "/job:other/task:1", "nonsense"])),
    st.tuples(st.just("producer"), st.integers(-1, 5000)),
)


@st.composite
def examples(draw: Callable) -> Example:
    raw = draw(st.integers(0, 3)) == 0
    return Example(
        op=draw(st.sampled_from([*INPUTS])),
        shape=draw(st.lists(st.integers(1, 5), min_size=3, max_size=8).map(tuple)),
        dtype=draw(st.sampled_from(agc_testing.DTYPES)),
        activation=draw(st.sampled_from(agc_testing.ACTIVATIONS)),
        data_format=draw(st.sampled_from(agc_testing.DATA_FORMATS)),
        seed=draw(st.integers(0, 2**31)),
        # Bytes of a constant are values and sizes that TensorFlow allocates: none of ours.
        inputs=draw(
            st.lists(
                st.sampled_from(["placeholder", "unknown"] if raw else ["const", "placeholder", "unknown"]),
                min_size=1,
                max_size=3,
            ).map(tuple)
        ),
        in_function=draw(st.booleans()),
        mutations=() if raw else draw(_some(_MUTATIONS, 3)),
        raw=draw(_some(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(-1, 255)), 2)) if raw else (),
        optional=draw(st.sampled_from([*agc_testing.OPTIONAL])),
    )


def _tensors(example: Example) -> tuple[agc_testing.Case, list[np.ndarray]]:
    """A case, and what its node gets: for the gradient what the reference keeps of the forward pass."""
    bias, shortcut = agc_testing.OPTIONAL[example.optional]
    if example.op == "TfAgc>AgcGrad" and example.activation == "linear":
        shortcut = False  # the op refuses it
    case = agc_testing.make_case(
        example.shape,
        example.dtype,
        example.activation,
        example.data_format,
        seed=example.seed,
        bias=bias,
        shortcut=shortcut,
    )
    results = agc_testing.float64_results(case)
    kept = case.x if example.activation == "linear" else tf.cast(results.y, example.dtype)
    values = {
        **{name: getattr(case, name) for name in ("x", "gain", "mean_scale", "dy", "dmean")},
        "kept": kept,
        "mean": tf.cast(results.mean, case.gain.dtype),
        **case.optional,
    }
    return case, [values[name].numpy() for name in (*INPUTS[example.op], *case.optional)]


def _graph(example: Example, case: agc_testing.Case, tensors: list[np.ndarray]) -> tf.compat.v1.GraphDef:
    graph = tf.compat.v1.GraphDef()
    graph.versions.producer = tf.version.GRAPH_DEF_VERSION
    for index, tensor in enumerate(tensors):
        kind = example.inputs[index % len(example.inputs)]
        dtype = tf.as_dtype(tensor.dtype).as_datatype_enum
        node = graph.node.add(name=f"input{index}", op="Const" if kind == "const" else "Placeholder")
        node.attr["dtype"].type = dtype
        if kind == "const":
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(tensor))
        else:
            shape = tf.TensorShape(tensor.shape if kind == "placeholder" else None)
            node.attr["shape"].shape.CopyFrom(shape.as_proto())
    node = graph.node.add(name=NODE, op=example.op, input=[f"input{index}" for index in range(len(tensors))])
    node.attr["T"].type = case.x.dtype.as_datatype_enum
    node.attr["U"].type = case.gain.dtype.as_datatype_enum
    node.attr["num_bias"].i = int("bias" in case.optional)
    node.attr["num_shortcut"].i = int("shortcut" in case.optional)
    node.attr["activation"].s = case.activation.encode()
    node.attr["alpha"].f = case.alpha
    node.attr["data_format"].s = _FORMATS[case.data_format].encode()
    return graph


def _change(graph: tf.compat.v1.GraphDef, feeds: dict[str, np.ndarray], mutation: Mutation) -> None:
    nodes = {node.name: node for node in graph.node}
    kind, *arguments = mutation
    if kind == "attribute":
        name, attribute, (field, value) = arguments
        new = nodes[name].attr[attribute]
        new.Clear()
        if field == "shape":
            _fill(new.shape, value)
        elif field == "shapes":
            new.list.SetInParent()
            for shape in value:
                _fill(new.list.shape.add(), shape)
        elif field == "words":
            new.list.s.extend(value)
        else:
            setattr(new, field, value)
    elif kind == "remove":
        nodes[arguments[0]].attr.pop(arguments[1], None)
    elif kind == "input":
        index, new = arguments
        inputs = [*nodes[NODE].input]
        inputs[index : index + 1] = [] if new == "-" else [new]
        nodes[NODE].input[:] = inputs
    elif kind == "feed":
        name = f"input{arguments[0]}"
        if name in feeds:
            feeds[name] = np.ones(arguments[1], feeds[name].dtype)
    elif kind == "producer":
        graph.versions.producer = arguments[0]
    else:
        setattr(nodes[arguments[0]], kind, arguments[1])


def _fill(shape: Any, sizes: tuple[int, ...]) -> None:
    shape.SetInParent()
    for size in sizes:
        shape.dim.add(size=size)


def outcome(example: Example) -> str:
    case, tensors = _tensors(example)
    graph = _graph(example, case, tensors)
    feeds = {node.name: tensor for node, tensor in zip(graph.node, tensors, strict=False) if node.op == "Placeholder"}
    for mutation in example.mutations:
        _change(graph, feeds, mutation)
    kind = "bytes" if example.raw else "mutations" if example.mutations else "right"
    try:
        if example.raw:
            content = bytearray(graph.SerializeToString())
            for place, byte in example.raw:
                index = int(place * len(content))
                content[index : index + 1] = [] if byte < 0 else [byte]
            graph = tf.compat.v1.GraphDef.FromString(bytes(content))
        operation, outputs, inputs = _run(graph, feeds, example.in_function)
    except (*_REFUSALS, DecodeError) as error:
        refusal: Exception = error
    except _NotImportedError as error:
        assert kind != "right", f"a right graph was not imported: {error.__cause__}"
        return f"{kind}, not imported: {error}"
    except (tf.errors.NotFoundError, tf.errors.UnimplementedError) as error:
        if not re.search(_UNKNOWN, str(error)):
            raise
        refusal = error
    else:
        if operation is None or operation.type not in INPUTS:
            return f"{kind}, without our node"
        return f"{kind}, {_compared(case, tensors, operation, outputs, inputs)}"
    assert kind != "right", f"a right graph was refused: {refusal}"
    return f"{kind}, refused: {type(refusal).__name__}"


class _NotImportedError(Exception):
    """Any error of TensorFlow's importer, which has bugs of its own. It calls our shape functions, and makes
    one kind of error of whatever they say.
    """


def _import(graph: tf.compat.v1.GraphDef) -> None:
    try:
        tf.compat.v1.import_graph_def(graph, name="")
    except Exception as error:
        raise _NotImportedError(type(error).__name__) from error


def _run(graph: tf.compat.v1.GraphDef, feeds: dict[str, np.ndarray], in_function: bool) -> tuple:
    """The imported node, None where there is none, and the values of its outputs and inputs."""
    if in_function:
        function = tf.compat.v1.wrap_function(lambda: _import(graph), [])
        imported = function.graph
    else:
        imported = tf.Graph()
        with imported.as_default():
            _import(graph)
    operations = {operation.name: operation for operation in imported.get_operations()}
    operation = operations.get(NODE)
    if operation is None:
        return None, [], []
    fed = {f"{name}:0": value for name, value in feeds.items() if name in operations}
    fetched = [*operation.outputs, *operation.inputs]
    if in_function:
        pruned = function.prune([imported.get_tensor_by_name(name) for name in fed], fetched)
        values = [tensor.numpy() for tensor in pruned(*map(tf.constant, fed.values()))]
    else:
        with tf.compat.v1.Session(graph=imported) as session:
            values = session.run(fetched, fed)
    return operation, values[: len(operation.outputs)], values[len(operation.outputs) :]


def _compared(case: agc_testing.Case, tensors: list, operation: tf.Operation, outputs: list, inputs: list) -> str:
    """Asserts that the node did what its attributes say."""
    activation, alpha = operation.get_attr("activation").decode(), operation.get_attr("alpha")
    formats = {value: name for name, value in _FORMATS.items()}
    data_format = formats[operation.get_attr("data_format").decode()]
    assert activation in agc_testing.ACTIVATIONS, f"activation {activation} was accepted"
    assert math.isfinite(alpha) and alpha >= 0, f"alpha {alpha} was accepted"
    alpha = alpha if alpha >= agc_testing.SMALLEST_NORMAL["float32"] else 0.0  # as the kernels take it
    made = (case.activation, np.float32(case.alpha), case.data_format)
    case = dataclasses.replace(case, activation=activation, alpha=alpha, data_format=data_format)
    numbers = {name: operation.get_attr(f"num_{name}") for name in ("bias", "shortcut")}
    assert max(numbers.values()) <= 1, f"{numbers} were accepted"
    optional = [name for name, number in numbers.items() if number]
    if operation.type == "TfAgc>AgcGrad":
        same = (
            len(inputs) == len(tensors) and all(map(np.array_equal, inputs, tensors)) and optional == [*case.optional]
        )
        if not same or made != (activation, np.float32(alpha), data_format):
            return "ran, its values are not those of any forward pass"
        want = agc_testing.float64_results(case)
        got = dict(zip(("dx", "dgain", "dmean_scale", *(f"d{name}" for name in optional)), outputs, strict=True))
    else:
        x, gain, mean_scale, *rest = map(tf.constant, inputs)
        others: dict[str, Any] = dict.fromkeys(("bias", "shortcut")) | dict(zip(optional, rest, strict=True))
        channels = gain.shape[0]
        dmean = tf.zeros([x.shape[0], channels], gain.dtype)
        case = dataclasses.replace(
            case, x=x, gain=gain, mean_scale=mean_scale, dy=tf.zeros_like(x), dmean=dmean, **others
        )
        want = agc_testing.float64_results(case)
        got = dict(zip(("y", "mean"), outputs, strict=True))
    got = {name: value.astype(np.float64) for name, value in got.items()}
    agc_testing.check(case, agc_testing.Results(**vars(want) | got), want)
    return f"compared, {operation.type}"
