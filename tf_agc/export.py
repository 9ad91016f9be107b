"""`tf_agc.export_saved_model`: from a model to a version directory that model servers load.

The order of things, the arguments' checks, and files and their names live here. Keras traces and writes;
`saved_graph` makes a graph portable, and `export_check` compares the answers.
"""

import contextlib
import fcntl
import functools
import inspect
import os
import pathlib
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

# Private, as Keras has no public way to say which inputs its own `Model.export` takes, and no public name of the class.
from keras.src.export.export_utils import get_input_signature
from keras.src.models import Functional

from tf_agc import graph_marks, model_graph, saved_graph
from tf_agc.export_check import Endpoint, Tensors, check_answers, name_outputs
from tf_agc.forward_pass import agc_layers
from tf_agc.implementation import implementation, native_where_free_to_choose

# Attributes of the object that Keras writes.
_RESERVED_NAMES = ("non_trainable_variables", "signatures", "trainable_variables", "variables")

# TensorFlow ignores warnings while it writes. Where two threads did so at once, warnings could stay ignored.
_WRITING = threading.Lock()

_MAX_VERSION = 2**63 - 1  # a server reads an int64, and no directory with a larger number


def export_saved_model(
    model: keras.Model,
    path: str | os.PathLike[str],
    portable: bool = True,
    signatures: dict[str, Callable[..., Any]] | None = None,
    warmup: Any = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> pathlib.Path:
    """Writes a model as a SavedModel for inference, into the next version directory under `path`.

    Model servers watch a directory and load its subdirectories that are named by a number: the first
    export writes `path/1`, the next one `path/2`. A version is checked before it appears, complete, in
    one rename: its graph has only ops that it may have, it loads, and each signature answers random
    inputs (those in `warmup`, where it takes no random ones) like the model. Of integers, bools and
    strings a few may differ, since a rounding can turn a class or a truncated pixel: 1 % of an output's
    entries, 10 % where the graph has float16, 25 % where it has bfloat16. Only shapes are compared where
    the model's own answers vary from call to call or are not finite. An error leaves nothing behind; an
    export that is killed leaves a directory `path/.export-...`. The model stays as it was. The check
    needs the memory of a second copy.

    Args:
        model: a built model of any kind. A subclassed one must have been called, with all its inputs in
            one argument, or `signatures` must have a "serving_default".
        path: a local directory, whose name is the model's for a server; it is made where there is none.
            Without the characters * ? [ and backslash.
        portable: True: stock TensorFlow ops only, for any model server, TensorFlow Lite and ONNX. Each op
            TfAgc>Agc is replaced by its definition in stock ops, also in functions that were traced
            before. False: keeps the op, for programs that load or link it, whichever `implementation`
            is chosen.
        signatures: more signatures by name, each a `tf.function` with an `input_signature` of
            `tf.TensorSpec`s, which returns a tensor, or a list, tuple or dict with str keys of tensors;
            a model in it should be called with `training=False`. "serving_default" is the model itself,
            unless it is given here: in inference, without augmentation, dropout and noise, its inputs
            named as in the model, with any batch size or the one that `keras.Input(batch_shape=...)`
            fixes (in a Sequential model: where a layer is stateful), its outputs named output_0,
            output_1, ... or by the keys of a dict. In Python, the inputs of a loaded signature are named
            as arguments can be: "image-1" and "a.b" are image_1 and a_b there, "1st" is arg_1st.
        warmup: example inputs that the server runs before it takes requests: for "serving_default" a
            tensor, or a list, tuple or dict (by name) of them; with more signatures, a dict of such inputs
            by signature, for all of them. They are cast to the signature's dtypes. Needs the package
            tensorflow-serving-api.
        overwrite: True: replaces the newest version, where there is one; for a moment there is none. A
            server that has loaded it notices that only when it restarts.
        verbose: whether one line is printed that says what was written, what was compared and what was not.

    Returns:
        The version directory.

    Raises:
        TypeError: the model is no Keras model, path no path, a signature no `tf.function` or one of
            ragged or sparse inputs, portable or overwrite no bool.
        ValueError: path is remote, has one of the characters above, is a SavedModel itself, or has the
            last number that a server reads; the model is not built, or its call takes several inputs; a
            signature has no `input_signature` or no possible name, an input none, or outputs that are
            nested or no tensors; inputs in warmup do not fit, or are needed since random ones do not;
            the graph calls Python, a portable one has custom ops (named), or one of portable=False has
            no native op for a model with AGC layers.
        OSError: path cannot be written, or the version to replace is not a SavedModel.
        ImportError: warmup without the package tensorflow-serving-api.
        RuntimeError: a signature does not answer like the model; the call is inside the scope of a
            `tf.distribute` strategy; or portable=False where the native library is not available.
    """
    base = _check_path(path)
    signatures = {} if signatures is None else signatures
    _check_arguments(model, portable, signatures, overwrite)
    if warmup is not None:
        _import_prediction_log()  # an error before the work, not after it

    # Not the reference while tracing: the traces of tf.functions inside the model stay in it, and would go
    # on to run it, which is slower. Keras traces again while it writes.
    with native_where_free_to_choose() if portable else implementation("native"):
        archive, endpoints = _trace(model, signatures)
        examples = {} if warmup is None else _convert_warmup(warmup, endpoints)
        with _staging_directory(base) as staging:
            with _file_errors(base):
                with _WRITING:
                    archive.write_out(staging, verbose=False)
                saved_graph.rewrite(staging, graph_marks.layers(), portable)
                if examples:
                    _write_warmup(examples, base.name, staging)
            graph_def = saved_graph.read(staging)
            saved_graph.check_ops(graph_def, portable)
            native_ops = sum(node.op == saved_graph.OP for node in saved_graph.nodes(graph_def))
            if not portable:
                _check_native(model, native_ops)
            answers = check_answers(staging, endpoints, examples)
            version = _publish(staging, base, overwrite)

    if verbose:
        ops = "stock ops only" if portable else f"{native_ops} x {saved_graph.OP}"
        print(f"Exported '{model.name}' to {version}: {', '.join(endpoints)}; {ops}; {answers}.")
    return version


def _check_path(path: Any) -> pathlib.Path:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path must be a str or a pathlib.Path, got {type(path).__name__}")
    path = os.fspath(path)
    if not path or "://" in path:
        # Remote file systems have no rename that makes a version appear complete.
        raise ValueError(f"path must be a local directory, got {path!r} (export locally, then copy the version)")
    base = pathlib.Path(os.path.abspath(path))
    if found := sorted(set("*?[\\\0").intersection(str(base))):
        # TensorFlow takes them for wildcards where it reads the variables, and answers with another file or none.
        raise ValueError(f"path must be without the characters * ? [ \\ and NUL, got {found[0]!r} in {str(base)!r}")
    with _file_errors(base):
        is_saved_model = (base / "saved_model.pb").exists()
    if is_saved_model:
        raise ValueError(f"path must be a directory for numbered versions, got one with a SavedModel in it: {base}")
    return base


def _check_arguments(model: Any, portable: Any, signatures: Any, overwrite: Any) -> None:
    for name, value in (("portable", portable), ("overwrite", overwrite)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")
    if tf.distribute.has_strategy():
        # The check loads what was written, and loads no second copy of variables that are mirrored.
        raise RuntimeError(
            "export_saved_model must be called outside of the scope of a tf.distribute strategy, got the scope of a "
            f"{type(tf.distribute.get_strategy()).__name__}: export after the `with strategy.scope():`"
        )
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}")
    if not model.built:
        raise ValueError(f"model '{model.name}' is not built: call it on a batch before exporting it")
    if not isinstance(signatures, dict):
        raise TypeError(f"signatures must be a dict of tf.functions, got {type(signatures).__name__}")
    for name, function in signatures.items():
        if not isinstance(name, str) or not name or name.startswith("_") or name in _RESERVED_NAMES:
            raise ValueError(
                "a name in signatures must be a str that does not start with '_' and is none of "
                f"{', '.join(_RESERVED_NAMES)}, got {name!r}"
            )
        cure = "make it with tf.function(f, input_signature=[tf.TensorSpec(...)])"
        if not isinstance(function, tf.types.experimental.PolymorphicFunction):
            raise TypeError(f"signatures['{name}'] must be a tf.function, got {type(function).__name__}: {cure}")
        if function.input_signature is None:
            raise ValueError(f"signatures['{name}'] must have an input_signature, got None: {cure}")


def _check_native(model: keras.Model, native_ops: int) -> None:
    layers = ", ".join(layer.name for layer in agc_layers(model))
    if layers and not native_ops:
        raise ValueError(
            f"portable=False keeps the ops {saved_graph.OP}, and the graph has none, though the model has the layers "
            f"{layers}: let a signature run them, or export with portable=True"
        )


def _trace(model: keras.Model, signatures: dict[str, Any]) -> tuple[keras.export.ExportArchive, dict[str, Endpoint]]:
    """Keras's archive of all that is to be written, and the endpoints by signature."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    endpoints = {}
    if "serving_default" not in signatures:
        specs = _input_specs(model)
        signatures = {"serving_default": None, **signatures}
    for name, function in signatures.items():
        if function is None:
            # Said outright: layers of augmentation are active where nobody says what is wanted.
            function = functools.partial(model, training=False)
            traced = archive.add_endpoint(name, function, specs)
        else:
            _check_input_specs(name, function.input_signature)
            traced = archive.add_endpoint(name, function, function.input_signature)
        endpoints[name] = Endpoint(function, traced.input_signature, traced.get_concrete_function())
        _check_input_names(name, list(endpoints[name].inputs))
        _check_outputs(name, endpoints[name].concrete.structured_outputs)
    return archive, endpoints


def _input_specs(model: keras.Model) -> Any:
    """The positional arguments of a model's call as Keras exports them, with the batch size where one was fixed."""
    cure = "pass a signature 'serving_default'"
    try:
        specs = get_input_signature(model)
    except ValueError as error:  # a subclassed model
        raise ValueError(
            f"the inputs of model '{model.name}' are not known: call it on a batch, or {cure}. {error}"
        ) from error
    others = list(inspect.signature(model.call).parameters.values())[len(specs) :]
    required = [p.name for p in others if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing := [name for name in required if name != "training"]:  # which Keras passes
        raise ValueError(f"the call() of model '{model.name}' takes more than one input ({', '.join(missing)}): {cure}")
    # Keras drops a batch size. A Sequential without keras.Input has that of its first call, and takes others: only
    # states make it a fixed one.
    stateful = any(getattr(layer, "stateful", False) for layer in model_graph.sublayers(model))
    if isinstance(model, Functional) or (isinstance(model, keras.Sequential) and stateful):
        sizes = [tensor.shape[0] for tensor in model.inputs]
        flat = [
            keras.InputSpec(shape=(size, *spec.shape[1:]), dtype=spec.dtype, name=spec.name)
            for size, spec in zip(sizes, keras.tree.flatten(specs), strict=True)
        ]
        specs = keras.tree.pack_sequence_as(specs, flat)
    return specs


def _check_input_specs(signature: str, specs: Any) -> None:
    for spec in tf.nest.flatten(specs):
        if not isinstance(spec, tf.TensorSpec):
            raise TypeError(
                f"the input_signature of signatures['{signature}'] must have tf.TensorSpecs only, got a "
                f"{type(spec).__name__}: a model server sends dense tensors"
            )


def _check_input_names(signature: str, names: list[str]) -> None:
    # TensorFlow's own errors, when it saves, say of such names that they are not unique.
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*", name) or name == "self":
            raise ValueError(
                f"an input of signature '{signature}' must have a name of the characters A-Z a-z 0-9 _ . - that does "
                f"not begin with _ or - and is not 'self', got {name!r}: rename it"
            )
    as_arguments = {re.sub("^(?![A-Za-z])", "arg_", re.sub("[^A-Za-z0-9]", "_", name)) for name in names}
    if len(as_arguments) < len(names):
        raise ValueError(
            f"the inputs of signature '{signature}' must have different names where each . and - is a _, "
            f"got {', '.join(names)}"
        )


def _check_outputs(signature: str, outputs: Any) -> None:
    named = name_outputs(outputs)
    wrong = [f"{key!r}: {type(part).__name__}" for key, part in named.items() if not isinstance(part, tf.Tensor)]
    wrong += [f"the key {key!r}" for key in named if not isinstance(key, str)]
    if wrong or not named:
        raise ValueError(
            f"signature '{signature}' must return a dense tensor, or a list, a tuple or a dict with str keys of them, "
            f"got {', '.join(wrong) or 'no output'}"
        )


def _convert_warmup(warmup: Any, endpoints: dict[str, Endpoint]) -> dict[str, Tensors]:
    by_signature = isinstance(warmup, dict) and set(warmup) == set(endpoints)
    if not by_signature and len(endpoints) == 1:
        return {name: _convert_inputs(name, endpoint.inputs, warmup) for name, endpoint in endpoints.items()}
    if not by_signature:
        got = f"the keys {', '.join(map(str, warmup))}" if isinstance(warmup, dict) else f"a {type(warmup).__name__}"
        raise ValueError(f"warmup must be a dict with inputs for each of {', '.join(endpoints)}, got {got}")
    return {name: _convert_inputs(name, endpoint.inputs, warmup[name]) for name, endpoint in endpoints.items()}


def _convert_inputs(signature: str, specs: dict[str, tf.TensorSpec], values: Any) -> Tensors:
    """One signature's example inputs by name, as tensors of its dtypes and shapes."""
    what = f"warmup of '{signature}'"
    if not isinstance(values, dict):
        if not (isinstance(values, (list, tuple)) and len(values) == len(specs)):
            values = [values]
        if len(values) != len(specs):
            raise ValueError(f"{what} must have the inputs {', '.join(specs)}, got one that is not a list of so many")
        values = dict(zip(specs, values, strict=True))
    if set(values) != set(specs):
        raise ValueError(f"{what} must have the inputs {', '.join(specs)}, got {', '.join(map(str, values))}")
    tensors = {}
    for name, spec in specs.items():
        try:
            tensors[name] = tf.cast(values[name], spec.dtype) if spec.dtype != tf.string else tf.constant(values[name])
        except (TypeError, ValueError, tf.errors.OpError) as error:
            raise ValueError(f"{what}: '{name}' must be convertible to {spec.dtype.name}: {error}") from error
        if not isinstance(tensors[name], tf.Tensor):
            raise ValueError(f"{what}: '{name}' must be a dense tensor, got a {type(tensors[name]).__name__}")
        if not spec.is_compatible_with(tensors[name]):
            got = tf.TensorSpec.from_tensor(tensors[name])
            raise ValueError(
                f"{what}: '{name}' must have dtype {spec.dtype.name} and shape {spec.shape}, "
                f"got {got.dtype.name} and {got.shape}"
            )
        if not tf.size(tensors[name]):
            raise ValueError(f"{what}: '{name}' must have entries, got the shape {tensors[name].shape}")
    return tensors


def _import_prediction_log() -> Any:
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError as error:
        raise ImportError(
            f"warmup needs the package tensorflow-serving-api: pip install tensorflow-serving-api ({error})"
        ) from error
    return prediction_log_pb2


def _write_warmup(examples: dict[str, Tensors], model_name: str, staging: pathlib.Path) -> None:
    """The file that a model server looks for, one record for each signature."""
    prediction_log_pb2 = _import_prediction_log()
    file = staging / "assets.extra" / "tf_serving_warmup_requests"
    file.parent.mkdir()
    with tf.io.TFRecordWriter(str(file)) as writer:
        for signature, inputs in examples.items():
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.name = model_name
            request.model_spec.signature_name = signature
            for name, tensor in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(tensor))
            writer.write(log.SerializeToString())


@contextlib.contextmanager
def _staging_directory(base: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory in `base`, named so that servers ignore it; an error removes it, and `base` if it is new."""
    made = [directory for directory in (base, *base.parents) if not directory.exists()]
    staging = base / f".export-{uuid.uuid4().hex}"
    try:
        with _file_errors(base):
            staging.mkdir(parents=True)
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for directory in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                directory.rmdir()
        raise


@contextlib.contextmanager
def _file_errors(base: pathlib.Path) -> Iterator[None]:
    """TensorFlow's errors of the file system as Python's, and both with the argument's name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"path cannot be written: {error.strerror}", str(base)) from error
    except tf.errors.OpError as error:
        raise OSError(f"path cannot be written: '{base}': {error.message}") from error


def _publish(staging: pathlib.Path, base: pathlib.Path, overwrite: bool) -> pathlib.Path:
    """Gives the finished directory its number, under a lock that other exports to `base` wait for."""
    descriptor = os.open(base, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        versions = [
            name for name in os.listdir(base) if name.isascii() and name.isdigit() and int(name) <= _MAX_VERSION
        ]
        newest = max(versions, key=int, default="0")
        if overwrite and versions:
            version = base / newest
            _replace(version, staging)
        elif int(newest) == _MAX_VERSION:
            raise ValueError(
                f"path has the last version that a model server reads, there is no next one: {base / newest}"
            )
        else:
            version = base / str(int(newest) + 1)
            staging.rename(version)
        return version
    finally:
        os.close(descriptor)


def _replace(version: pathlib.Path, staging: pathlib.Path) -> None:
    if version.is_symlink() or not (version / "saved_model.pb").is_file():
        raise FileExistsError(f"overwrite replaces the directory of a SavedModel and nothing else, got {version}")
    # No rename replaces a directory with content: for a moment there is neither version.
    aside = staging.with_name(f"{staging.name}-replaced")
    version.rename(aside)
    try:
        staging.rename(version)
    except BaseException:
        aside.rename(version)
        raise
    shutil.rmtree(aside)
