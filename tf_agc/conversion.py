"""`tf_agc.convert`: a copy of a Keras model with AutomaticGainControl in place of BatchNormalization.

What becomes of each BatchNormalization is decided first, from the graphs of the model and the models
nested in it (`_Survey`, which `conversion_table` prints); the copy is made after that (`_Copier`).
Nothing here computes anything, and the original is only read.
"""

import collections
import contextlib
import dataclasses
import inspect
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import keras

from tf_agc import calibration
from tf_agc.activations import find_fused
from tf_agc.layer import AutomaticGainControl
from tf_agc.table import format_table


@dataclasses.dataclass
class ConvertedLayer:
    """What `convert` makes of one BatchNormalization layer, or of a model that loses its class.

    Attributes:
        layer: the layer's name, after those of the nested models that it is in ("encoder/bn1").
        activation: the activation that AGC computes, "linear" for none; empty where there is no AGC.
        fused: names of the activation layers that disappear, because AGC computes them.
        reason: why there is no AGC, or what a model loses; empty for a layer that is replaced.
    """

    layer: str
    activation: str = ""
    fused: list[str] = dataclasses.field(default_factory=list)
    reason: str = ""

    def _cells(self) -> list[str]:
        note = f"with {', '.join(self.fused)}" if self.fused else self.reason
        return [self.layer, self.activation and f"AGC, {self.activation}", note]


class ConversionTable(list[ConvertedLayer]):
    """One row for each BatchNormalization layer, in the order of execution; `print` shows it as a table."""

    def __str__(self) -> str:
        return format_table([["layer", "becomes", ""], *(row._cells() for row in self)])


def convert(model: keras.Model, calibrate_with: Any = None) -> keras.Model:
    """Returns a copy of a model with AutomaticGainControl in place of BatchNormalization.

    **The copy has to be trained.** The two layers compute different things: BatchNormalization's
    moving averages, gamma and beta (with their initializers, regularizers and constraints) cannot be
    carried over and are dropped, the predictions are not those of the original, and a network that
    was trained with BatchNormalization does not keep its accuracy. Every AGC starts with a gain and
    a mean scale of 1, and has no offset. All other weights are copied, so the result is a start for
    training; `calibrate_with`, or `tf_agc.calibrate` later, gives it initial gains that fit, without
    which a deep network may diverge.

    A ReLU (max_value None or 6), LeakyReLU or ELU layer, an Activation layer of relu, relu6, leaky_relu
    or elu (by name, or the function of keras.activations), or an operation such as keras.ops.relu,
    becomes part of the AGC before it and is no layer any more, where it is all that reads the
    BatchNormalization, at every place where that is used. It stays a layer of its own where AGC cannot
    compute the same (a threshold), where it has another compute dtype, where it or the
    BatchNormalization has an activity regularizer, and where it is one of several outputs of its model.

    What stays as it was: names (an AGC has the name of the layer that it replaces), `trainable`, dtype
    policies, activity regularizers, shared layers and models, the structure of inputs and outputs, the
    state of preprocessing layers. The original is not changed, and shares no weights with the copy. The
    copy is not compiled: its weights need an optimizer of their own. Other layers are copied through
    `get_config()`, so custom ones must have it, and custom functions that they name must be registered.
    What Keras does not save of a layer starts anew, such as a `tf.Variable` that is none of its weights.

    Models may be nested, also in TimeDistributed. A BatchNormalization is left alone, with one warning
    that lists all of them and why, where a call's map has one position, as far as sizes are known now
    (its mean is the map itself), where it has no spatial axes (behind a Dense layer), where its axis is
    not that of the channels, where it is called with a mask, where a subclass has a `call` of its own,
    and inside custom layers and subclassed models, whose code `convert` does not rewrite. A model class
    whose constructor does not take (inputs, outputs, name) cannot be made again: such a model is copied
    as a plain functional or Sequential model, and listed too. `tf_agc.conversion_table(model)` tells all
    of it before anything is done. Of sizes that only a batch has, the warning lists what is seen with
    `calibrate_with`: an AGC all of whose channels are constant there.

    Args:
        model: a functional or Sequential model, built; compiled or not.
        calibrate_with: one batch of the model's inputs, for `tf_agc.calibrate`; None leaves all gains
            at 1.

    Returns:
        A new model of the same class, not compiled.

    Raises:
        TypeError: model is not a functional or Sequential model.
        ValueError: the model is not built; it has no BatchNormalization, or none that can be replaced;
            a layer cannot be copied (the message names it). What `calibrate` raises for the batch.
    """
    survey = _Survey(model)
    table = survey.table()
    if not survey.norms:
        raise ValueError(f"model '{model.name}' has no BatchNormalization layer to convert")
    notes = "".join(f"\n  {row.layer}: {row.reason}" for row in table if row.reason)
    if not any(map(survey.replacement_of, (norm.layer for norm in survey.norms.values()))):
        raise ValueError(f"model '{model.name}' has no BatchNormalization layer that can be replaced:{notes}")
    copy = _Copier(survey).copy(model)
    if calibrate_with is not None:
        for row in calibration.calibrate(copy, calibrate_with):
            if row.calls and len(row.kept) == row.gain.size:
                notes += f"\n  {row.layer}: replaced, but constant on calibrate_with, as maps of one position are"
    if notes:
        warnings.warn(f"convert did not carry over all of model '{model.name}':{notes}", stacklevel=2)
    return copy


