"""Whether the signatures of an exported model answer like the model that they were made from.

Functions and tensors only: how a model is traced and written is `export`'s, its graph `saved_graph`'s.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_agc import saved_graph

Tensors = dict[str, tf.Tensor]

# By the least precise dtype in a graph: how far an entry may be off, of its output's largest, as a whole network
# multiplies roundings; and which part of an output's integers, bools and strings may be off by more. A rounding turns
# a class where two are nearly equal, and a truncated pixel near an integer: few of many. A wrong graph turns most,
# half of them where there are two classes.
_TOLERANCES = {tf.float64: (1e-6, 0.01), tf.float32: (1e-3, 0.01), tf.float16: (2e-2, 0.1), tf.bfloat16: (1e-1, 0.25)}
_SMALLEST_SCALE = 1e-2  # of outputs that are all smaller, roundings of larger values within can be a part
# Of fewer entries a single one is too large a part: more inputs are asked until it is known which part is off.
_ENOUGH_ENTRIES = 100


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
        arguments = tf.nest.flatten(self.concrete.structured_input_signature)
        specs = [spec for spec in arguments if isinstance(spec, tf.TensorSpec)]  # others have a default
        # Private: the names that the SavedModel gives them, which are not the specs' where those are nested.
        return dict(zip(self.concrete._arg_keywords, specs, strict=True))

    def answer(self, inputs: Tensors) -> Tensors:
        """What the function itself answers, the outputs named as a signature names them; changes no variable."""
        arguments = tf.nest.pack_sequence_as(self.input_signature, [inputs[name] for name in self.inputs])
        with _unchanged(self.concrete.variables):
            outputs = self.function(*arguments)
        return {key: tf.convert_to_tensor(output) for key, output in name_outputs(outputs).items()}


def name_outputs(outputs: Any) -> dict[Any, Any]:
    """What a function returns, by the names that a signature gives its parts."""
    if hasattr(outputs, "_asdict"):
        outputs = outputs._asdict()
    if isinstance(outputs, Mapping):
        return dict(outputs)
    parts = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return {f"output_{index}": part for index, part in enumerate(parts)}


@dataclasses.dataclass
class _Comparison:
    """One output's answers, to all the inputs that were asked.

    Attributes:
        discrete: integers, bools and strings are counted; of floating-point numbers the largest difference matters.
        entries: the number that was compared; NaN and infinities are not counted.
        off: of these, where they are discrete, those that differ by more than the tolerance.
        difference: the largest one, where they are not.
        varies: the model's own answers do, from call to call.
    """

    discrete: bool
    entries: int = 0
    off: int = 0
    difference: float = 0.0
    varies: bool = False


def check_answers(directory: pathlib.Path, endpoints: dict[str, Endpoint], examples: dict[str, Tensors]) -> str:
    """Loads a SavedModel and compares what its signatures answer with what their endpoints do.

    Args:
        directory: the SavedModel.
        endpoints: by signature.
        examples: inputs by signature, for those that take no random ones. Random ones come first, since
            zeros or ones, which many take as an example, are constant maps: after AGC only noise.

    Returns:
        The result in words: what was compared, and what was not.

    Raises:
        RuntimeError: an answer differs by more than the dtypes in the graph explain.
        ValueError: an endpoint takes no random inputs of the sizes that were tried, and has no example.
    """
    tolerance, part = _tolerances_of(saved_graph.read(directory))
    loaded = tf.saved_model.load(str(directory))
    compared, skipped = [], []
    for name, endpoint in endpoints.items():
        comparisons = _compare(name, endpoint, loaded.signatures[name], examples.get(name), tolerance, part)
        for key, comparison in comparisons.items():
            if comparison.varies or not comparison.entries:
                reason = "varies from call to call" if comparison.varies else "no finite entry"
                skipped.append(f"{key} of {name} ({reason})")
            else:
                compared.append(comparison)
    differences = [comparison.difference for comparison in compared if not comparison.discrete]
    discrete = [comparison for comparison in compared if comparison.discrete]
    results = [f"by at most {max(differences):.1g} of the largest"] if differences else []
    if discrete:
        off, entries = sum(comparison.off for comparison in discrete), sum(c.entries for c in discrete)
        results.append(f"in {off} of {entries} integers, bools and strings")
    result = f"answers differ from the model's {' and '.join(results)}" if results else "no answers were compared"
    return "; not compared: ".join([result, *([", ".join(skipped)] if skipped else [])])


def _tolerances_of(graph_def: Any) -> tuple[float, float]:
    types = {value.type for node in saved_graph.nodes(graph_def) for value in node.attr.values()}
    found = [tolerances for dtype, tolerances in _TOLERANCES.items() if dtype.as_datatype_enum in types]
    return max(found, default=_TOLERANCES[tf.float32])


def _compare(
    name: str, endpoint: Endpoint, signature: Any, example: Tensors | None, tolerance: float, part: float
) -> dict[str, _Comparison]:
    """The comparisons by output; raises for one that differs by more than `tolerance` or in more than a `part`."""
    comparisons: dict[str, _Comparison] = {}
    for seed in range(_ENOUGH_ENTRIES):
        inputs, want = _ask(name, endpoint, example, seed)
        again = endpoint.answer(inputs)
        with _unchanged(signature.variables):
            got = signature(**inputs)
        _check_same(name, _kinds(got), _kinds(want))
        for key in want:
            discrete = not (want[key].dtype.is_floating or want[key].dtype.is_complex)
            comparison = comparisons.setdefault(key, _Comparison(discrete))
            _add(comparison, got[key], want[key], again[key], tolerance, part)
        undecided = any(part * c.entries < c.off <= part * _ENOUGH_ENTRIES for c in comparisons.values())
        if not undecided or inputs is example:
            break
    for key, comparison in comparisons.items():
        if comparison.varies:
            continue
        what = f"output '{key}' of the exported signature '{name}' differs from the model's"
        if not comparison.difference <= tolerance:
            raise RuntimeError(
                f"{what} by {comparison.difference:.3g} of its largest entry, more than the {tolerance:g} that "
                "roundings explain"
            )
        if comparison.off > part * comparison.entries:
            raise RuntimeError(
                f"{what} in {comparison.off / comparison.entries:.2%} of {comparison.entries} entries (by more than "
                f"{tolerance:g} of the largest), more than the {part:.0%} that roundings explain"
            )
    return comparisons


def _add(
    comparison: _Comparison, got: tf.Tensor, want: tf.Tensor, again: tf.Tensor, tolerance: float, part: float
) -> None:
    """Adds one answer to a comparison."""
    if again.shape != want.shape:
        comparison.varies = True
    elif comparison.discrete:
        comparison.varies |= _count_off(again, want, tolerance) > part * want.shape.num_elements()
        comparison.entries += want.shape.num_elements()
        comparison.off += _count_off(got, want, tolerance)
    else:
        comparison.varies |= not _difference(again, want) <= tolerance
        comparison.entries += int(np.count_nonzero(tf.math.is_finite(tf.abs(want))))
        comparison.difference = max(comparison.difference, _difference(got, want))


def _ask(name: str, endpoint: Endpoint, example: Tensors | None, seed: int) -> tuple[Tensors, Tensors]:
    """Inputs of an endpoint and its answer: random numbers of the first size that it takes, or the example."""
    error = None
    for inputs in _random_inputs(endpoint.inputs, seed):
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


def _random_inputs(specs: dict[str, tf.TensorSpec], seed: int) -> Iterator[Tensors]:
    """Inputs of two samples, or of a fixed number; sizes that are not known are all the same, and several are tried."""
    if any(spec.shape.rank is None for spec in specs.values()):
        return
    unknown = max((list(spec.shape[1:]).count(None) for spec in specs.values()), default=0)
    sizes = [size for size in (32, 256, 8) if size**unknown <= 2**20] if unknown else [1]
    for size in sizes:
        rng = np.random.default_rng(seed)
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


@contextlib.contextmanager
def _unchanged(variables: Iterable[Any]) -> Iterator[None]:
    """Puts back what a call changes: states, seeds, and weights where it trains."""
    values = [(variable, variable.numpy()) for variable in variables]
    try:
        yield
    finally:
        for variable, value in values:
            variable.assign(value)


def _count_off(got: tf.Tensor, want: tf.Tensor, tolerance: float) -> int:
    """The number of entries that differ: by more than `tolerance` of the largest, where they are numbers."""
    if want.dtype == tf.string:
        return int(np.count_nonzero(got.numpy() != want.numpy()))
    got, want = tf.cast(got, tf.float64).numpy(), tf.cast(want, tf.float64).numpy()
    return int(np.count_nonzero(np.abs(got - want) > tolerance * np.abs(want).max(initial=0)))


def _difference(got: tf.Tensor, want: tf.Tensor) -> float:
    """The largest difference, relative to the largest entry of `want`; infinite where one is NaN or infinite alone."""
    wide = tf.complex128 if want.dtype.is_complex else tf.float64
    got, want = tf.cast(got, wide).numpy(), tf.cast(want, wide).numpy()
    finite = np.isfinite(want)
    if not np.isfinite(got[finite]).all() or not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return np.inf
    largest_difference = np.abs(got[finite] - want[finite]).max(initial=0)
    return float(largest_difference / np.abs(want[finite]).max(initial=_SMALLEST_SCALE))
