"""The graph of a SavedModel on disk: which ops it has, how the native one becomes stock ops, and weights constants.

Protocol buffers only. What a graph computes, how it is traced, and where it is written, is decided elsewhere.
"""

import collections
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

# Private: keras.ops.slice_update makes such an op, and `tf.raw_ops` leaves these out.
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.core.protobuf import saved_model_pb2

# Private: what a SavedModel says of its own graph, and must say anew when the graph has changed.
from tensorflow.python.framework import meta_graph
from tensorflow.python.saved_model import fingerprinting_utils

from tf_agc import reference
from tf_agc.graph_marks import ATTRIBUTE
from tf_agc.op_attributes import reference_arguments

OP, GRADIENT_OP = "TfAgc>Agc", "TfAgc>AgcGrad"
_ATTRIBUTES = ("T", "U", "num_bias", "num_shortcut", "activation", "alpha", "data_format")
# Of a protocol buffer's 2 GiB: kernels beyond them are computed at each call.
_LARGEST_CONSTANTS = 2**30
_CALLBACKS = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}


def read(directory: pathlib.Path) -> Any:
    """The GraphDef of a SavedModel."""
    return _read(directory).meta_graphs[0].graph_def


def nodes(graph_def: Any) -> Iterator[Any]:
    """Every node of a GraphDef, those in its functions too."""
    yield from graph_def.node
    for function in graph_def.library.function:
        yield from function.node_def


def rewrite(directory: pathlib.Path, layers: Mapping[bytes, Any], portable: bool) -> None:
    """Makes constants of what inference does not change, and a portable graph of stock ops, in place.

    Standardized kernels become constants. In a portable graph, a gain goes into the constant kernel of the convolution
    in front, as gain * convolve(x, kernel) = convolve(x, gain * kernel), and every op TfAgc>Agc becomes a call of its
    definition.

    In the written graph and not while tracing: a tf.function in a model that was traced before holds the native op,
    whatever is chosen now, and one that is traced now would keep the constants when the model is trained.

    Args:
        directory: of the SavedModel.
        layers: as of `graph_marks.layers`. What others have marked, as those of a loaded model, stays computed.
        portable: as in `export_saved_model`.
    """
    saved_model = _read(directory)
    meta_graph_def = saved_model.meta_graphs[0]
    graph_def = meta_graph_def.graph_def
    kernels: dict[bytes, Any] = {}
    calls: dict[bytes, tuple[Any, Any]] = {}
    room = _LARGEST_CONSTANTS
    captured = _captured_by_gradients(meta_graph_def.object_graph_def)
    for node in graph_def.node if portable else ():
        _replace(node, calls)
    for function in graph_def.library.function:
        folded = _fold_kernels(function, layers, kernels, room)
        room -= folded
        if portable:
            _fold_gains(function, layers)
            _replace_in_function(function, calls)
        if folded:  # others are left as they were traced
            _remove_unread(function, captured[function.signature.name])
    for _, functions in calls.values():
        graph_def.library.function.extend(functions)
    for node in nodes(graph_def):
        if ATTRIBUTE in node.attr:
            del node.attr[ATTRIBUTE]  # of no use to anybody else

    stripped_op_list = meta_graph.stripped_op_list_for_graph(graph_def)
    meta_graph_def.meta_info_def.stripped_op_list.CopyFrom(stripped_op_list)
    (directory / "saved_model.pb").write_bytes(saved_model.SerializeToString(deterministic=True))
    fingerprinting_utils.write_fingerprint(str(directory))


