"""`tf_agc.export_saved_model`: from a trained model to a version directory that a model server loads.

What is written, how it is checked and how it reaches its place live here. Keras traces and writes; what
replaces the native op in a portable export is `tf_agc.reference`. No arithmetic.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Private, as Keras has no public way to say what its own `Model.export` takes as the inputs.
from keras.src.export.export_utils import get_input_signature

# Private: keras.ops.slice_update makes such an op, and `tf.raw_ops` leaves these out.
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.core.protobuf import saved_model_pb2

# Private: what a SavedModel says of its own graph, and must be said anew when the graph was changed.
from tensorflow.python.framework import meta_graph
from tensorflow.python.saved_model import fingerprinting_utils

from tf_agc import reference
from tf_agc.implementation import implementation

_OP, _GRADIENT_OP = "TfAgc>Agc", "TfAgc>AgcGrad"
_DATA_FORMATS = {b"N...C": "channels_last", b"NC...": "channels_first"}
_CALLBACKS = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}
# Attributes of the object that Keras writes.
_RESERVED_NAMES = {"signatures", "variables", "trainable_variables", "non_trainable_variables"}
# Of an output's largest entry. A whole network in half precision multiplies its roundings.
_TOLERANCES = {tf.float64: 1e-6, tf.float32: 1e-3, tf.float16: 2e-2, tf.bfloat16: 1e-1}
_WARMUP_FILE = "tf_serving_warmup_requests"


def export_saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    portable: bool = True,
    signatures: dict[str, Callable] | None = None,
    warmup: Any = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes a model as a SavedModel for inference, into the next version directory under `path`.

    Model servers watch a directory and load its subdirectories that are named by a number: the first
    export writes `path/1`, the next one `path/2`. A version appears complete, in one rename, and is
    checked before: it has only the ops that it may have, it loads, and every signature answers like
    the model, on the `warmup` inputs or else on random ones (where the model itself answers the same
    inputs differently from call to call, only the shapes are compared). One printed line says so. On
    an error nothing is left behind. The model stays as it was; the check needs the memory of a second
    copy.

    Args:
        model: a built model of any kind. A subclassed one must have been called, or
            `signatures` must hold "serving_default".
        path: a local directory, whose name is the model's; it is made where it does not exist.
        portable: True: stock TensorFlow ops only, for any model server, TensorFlow Lite and ONNX.
            Every op TfAgc>Agc is replaced by its definition in stock ops, in whatever function it
            was traced, and whenever. False: keeps the op, for programs that link or load it.
        signatures: further signatures by name, each a `tf.function` with an `input_signature`. One
            that is named "serving_default" takes the place of the model's own, which takes the
            model's inputs (any batch size) and returns its outputs.
        warmup: example inputs, which the server runs before it takes requests: a tensor, or a list,
            tuple or dict of them as the signature takes it, for "serving_default"; where there are
            more signatures, a dict of such inputs by signature, all of them. They are converted to the
            signature's dtypes. Needs the package tensorflow-serving-api.
        overwrite: True: replaces the newest version, if there is one. A running server does not look
            into a version that it has loaded; restart it, or give it a new one.

    Returns:
        The version directory.

    Raises:
        TypeError: model is not a Keras model; path is not a path; a signature is not a `tf.function`.
        ValueError: path is remote or a SavedModel itself; the model is not built; a name or an
            `input_signature` of the signatures is missing or not possible; an input of warmup does
            not fit; the graph contains a call of Python, or a portable one a custom op (the message
            names it).
        OSError: path cannot be written; the version to replace is not a SavedModel.
        ImportError: warmup without the package tensorflow-serving-api.
        RuntimeError: a signature does not answer like the model; `portable=False` where the native
            library is not available.
    """
    base = _check_path(path)
    _check_arguments(model, signatures or {})
    if warmup is not None:
        _import_prediction_log()  # before any work

    # Where the native op is not asked for by name, the caller's own choice is traced: traces stay in the
    # model's inner tf.functions, and must be those that it would have made itself.
    with contextlib.nullcontext() if portable else implementation("native"):
        archive, endpoints = _trace(model, signatures or {})
    with _staging_directory(base) as staging:
        _write(archive, staging)
        graph_def = _read(staging).meta_graphs[0].graph_def
        if portable:
            graph_def = _replace_native_ops(staging)
        _check_ops(graph_def, portable)
        examples = {}
        if warmup is not None:
            examples = _convert_warmup(warmup, endpoints)
            _write_warmup(examples, base.name, staging)
        difference = _check_answers(endpoints, examples, staging, _tolerance_of(graph_def))
        version = _publish(staging, base, overwrite)

    native_ops = sum(node.op == _OP for node in _nodes(graph_def))
    ops = "stock ops only" if portable else f"{native_ops} ops {_OP}"
    print(f"Exported '{model.name}' to {version}: signatures {', '.join(endpoints)}; {ops}; {difference}.")
    return version


