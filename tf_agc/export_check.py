"""Whether the signatures of an exported model answer like the model that they were made from.

Functions and tensors only: how a model is traced and written is `export`'s, its graph `saved_graph`'s.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_agc import saved_graph

Tensors = dict[str, tf.Tensor]

# Of an output's largest entry: a whole network multiplies the roundings of its least precise dtype.
_TOLERANCES = {tf.float64: 1e-6, tf.float32: 1e-3, tf.float16: 2e-2, tf.bfloat16: 1e-1}
_SMALLEST_SCALE = 1e-2  # of outputs that are all smaller, roundings of larger values within can be a part


@dataclasses.dataclass
class Endpoint:
    """What one signature is made from.

    Attributes:
        function: the model, or the user's own tf.function.
        input_signature: the specs of its positional arguments, nested as it takes them.
        concrete: its trace, which is written.
    """

    function: Callable[..., Any]
    input_signature: Any
    concrete: Any

    @property
    def inputs(self) -> dict[str, tf.TensorSpec]:
        """The signature's inputs by name, in the order of the flattened arguments."""
        specs = tf.nest.flatten(self.concrete.structured_input_signature)
        # Private: the names that the SavedModel gives them, which are not the specs' where those are nested.
        return dict(zip(self.concrete._arg_keywords, specs, strict=True))

    def answer(self, inputs: Tensors) -> Tensors:
        """What the function itself answers, the outputs named as a signature names them; changes no variable."""
        arguments = tf.nest.pack_sequence_as(self.input_signature, [inputs[name] for name in self.inputs])
        # States, seeds, and weights where the function trains.
        values = [(variable, variable.numpy()) for variable in self.concrete.variables]
        try:
            outputs = self.function(*arguments)
        finally:
            for variable, value in values:
                variable.assign(value)
        if isinstance(outputs, dict):
            return dict(outputs)
        return {f"output_{index}": output for index, output in enumerate(tf.nest.flatten(outputs))}


def check_answers(directory: pathlib.Path, endpoints: dict[str, Endpoint], examples: dict[str, Tensors]) -> str:
    """Loads a SavedModel and compares what its signatures answer with what their endpoints do.

    Args:
        directory: the SavedModel.
        endpoints: by signature.
        examples: inputs by signature, for those that take no random ones. Random ones come first, since
            zeros or ones, which many take as an example, are constant maps: after AGC only noise.

    Returns:
        The result in words.

    Raises:
        RuntimeError: an answer differs by more than the dtypes in the graph explain.
        ValueError: an endpoint takes no random inputs of the sizes that were tried, and has no example.
    """
    tolerance = _tolerance_of(saved_graph.read(directory))
    largest, varying = 0.0, []
    for name, endpoint in endpoints.items():
        inputs, want = _ask(name, endpoint, examples.get(name))
        again = endpoint.answer(inputs)
        # Loaded for each signature anew, as one may change the variables of another.
        got = tf.saved_model.load(str(directory)).signatures[name](**inputs)
        _check_same(name, _kinds(got), _kinds(want))
        if any(not _difference(again[key], want[key]) <= tolerance for key in want):
            varying.append(name)
            continue
        for key in want:
            if tolerance > _TOLERANCES[tf.float32] and not want[key].dtype.is_floating:
                continue  # half precision: roundings can turn a class
            difference = _difference(got[key], want[key])
            if not difference <= tolerance:
                raise RuntimeError(
                    f"output '{key}' of the exported signature '{name}' differs from the model's by {difference:.3g} "
                    f"of its largest entry, more than the {tolerance:g} that roundings explain"
                )
            largest = max(largest, difference)
    note = f" (not compared, since they vary from call to call: {', '.join(varying)})" if varying else ""
    return f"answers differ from the model's by at most {largest:.1g} of the largest{note}"


def _tolerance_of(graph_def: Any) -> float:
    types = {value.type for node in saved_graph.nodes(graph_def) for value in node.attr.values()}
    found = [tolerance for dtype, tolerance in _TOLERANCES.items() if dtype.as_datatype_enum in types]
    return max(found, default=_TOLERANCES[tf.float32])


def _ask(name: str, endpoint: Endpoint, example: Tensors | None) -> tuple[Tensors, Tensors]:
    """Inputs of an endpoint and its answer: random numbers of the first size that it takes, or the example."""
    error = None
    for inputs in _random_inputs(endpoint.inputs):
        try:
            return inputs, endpoint.answer(inputs)
        except (ValueError, tf.errors.InvalidArgumentError) as raised:
            error = raised
    if example is not None:
        return example, endpoint.answer(example)
    shapes = ", ".join(f"{key} {spec.shape}" for key, spec in endpoint.inputs.items())
    raise ValueError(
        f"signature '{name}' takes no random inputs to check the export with ({shapes}): pass example inputs as "
        f"warmup. {error or ''}"
    ) from error


def _random_inputs(specs: dict[str, tf.TensorSpec]) -> Iterator[Tensors]:
    """Inputs of two samples; sizes that are not known are all the same, and several are tried."""
    if any(spec.shape.rank is None for spec in specs.values()):
        return
    unknown = max((list(spec.shape[1:]).count(None) for spec in specs.values()), default=0)
    sizes = [size for size in (32, 256, 8) if size**unknown <= 2**20] if unknown else [1]
    for size in sizes:
        rng = np.random.default_rng(0)
        yield {name: _random(rng, spec, size) for name, spec in specs.items()}


def _random(rng: np.random.Generator, spec: tf.TensorSpec, size: int) -> tf.Tensor:
    shape = [size if length is None else length for length in spec.shape]
    if shape and spec.shape[0] is None:
        shape[0] = 2
    if spec.dtype == tf.string:
        return tf.fill(shape, "")
    if spec.dtype.is_floating or spec.dtype.is_complex:
        return tf.cast(rng.standard_normal(shape), spec.dtype)
    return tf.cast(rng.integers(0, 2, shape), spec.dtype)  # indices that any table has


def _kinds(tensors: Tensors) -> dict[str, tuple[str, list[int]]]:
    return {key: (tensor.dtype.name, tensor.shape.as_list()) for key, tensor in tensors.items()}


def _check_same(name: str, got: dict[str, Any], want: dict[str, Any]) -> None:
    if got != want:
        raise RuntimeError(f"the exported signature '{name}' answers with {got}, the model with {want}")


def _difference(got: tf.Tensor, want: tf.Tensor) -> float:
    """The largest difference, relative to the largest entry of `want`; infinite where one is NaN or infinite alone."""
    if not (want.dtype.is_floating or want.dtype.is_complex):
        return 0.0 if np.array_equal(got, want) else np.inf
    wide = tf.complex128 if want.dtype.is_complex else tf.float64
    got, want = tf.cast(got, wide).numpy(), tf.cast(want, wide).numpy()
    finite = np.isfinite(want)
    if not np.isfinite(got[finite]).all() or not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return np.inf
    largest_difference = np.abs(got[finite] - want[finite]).max(initial=0)
    return float(largest_difference / np.abs(want[finite]).max(initial=_SMALLEST_SCALE))