def check_ops(graph_def: Any, portable: bool) -> None:
    """Raises where no other program could run a graph, or not every model server a portable one.

    Stock are the ops of which TensorFlow itself has Python wrappers: libraries that were loaded into
    this process add to its registry of ops, but not to those.

    Raises:
        ValueError: the message names the ops.
    """
    functions = {function.signature.name for function in graph_def.library.function}
    used = {node.op for node in nodes(graph_def)} - functions
    if used & _CALLBACKS:
        raise ValueError(
            "the model calls Python (tf.py_function, tf.numpy_function), which no other program can run: "
            f"its graph has the ops {', '.join(sorted(used & _CALLBACKS))}"
        )
    if not portable:
        return
    if GRADIENT_OP in used:
        raise ValueError(
            f"a signature computes gradients, with the custom op {GRADIENT_OP}: build the model and export it inside "
            '`with tf_agc.implementation("reference"):`, or export with portable=False'
        )
    custom = sorted(op for op in used if not hasattr(tf.raw_ops, op) and not hasattr(gen_xla_ops, op))
    if custom:
        raise ValueError(
            "a portable export must have stock TensorFlow ops only, and this model has the custom ops "
            f"{', '.join(custom)}: leave out the layers that make them, or export with portable=False"
        )


def _read(directory: pathlib.Path) -> Any:
    return saved_model_pb2.SavedModel.FromString((directory / "saved_model.pb").read_bytes())


def _layer_of(node: Any, layers: Mapping[bytes, Any]) -> Any:
    return layers.get(node.attr[ATTRIBUTE].s) if ATTRIBUTE in node.attr else None


def _fold_kernels(function: Any, layers: Mapping[bytes, Any], kernels: dict[bytes, Any], room: int) -> int:
    """Makes standardized kernels constants as long as there is room, and returns the bytes that they take."""
    size = 0
    for node in function.node_def:
        layer = _layer_of(node, layers)
        if layer is None or not hasattr(layer, "standardized_kernel"):
            continue
        mark = node.attr[ATTRIBUTE].s
        if mark not in kernels:
            kernels[mark] = tf.make_tensor_proto(layer.standardized_kernel().numpy())
        if size + kernels[mark].ByteSize() > room:
            continue
        size += kernels[mark].ByteSize()
        node.op = "Const"
        del node.input[:]
        node.attr["dtype"].type = kernels[mark].dtype
        node.attr["value"].tensor.CopyFrom(kernels[mark])
        for name in ("T", ATTRIBUTE):
            del node.attr[name]
    return size


def _fold_gains(function: Any, layers: Mapping[bytes, Any]) -> None:
    """Takes the gain, the second input, from the ops TfAgc>Agc behind a convolution with a constant kernel.

    Where nothing else reads either. Not in float16, whose largest number what is in front of the mean might exceed.
    """
    by_name = {node.name: node for node in function.node_def}
    readers = collections.Counter(map(_name_of, [*_inputs(function), *function.ret.values()]))
    for node in function.node_def:
        layer = _layer_of(node, layers)
        if node.op != OP or layer is None or node.attr["T"].type == tf.float16.as_datatype_enum:
            continue
        convolution = by_name.get(_name_of(node.input[0]))
        if convolution is None or convolution.op not in ("Conv2D", "DepthwiseConv2dNative"):
            continue
        kernel = by_name.get(_name_of(convolution.input[1]))
        if kernel is None or kernel.op != "Const" or readers[convolution.name] > 1 or readers[kernel.name] > 1:
            continue
        values, gain = tf.make_ndarray(kernel.attr["value"].tensor), layer.gain.numpy()
        # Channel c of depthwise maps with m filters for each input: the axes are [..., c // m, c % m].
        outputs = values.shape[-1:] if convolution.op == "Conv2D" else values.shape[-2:]
        scaled = (values.astype(gain.dtype) * gain.reshape(outputs)).astype(values.dtype)
        kernel.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(scaled))
        del node.input[1]


def _replace_in_function(function: Any, calls: dict[bytes, tuple[Any, Any]]) -> None:
    # Inside a function, an output has the name that its op gives it.
    renamed: dict[str, str] = {}
    for node in function.node_def:
        if _replace(node, calls):
            renamed |= {f"{node.name}:y:0": f"{node.name}:output:0", f"{node.name}:mean:0": f"{node.name}:output:1"}
    for node in function.node_def:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for result, name in function.ret.items():
        function.ret[result] = renamed.get(name, name)


