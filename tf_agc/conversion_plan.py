"""What becomes of each BatchNormalization of a model: the decisions of `tf_agc.convert`, and the table that tells them.

They are taken from the model's graph, before it is copied. Nothing here computes anything.
"""

import collections
import dataclasses
import inspect
import math
from collections.abc import Iterable
from typing import Any

import keras

from tf_agc import layer_replacement, model_graph, reference, standardized
from tf_agc.activations import FusedActivation, find_fused
from tf_agc.calibration import BRANCH_FACTOR
from tf_agc.layer import AutomaticGainControl
from tf_agc.model_graph import Call, is_of_keras
from tf_agc.table import format_table

# Layers with weights that are linear in their input: what has a mean of 0 in each map has so behind them, but for the
# borders and a constant.
_LINEAR = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
    keras.layers.Dense,
    keras.layers.EinsumDense,
)

# What takes the place of a convolution whose output an AGC normalizes.
_STANDARDIZED: dict[type, type[keras.layers.Layer]] = {
    keras.layers.Conv1D: standardized.StandardizedConv1D,
    keras.layers.Conv2D: standardized.StandardizedConv2D,
    keras.layers.Conv3D: standardized.StandardizedConv3D,
    keras.layers.DepthwiseConv2D: standardized.StandardizedDepthwiseConv2D,
}

# What is not standardized, but takes filters of another norm in its place.
_RESCALED = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)

# Between a convolution and what normalizes its output: layers that hand each channel on, or parts of its map.
_HANDS_CHANNELS_ON = (
    *("Concatenate", "Dropout", "GaussianDropout", "GaussianNoise", "AlphaDropout", "Identity"),
    *(f"{kind}{rank}D" for kind in ("SpatialDropout", "ZeroPadding", "Cropping", "UpSampling") for rank in (1, 2, 3)),
    *(f"{kind}Pooling{rank}D" for kind in ("Max", "Average") for rank in (1, 2, 3)),
    *("Pad", "MaxPool", "AveragePool"),
)

# Layers without weights that are not linear, and have no `activation`. Others, custom ones too, are taken for linear.
_NOT_LINEAR = (
    *("ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax"),
    *(f"{kind}MaxPooling{rank}D" for kind in ("Global", "", "Adaptive") for rank in (1, 2, 3)),
)

# Operations that are linear in their input, where it is the only tensor; others are taken for activations.
_LINEAR_OPERATIONS = (
    *("Add", "Subtract", "Negative", "Multiply", "Divide", "TrueDivide", "Mean", "Sum", "Average"),
    *("Conv", "ConvTranspose", "DepthwiseConv", "SeparableConv", "Einsum", "Matmul", "Dot", "Tensordot"),
    *("AveragePool", "AdaptiveAveragePool", "Pad", "PadImages", "CropImages", "Resize", "GetItem", "Split", "Repeat"),
    *("Reshape", "Ravel", "Transpose", "Swapaxes", "Moveaxis", "ExpandDims", "Squeeze", "Flip", "Roll", "Tile"),
    *("DepthToSpace", "SpaceToDepth"),
)

# Layers and operations that average positions, with equal weights or learned ones.
_AVERAGES = (
    *(f"{kind}AveragePooling{rank}D" for kind in ("Global", "", "Adaptive") for rank in (1, 2, 3)),
    *("AveragePool", "AdaptiveAveragePool", "DepthwiseConv1D", "DepthwiseConv2D", "DepthwiseConv"),
)

# What attends to its other inputs, and recurrent layers: the steps of the output are those of one input.
_ATTENTION = ("MultiHeadAttention", "GroupedQueryAttention", "Attention", "AdditiveAttention")


@dataclasses.dataclass
class ConvertedLayer:
    """What `convert` makes of one BatchNormalization layer, or of a model that loses its class.

    Attributes:
        layer: the layer's name, after those of the nested models that it is in ("encoder/bn1").
        activation: the activation that AGC computes, "linear" for none; empty where there is no AGC.
        fused: names of the Add and activation layers that disappear, because AGC computes them.
        standardized: names of the convolutions whose output it normalizes, which are standardized.
        averaged_by: name of what averages the maps behind the AGC, for which its mean scale is 0 at first; or empty.
        reason: why there is no AGC, or what a model loses; empty for a layer that is replaced.
    """

    layer: str
    activation: str = ""
    fused: list[str] = dataclasses.field(default_factory=list)
    averaged_by: str = ""
    reason: str = ""
    standardized: list[str] = dataclasses.field(default_factory=list)

    def _cells(self) -> list[str]:
        notes = [f"with {', '.join(self.fused)}"] if self.fused else []
        if self.standardized:
            notes.append(f"standardizes {', '.join(self.standardized)}")
        if self.averaged_by:
            notes.append(f"mean scale 0 at first, as {self.averaged_by} averages the map")
        return [self.layer, self.activation and f"AGC, {self.activation}", "; ".join(notes) or self.reason]


