"""`tf_agc.convert`: a copy of a Keras model with AutomaticGainControl in place of BatchNormalization.

What becomes of each layer is decided in `tf_agc.conversion_plan`; here the copy is made. Nothing computes anything, and
the original is only read.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import keras

from tf_agc import calibration, model_graph
from tf_agc.conversion_plan import ConversionTable, ConvertedLayer, Plan, can_be_constructed, summary


def convert(model: keras.Model, calibrate_with: Any = None, replace_causal: bool = False) -> keras.Model:
    """Returns a copy of a model with AutomaticGainControl in place of BatchNormalization.

    **The copy has to be trained.** The two layers compute different things: BatchNormalization's
    moving averages, gamma and beta (with their initializers, regularizers and constraints) cannot be
    carried over and are dropped, the predictions are not those of the original, and a network that
    was trained with BatchNormalization does not keep its accuracy. Every AGC starts with a gain and
    a mean scale of 1, and has no bias. All other weights are copied, so the result is a start for
    training; `calibrate_with`, or `tf_agc.calibrate` later, gives it initial gains that fit, without
    which a deep network may diverge.

    A ReLU (max_value None or 6), LeakyReLU or ELU layer, an Activation layer of relu, relu6, leaky_relu
    or elu (by name, or the function of keras.activations or tf.nn), or an operation such as keras.ops.relu,
    becomes part of the AGC before it and is no layer any more, where it is all that reads the
    BatchNormalization, at every place where that is used. It stays a layer of its own where AGC cannot
    compute the same (a threshold), where it has another compute dtype, where it or the
    BatchNormalization has an activity regularizer, and where it is one of several outputs of its model.

    An Add layer, keras.ops.add or `+` of two maps of one shape becomes part of the AGC before it likewise: the
    junction of a residual network, BatchNormalization, Add and ReLU, is one AGC that is called with the other map
    as its `shortcut`. Where both maps come from a BatchNormalization (a projected shortcut), the one at the end of
    the longer way is the junction, and the other's AGC is linear. A sum of more maps, or one that broadcasts, stays.

    Where a global average pooling, or another mean over the map, reads an AGC (its activation, dropout,
    convolutions and concatenations may be between), the mean is let through: its mean scale is 0 at first.
    With a mean scale of 1, a linear AGC would give such a pooling zeros.

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
    inside custom layers and subclassed models, whose code `convert` does not rewrite, and in causal networks,
    unless `replace_causal` asks for it: before or behind a Conv1D with padding="causal", padding of the
    start alone, attention with a causal mask, or a recurrent layer that returns sequences. A model class
    whose constructor does not take (inputs, outputs, name) cannot be made again: such a model is copied
    as a plain functional or Sequential model, and listed too. `tf_agc.conversion_table(model)` tells all
    of it before anything is done. Of sizes that only a batch has, the warning lists what is seen with
    `calibrate_with`: an AGC all of whose channels are constant there.

    Args:
        model: a functional or Sequential model, built; compiled or not.
        calibrate_with: one batch of the model's inputs, for `tf_agc.calibrate`; None leaves all gains
            at 1.
        replace_causal: whether BatchNormalization is replaced in causal networks too. AGC's mean is over the whole
            sequence, so what the copy gives at one step depends on later ones.

    Returns:
        A new model of the same class, not compiled.

    Raises:
        TypeError: model is not a functional or Sequential model.
        ValueError: the model is not built; it has no BatchNormalization, or none that can be replaced;
            a layer or a model cannot be made again (the message names it). What `calibrate` raises for the
            batch.
    """
    plan = Plan(model, replace_causal)
    table = plan.table()
    if not plan.norms:
        raise ValueError(f"model '{model.name}' has no BatchNormalization layer to convert")
    if not any(row.activation for row in table):
        raise ValueError(f"model '{model.name}' has no BatchNormalization layer that can be replaced:{summary(table)}")
    copy = _Copier(plan).copy(model)
    if calibrate_with is not None:
        reason = "replaced, but constant on calibrate_with, as maps of one position are"
        for row in calibration.calibrate(copy, calibrate_with):
            if row.calls and len(row.kept) == row.gain.size:
                table.append(ConvertedLayer(row.layer, reason=reason))
    if notes := summary(table):
        warnings.warn(f"convert did not carry over all of model '{model.name}':{notes}", stacklevel=2)
    return copy


def conversion_table(model: keras.Model, replace_causal: bool = False) -> ConversionTable:
    """Tells what `convert` makes of each BatchNormalization layer, without converting anything.

    Args:
        model: as in `convert`.
        replace_causal: as in `convert`.

    Returns:
        A list with one row for each BatchNormalization layer, in order of execution: what replaces it,
        which Add and activation layers become part of that, whether its mean is let through, or why it is
        left alone; then one for each model that loses its class. Printing it shows a table.

    Raises:
        TypeError, ValueError: the model is of a kind that `convert` refuses, or not built.
    """
    return Plan(model, replace_causal).table()


class _Copier:
    """Copies models, and each of their layers once, however often it is used."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._copies: dict[int, tuple[Any, Any]] = {}  # original and copy; layers before the models that hold them
        self._kept: list[tuple[keras.Layer, keras.Layer]] = []  # those copied as they are

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
        replacement = self._plan.replacement(operation)
        if replacement is not None:
            return replacement
        if isinstance(operation, keras.Sequential) and model_graph.is_graph(operation):
            return self._copy_sequential(operation)
        if model_graph.is_graph(operation):
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
        vanishing = {id(node.operation) for node in model_graph.nodes(model) if self._plan.vanishes(node)}
        layers = [self._copy(layer) for layer in model.layers if id(layer) not in vanishing]
        kind = type(model) if can_be_constructed(type(model)) else keras.Sequential
        with _naming(model):
            return kind([_input_layer(model.inputs[0]), *layers], name=model.name)

    def _copy_functional(self, model: keras.Model) -> keras.Model:
        # Not keras.models.clone_model: it does not say which call is made, and compiles the copy, which fails where a
        # loss is not registered.
        inputs = keras.tree.map_structure(lambda tensor: _input_layer(tensor).output, model.input)
        tensors = dict(zip(map(id, model.inputs), keras.tree.flatten(inputs), strict=True))
        for node in model_graph.nodes(model):
            outputs = self._call(node, *node.arguments.fill_in(tensors))
            tensors.update(zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=True))
        outputs = keras.tree.map_structure(lambda tensor: tensors[id(tensor)], model.output)
        kind = type(model) if can_be_constructed(type(model)) else keras.Model
        with _naming(model):
            return kind(inputs, outputs, name=model.name)

    def _call(self, node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Does in the copy what a call in the original does; args and kwargs are of the copy."""
        tensors = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
        junction = self._plan.junction(node)
        if junction is not None:
            norm, position = junction
            return self._copy(norm)(tensors[position], shortcut=tensors[1 - position])
        if self._plan.vanishes(node):
            return tensors[0]
        copy = self._copy(node.operation)
        if self._plan.is_replaced(node.operation):
            return copy(tensors[0])  # `training` means nothing to AGC
        return copy(*args, **kwargs)


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
    for old, new in zip(model_graph.sublayers(original), model_graph.sublayers(copy), strict=True):
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
    except KeyError as error:  # its message is the key alone
        raise ValueError(
            f"layer '{operation.name}' ({type(operation).__name__}) cannot be copied: missing argument {error}"
        ) from error
    except Exception as error:
        raise ValueError(f"layer '{operation.name}' ({type(operation).__name__}) cannot be copied: {error}") from error