def conversion_table(model: keras.Model) -> ConversionTable:
    """Tells what `convert` makes of each BatchNormalization layer, without converting anything.

    Args:
        model: as in `convert`.

    Returns:
        A list with one row for each BatchNormalization layer, in order of execution: what replaces it,
        which activation layers become part of that, or why it is left alone. Empty where the model
        has none. Printing it shows a table.

    Raises:
        TypeError, ValueError: the model is of a kind that `convert` refuses, or not built.
    """
    return _Survey(model).table()


@dataclasses.dataclass
class _Call:
    """One call of a BatchNormalization, and the activation that is all that reads its output."""

    shape: tuple[int | None, ...]
    activation: tuple[str, float | None] | None = None  # name and alpha
    activation_layer: str = ""


@dataclasses.dataclass
class _Norm:
    """A BatchNormalization layer with all its calls."""

    layer: keras.layers.BatchNormalization
    path: str
    calls: list[_Call] = dataclasses.field(default_factory=list)
    obstacle: str = ""

    @property
    def activation(self) -> tuple[str, float | None] | None:
        """What AGC computes too: one and the same activation behind every call."""
        first, *others = {call.activation for call in self.calls}
        return None if others else first

    @property
    def _data_format(self) -> str:
        rank = len(self.calls[0].shape)
        return "channels_last" if self.layer.axis % rank == rank - 1 else "channels_first"

    def reason(self) -> str:
        """Why the layer is left alone; empty where it is replaced."""
        if self.obstacle:
            return self.obstacle
        axis, rank = self.layer.axis, len(self.calls[0].shape)
        if not 3 <= rank <= 8:
            return f"left alone, AGC takes 1 to 6 spatial axes: input shape {self.calls[0].shape}"
        if axis % rank not in (1, rank - 1):
            return f"left alone, its axis={axis} is neither the first nor the last one of a sample"
        for call in self.calls:
            if set(call.shape[1:-1] if self._data_format == "channels_last" else call.shape[2:]) == {1}:
                return f"left alone, a map of one position is its own mean: input shape {call.shape}"
        return ""

    def replacement(self) -> AutomaticGainControl:
        activation, alpha = self.activation or (None, None)
        return AutomaticGainControl(
            activation,
            data_format=self._data_format,
            alpha=alpha,
            activity_regularizer=self.layer.activity_regularizer,
            name=self.layer.name,
            dtype=self.layer.dtype_policy,
        )

    def row(self) -> ConvertedLayer:
        reason = self.reason()
        if reason or not self.activation:
            return ConvertedLayer(self.path, "" if reason else "linear", reason=reason)
        fused = list(dict.fromkeys(call.activation_layer for call in self.calls))
        return ConvertedLayer(self.path, self.activation[0], fused)