class ConversionTable(list[ConvertedLayer]):
    """One row for each BatchNormalization layer, in the order of execution; `print` shows it as a table."""

    def __str__(self) -> str:
        return format_table([["layer", "becomes", ""], *(row._cells() for row in self)])


def summary(rows: Iterable[ConvertedLayer]) -> str:
    """The reasons in some rows, each once, as lines of a message; a model may have hundreds of layers."""
    by_kind: dict[str, list[ConvertedLayer]] = {}
    for row in rows:
        if row.reason:
            by_kind.setdefault(row.reason.partition(": ")[0], []).append(row)
    lines = ""
    for kind, (first, *others) in by_kind.items():
        listed = ", ".join(row.layer for row in [first, *others[:7]]) + (", ..." if len(others) > 7 else "")
        lines += f"\n  {kind} ({len(others) + 1} layers): {listed}" if others else f"\n  {first.layer}: {first.reason}"
    return lines


@dataclasses.dataclass
class _NormCall:
    """One call of a BatchNormalization, and what AGC computes with it."""

    call: Call
    add: Call | None = None
    activation: Call | None = None  # what reads its output, or the sum, if that is the only reader


@dataclasses.dataclass
class _Norm:
    """A BatchNormalization layer with all its calls."""

    layer: keras.layers.BatchNormalization
    path: str
    calls: list[_NormCall] = dataclasses.field(default_factory=list)
    obstacle: str = ""
    in_code: bool = False  # called by code, which no graph tells
    causal: str = ""  # the name of something causal before or behind it
    averaged_by: str = ""
    standardized: list[str] = dataclasses.field(default_factory=list)

    @property
    def activation(self) -> FusedActivation | None:
        """What AGC computes too: one and the same activation behind every call."""
        activations = {_find_activation(each.activation) for each in self.calls}
        return activations.pop() if len(activations) == 1 and not self.in_code else None

    @property
    def _data_format(self) -> str:
        rank = len(self._shapes[0])
        return "channels_last" if self.layer.axis % rank == rank - 1 else "channels_first"

    @property
    def _shapes(self) -> list[tuple[int | None, ...]]:
        shapes = [each.call.inputs[0].shape for each in self.calls]
        built = self.layer.get_build_config() or {}
        return [*shapes, tuple(built["input_shape"])] if self.in_code and "input_shape" in built else shapes

    def reason(self) -> str:
        """Why the layer is left alone; empty where it is replaced. What is behind ": " is of this layer alone."""
        if self.obstacle:
            return f"left alone, {self.obstacle}"
        axis, rank = self.layer.axis, len(self._shapes[0])
        if rank not in reference.RANKS:
            return f"left alone, AGC takes 1 to 6 spatial axes: input shape {self._shapes[0]}"
        if axis % rank not in (1, rank - 1):
            return f"left alone, its axis={axis} is neither the first nor the last one of a sample"
        for shape in self._shapes:
            if set(shape[1:-1] if self._data_format == "channels_last" else shape[2:]) == {1}:
                return f"left alone, a map of one position is its own mean: input shape {shape}"
        if self.causal:
            return (
                "left alone, AGC averages over later steps too and the network is causal (replace_causal=True "
                f"replaces it): {self.causal} is causal"
            )
        return ""

    def replacement(self) -> AutomaticGainControl:
        return AutomaticGainControl(
            **(self.activation or FusedActivation("linear"))._asdict(),
            data_format=self._data_format,
            mean_scale_initializer="zeros" if self.averaged_by else None,
            use_bias=self.layer.center,
            activity_regularizer=self.layer.activity_regularizer,
            name=self.layer.name,
            dtype=self.layer.dtype_policy,
        )

    def row(self) -> ConvertedLayer:
        reason = self.reason()
        if reason:
            return ConvertedLayer(self.path, reason=reason)
        adds = [each.add.operation.name for each in self.calls if each.add]
        activations = [each.activation.operation.name for each in self.calls if each.activation and self.activation]
        fused = list(dict.fromkeys(adds + activations))
        activation = (self.activation or ("linear",))[0]
        return ConvertedLayer(self.path, activation, fused, self.averaged_by, standardized=self.standardized)