def _captured_by_gradients(object_graph_def: Any) -> Mapping[str, list[str]]:
    """By function, the nodes that functions of `tf.custom_gradient` read: a SavedModel has those too."""
    captured = collections.defaultdict(list)
    for node in object_graph_def.nodes:
        if node.WhichOneof("kind") == "captured_tensor":
            captured[node.captured_tensor.concrete_function].append(_name_of(node.captured_tensor.name))
    return captured


def _remove_unread(function: Any, captured: Iterable[str]) -> None:
    """Removes the nodes of a function that it does not run: nothing reads them, and they have no effect."""
    by_name = {node.name: node for node in function.node_def}
    todo = [*map(_name_of, function.ret.values()), *function.control_ret.values(), *captured]
    live: set[str] = set()
    while todo:
        name = todo.pop()
        if name in by_name and name not in live:
            live.add(name)
            todo.extend(map(_name_of, by_name[name].input))
    kept = [node for node in function.node_def if node.name in live]
    if len(kept) < len(by_name):
        del function.node_def[:]
        function.node_def.extend(kept)


def _inputs(function: Any) -> Iterator[str]:
    for node in function.node_def:
        yield from node.input


def _name_of(tensor: str) -> str:
    """The node, in "node:output:0" and in "^node", which is only waited for."""
    return tensor.lstrip("^").partition(":")[0]


def _replace(node: Any, calls: dict[bytes, tuple[Any, Any]]) -> bool:
    """Makes a node TfAgc>Agc a call of a function from `calls`, where equal nodes share one; False for other nodes."""
    if node.op != OP:
        return False
    tensors = [name for name in node.input if not name.startswith("^")]
    has_gain = len(tensors) == 3 + node.attr["num_bias"].i + node.attr["num_shortcut"].i
    attributes = {name: value for name, value in node.attr.items() if name != ATTRIBUTE}
    key = tf.compat.v1.NodeDef(attr=attributes).SerializeToString(deterministic=True) + bytes([has_gain])
    if key not in calls:
        calls[key] = _call_of_definition(node.attr, has_gain)
    call, _ = calls[key]
    for name in _ATTRIBUTES:
        del node.attr[name]
    node.op = call.op
    for name, value in call.attr.items():
        node.attr[name].CopyFrom(value)
    return True


def _call_of_definition(attributes: Any, has_gain: bool) -> tuple[Any, Any]:
    """A node that calls the definition of an op TfAgc>Agc with these attributes, and the functions that it needs."""
    maps_shape = None
    if "_output_shapes" in attributes:  # the first is that of y, and so of x and the shortcut
        maps_shape = tf.TensorShape(attributes["_output_shapes"].list.shape[0])
    maps = tf.TensorSpec(maps_shape, attributes["T"].type)
    options = reference_arguments(attributes)
    # With the number of channels, as far as it is known: the definition has fewer ops then.
    channels = None if maps.shape.rank is None else maps.shape[reference.channel_axis(options["data_format"])]
    parameter = tf.TensorSpec([channels], attributes["U"].type)
    # In the order of the op's inputs, of which the last two may be absent, and the gain where it is folded.
    inputs = {"x": maps, **({"gain": parameter} if has_gain else {}), "mean_scale": parameter}
    inputs |= {"bias": parameter} if attributes["num_bias"].i else {}
    inputs |= {"shortcut": maps} if attributes["num_shortcut"].i else {}

    def agc(*tensors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        named = {"gain": None, **dict(zip(inputs, tensors, strict=True))}
        return reference.agc(**named, **options)

    with tf.Graph().as_default() as graph:
        placeholders = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in inputs.values()]
        tf.function(agc, autograph=False)(*placeholders)
    graph_def = graph.as_graph_def()
    (call,) = (node for node in graph_def.node if node.op in ("PartitionedCall", "StatefulPartitionedCall"))
    return call, graph_def.library.function
