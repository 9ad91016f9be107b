"""Reads the graph of a model: which operation is called where, on what, and who reads that; and runs it in less memory.

Keras's private names for graphs are used here alone. No model stays changed, and what `convert` looks for is not known.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras


def is_graph(layer: Any) -> bool:
    """Whether this is a model that its graph describes: no code of its own runs when it is called."""
    if isinstance(layer, keras.Sequential):
        return hasattr(layer, "inputs") and keras_defines_call(layer)
    return isinstance(layer, keras.Model) and isinstance(layer, keras.Function) and keras_defines_call(layer)


def keras_defines_call(layer: keras.Layer) -> bool:
    return type(layer).call.__module__.startswith("keras.")


def is_of_keras(operation: Any, *names: str) -> bool:
    """Whether a layer or an operation is of a class of Keras's own with one of these names.

    By name, as Keras exports no classes of its operations. A layer and an operation may have one name, as Add.
    """
    return type(operation).__module__.startswith("keras.") and type(operation).__name__ in names


def held_layers(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer holds itself; private, as Keras has no public way to list them."""
    if isinstance(layer, keras.Sequential):
        return list(layer._layers)  # its tracker has the graph that is made of them too
    # With Keras 3.12 a Functional model's own list has the layers of its graph, and not those in attributes.
    return list({id(each): each for each in (*layer._layers, *layer._tracker.config["layers"][1])}.values())


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layer itself and all layers in it."""
    found = {id(layer): layer}
    for each in held_layers(layer):
        for inner in sublayers(each):
            found.setdefault(id(inner), inner)
    return list(found.values())


def sublayer_paths(layer: keras.Layer, prefix: str = "") -> list[tuple[str, keras.Layer]]:
    """All layers in a layer, each with the names of those that hold it ("encoder/norm")."""
    found: dict[int, tuple[str, keras.Layer]] = {}
    for each in held_layers(layer):
        path = prefix + each.name
        for inner_path, inner in [(path, each), *sublayer_paths(each, f"{path}/")]:
            found.setdefault(id(inner), (inner_path, inner))
    return list(found.values())


def nodes(model: keras.Model) -> list[Any]:
    """The nodes of a model's graph, in the order of execution: `operation`, `arguments`, `input_tensors`, `outputs`.

    Private, as Keras has no public way to see who reads a tensor, but for configurations, which exist only for layers
    that can be saved.
    """
    if isinstance(model, keras.Sequential):
        model = keras.Model(model.inputs, model.outputs, name=model.name)
    depths = sorted(model._nodes_by_depth.items(), reverse=True)
    return [node for _, nodes in depths for node in nodes if not node.is_input]


# One thread at a time: two that put back what they found in the order they came would leave an instance changed.
_CHANGING = threading.RLock()


@contextlib.contextmanager
def on_instance(operation: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within it, a layer or operation has a method of its own, past what Keras tracks; all threads see it."""
    with _CHANGING:
        attributes = vars(operation)
        before = {name: attributes[name]} if name in attributes else {}
        attributes[name] = method
        try:
            yield
        finally:
            attributes.pop(name, None)
            attributes.update(before)


# Another Keras may not have it: graphs run as ever then.
_KERAS_RUN: Any = getattr(keras.Function, "_run_through_graph", None)


@contextlib.contextmanager
def forgetting(model: keras.Model) -> Iterator[None]:
    """Within it, the graphs of a model and of those in it let a tensor go when the last call that reads it has ended.

    Keras keeps all tensors until the model's call ends: eager, as much memory as a training step takes.
    """
    with contextlib.ExitStack() as stack:
        for layer in sublayers(model):
            graph = layer._functional if isinstance(layer, keras.Sequential) else layer
            # Not where a class has a way of its own.
            if _KERAS_RUN and getattr(type(graph), "_run_through_graph", None) is _KERAS_RUN:
                run = functools.partial(_run_forgetting, graph)
                stack.enter_context(on_instance(graph, "_run_through_graph", run))
        yield


def _run_forgetting(
    graph: keras.Function,
    inputs: Any,
    operation_fn: Callable[[Any], Any] = lambda operation: operation,
    **others: Any,
) -> Any:
    """What Keras's `_run_through_graph` does."""
    given = keras.tree.flatten(inputs)
    if others or len(given) != len(graph.inputs):  # as keras.models.clone_model calls it, or an odd subclass
        return _KERAS_RUN(graph, inputs, operation_fn, **others)
    steps = nodes(graph)
    left = collections.Counter(map(id, graph.outputs))
    for node in steps:
        left.update({id(x) for x in node.input_tensors})
    values = dict(zip(map(id, graph.inputs), given, strict=True))
    for node in steps:
        if any(id(x) not in values for x in node.input_tensors):
            continue  # A layer gave fewer outputs than it had said.
        args, kwargs = node.arguments.fill_in(values)
        outputs = operation_fn(node.operation)(*args, **kwargs)
        del args, kwargs
        values.update(zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=False))
        del outputs
        left.subtract({id(x) for x in node.input_tensors})
        for x in (*node.input_tensors, *node.outputs):
            if not left[id(x)]:
                values.pop(id(x), None)
    if any(id(x) not in values for x in graph.outputs):
        raise ValueError(f"an output of '{graph.name}' is not connected to its inputs")
    return keras.tree.pack_sequence_as(graph._outputs_struct, [values[id(x)] for x in graph.outputs])


@dataclasses.dataclass(eq=False)
class Scope:
    """One call of a model, or of TimeDistributed around a layer, which has no model."""

    model: Any = None