class Plan:
    """Finds every BatchNormalization of a model and decides what becomes of it, and of what is behind it.

    Args:
        model: as in `convert`.
        replace_causal, standardize: as in `convert`.

    Attributes:
        norms: the BatchNormalization layers, by identity.
    """

    def __init__(self, model: keras.Model, replace_causal: bool, standardize: bool) -> None:
        _check_model(model)
        self._model = model
        self._graph = model_graph.CallGraph(model)
        self.remade: dict[int, keras.Model] = {}
        self._lost_classes: dict[int, ConvertedLayer] = {}  # by the model's identity
        self._remake_models()
        self.norms: dict[int, _Norm] = {}
        for call in self._graph.calls:
            self._find_norms(call)
        self._find_norms_in_code(model)
        if not replace_causal:
            self._mark_causal()
        self._held_tensors = set(map(id, layer_replacement.held(model, keras.KerasTensor)))
        replaced = [norm for norm in self.norms.values() if not norm.reason()]
        self._choose_adds(replaced)
        self._centered = self._find_centered({id(norm.layer) for norm in replaced})
        for norm in replaced:
            for each in norm.calls:
                each.activation = self._activation_behind(norm.layer, each.add or each.call)
            norm.averaged_by = next(filter(None, (self._averaged_by(each.call) for each in norm.calls)), "")

        self._replaced = {id(norm.layer): norm for norm in replaced}
        self._convolutions: dict[int, dict[str, Any]] = {}  # by identity: the arguments that their replacements add
        self._rescaled: set[int] = set()
        if standardize:
            self._find_convolutions()
        # By the identity of Keras's nodes, as the copy is made from them.
        self._junctions: dict[int, tuple[keras.layers.BatchNormalization, int]] = {}
        self._vanishing: set[int] = set()
        for norm in replaced:
            for each in norm.calls:
                if each.add:
                    (output,) = each.call.node.outputs
                    position = [x is output for x in each.add.node.input_tensors].index(True)
                    self._junctions[id(each.add.node)] = norm.layer, position
                    self._vanishing.add(id(each.call.node))
                if each.activation and norm.activation:
                    self._vanishing.add(id(each.activation.node))

    def replacement(self, operation: Any) -> keras.layers.Layer | None:
        """What replaces a layer, made anew; None where it is copied."""
        if id(operation) in self._convolutions:
            kind = _STANDARDIZED[type(operation)]
            return kind.from_config({**operation.get_config(), **self._convolutions[id(operation)]})
        return self._replaced[id(operation)].replacement() if self.is_replaced(operation) else None

    def is_replaced(self, operation: Any) -> bool:
        """Whether an AGC takes the place of a layer."""
        return id(operation) in self._replaced

    def replaces(self, operation: Any) -> bool:
        """Whether an AGC or a standardized convolution takes the place of a layer."""
        return self.is_replaced(operation) or id(operation) in self._convolutions

    def is_rescaled(self, operation: Any) -> bool:
        """Whether a layer is copied with filters of another norm."""
        return id(operation) in self._rescaled

    def junction(self, node: Any) -> tuple[keras.layers.BatchNormalization, int] | None:
        """For the call of an Add that an AGC computes: the BatchNormalization before it, and at which of the inputs."""
        return self._junctions.get(id(node))

    def vanishes(self, node: Any) -> bool:
        """Whether the copy hands the input of this call on, because an AGC behind or before it computes it."""
        return id(node) in self._vanishing

    def replacements_in(self, root: keras.Layer) -> layer_replacement.Replacements:
        """What is replaced in a layer or model whose class makes its layers itself."""
        found = layer_replacement.Replacements()
        layers = model_graph.sublayers(root)
        positions = {id(layer): at for at, layer in enumerate(layers)}
        for at, layer in enumerate(layers):
            new = self.replacement(layer)
            if new is not None:
                new.trainable = layer.trainable
                found.layers[at] = new
            if model_graph.is_graph(layer):
                for number, node in enumerate(model_graph.nodes(layer)):
                    junction = self.junction(node)
                    if junction is not None:
                        found.junctions[at, number] = positions[id(junction[0])], junction[1]
                    elif self.vanishes(node):
                        found.vanishing.add((at, number))
        return found

    def table(self) -> ConversionTable:
        return ConversionTable([*(norm.row() for norm in self.norms.values()), *self._lost_classes.values()])

    def _find_norms(self, call: Call) -> None:
        operation = call.operation
        if isinstance(operation, keras.layers.BatchNormalization):
            norm = self._norm(operation, call.path)
            norm.calls.append(_NormCall(call))
            if not model_graph.keras_defines_call(operation):
                norm.obstacle = f"its class {type(operation).__name__} has a call() of its own"
            elif len(call.inputs) > 1 or _is_masked(call.node):
                norm.obstacle = "it is called with a mask, and AGC averages over all positions"

    def _find_norms_in_code(self, model: keras.Model) -> None:
        called = {id(call.operation) for call in self._graph.calls}
        reachable = set(map(id, layer_replacement.held(model, keras.layers.BatchNormalization)))
        paths = {id(layer): path for path, layer in model_graph.sublayer_paths(model)}
        for holder in model_graph.sublayers(model):
            if model_graph.is_graph(holder) or (id(holder) in called and _hands_in(holder)):
                continue
            for layer in model_graph.held_layers(holder):
                if isinstance(layer, keras.layers.BatchNormalization):
                    norm = self._norm(layer, paths[id(layer)])
                    norm.in_code = True
                    if not model_graph.keras_defines_call(layer):
                        norm.obstacle = f"its class {type(layer).__name__} has a call() of its own"
                    elif not norm._shapes:
                        norm.obstacle = "it is not built, and its input is not known"
                    elif id(layer) not in reachable:
                        norm.obstacle = f"it is not in an attribute of the {type(holder).__name__} that calls it"

    def _remake_models(self) -> None:
        """Makes the models with constructors of their own again, as nothing else tells whether they can."""
        tried: set[int] = set()  # with what is in them, which they make too
        for path, nested in self._graph.models:
            if can_be_constructed(type(nested)) or id(nested) in tried:
                continue
            try:
                self.remade[id(nested)] = layer_replacement.remake(nested)
                tried.update(map(id, model_graph.sublayers(nested)))
            except ValueError as error:
                cause = str(error.__cause__).splitlines()[0]
                reason = f"copied without its class {type(nested).__name__}, which cannot make it again: {cause}"
                self._lost_classes.setdefault(id(nested), ConvertedLayer(path, reason=reason))

    def _norm(self, layer: keras.layers.BatchNormalization, path: str) -> _Norm:
        return self.norms.setdefault(id(layer), _Norm(layer, path))

    def _mark_causal(self) -> None:
        calls = self._graph.calls
        padded: set[int] = set()  # tensors, by identity, that come of one with zeros at both ends
        causal = {id(call) for call in calls if _is_causal(call, padded)}
        for forward in (True, False):
            reached: dict[int, str] = {}  # by the identity of a tensor: what is causal before it, or behind it
            entered: dict[int, str] = {}  # by the identity of the node of a TimeDistributed
            for call in calls if forward else calls[::-1]:
                before = call.inputs if forward else call.outputs
                name = call.path if id(call) in causal else next(filter(None, (reached.get(id(x)) for x in before)), "")
                if type(call.operation) is keras.layers.TimeDistributed:
                    # What is inside has one step at a time: it is passed by.
                    if id(call.node) not in entered:
                        entered[id(call.node)] = name
                        continue
                    name = entered.pop(id(call.node)) or name
                if name:
                    behind = call.outputs if forward else _with_same_steps(call)
                    reached.update((id(x), name) for x in behind)
                    for layer in _layers_called(call.operation):
                        norm = self.norms.get(id(layer))
                        if norm and not norm.causal:
                            norm.causal = name

    def _find_convolutions(self) -> None:
        """Finds the convolutions whose output, in every call, nothing reads but what is replaced."""
        producers = {id(x): call for call in self._graph.calls for x in call.outputs}
        by_layer: dict[int, list[Call]] = collections.defaultdict(list)
        for call in self._graph.calls:
            if _can_be_standardized(call.operation) or _can_be_rescaled(call.operation):
                by_layer[id(call.operation)].append(call)
        for calls in by_layer.values():
            read_by = [self._norms_behind(call, producers) for call in calls]
            if not all(norms for norms, _ in read_by):
                continue
            if _can_be_rescaled(calls[0].operation):
                self._rescaled.add(id(calls[0].operation))
            else:
                ends_branch = any(ends for _, ends in read_by)
                factor = {"use_gain": True, "gain_initializer": keras.initializers.Constant(BRANCH_FACTOR)}
                self._convolutions[id(calls[0].operation)] = factor if ends_branch else {}
                read_by[0][0][0].standardized.append(calls[0].operation.name)

    def _norms_behind(self, call: Call, producers: dict[int, Call]) -> tuple[list[_Norm], bool]:
        """The replaced layers that read an output, directly or as a part of sums and concatenations.

        Returns:
            The layers, none where anything else reads it; whether the output is the branch of a residual block: of
            two maps that are added, the one at the end of the longer way.
        """
        norms: list[_Norm] = []
        ends_branch = False
        todo, seen = [(x, True) for x in call.outputs], {id(call)}
        while todo:
            tensor, is_own = todo.pop()  # is_own: nothing else has been added or concatenated to it
            readers = self._graph.readers(tensor)
            if not readers or self._is_output(producers[id(tensor)]):
                return [], False
            for reader in readers:
                if id(reader.operation) in self._replaced:
                    norms.append(self._replaced[id(reader.operation)])
                elif _adds(reader) or is_of_keras(reader.operation, *_HANDS_CHANNELS_ON):
                    if _adds_two_maps(reader) and is_own:
                        depths = [producers[id(x)].depth if id(x) in producers else 0 for x in reader.inputs]
                        other = depths[reader.inputs[0] is tensor]
                        ends_branch |= producers[id(tensor)].depth > other
                    if id(reader) not in seen:
                        seen.add(id(reader))
                        todo.extend((x, is_own and len(reader.inputs) == 1) for x in reader.outputs)
                else:
                    return [], False
        return norms, ends_branch

    def _is_output(self, call: Call) -> bool:
        """Whether the outermost model, or something that no graph shows, has an output of a call."""
        if call.node is None:
            return False
        if not self._held_tensors.isdisjoint(map(id, call.node.outputs)):
            return True
        return call.scope.model is self._model and call.gives_output_of_model()

    def _only_reader(self, norm: keras.layers.BatchNormalization, call: Call) -> Call | None:
        """What reads the output of a call, if it is in the same graph, and one layer can stand for both."""
        (output,) = call.outputs
        readers = self._graph.readers(output)
        if len(readers) != 1 or readers[0].scope is not call.scope or call.node is None or call.gives_output_of_model():
            return None
        if not self._held_tensors.isdisjoint(map(id, call.node.outputs)):
            return None
        (reader,) = readers
        # Losses and metrics may be given by the name of an output.
        if len(call.scope.model.outputs) > 1 and reader.gives_output_of_model():
            return None
        # Nothing may regularize what is between them. An operation is no layer, and computes in its input's dtype.
        if norm.activity_regularizer:
            return None
        alike = not isinstance(reader.operation, keras.Layer) or reader.operation.compute_dtype == norm.compute_dtype
        return reader if alike else None

    def _choose_adds(self, replaced: list[_Norm]) -> None:
        """Finds each Add that an AGC computes: the one at the end of the longer way, where there are two."""
        candidates: dict[int, list[_NormCall]] = collections.defaultdict(list)
        for norm in replaced:
            for each in norm.calls:
                reader = self._only_reader(norm.layer, each.call)
                if reader and _adds_two_maps(reader):
                    candidates[id(reader)].append(each)
                    each.add = reader
        for alternatives in candidates.values():
            chosen = max(alternatives, key=lambda each: each.call.depth)
            for each in alternatives:
                each.add = each.add if each is chosen else None
        # The graph of a shared model is one, whatever the sizes that it is called with.
        calls = [each for norm in replaced for each in norm.calls]
        apart = {id(each.call.node) for each in calls if not each.add}
        for each in calls:
            each.add = None if id(each.call.node) in apart else each.add

    def _activation_behind(self, norm: keras.layers.BatchNormalization, call: Call) -> Call | None:
        reader = self._only_reader(norm, call)
        return reader if _find_activation(reader) else None

    def _find_centered(self, replaced: set[int]) -> set[int]:
        """The tensors, by identity, whose maps have a mean of 0 if all mean scales are 1 (or one that is constant)."""
        centered: set[int] = set()
        for call in self._graph.calls:
            hits = [id(x) in centered for x in call.inputs]
            is_sum = _sums(call) and len(call.inputs) > 1
            if id(call.operation) in replaced or (all(hits) if is_sum else any(hits) and _keeps_mean_of_zero(call)):
                centered.update(map(id, call.outputs))
        return centered

    def _averaged_by(self, call: Call) -> str:
        """The name of what averages over the maps that come of a call, without another normalization between."""
        (output,) = call.outputs
        todo, seen = [output], set()
        while todo:
            tensor = todo.pop()
            for reader in self._graph.readers(tensor):
                if _averages_maps(reader):
                    return reader.path
                # A sum counts for what is directly before it alone: the last sum of a residual stream has all of it.
                # Where it would be 0 on average, it counts for all that is in it.
                adds = _sums(reader) and (tensor is output or all(id(x) in self._centered for x in reader.inputs))
                if id(reader) not in seen and (adds or _hands_maps_on(reader)):
                    seen.add(id(reader))
                    todo.extend(reader.outputs)
        return ""