class _Survey:
    """Finds every BatchNormalization of a model and decides what becomes of it."""

    def __init__(self, model: keras.Model) -> None:
        _check_model(model)
        self.norms: dict[int, _Norm] = {}  # by the layer's identity
        self._lost_classes: dict[int, ConvertedLayer] = {}  # by the model's identity
        self._visited: set[tuple[Any, ...]] = set()
        self._visit_model(model, model.inputs, model.name, "")

    def replacement_of(self, operation: Any) -> _Norm | None:
        norm = self.norms.get(id(operation))
        return None if norm is None or norm.reason() else norm

    def table(self) -> ConversionTable:
        return ConversionTable([*(norm.row() for norm in self.norms.values()), *self._lost_classes.values()])

    def _visit_model(self, model: keras.Model, inputs: list[Any], path: str, prefix: str) -> None:
        """Visits a model as it is called with these inputs, whose sizes may be known where its own are not."""
        inputs = [_input(own, given) for own, given in zip(model.inputs, inputs, strict=True)]
        visit = (id(model), *(x.shape for x in inputs))
        if visit in self._visited:
            return
        self._visited.add(visit)
        if not _can_be_constructed(type(model)):
            reason = f"copied without its class {type(model).__name__}, which has a constructor of its own"
            self._lost_classes.setdefault(id(model), ConvertedLayer(path, reason=reason))

        calls = _calls(model)
        readers = collections.defaultdict(list)
        for call in calls:
            for tensor in set(map(id, call.input_tensors)):
                readers[tensor].append(call)
        model_outputs = set(map(id, model.outputs))
        for call, arguments in zip(calls, _arguments(model, calls, inputs), strict=True):
            self._visit_call(call.operation, arguments, prefix)
            norm = self.norms.get(id(call.operation))
            if norm is None:
                continue
            if len(call.input_tensors) > 1:
                norm.obstacle = "left alone, it is called with a mask, and AGC averages over all positions"
            (output,) = map(id, call.outputs)
            if len(readers[output]) == 1 and output not in model_outputs:
                (reader,) = readers[output]
                several = len(model.outputs) > 1 and not model_outputs.isdisjoint(map(id, reader.outputs))
                # Losses and metrics may be given by the name of an output.
                if not several and _is_computed_alike(norm.layer, reader.operation):
                    fused = find_fused(reader.operation)
                    norm.calls[-1].activation = None if fused == ("linear", None) else fused
                    norm.calls[-1].activation_layer = reader.operation.name

    def _visit_call(self, operation: Any, arguments: list[Any], prefix: str) -> None:
        path = prefix + operation.name
        if isinstance(operation, keras.layers.BatchNormalization):
            norm = self._norm(operation, path)
            norm.calls.append(_Call(arguments[0].shape))
            if not _keras_defines_call(operation):
                norm.obstacle = f"left alone, its class {type(operation).__name__} has a call() of its own"
        elif _is_graph(operation):
            self._visit_model(operation, arguments[: len(operation.inputs)], path, f"{path}/")
        elif type(operation) is keras.layers.TimeDistributed:
            # Nothing is fused here: an activation behind it is in another TimeDistributed.
            step = keras.KerasTensor(arguments[0].shape[:1] + arguments[0].shape[2:], arguments[0].dtype)
            self._visit_call(operation.layer, [step], f"{path}/")
        elif isinstance(operation, keras.Layer):
            for layer in _sublayers(operation):
                if isinstance(layer, keras.layers.BatchNormalization):
                    obstacle = f"left alone, it is inside the {type(operation).__name__} '{operation.name}'"
                    self._norm(layer, f"{path}/{layer.name}").obstacle = obstacle

    def _norm(self, layer: keras.layers.BatchNormalization, path: str) -> _Norm:
        return self.norms.setdefault(id(layer), _Norm(layer, path))