@dataclasses.dataclass(eq=False)
class Call:
    """One call of an operation while the outermost model is called once.

    A nested model and TimeDistributed have calls too, which hand tensors in (and out, of TimeDistributed); what is
    called inside stands between them.

    Attributes:
        operation: the layer or operation.
        path: its name, after those of the nested models that it is in ("encoder/conv").
        node: Keras's node, in the graph of scope.model; None inside TimeDistributed around one layer.
        scope: the call of the model that this call is in.
        inputs: the tensors that it is called with, their sizes as far as anything tells them.
        outputs: its tensors, which are no other call's.
        depth: the number of calls on the longest way from the inputs of the outermost model to here.
    """

    operation: Any
    path: str
    node: Any
    scope: Scope
    inputs: list[keras.KerasTensor]
    outputs: list[keras.KerasTensor]
    depth: int

    def gives_output_of_model(self) -> bool:
        """Whether an output of the call is one of the model that it is in."""
        return not set(map(id, self.scope.model.outputs)).isdisjoint(map(id, self.node.outputs))


class CallGraph:
    """All calls of a model, in the order of execution, those in nested models and in TimeDistributed among them.

    Where a class has code of its own (a custom layer, a subclassed model), its call is one, and no graph tells what it
    calls. Functional and Sequential models that no graph calls, but something holds, are read as if each were called
    once, on its own inputs.

    Attributes:
        calls: the calls; a model that is called several times has the calls in it as often.
        models: the model itself and the nested ones, with their paths, once for each call.
    """

    def __init__(self, model: keras.Model) -> None:
        self.calls: list[Call] = []
        self.models: list[tuple[str, keras.Model]] = []
        self._readers: dict[int, list[Call]] = collections.defaultdict(list)
        self._depths: dict[int, int] = {}
        if is_graph(model):
            self._walk(model, list(map(copy.copy, model.inputs)), model.name, "")
        else:
            self._record((model, model.name, None, Scope()), [], [])
        for path, layer in sublayer_paths(model):
            if is_graph(layer) and all(layer is not walked for _, walked in self.models):
                self._walk(layer, list(map(copy.copy, layer.inputs)), path, f"{path}/")

    def readers(self, tensor: keras.KerasTensor) -> list[Call]:
        """The calls that have this tensor among their inputs."""
        return self._readers[id(tensor)]

    def _walk(
        self, model: keras.Model, inputs: list[keras.KerasTensor], path: str, prefix: str
    ) -> list[keras.KerasTensor]:
        """Records the calls in a model that is called with these inputs, and returns its outputs."""
        self.models.append((path, model))
        scope = Scope(model)
        tensors = dict(zip(map(id, model.inputs), inputs, strict=True))
        as_in_graph = all(x.shape == own.shape for x, own in zip(inputs, model.inputs, strict=True))
        for node in nodes(model):
            args, kwargs = node.arguments.fill_in(tensors)
            spec = node.outputs
            if not as_in_graph and not is_graph(node.operation):
                # As Keras infers it for the model's outputs.
                spec = keras.tree.flatten(node.operation.compute_output_spec(*args, **kwargs))
            arguments = keras.tree.flatten((args, kwargs))  # keywords by name: `inputs` stands first
            outputs = self._call(node.operation, arguments, spec, prefix, scope, node)
            tensors.update(zip(map(id, node.outputs), outputs, strict=True))
        return [tensors[id(x)] for x in model.outputs]

    def _call(
        self, operation: Any, arguments: list[Any], spec: list[keras.KerasTensor], prefix: str, scope: Scope, node: Any
    ) -> list[keras.KerasTensor]:
        """Records one call and those inside it; spec has the shapes of its outputs, but for a model's."""
        path = prefix + operation.name
        place = (operation, path, node, scope)
        if is_graph(operation):
            inputs: list[keras.KerasTensor] = []
            for own, given in zip(operation.inputs, arguments[: len(operation.inputs)], strict=True):
                inputs += self._record(place, [given], [_with_known_sizes(own, given)])
            return self._walk(operation, inputs, path, f"{path}/")
        if type(operation) is keras.layers.TimeDistributed:
            step = self._record(place, arguments[:1], [_step(arguments[0])])
            steps = self._call(operation.layer, step, list(map(_step, spec)), f"{path}/", Scope(), None)
            return self._record(place, steps, spec)
        return self._record(place, arguments, spec)

    def _record(
        self, place: tuple[Any, str, Any, Scope], arguments: list[Any], spec: list[keras.KerasTensor]
    ) -> list[keras.KerasTensor]:
        inputs = [x for x in arguments if isinstance(x, keras.KerasTensor)]
        outputs = list(map(copy.copy, spec))
        depth = 1 + max((self._depths.get(id(x), 0) for x in inputs), default=0)
        call = Call(*place, inputs, outputs, depth)
        self.calls.append(call)
        for tensor in set(map(id, inputs)):
            self._readers[tensor].append(call)
        self._depths.update((id(x), depth) for x in outputs)
        return outputs


def _with_known_sizes(own: keras.KerasTensor, given: Any) -> keras.KerasTensor:
    """An input of a model in one call, with the sizes that the model knows or the call."""
    if not isinstance(given, keras.KerasTensor) or len(given.shape) != len(own.shape):
        return own
    shape = tuple(a if b is None else b for a, b in zip(own.shape, given.shape, strict=True))
    return own if shape == own.shape else keras.KerasTensor(shape, own.dtype, sparse=own.sparse)


def _step(tensor: keras.KerasTensor) -> keras.KerasTensor:
    """What TimeDistributed calls its layer with, or gets from it, for each of the steps in a tensor."""
    return keras.KerasTensor(tensor.shape[:1] + tensor.shape[2:], tensor.dtype)