def _can_be_standardized(operation: Any) -> bool:
    if type(operation) not in _STANDARDIZED or operation.activation is not keras.activations.linear:
        return False
    if operation.quantization_mode is not None or getattr(operation, "lora_enabled", False):
        return False
    filters = operation.kernel.shape[:-1]
    inputs = filters[:-1] if isinstance(operation, keras.layers.DepthwiseConv2D) else filters
    return math.prod(inputs) > 1


def _can_be_rescaled(operation: Any) -> bool:
    return type(operation) in _RESCALED and operation.activation is keras.activations.linear


def _find_activation(call: Call | None) -> FusedActivation | None:
    fused = find_fused(call.operation) if call else None
    return None if fused == FusedActivation("linear") else fused


def _adds(call: Call) -> bool:
    return is_of_keras(call.operation, "Add") and not getattr(call.operation, "activity_regularizer", None)


def _is_masked(node: Any) -> bool:
    """Whether an input has a mask, which Keras then hands in. Before Keras 3.16 it is one of the inputs as well."""
    return node is not None and any(getattr(tensor, "_keras_mask", None) is not None for tensor in node.input_tensors)


def _sums(call: Call) -> bool:
    return is_of_keras(call.operation, "Add", "Subtract", "Average")


def _adds_two_maps(call: Call) -> bool:
    """Whether AGC can compute this sum: of two tensors of one shape and dtype."""
    if not _adds(call) or len(call.inputs) != 2:
        return False
    a, b = call.inputs
    return a is not b and a.shape == b.shape and a.dtype == b.dtype