def _check_path(path):
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a PathLike, got {type(path).__name__}")
    text = os.fspath(path)
    if not text or "://" in text:
        # A remote file system has no rename that makes a version appear complete.
        raise ValueError(f"path must be a local directory, got {text!r}: export locally and copy the version directory")
    base = pathlib.Path(os.path.abspath(text))
    if (base / "saved_model.pb").exists():
        raise ValueError(f"path must be a directory of versions, got a SavedModel itself: {base}")
    return base


def _check_arguments(model, signatures):
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}")
    if not model.built:
        raise ValueError(f"model '{model.name}' is not built: call it on a batch before exporting it")
    if not isinstance(signatures, dict):
        raise TypeError(f"signatures must be a dict of tf.functions by name, got {type(signatures).__name__}")
    for name, function in signatures.items():
        if not isinstance(name, str) or not name or name.startswith("_") or name in _RESERVED_NAMES:
            raise ValueError(
                "a name in signatures must be a str that does not start with '_' and is not one of "
                f"{', '.join(sorted(_RESERVED_NAMES))}, got {name!r}"
            )
        if not isinstance(function, tf.types.experimental.PolymorphicFunction):
            raise TypeError(
                f"signatures[{name!r}] must be a tf.function, got {type(function).__name__}: wrap it with "
                "tf.function(..., input_signature=[tf.TensorSpec(...)])"
            )
        if function.input_signature is None:
            raise ValueError(
                f"signatures[{name!r}] must have an input_signature: "
                "make it with tf.function(..., input_signature=[tf.TensorSpec(...)])"
            )