class _Copier:
    """Copies models, and each of their layers once, however often it is used."""

    def __init__(self, survey: _Survey) -> None:
        self._survey = survey
        self._copies: dict[int, tuple[Any, Any]] = {}  # original and copy; layers before the models that hold them
        self._kept: list[tuple[keras.Layer, keras.Layer]] = []  # those copied as they are
        self._replacements: dict[int, _Norm] = {}  # by the identity of the AGC layer
        self._activated: dict[int, keras.KerasTensor] = {}  # see _call

    def copy(self, model: keras.Model) -> keras.Model:
        copy = self._copy(model)
        # Models before their layers: what is set on a model is set on all of its layers.
        for original, copied in reversed(self._copies.values()):
            if isinstance(original, keras.Layer):
                copied.trainable = original.trainable
        for original, copied in self._kept:
            with _naming(original):
                _copy_state(original, copied)
        return copy

    def _copy(self, operation: Any) -> Any:
        if id(operation) not in self._copies:
            self._copies[id(operation)] = operation, self._make_copy(operation)
        return self._copies[id(operation)][1]

    def _make_copy(self, operation: Any) -> Any:
        norm = self._survey.replacement_of(operation)
        if norm:
            copy = norm.replacement()
            self._replacements[id(copy)] = norm
            return copy
        if isinstance(operation, keras.Sequential) and _is_graph(operation):
            return self._copy_sequential(operation)
        if _is_graph(operation):
            return self._copy_functional(operation)
        if type(operation) is keras.layers.TimeDistributed:
            layer = self._copy(operation.layer)
            return keras.layers.TimeDistributed(layer, name=operation.name, dtype=operation.dtype_policy)
        with _naming(operation):
            copy = _copy_layer(operation)
        if isinstance(operation, keras.Layer):
            self._kept.append((operation, copy))
        return copy

    def _copy_sequential(self, model: keras.Sequential) -> keras.Sequential:
        layers = [_input_layer(model.inputs[0])]
        previous = None
        for layer in model.layers:
            norm = self._survey.replacement_of(previous)
            if not (norm and norm.activation):  # else it is that activation
                layers.append(self._copy(layer))
            previous = layer
        kind = type(model) if _can_be_constructed(type(model)) else keras.Sequential
        return kind(layers, name=model.name)

    def _copy_functional(self, model: keras.Model) -> keras.Model:
        # Of the same graph, but plain and not compiled: clone_model would compile the copy, which
        # fails where a loss is not registered.
        plain = keras.Model(model.input, model.output, name=model.name)
        copy = keras.models.clone_model(
            plain,
            input_tensors=keras.tree.map_structure(lambda tensor: _input_layer(tensor).output, plain.input),
            clone_function=self._copy,
            call_function=self._call,
        )
        if type(model) is not type(copy) and _can_be_constructed(type(model)):
            copy = type(model)(copy.input, copy.output, name=model.name)
        return copy

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a copy, but for an activation behind an AGC that computes it: that one vanishes.

        clone_model does not say which call of the original this is. The only reader of a fused AGC's
        output is its activation, so the first to come with that output is it.
        """
        first = next(x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor))
        if id(first) in self._activated:
            return self._activated.pop(id(first))
        norm = self._replacements.get(id(operation))
        if norm is None:
            return operation(*args, **kwargs)
        outputs = operation(first)  # `training` means nothing to AGC
        if norm.activation:
            self._activated[id(outputs)] = outputs
        return outputs


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a functional or Sequential keras.Model, got {type(model).__name__}")
    if isinstance(model, keras.Sequential) and _keras_defines_call(model) and not _is_graph(model):
        raise ValueError(
            f"model '{model.name}' is not built: call it on a batch, or call its build() with an input shape, "
            "before converting it"
        )
    if not _is_graph(model):
        raise TypeError(
            f"model must be a functional or Sequential keras.Model, got the subclassed model '{model.name}' "
            f"({type(model).__name__}): replace BatchNormalization in its code"
        )


def _is_graph(layer: Any) -> bool:
    """Whether this is a model that its graph describes: no code of its own runs when it is called."""
    if isinstance(layer, keras.Sequential):
        return hasattr(layer, "inputs") and _keras_defines_call(layer)
    return isinstance(layer, keras.Model) and isinstance(layer, keras.Function) and _keras_defines_call(layer)


def _keras_defines_call(layer: keras.Layer) -> bool:
    return type(layer).call.__module__.startswith("keras.")


def _can_be_constructed(kind: type[keras.Model]) -> bool:
    """Whether a model of this class can be made as Keras makes its own."""
    if kind.__init__.__module__.startswith("keras."):
        return True
    arguments = inspect.getfullargspec(kind.__init__)
    return arguments.args[1:] == ["inputs", "outputs", "name"] or bool(arguments.varargs and arguments.varkw)


def _calls(model: keras.Model) -> list[Any]:
    """The nodes of a model's graph, in the order of execution: `operation`, `arguments`, `input_tensors`, `outputs`.

    Private, as Keras has no public way to see who reads a tensor, but for configurations, which
    exist only for layers that can be saved.
    """
    if isinstance(model, keras.Sequential):
        model = keras.Model(model.inputs, model.outputs, name=model.name)
    depths = sorted(model._nodes_by_depth.items(), reverse=True)
    return [node for _, nodes in depths for node in nodes if not node.is_input]


def _input(own: keras.KerasTensor, given: Any) -> keras.KerasTensor:
    """An input of a model in one call, with the sizes that the model knows or the call."""
    if not isinstance(given, keras.KerasTensor) or len(given.shape) != len(own.shape):
        return own
    shape = tuple(a if b is None else b for a, b in zip(own.shape, given.shape, strict=True))
    return own if shape == own.shape else keras.KerasTensor(shape, own.dtype, sparse=own.sparse)


def _arguments(model: keras.Model, calls: list[Any], inputs: list[Any]) -> Iterator[list[Any]]:
    """The arguments of each of a model's calls when the model is called with these inputs, flat.

    Shapes are inferred as Keras does it for the model's output.
    """
    known = all(x is own for x, own in zip(inputs, model.inputs, strict=True))
    tensors = dict(zip(map(id, model.inputs), inputs, strict=True))
    for call in calls:
        args, kwargs = call.arguments.fill_in(tensors)
        outputs = call.outputs if known else call.operation.compute_output_spec(*args, **kwargs)
        tensors.update(zip(map(id, call.outputs), keras.tree.flatten(outputs), strict=True))
        yield keras.tree.flatten((args, kwargs))  # keywords by name: `inputs` stands first


def _sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layer itself and all layers in it; private, as Keras has no public way to list them."""
    return layer._flatten_layers()