def _hands_in(operation: Any) -> bool:
    """Whether the graph has the calls inside this one too."""
    return model_graph.is_graph(operation) or type(operation) is keras.layers.TimeDistributed


def _hands_maps_on(call: Call) -> bool:
    """Whether the mean of each map stays what it is, or becomes a part of others."""
    operation = call.operation
    if _hands_in(operation) or is_of_keras(operation, "Concatenate", "Multiply"):
        return True
    if isinstance(operation, _LINEAR):
        return len(call.outputs[0].shape) > 2  # else there are no maps any more
    # Activations, dropout, what pools parts of a map and what changes its shape.
    has_weights = isinstance(operation, keras.Layer) and operation.weights and not is_of_keras(operation, "PReLU")
    return len(call.inputs) == 1 and not has_weights


def _keeps_mean_of_zero(call: Call) -> bool:
    """Whether maps with a mean of 0 have so, or a constant one, behind a call that is no sum."""
    operation = call.operation
    if not _hands_maps_on(call):
        return False
    if not isinstance(operation, keras.Layer):
        return is_of_keras(operation, "Concatenate") or (
            len(call.inputs) == 1 and is_of_keras(operation, *_LINEAR_OPERATIONS)
        )
    is_linear = getattr(operation, "activation", None) in (None, keras.activations.linear)
    return is_linear and not is_of_keras(operation, "Multiply", *_NOT_LINEAR)


