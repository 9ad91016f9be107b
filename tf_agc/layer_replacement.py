"""Replaces layers in place, inside a model or layer of any class, so that it can be saved and loaded again.

For `tf_agc.convert`: an object whose class makes its layers itself keeps that class, its attributes and its methods. It
is saved as the configuration from which its class makes the original, with a record of what is replaced in that.
Nothing is decided here, and no weights are copied.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tf_agc import model_graph

# What makes a Functional model's graph.
_GRAPH = (
    *("_inputs", "_outputs", "_inputs_struct", "_outputs_struct", "_nodes", "_nodes_by_depth", "_operations"),
    *("_operations_by_depth", "output_names"),
)
# Other attributes in which Keras keeps layers and nodes itself.
_OF_KERAS = (*_GRAPH, "_layers", "_tracker", "_functional", "_inbound_nodes", "_outbound_nodes")


@dataclasses.dataclass
class Replacements:
    """What becomes of the layers of a root, and of the nodes of the graphs in it.

    Attributes:
        layers: what takes the place of a layer, by the position of that among `sublayers(root)`.
        junctions: for nodes that add two tensors, by the positions of the model among `sublayers(root)` and of the node
            among its `nodes`: the position of the layer that becomes an AGC and computes them, and which of the two
            tensors is its input.
        vanishing: nodes whose input is handed on, by the same two positions.
    """

    layers: dict[int, keras.layers.Layer] = dataclasses.field(default_factory=dict)
    junctions: dict[tuple[int, int], tuple[int, int]] = dataclasses.field(default_factory=dict)
    vanishing: set[tuple[int, int]] = dataclasses.field(default_factory=set)

    def get_config(self) -> dict[str, Any]:
        return {
            "layers": [[at, keras.saving.serialize_keras_object(layer)] for at, layer in self.layers.items()],
            "junctions": [[*node, *junction] for node, junction in self.junctions.items()],
            "vanishing": sorted(map(list, self.vanishing)),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Replacements":
        return cls(
            {at: keras.saving.deserialize_keras_object(layer) for at, layer in config["layers"]},
            {(model, node): (layer, position) for model, node, layer, position in config["junctions"]},
            set(map(tuple, config["vanishing"])),
        )


@keras.saving.register_keras_serializable(package="tf_agc")
class Converted:
    """Mixed into the class of an object in which layers were replaced, for what it is saved as."""

    _conversion: dict[str, Any]

    def get_config(self) -> dict[str, Any]:
        return copy.deepcopy(self._conversion)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        root = keras.saving.deserialize_keras_object(config["original"], custom_objects)
        replace(root, Replacements.from_config(config["replacements"]), config)
        return root


def replace(root: keras.Layer, replacements: Replacements, config: dict[str, Any]) -> None:
    """Replaces layers in a root, which is changed.

    Args:
        root: a layer or a model that nothing has called yet, if it is a graph.
        replacements: what becomes of its layers and nodes.
        config: what the root is saved as from now on: `original`, as `keras.saving` serializes it, and `replacements`,
            as `get_config` tells them.
    """
    layers = model_graph.sublayers(root)
    if max(replacements.layers) >= len(layers):
        raise ValueError(f"'{root.name}' ({type(root).__name__}) has fewer layers than when it was converted")
    replaced = {id(layers[at]): layer for at, layer in replacements.layers.items()}
    # What holds a model has the models in it replaced first, as their outputs may be other tensors afterwards.
    graphs = {at: layer for at, layer in enumerate(layers) if model_graph.is_graph(layer)}
    nodes = {at: model_graph.nodes(graph) for at, graph in graphs.items()}
    junctions = {
        id(nodes[model][node]): (replaced[id(layers[layer])], position)
        for (model, node), (layer, position) in replacements.junctions.items()
    }
    vanishing = {id(nodes[model][node]) for model, node in replacements.vanishing}
    _replace_in_trackers(layers, replaced)
    # The old nodes would keep the replaced layers, with their weights.
    for at, graph in graphs.items():
        for node in nodes[at]:
            node.operation._inbound_nodes, node.operation._outbound_nodes = [], []
        for tensor in graph.inputs:
            tensor._keras_history.operation._outbound_nodes = []

    tensors: dict[int, Any] = {}

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        given = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
        if id(node) in junctions:
            layer, position = junctions[id(node)]
            return layer(given[position], shortcut=given[1 - position])
        if id(node) in vanishing:
            return given[0]
        if id(node.operation) in replaced:
            return replaced[id(node.operation)](given[0])
        return node.operation(*args, **kwargs)

    for at in _inner_first(graphs):
        _retrace(graphs[at], nodes[at], tensors, vanishing, call)
    for holder in layers:
        _replace_in_attributes(holder, replaced, tensors)
    for at, layer in replacements.layers.items():
        if layers[at].built and not layer.built:  # code calls it
            layer.build_from_config(layers[at].get_build_config())
    vars(root)["_conversion"] = config
    object.__setattr__(root, "__class__", _converted_class(type(root)))  # type: ignore[arg-type]


def remake(layer: Any) -> Any:
    """Makes a layer or an operation again, from its configuration, with weights of its own.

    Raises:
        ValueError: its class cannot make it; the message names it.
    """
    with naming(layer):
        if type(layer) is keras.layers.Lambda:
            # Its configuration has the code of a lambda, but not the globals that the code uses.
            return keras.layers.Lambda(
                layer.function,
                layer._output_shape,
                layer.mask,
                layer.arguments,
                name=layer.name,
                dtype=layer.dtype_policy,
            )
        made = type(layer).from_config(layer.get_config())
        if not isinstance(made, type(layer)):
            raise TypeError(f"from_config() of its class gives a {type(made).__name__}")
        if model_graph.is_graph(layer):
            kinds = [list(map(type, model_graph.sublayers(each))) for each in (layer, made)]
            if kinds[0] != kinds[1]:
                raise ValueError("from_config() of its class gives other layers")
        return made


@contextlib.contextmanager
def naming(operation: Any) -> Iterator[None]:
    """Errors in it name a layer that cannot be copied."""
    try:
        yield
    except KeyError as error:  # its message is the key alone
        raise ValueError(
            f"layer '{operation.name}' ({type(operation).__name__}) cannot be copied: missing argument {error}"
        ) from error
    except Exception as error:
        raise ValueError(f"layer '{operation.name}' ({type(operation).__name__}) cannot be copied: {error}") from error


def trace(nodes: list[Any], tensors: dict[int, Any], call: Callable[[Any, Any, Any], Any]) -> None:
    """Calls what the nodes of a graph call, in their order.

    Args:
        nodes: those of `model_graph.nodes`.
        tensors: what stands for each tensor, by its identity; those of the nodes are added, if they are not there.
        call: called with a node and its arguments, args and kwargs, returns what stands for its outputs.
    """
    for node in nodes:
        if not all(id(x) in tensors for x in node.outputs):
            outputs = call(node, *node.arguments.fill_in(tensors))
            tensors.update(zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=True))


def _inner_first(graphs: dict[int, keras.Model]) -> list[int]:
    """The positions of models, those that are called in others before these."""
    order: list[int] = []
    positions = {id(graph): at for at, graph in graphs.items()}

    def add(at: int) -> None:
        if at not in order:
            for layer in model_graph.sublayers(graphs[at])[1:]:
                if id(layer) in positions:
                    add(positions[id(layer)])
            order.append(at)

    for at in graphs:
        add(at)
    return order


def _retrace(
    model: keras.Model,
    nodes: list[Any],
    tensors: dict[int, Any],
    vanishing: set[int],
    call: Callable[[Any, Any, Any], Any],
) -> None:
    if isinstance(model, keras.Sequential):
        gone = {id(node.operation) for node in nodes if id(node) in vanishing}
        model._layers = [layer for layer in model._layers if id(layer) not in gone]
        model._maybe_rebuild()
        return
    tensors.update((id(x), x) for x in model.inputs)
    trace(nodes, tensors, call)
    before = model.layers
    own = model._layers is not model._tracker.config["layers"][1]  # with Keras 3.12
    outputs = keras.tree.map_structure(lambda tensor: tensors[id(tensor)], model._outputs_struct)
    made = keras.Model(model._inputs_struct, outputs)
    # The model's own __setattr__ would wrap and track them.
    vars(model).update({name: vars(made)[name] for name in _GRAPH})
    for layer in before:
        if all(layer is not each for each in made.layers):
            model._tracker.untrack(layer)
    if own:
        with _unlocked(model):
            model._layers = model.layers


def _replace_in_trackers(layers: list[keras.Layer], replaced: dict[int, keras.Layer]) -> None:
    for holder in layers:
        tracked, own = holder._tracker.config["layers"][1], holder._layers
        tracked[:] = [replaced.get(id(layer), layer) for layer in tracked]
        stored = holder._tracker.stored_ids["layers"]
        for old in stored & replaced.keys():
            stored.remove(old)
            stored.add(id(replaced[old]))
        # A Sequential model has a list of its own besides the tracker's; with Keras 3.12 a Functional one too, which
        # TensorFlow watches: it is never changed in place.
        if own is not tracked and any(id(layer) in replaced for layer in own):
            with _unlocked(holder):
                holder._layers = [replaced.get(id(layer), layer) for layer in own]


def _replace_in_attributes(holder: keras.Layer, replaced: dict[int, keras.Layer], tensors: dict[int, Any]) -> None:
    with _unlocked(holder):
        for name, value in _attributes(holder):
            new = _replace_in(value, replaced, tensors)
            if new is not value:
                setattr(holder, name, new)


@contextlib.contextmanager
def _unlocked(holder: keras.Layer) -> Iterator[None]:
    """A built layer takes no new layers, but here."""
    locked = holder._tracker.locked
    holder._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            holder._tracker.lock()


def _attributes(holder: keras.Layer) -> list[tuple[str, Any]]:
    """Those that are not kept by Keras or TensorFlow for themselves."""
    return [item for item in vars(holder).items() if item[0] not in _OF_KERAS and not item[0].startswith("_self_")]


def _replace_in(value: Any, replaced: dict[int, keras.Layer], tensors: dict[int, Any]) -> Any:
    """The value itself where nothing in it is replaced."""
    if isinstance(value, keras.Layer):
        return replaced.get(id(value), value)
    if isinstance(value, keras.KerasTensor):
        return tensors.get(id(value), value)
    if isinstance(value, dict):
        new = {key: _replace_in(each, replaced, tensors) for key, each in value.items()}
        return value if all(new[key] is value[key] for key in new) else new
    if type(value) is tuple or isinstance(value, list):
        items = [_replace_in(each, replaced, tensors) for each in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else tuple(items) if isinstance(value, tuple) else items
    return value


def held(root: keras.Layer, kind: type) -> list[Any]:
    """What of a kind `replace` can reach in a root: in attributes, and in lists, tuples and dicts in these."""

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict | list) or type(value) is tuple:
            return [leaf for each in (value.values() if isinstance(value, dict) else value) for leaf in leaves(each)]
        return [value]

    values = [value for each in model_graph.sublayers(root) for _, value in _attributes(each)]
    return [x for x in leaves(values) if isinstance(x, kind)]


@functools.cache
def _converted_class(kind: type) -> type:
    converted = type(kind.__name__, (Converted, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    # Saved under one name, all of them are made by Converted.
    register = keras.saving.register_keras_serializable("tf_agc", "Converted")
    register(converted)
    register(Converted)
    return converted