def _is_computed_alike(norm: keras.layers.BatchNormalization, activation: Any) -> bool:
    """Whether one layer can stand for both: of one compute dtype, and nothing regularizes what is between them."""
    if norm.activity_regularizer:
        return False
    # An operation is no layer, and computes in the dtype of its input.
    return not isinstance(activation, keras.Layer) or activation.compute_dtype == norm.compute_dtype


def _input_layer(tensor: keras.KerasTensor) -> keras.layers.InputLayer:
    """A copy of the input layer that made this input of a model."""
    original = tensor._keras_history.operation
    # Some versions of Keras leave `optional` out of the configuration.
    return keras.layers.InputLayer.from_config({**original.get_config(), "optional": original.optional})


def _copy_layer(operation: Any) -> Any:
    if type(operation) is keras.layers.Lambda:
        # Its configuration has the code of a lambda, but not the globals that the code uses.
        return keras.layers.Lambda(
            operation.function,
            operation._output_shape,
            operation.mask,
            operation.arguments,
            name=operation.name,
            dtype=operation.dtype_policy,
        )
    return type(operation).from_config(operation.get_config())


def _copy_state(original: keras.Layer, copy: keras.Layer) -> None:
    """Copies weights, and what else a layer saves: the state that a preprocessing layer has learned."""
    for old, new in zip(_sublayers(original), _sublayers(copy), strict=True):
        new.trainable = old.trainable
        variables: dict[str, Any] = {}
        old.save_own_variables(variables)
        if variables:
            new.load_own_variables(variables)
        if hasattr(old, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                old.save_assets(directory)
                new.load_assets(directory)


@contextlib.contextmanager
def _naming(operation: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(f"layer '{operation.name}' ({type(operation).__name__}) cannot be copied: {error}") from error