def _averages_maps(call: Call) -> bool:
    """Whether one number comes of each map: the mean of its positions, or their sum."""
    if not call.inputs:
        return False
    operation, shape = call.operation, call.inputs[0].shape
    rank = len(shape)
    if is_of_keras(operation, "Mean", "Sum", "Average") and not isinstance(operation, keras.Layer):
        axis = range(rank) if operation.axis is None else operation.axis
        axes = {each % rank for each in ((axis,) if isinstance(axis, int) else axis)}
        return rank > 1 and (axes >= set(range(1, max(rank - 1, 2))) or axes >= set(range(min(2, rank - 1), rank)))
    pooled = call.outputs[0].shape
    of_whole_maps = len(pooled) < rank or {1} in (set(pooled[1:-1]), set(pooled[2:]))
    return is_of_keras(operation, *_AVERAGES) and of_whole_maps


def _layers_called(operation: Any) -> list[Any]:
    """A layer or an operation, and where code of its own runs, which no graph tells, all layers in it."""
    has_code = isinstance(operation, keras.Layer) and not type(operation).__module__.startswith("keras.")
    return model_graph.sublayers(operation) if has_code and not _hands_in(operation) else [operation]


def _is_causal(call: Call, padded: set[int]) -> bool:
    """Whether a call keeps later steps of a sequence out of earlier ones.

    Args:
        call: the call.
        padded: the tensors, by identity, that come of zeros at both ends; those of this call are added.
    """
    operation = call.operation
    inside = _layers_called(operation)
    kwargs = call.node.arguments.kwargs if call.node else {}
    both_ways = {id(each) for x in inside if isinstance(x, keras.layers.Bidirectional) for each in x._layers}
    for layer in inside:
        if isinstance(layer, keras.layers.RNN) and id(layer) not in both_ways:
            if layer.return_sequences and not layer.go_backwards:
                return True
        elif getattr(layer, "padding", None) == "causal":
            return True
    ends = _paddings(operation)
    if len(call.inputs) == 1 and (
        any(before == after > 0 for before, after in ends)
        or (id(call.inputs[0]) in padded and not isinstance(operation, keras.layers.BatchNormalization))
    ):
        padded.update(map(id, call.outputs))
    if is_of_keras(operation, "Cropping1D") and id(call.inputs[0]) in padded:
        before, after = operation.cropping
        return bool(after > before == 0)
    starts_alone = any(before > after == 0 for before, after in ends)
    return starts_alone or bool(kwargs.get("use_causal_mask"))


