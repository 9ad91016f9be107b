"""The graph of a SavedModel on disk: which ops it has, how the native one becomes stock ops, and kernels constants.

Protocol buffers only. What a graph computes, how it is traced, and where it is written, is decided elsewhere.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# Private: keras.ops.slice_update makes such an op, and `tf.raw_ops` leaves these out.
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.core.protobuf import saved_model_pb2

# Private: what a SavedModel says of its own graph, and must say anew when the graph has changed.
from tensorflow.python.framework import meta_graph
from tensorflow.python.saved_model import fingerprinting_utils

from tf_agc import reference
from tf_agc.standardized import KERNEL_ATTRIBUTE

OP, GRADIENT_OP = "TfAgc>Agc", "TfAgc>AgcGrad"
_DATA_FORMATS = {b"N...C": "channels_last", b"NC...": "channels_first"}
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


def replace_native_ops(directory: pathlib.Path) -> None:
    """Replaces every op TfAgc>Agc in a SavedModel by a call of its definition, in place.

    In the written graph and not while tracing: a tf.function in a model that was traced before holds
    the native op, whatever is chosen now.
    """
    saved_model = _read(directory)
    meta_graph_def = saved_model.meta_graphs[0]
    graph_def = meta_graph_def.graph_def
    calls: dict[bytes, tuple[Any, Any]] = {}
    for node in graph_def.node:
        _replace(node, calls)
    for function in graph_def.library.function:
        # Inside a function, an output has the name that its op gives it.
        renamed: dict[str, str] = {}
        for node in function.node_def:
            if _replace(node, calls):
                renamed |= {f"{node.name}:y:0": f"{node.name}:output:0", f"{node.name}:mean:0": f"{node.name}:output:1"}
        for node in function.node_def:
            node.input[:] = [renamed.get(name, name) for name in node.input]
        for result, name in function.ret.items():
            function.ret[result] = renamed.get(name, name)
    for _, functions in calls.values():
        graph_def.library.function.extend(functions)

    _write(directory, saved_model)


def fold_kernels(directory: pathlib.Path, kernels: Mapping[bytes, Callable[[], np.ndarray]]) -> None:
    """Makes standardized kernels constants in a SavedModel, in place, and removes what computed them.

    In the written graph for the reason above: a trace in the model with constants would keep them when it is trained.

    Args:
        directory: of the SavedModel.
        kernels: as of `standardized.kernels`. Others, as of a loaded model, stay as they are.
    """
    saved_model = _read(directory)
    constants: dict[bytes, Any] = {}
    size = 0
    for function in saved_model.meta_graphs[0].graph_def.library.function:
        marked = [node for node in function.node_def if KERNEL_ATTRIBUTE in node.attr]
        for node in marked:
            mark = node.attr[KERNEL_ATTRIBUTE].s
            if mark not in kernels:
                continue
            if mark not in constants:
                constants[mark] = tf.make_tensor_proto(kernels[mark]())
            size += constants[mark].ByteSize()
            if size > _LARGEST_CONSTANTS:
                return
            node.op = "Const"
            del node.input[:]
            node.attr["dtype"].type = constants[mark].dtype
            node.attr["value"].tensor.CopyFrom(constants[mark])
            for name in ("T", KERNEL_ATTRIBUTE):
                del node.attr[name]
        if marked:
            _remove_unread(function)
    if constants:
        _write(directory, saved_model)


def _remove_unread(function: Any) -> None:
    """Removes the nodes of a function that nothing reads and that have no effect."""
    outputs = [name.partition(":")[0] for name in function.ret.values()] + list(function.control_ret.values())
    by_name = {node.name: node for node in function.node_def}
    todo, live = outputs, set()
    while todo:
        name = todo.pop()
        if name in by_name and name not in live:
            live.add(name)
            todo.extend(each.lstrip("^").partition(":")[0] for each in by_name[name].input)
    for index in reversed(range(len(function.node_def))):
        if function.node_def[index].name not in live:
            del function.node_def[index]


def _write(directory: pathlib.Path, saved_model: Any) -> None:
    meta_graph_def = saved_model.meta_graphs[0]
    stripped_op_list = meta_graph.stripped_op_list_for_graph(meta_graph_def.graph_def)
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


def _replace(node: Any, calls: dict[bytes, tuple[Any, Any]]) -> bool:
    """Makes a node TfAgc>Agc a call of a function from `calls`, where equal nodes share one; False for other nodes."""
    if node.op != OP:
        return False
    key = tf.compat.v1.NodeDef(attr=node.attr).SerializeToString(deterministic=True)
    if key not in calls:
        calls[key] = _call_of_definition(node.attr)
    call, _ = calls[key]
    for name in _ATTRIBUTES:
        del node.attr[name]
    node.op = call.op
    for name, value in call.attr.items():
        node.attr[name].CopyFrom(value)
    return True


def _call_of_definition(attributes: Any) -> tuple[Any, Any]:
    """A node that calls the definition of an op TfAgc>Agc with these attributes, and the functions that it needs."""
    maps_shape = None
    if "_output_shapes" in attributes:  # the first is that of y, and so of x and the shortcut
        maps_shape = tf.TensorShape(attributes["_output_shapes"].list.shape[0])
    maps = tf.TensorSpec(maps_shape, attributes["T"].type)
    parameter = tf.TensorSpec([None], attributes["U"].type)
    # In the order of the op's inputs, of which the last two may be absent.
    inputs = {"x": maps, "gain": parameter, "mean_scale": parameter}
    inputs |= {"bias": parameter} if attributes["num_bias"].i else {}
    inputs |= {"shortcut": maps} if attributes["num_shortcut"].i else {}
    activation, alpha = attributes["activation"].s.decode(), attributes["alpha"].f
    data_format = _DATA_FORMATS[attributes["data_format"].s]

    def agc(*tensors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return reference.agc(**named, activation=activation, alpha=alpha, data_format=data_format)

    with tf.Graph().as_default() as graph:
        placeholders = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in inputs.values()]
        tf.function(agc, autograph=False)(*placeholders)
    graph_def = graph.as_graph_def()
    (call,) = (node for node in graph_def.node if node.op in ("PartitionedCall", "StatefulPartitionedCall"))
    return call, graph_def.library.function
