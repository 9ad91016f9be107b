"""Which layers end the residual branches of a functional model, and a look at what is added there.

Read from the model's graph. What the ends are set to is `tf_agc.calibration`'s.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tf_agc import model_graph
from tf_agc.layer import AutomaticGainControl
from tf_agc.model_graph import Call, CallGraph, is_of_keras
from tf_agc.standardized import StandardizedConvolution

# Layers that hand a multiple of a map on as the same multiple, in inference.
_HOMOGENEOUS = (
    *("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout", "Identity"),
    *(f"{kind}{rank}D" for kind in ("ZeroPadding", "Cropping", "UpSampling", "AveragePooling") for rank in (1, 2, 3)),
)


@dataclasses.dataclass(frozen=True)
class Branch:
    """A residual branch that an Add layer or operation adds to something, its shortcut.

    Attributes:
        end: the layer whose gain and bias scale the branch: an AutomaticGainControl or a standardized convolution.
        add: the Add, and `position` of the branch among its two inputs.
    """

    end: AutomaticGainControl | StandardizedConvolution
    add: Any
    position: int


def find(model: keras.Model) -> list[Branch]:
    """The branches of a functional or Sequential model whose ends have a gain; none of another model.

    An end is used once and linear, and nothing but the Add reads it, through layers such as dropout. Where both inputs
    of an Add are so, the branch is the one on the longer way.
    """
    if not model_graph.is_graph(model):
        return []
    graph = CallGraph(model)
    calls: dict[int, list[Call]] = {}
    for call in graph.calls:
        calls.setdefault(id(call.operation), []).append(call)
    producers = {id(x): call for call in graph.calls for x in call.outputs}
    found = []
    for call in graph.calls:
        if not is_of_keras(call.operation, "Add") or len(call.inputs) != 2 or len(calls[id(call.operation)]) > 1:
            continue
        ends = []
        for position, x in enumerate(call.inputs):
            end = _end(graph, producers, x, call)
            if end and len(calls[id(end.operation)]) == 1:
                ends.append((end.depth, position, end.operation))
        if ends:
            _, position, layer = max(ends, key=lambda end: end[:2])
            found.append(Branch(layer, call.operation, position))
    return found


def count(model: keras.Model) -> int:
    """How many branches of a functional or Sequential model start at what they are added to; 0 of another model.

    Not those of projected shortcuts. What adds is an Add, or an AutomaticGainControl with a shortcut.
    """
    if not model_graph.is_graph(model):
        return 0
    graph = CallGraph(model)
    producers = {id(x): call for call in graph.calls for x in call.outputs}

    def starts_at(branch: keras.KerasTensor, shortcut: keras.KerasTensor) -> bool:
        todo, seen = [branch], set()
        depth = producers[id(shortcut)].depth if id(shortcut) in producers else 0
        while todo:
            call = producers.get(id(todo.pop()))
            if call and id(call) not in seen and call.depth > depth:
                seen.add(id(call))
                if any(x is shortcut for x in call.inputs):
                    return True
                todo.extend(call.inputs)
        return False

    pairs = [
        call.inputs
        for call in graph.calls
        if len(call.inputs) == 2
        and (isinstance(call.operation, AutomaticGainControl) or is_of_keras(call.operation, "Add"))
    ]
    return sum(starts_at(a, b) or starts_at(b, a) for a, b in pairs)


def _end(graph: CallGraph, producers: dict[int, Call], x: keras.KerasTensor, reader: Call) -> Call | None:
    while graph.readers(x) == [reader] and id(x) in producers:
        reader = producers[id(x)]
        if _has_gain(reader):
            return reader
        if not (is_of_keras(reader.operation, *_HOMOGENEOUS) and len(reader.inputs) == 1):
            return None
        (x,) = reader.inputs
    return None


def _has_gain(call: Call) -> bool:
    """Whether a multiple of this call's output is one of its layer's gain and bias."""
    layer = call.operation
    if not isinstance(layer, AutomaticGainControl | StandardizedConvolution) or len(call.inputs) != 1:
        return False
    constrained = getattr(layer, "gain_constraint", None) or layer.bias_constraint
    return layer.gain is not None and layer.activation is keras.activations.linear and not constrained


# Other threads may call the model meanwhile: what they add is their own.
_observing = contextvars.ContextVar("tf_agc_observing_branches", default=False)


@contextlib.contextmanager
def observed(branches: list[Branch], observe: Callable[[Branch, tf.Tensor, tf.Tensor], tf.Tensor]) -> Iterator[None]:
    """Within it, an Add adds what `observe(branch, output, shortcut)` returns, instead of the branch's output."""

    def observing(branch: Branch) -> Callable[..., Any]:
        call = branch.add.call

        def call_observed(*args: Any, **kwargs: Any) -> Any:
            if not _observing.get():
                return call(*args, **kwargs)
            tensors = keras.tree.flatten((args, kwargs))
            tensors[branch.position] = observe(branch, tensors[branch.position], tensors[1 - branch.position])
            args, kwargs = keras.tree.pack_sequence_as((args, kwargs), tensors)
            return call(*args, **kwargs)

        return call_observed

    with contextlib.ExitStack() as stack:
        for branch in branches:
            stack.enter_context(model_graph.on_instance(branch.add, "call", observing(branch)))
        stack.callback(_observing.reset, _observing.set(True))
        yield
