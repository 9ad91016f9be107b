"""`tf_agc.convert`: a copy of a Keras model with AutomaticGainControl in place of BatchNormalization.

What becomes of each layer is decided in `tf_agc.conversion_plan`; here the copy is made. Nothing computes anything, and
the original is only read.
"""

import tempfile
import warnings
from typing import Any

import keras

from tf_agc import calibration, layer_replacement, model_graph, standardized
from tf_agc.conversion_plan import ConversionTable, Plan, can_be_constructed, summary


def convert(
    model: keras.Model, calibrate_with: Any = None, replace_causal: bool = False, standardize: bool = True
) -> keras.Model:
    """Returns a copy of a model with AutomaticGainControl in place of BatchNormalization.

    **The copy has to be trained.** The two layers compute different things: BatchNormalization's moving averages,
    gamma and beta (with their initializers, regularizers and constraints) are dropped, and a network that was trained
    with BatchNormalization does not keep its accuracy. Other weights are copied, so the result is a start for
    training; `calibrate_with`, or `tf_agc.calibrate` later, gives it initial gains and biases that fit, without which
    a deep network may diverge. An AGC has a bias where the BatchNormalization has a beta (`center`).

    With `standardize`, every convolution becomes a standardized one (`tf_agc.StandardizedConv2D` and its like) whose
    output nothing reads but AGCs, directly or in sums, concatenations, poolings, padding and dropout. At the end of a
    residual branch, where no AGC is between it and the sum (pre-activation networks), it has a gain too, 0.5 at first.
    Filters keep their directions, and start with a norm of sqrt(2), whatever theirs was; so do those of a separable
    convolution, which becomes no standardized one. A convolution stays as it is with an activation, with LoRA or
    quantized, and where its filters have one input each. So do subclasses, transposed convolutions, and those inside
    the code of custom layers.

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

    Where a global average pooling, or another mean over the map (in a squeeze-and-excite block), reads an AGC, the
    mean is let through: its mean scale is 0 at first. Activations, dropout, convolutions and concatenations may be
    between. Elsewhere it is the layer's default.

    What stays as it was: names (an AGC has the name of the layer that it replaces), `trainable`, dtype
    policies, activity regularizers, shared layers and models, the structure of inputs and outputs, the
    state of preprocessing layers. The original is not changed, and shares no weights with the copy. `convert` does
    not compile the copy: its weights need an optimizer of their own. Other layers are copied through
    `get_config()`, so custom ones must have it, and custom functions that they name must be registered.
    What Keras does not save of a layer starts anew, such as a `tf.Variable` that is none of its weights.

    A model keeps its class, its methods and its attributes. Custom layers, subclassed models and models with a
    constructor of their own (KerasHub's) are made again by their `from_config()`, and the layers in them are replaced
    wherever an attribute, or a list, tuple or dict in one, holds them. The copy's class is a subclass of the original's
    that says, when it is saved, what was replaced. Inside the code of custom layers and subclassed models an AGC is
    linear, as no graph tells what follows. Where a functional or Sequential class cannot make its model again, as its
    `get_config()` does not have what its constructor needs, the copy is a plain functional or Sequential model, and is
    listed. What could be saved and not loaded again is refused.

    Models may be nested, also in TimeDistributed. A BatchNormalization is left alone, with one warning
    that lists all of them and why, where a call's map has one position, as far as sizes are known now
    (its mean is the map itself), where it has no spatial axes (behind a Dense layer), where its axis is
    not that of the channels, where it is called with a mask, where a subclass has a `call` of its own,
    where a custom layer holds it in no attribute, and in causal networks, unless `replace_causal` asks for it: before
    or behind a Conv1D with padding="causal", padding of the start alone, attention with a causal mask, or a recurrent
    layer that returns sequences, or in a custom layer or subclassed model with one of them.
    `tf_agc.conversion_table(model)` tells all of it before anything is done.

    Args:
        model: a model of any kind, built; compiled or not.
        calibrate_with: one batch of the model's inputs, for `tf_agc.calibrate`; None leaves all gains
            at 1.
        replace_causal: whether BatchNormalization is replaced in causal networks too. AGC's mean is over the whole
            sequence, so what the copy gives at one step depends on later ones.
        standardize: whether the convolutions in front of AGCs are standardized.

    Returns:
        A new model of the same class, or of a subclass of it.

    Raises:
        TypeError: model is not a Keras model.
        ValueError: the model is not built; it has no BatchNormalization, or none that can be replaced;
            a layer or a model cannot be made again (the message names it), or the copy could not be loaded again. What
            `calibrate` raises for the batch.
    """
    plan = Plan(model, replace_causal, standardize)
    table = plan.table()
    if not plan.norms:
        raise ValueError(f"model '{model.name}' has no BatchNormalization layer to convert")
    if not any(row.activation for row in table):
        raise ValueError(f"model '{model.name}' has no BatchNormalization layer that can be replaced:{summary(table)}")
    copy = _Copier(plan).copy(model)
    if calibrate_with is not None:
        calibration.calibrate(copy, calibrate_with)
    if notes := summary(table):
        warnings.warn(f"convert did not carry over all of model '{model.name}':{notes}", stacklevel=2)
    return copy