@dataclasses.dataclass
class _Endpoint:
    """A signature: the model's (or the user's) own function, the specs of its arguments, and its trace."""

    function: Callable
    input_signature: Any
    concrete: Any

    @property
    def inputs(self) -> dict[str, tf.TensorSpec]:
        """The named inputs, in the order of the flat arguments."""
        return {spec.name: spec for spec in tf.nest.flatten(self.concrete.structured_input_signature)}

    def __call__(self, inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The function's own answer to named inputs, its outputs named as TensorFlow names a signature's."""
        arguments = tf.nest.pack_sequence_as(self.input_signature, [inputs[name] for name in self.inputs])
        outputs = self.function(*arguments)
        if isinstance(outputs, dict):
            return dict(outputs)
        return {f"output_{index}": output for index, output in enumerate(tf.nest.flatten(outputs))}


def _trace(model, signatures):
    """Traces everything that is exported: Keras's archive of it, and the endpoints by name."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    endpoints = {}
    if "serving_default" not in signatures:
        try:
            specs = get_input_signature(model)
        except ValueError as error:  # of a subclassed model
            raise ValueError(
                f"the inputs of model '{model.name}' are not known: call it on a batch, or give the signature "
                f"'serving_default' ({error})"
            ) from error
        traced = archive.add_endpoint("serving_default", model.__call__, specs)
        endpoints["serving_default"] = _Endpoint(
            lambda *inputs: model(*inputs, training=False), traced.input_signature, traced.get_concrete_function()
        )
    for name, function in signatures.items():
        endpoints[name] = _Endpoint(function, function.input_signature, function.get_concrete_function())
        archive.add_endpoint(name, function)
    return archive, endpoints


@contextlib.contextmanager
def _staging_directory(base: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory in `base` that servers ignore; with what was made of `base`, gone after an error."""
    made = [directory for directory in (base, *base.parents) if not directory.exists()]
    staging = base / f".export-{uuid.uuid4().hex}"
    try:
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise OSError(error.errno, f"path must be a writable directory: {error.strerror}", str(base)) from error
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for directory in made:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                directory.rmdir()
        raise


def _write(archive, staging):
    try:
        archive.write_out(staging, verbose=False)
    except tf.errors.OpError as error:
        raise OSError(f"path: the SavedModel cannot be written to {staging.parent}: {error.message}") from error


def _read(staging):
    return saved_model_pb2.SavedModel.FromString((staging / "saved_model.pb").read_bytes())


def _nodes(graph_def):
    yield from graph_def.node
    for function in graph_def.library.function:
        yield from function.node_def


def _replace_native_ops(staging: pathlib.Path) -> Any:
    """Replaces every op TfAgc>Agc in the SavedModel by a call of its definition; returns the new graph.

    In the written graph and not while tracing: a tf.function inside the model, which was traced before,
    holds the native op whatever is chosen now.
    """
    saved_model = _read(staging)
    meta_graph_def = saved_model.meta_graphs[0]
    graph_def = meta_graph_def.graph_def
    calls: dict[bytes, Any] = {}
    replaced = set()
    for node in _nodes(graph_def):
        if node.op != _OP:
            continue
        key = tf.compat.v1.NodeDef(attr=node.attr).SerializeToString(deterministic=True)
        if key not in calls:
            calls[key], functions = _reference_call(node)
            graph_def.library.function.extend(functions)
        for name in ("T", "U", "activation", "alpha", "data_format"):
            del node.attr[name]
        node.op = calls[key].op
        for name, value in calls[key].attr.items():
            node.attr[name].CopyFrom(value)
        replaced.add(node.name)

    # Inside a function, an output has the name that the op gives it.
    renamed = {}
    for name in replaced:
        renamed |= {f"{name}:y:0": f"{name}:output:0", f"{name}:mean:0": f"{name}:output:1"}
    for function in graph_def.library.function:
        for node in function.node_def:
            node.input[:] = [renamed.get(name, name) for name in node.input]
        for name, value in function.ret.items():
            function.ret[name] = renamed.get(value, value)

    stripped = meta_graph.stripped_op_list_for_graph(graph_def)
    meta_graph_def.meta_info_def.stripped_op_list.CopyFrom(stripped)
    (staging / "saved_model.pb").write_bytes(saved_model.SerializeToString(deterministic=True))
    fingerprinting_utils.write_fingerprint(str(staging))
    return graph_def


def _reference_call(node: Any) -> tuple[Any, Any]:
    """The node that calls the definition of a node TfAgc>Agc, and the functions that it calls."""
    attributes = node.attr
    shapes = attributes["_output_shapes"].list.shape  # of y, which is that of x
    x_shape = tf.TensorShape(shapes[0]) if shapes else None
    dtypes = [tf.as_dtype(attributes[name].type) for name in ("T", "U", "U")]

    @tf.function(autograph=False)
    def agc(x, gain, mean_scale):
        return reference.agc(
            x,
            gain,
            mean_scale,
            attributes["activation"].s.decode(),
            attributes["alpha"].f,
            _DATA_FORMATS[attributes["data_format"].s],
        )

    with tf.Graph().as_default() as graph:
        agc(*map(tf.compat.v1.placeholder, dtypes, [x_shape, [None], [None]]))
    graph_def = graph.as_graph_def()
    (call,) = (node for node in graph_def.node if node.op in ("PartitionedCall", "StatefulPartitionedCall"))
    return call, graph_def.library.function


def _check_ops(graph_def, portable):
    functions = {function.signature.name for function in graph_def.library.function}
    used = {node.op for node in _nodes(graph_def)} - functions
    if used & _CALLBACKS:
        raise ValueError(
            "the model calls Python (tf.py_function or tf.numpy_function), which no other program can run: "
            f"its graph contains the ops {', '.join(sorted(used & _CALLBACKS))}"
        )
    if not portable:
        return
    if _GRADIENT_OP in used:
        raise ValueError(
            f"a signature computes gradients with the custom op {_GRADIENT_OP}: make and export it inside "
            '`with tf_agc.implementation("reference"):`, or export with portable=False'
        )
    custom = sorted(op for op in used if not hasattr(tf.raw_ops, op) and not hasattr(gen_xla_ops, op))
    if custom:
        raise ValueError(
            f"a portable export must contain stock TensorFlow ops only, got the custom ops {', '.join(custom)}: "
            "take out the layers that make them, or export with portable=False"
        )


def _tolerance_of(graph_def):
    """What the answers may differ by: that of the least precise floating dtype in the graph."""
    dtypes = {value.type for node in _nodes(graph_def) for value in node.attr.values() if value.HasField("type")}
    found = [tolerance for dtype, tolerance in _TOLERANCES.items() if dtype.as_datatype_enum in dtypes]
    return max(found, default=_TOLERANCES[tf.float32])


def _check_answers(endpoints, examples, staging, tolerance):
    """Compares every signature of the SavedModel with its function; returns what was found, for the line."""
    largest, varying = 0.0, []
    for name, endpoint in endpoints.items():
        with _kept_state(endpoint):
            inputs, want = _answer(name, endpoint, examples.get(name))
        with _kept_state(endpoint):
            again = endpoint(inputs)
        # Loaded anew for each one: a signature may change variables.
        loaded = tf.saved_model.load(str(staging)).signatures[name]
        got = loaded(**inputs)
        if set(got) != set(want):
            raise RuntimeError(f"the exported signature {name!r} has outputs {sorted(got)}, not {sorted(want)}")
        if any(_difference(again[key], want[key]) > 0 for key in want):
            varying.append(name)
        for key in want:
            if got[key].dtype != want[key].dtype or not got[key].shape.is_compatible_with(want[key].shape):
                raise RuntimeError(f"output {key!r} of the exported signature {name!r} is {got[key]}, not {want[key]}")
            difference = _difference(got[key], want[key])
            exact = not want[key].dtype.is_floating
            if name in varying or (exact and tolerance > _TOLERANCES[tf.float32]):
                continue  # rounding may turn the class of a half-precision model
            if not difference <= tolerance:
                raise RuntimeError(
                    f"output {key!r} of the exported signature {name!r} differs from the model's by "
                    f"{difference:.3g} of its largest entry, more than {tolerance:g}"
                )
            largest = max(largest, difference)
    found = f"answers like the model within {largest:.2g} of the largest entry"
    return found + (f" (not comparable, as they vary: {', '.join(varying)})" if varying else "")


def _difference(got: tf.Tensor, want: tf.Tensor) -> float:
    """The largest difference, relative to the largest entry of `want`; infinite where only one is finite."""
    if not (want.dtype.is_floating or want.dtype.is_complex):
        return 0.0 if np.array_equal(got.numpy(), want.numpy()) else np.inf
    wide = tf.complex128 if want.dtype.is_complex else tf.float64
    got, want = tf.cast(got, wide).numpy(), tf.cast(want, wide).numpy()
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return np.inf
    error = np.abs(got[finite] - want[finite]).max(initial=0)
    scale = np.abs(want[finite]).max(initial=0)
    if np.isnan(error):
        return np.inf
    return float(error / scale) if scale else float(error)


@contextlib.contextmanager
def _kept_state(endpoint: _Endpoint) -> Iterator[None]:
    """Puts back what an endpoint assigns to variables: states, seeds, or weights where it trains."""
    values = [(variable, variable.numpy()) for variable in endpoint.concrete.variables]
    try:
        yield
    finally:
        for variable, value in values:
            variable.assign(value)


def _answer(name, endpoint, example):
    """Inputs of an endpoint and its answer: the example, or random numbers of the first size that it takes."""
    if example is not None:
        return example, endpoint(example)
    error = None
    for inputs in _random_inputs(endpoint.inputs):
        try:
            return inputs, endpoint(inputs)
        except (ValueError, tf.errors.InvalidArgumentError) as raised:
            error = raised
    shapes = {key: spec.shape for key, spec in endpoint.inputs.items()}
    raise ValueError(
        f"signature {name!r} cannot be checked on random inputs of shapes {shapes}: pass example inputs as warmup "
        f"({error})"
    ) from error


def _random_inputs(specs: dict[str, tf.TensorSpec]) -> Iterator[dict[str, tf.Tensor]]:
    if any(spec.shape.rank is None for spec in specs.values()):
        return
    unknown = max((list(spec.shape[1:]).count(None) for spec in specs.values()), default=0)
    sizes = [size for size in (32, 256, 8) if size**unknown <= 2**20] if unknown else [1]
    for size in sizes:
        rng = np.random.default_rng(0)
        inputs = {}
        for name, spec in specs.items():
            shape = [size if length is None else length for length in spec.shape]
            if shape and spec.shape[0] is None:
                shape[0] = 2
            if spec.dtype == tf.string:
                value = np.full(shape, "")
            elif spec.dtype.is_floating or spec.dtype.is_complex:
                value = rng.standard_normal(shape)
            else:  # numbers that any table or embedding knows
                value = rng.integers(0, 2, shape)
            inputs[name] = tf.cast(value, spec.dtype) if spec.dtype != tf.string else tf.constant(value)
        yield inputs


def _convert_warmup(warmup, endpoints):
    """Example inputs by signature and name, as tensors of the signature's dtypes and shapes."""
    if len(endpoints) == 1 and not (isinstance(warmup, dict) and set(warmup) == set(endpoints)):
        warmup = {next(iter(endpoints)): warmup}
    if not isinstance(warmup, dict) or set(warmup) != set(endpoints):
        got = f"the keys {sorted(map(str, warmup))}" if isinstance(warmup, dict) else f"a {type(warmup).__name__}"
        raise ValueError(f"warmup must be a dict with inputs for each signature, {', '.join(endpoints)}, got {got}")
    return {name: _convert_inputs(name, endpoint, warmup[name]) for name, endpoint in endpoints.items()}


def _convert_inputs(name, endpoint, values):
    specs = endpoint.inputs
    if isinstance(values, dict):
        if set(values) != set(specs):
            raise ValueError(
                f"warmup of {name!r} must have the inputs {', '.join(specs)}, got {', '.join(map(str, values))}"
            )
    else:
        values = [values] if len(specs) == 1 and not _is_list_of_arrays(values) else list(values)
        if len(values) != len(specs):
            raise ValueError(f"warmup of {name!r} must have {len(specs)} inputs, {', '.join(specs)}, got {len(values)}")
        values = dict(zip(specs, values, strict=True))
    converted = {}
    for key, spec in specs.items():
        try:
            value = tf.convert_to_tensor(values[key])
            value = value if value.dtype == spec.dtype else tf.cast(value, spec.dtype)
        except (TypeError, ValueError, tf.errors.OpError) as error:
            raise ValueError(f"warmup of {name!r}: input {key!r} must be {spec.dtype.name}, got {error}") from error
        if not spec.shape.is_compatible_with(value.shape):
            raise ValueError(f"warmup of {name!r}: input {key!r} must have shape {spec.shape}, got {value.shape}")
        converted[key] = value
    return converted


def _is_list_of_arrays(values):
    return isinstance(values, (list, tuple)) and all(tf.is_tensor(v) or isinstance(v, np.ndarray) for v in values)


def _import_prediction_log():
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError as error:
        raise ImportError(
            "warmup needs the package tensorflow-serving-api, which is not installed: "
            f"`pip install tensorflow-serving-api` ({error})"
        ) from error
    return prediction_log_pb2


def _write_warmup(examples, model_name, staging):
    prediction_log_pb2 = _import_prediction_log()
    extra = staging / "assets.extra"
    extra.mkdir()
    with tf.io.TFRecordWriter(str(extra / _WARMUP_FILE)) as writer:
        for name, inputs in examples.items():
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.name = model_name
            request.model_spec.signature_name = name
            for key, value in inputs.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
            writer.write(log.SerializeToString())


def _publish(staging: pathlib.Path, base: pathlib.Path, overwrite: bool) -> pathlib.Path:
    """Gives the finished directory its number, under a lock that other exports to `base` wait for."""
    descriptor = os.open(base, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        versions = [name for name in os.listdir(base) if name.isascii() and name.isdigit()]
        newest = max(versions, key=int, default="0")
        if overwrite and versions:
            _replace(base / newest, staging)
            return base / newest
        version = base / str(int(newest) + 1)
        staging.rename(version)
        return version
    finally:
        os.close(descriptor)


def _replace(version: pathlib.Path, staging: pathlib.Path) -> None:
    if version.is_symlink() or not (version / "saved_model.pb").is_file():
        raise FileExistsError(f"overwrite replaces only the directory of a SavedModel, got {version}")
    # There is no rename onto a directory with content: for a moment the old version has another name.
    aside = staging.with_name(f"{staging.name}-replaced")
    version.rename(aside)
    try:
        staging.rename(version)
    except BaseException:
        aside.rename(version)
        raise
    shutil.rmtree(aside)