def _paddings(operation: Any) -> list[tuple[int, int]]:
    """The zeros at the start and at the end of each axis that a layer or an operation puts there."""
    if is_of_keras(operation, "ZeroPadding1D"):
        return [operation.padding]
    if is_of_keras(operation, "ZeroPadding2D", "ZeroPadding3D"):
        return list(operation.padding)
    return [(pair[0], pair[-1]) for pair in operation.pad_width] if is_of_keras(operation, "Pad") else []


def _with_same_steps(call: Call) -> list[keras.KerasTensor]:
    """The inputs of a call whose steps in time are those of its output: of attention the query, and no vectors."""
    inputs = call.inputs
    if is_of_keras(call.operation, *_ATTENTION) and call.node:
        # In the order of call.inputs, where keywords stand by their names.
        kwargs = sorted(name for name, x in call.node.arguments.kwargs.items() if isinstance(x, keras.KerasTensor))
        first = kwargs.index("query") if "query" in kwargs else 0
        inputs = inputs[first : first + 1]
    elif isinstance(call.operation, keras.layers.RNN):
        inputs = inputs[:1]
    return [x for x in inputs if len(x.shape) > 2]


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}")
    if not model.built or (type(model) is keras.Sequential and not model_graph.is_graph(model)):
        raise ValueError(
            f"model '{model.name}' is not built: call it on a batch, or call its build() with an input shape, "
            "before converting it"
        )


def can_be_constructed(kind: type[keras.Model]) -> bool:
    """Whether a model of this class can be made as Keras makes its own.

    That is, by kind(inputs, outputs, name=...), or kind(layers, name=...) for a Sequential one. What a constructor does
    with `**kwargs` is not known.
    """
    given = ("layers",) if issubclass(kind, keras.Sequential) else ("inputs", "outputs")
    for one in kind.__mro__:
        if "__init__" not in vars(one):
            continue
        if one.__module__.startswith("keras."):
            return True
        signature = inspect.signature(vars(one)["__init__"])
        try:
            signature.bind(one, *given, name="")
        except TypeError:
            return False
        own = list(signature.parameters.values())[1:]
        named = {each.name for each in own if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        if not named <= {*given, "name", "trainable"}:
            return False  # it would get its default in the copy, whatever it was
        if named.issuperset(given):
            return True
        # (*args, **kwargs) is handed on to the next class that has a constructor.
    return False