def conversion_table(model: keras.Model, replace_causal: bool = False, standardize: bool = True) -> ConversionTable:
    """Tells what `convert` makes of each BatchNormalization layer, without converting anything.

    Args:
        model: as in `convert`.
        replace_causal, standardize: as in `convert`.

    Returns:
        A list with one row for each BatchNormalization layer, in order of execution: what replaces it,
        which Add and activation layers become part of that, whether its mean is let through, or why it is
        left alone; then one for each model that loses its class. Printing it shows a table.

    Raises:
        TypeError, ValueError: the model is of a kind that `convert` refuses, or not built.
    """
    return Plan(model, replace_causal, standardize).table()


class _Copier:
    """Copies models, and each of their layers once, however often it is used."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._copies: dict[int, tuple[Any, Any]] = {}  # original and copy; layers before the models that hold them
        self._kept: list[tuple[keras.Layer, keras.Layer]] = []  # those made again by their class
        self._standardized: list[tuple[keras.Layer, keras.Layer]] = []  # convolutions and what became of them
        # Layers of which some are replaced in place, and what they became; models before their layers.
        self._pairs: list[tuple[keras.Layer, keras.Layer]] = []

    def copy(self, model: keras.Model) -> keras.Model:
        copy = self._copy(model)
        if not copy.built:
            with layer_replacement.naming(model):
                copy.build_from_config(model.get_build_config())
        # Models before their layers: what is set on a model is set on all of its layers.
        for original, copied in reversed(self._copies.values()):
            if isinstance(original, keras.Layer):
                copied.trainable = original.trainable
        for original, copied in self._kept:
            with layer_replacement.naming(original):
                _copy_state(original, copied)
                self._replace(original, copied)
        for original, copied in self._standardized:
            copied.start_from(original.kernel)
            if original.use_bias:
                copied.bias.assign(original.bias)
        for original, copied in self._pairs:
            copied.trainable = original.trainable
        for original, copied in [*self._kept, *self._pairs]:
            if self._plan.is_rescaled(original):
                standardized.rescale_separable(copied)
        if self._pairs:
            _check_loading(model, copy)
        return copy

    def _copy(self, operation: Any) -> Any:
        if id(operation) not in self._copies:
            self._copies[id(operation)] = operation, self._make_copy(operation)
        return self._copies[id(operation)][1]

    def _make_copy(self, operation: Any) -> Any:
        replaced = self._plan.replacement(operation)
        if replaced is not None:
            if not self._plan.is_replaced(operation):
                self._standardized.append((operation, replaced))
            return replaced
        if model_graph.is_graph(operation):
            if id(operation) in self._plan.remade:
                copy = self._plan.remade[id(operation)]
                with layer_replacement.naming(operation):
                    _copy_state(operation, copy)
                    self._replace(operation, copy)  # before anything calls it
                return copy
            if isinstance(operation, keras.Sequential):
                return self._copy_sequential(operation)
            return self._copy_functional(operation)
        if type(operation) is keras.layers.TimeDistributed:
            layer = self._copy(operation.layer)
            return keras.layers.TimeDistributed(layer, name=operation.name, dtype=operation.dtype_policy)
        copy = layer_replacement.remake(operation)
        if isinstance(operation, keras.Layer):
            self._kept.append((operation, copy))
        return copy

    def _replace(self, original: keras.Layer, copy: keras.Layer) -> None:
        """Replaces in a copy that its class made what is to be replaced in it."""
        replacements = self._plan.replacements_in(original)
        if replacements.layers:
            config = {
                "original": keras.saving.serialize_keras_object(copy),
                "replacements": replacements.get_config(),
            }
            layers = model_graph.sublayers(copy)
            layer_replacement.replace(copy, replacements, config)
            for at, old in enumerate(model_graph.sublayers(original)):
                new = replacements.layers.get(at, layers[at])
                self._pairs.append((old, new))
                if at in replacements.layers and not self._plan.is_replaced(old):
                    self._standardized.append((old, new))

    def _copy_sequential(self, model: keras.Sequential) -> keras.Sequential:
        vanishing = {id(node.operation) for node in model_graph.nodes(model) if self._plan.vanishes(node)}
        layers = [self._copy(layer) for layer in model.layers if id(layer) not in vanishing]
        kind = type(model) if can_be_constructed(type(model)) else keras.Sequential
        with layer_replacement.naming(model):
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
        with layer_replacement.naming(model):
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
        if self._plan.replaces(node.operation):
            return copy(tensors[0])  # `training` means nothing to these
        return copy(*args, **kwargs)


def _input_layer(tensor: keras.KerasTensor) -> keras.layers.InputLayer:
    """A copy of the input layer that made this input of a model."""
    original = tensor._keras_history.operation
    # Some versions of Keras leave `optional` out of the configuration.
    return keras.layers.InputLayer.from_config({**original.get_config(), "optional": original.optional})


def _check_loading(model: keras.Model, copy: keras.Model) -> None:
    """Raises ValueError where a copy could be trained and saved, and not loaded again."""
    kinds = {keras.saving.get_registered_name(type(each)): type(each) for each in model_graph.sublayers(model)}
    try:
        with keras.saving.custom_object_scope(kinds):
            loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(copy), safe_mode=False)
        saved, made = ([weight.shape for weight in each.weights] for each in (copy, loaded))
        if saved != made:
            raise ValueError(f"it has {len(saved)} weights, and {len(made)} when it is made from its configuration")
    except Exception as error:
        raise ValueError(
            f"model '{model.name}' ({type(model).__name__}) cannot be converted, as the copy could be saved and not be "
            f"loaded: {error}"
        ) from error


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
