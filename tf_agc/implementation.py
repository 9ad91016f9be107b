"""Which implementation runs, here and now: the scope `implementation(name)` and the decision.

The choice belongs to the code around a call, never to a layer's config or to a saved model.
"""

import contextlib
import contextvars
import os
import traceback
from collections.abc import Iterator

import tensorflow as tf

# Private, and without a public counterpart: the one way to learn, while tracing, that
# jit_compile=True encloses this call.
from tensorflow.python.ops import control_flow_util

from tf_agc import native

_NAMES = ("auto", "native", "reference")
# Modules in which Keras and TensorFlow Lite trace what is to run elsewhere.
_EXPORTERS = ("keras.src.export.", "tensorflow.lite.python.lite")
_VARIABLE = "TF_AGC_IMPLEMENTATION"


def _default() -> str:
    name = os.environ.get(_VARIABLE) or "auto"
    if name not in _NAMES:
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(map(repr, _NAMES))} or unset, got {name!r}")
    return name


DEFAULT = _default()
_scope = contextvars.ContextVar("tf_agc_implementation", default=DEFAULT)


def implementation(name: str) -> contextlib.AbstractContextManager[None]:
    """Chooses the implementation for the calls, and for the functions traced, inside a `with`.

    Scopes nest, and belong to the thread that opens them: the threads in which a
    `tf.distribute.MirroredStrategy` of several devices traces are outside. A `tf.function` keeps
    what was chosen when it was traced, and so do a Keras model's `fit`, `evaluate` and `predict`.
    Outside every scope the environment variable TF_AGC_IMPLEMENTATION chooses (read when tf_agc is
    imported), and "auto" where it is not set.

    Args:
        name: "auto": the native op where its library is loaded (in code that XLA compiles: both
            libraries), else the reference. The reference too in what Keras or TensorFlow Lite traces for
            an export (`model.export`, `keras.export.ExportArchive`,
            `tf.lite.TFLiteConverter.from_keras_model`), which is to run elsewhere. "native": the
            native op. "reference": stock TensorFlow ops.

    Returns:
        A context manager.

    Raises:
        ValueError: another name.
        RuntimeError: "native" where the library is not available; the message says why.
    """
    if name not in _NAMES:
        raise ValueError(f"name must be one of {', '.join(map(repr, _NAMES))}, got {name!r}")
    if name == "native":
        _require_native()
    return _open_scope(name)


@contextlib.contextmanager
def _open_scope(name: str) -> Iterator[None]:
    token = _scope.set(name)
    try:
        yield
    finally:
        _scope.reset(token)


def resolve() -> tuple[str, str]:
    """What a call made here and now runs.

    Returns:
        "native" or "reference", and half a sentence why.

    Raises:
        RuntimeError: TF_AGC_IMPLEMENTATION asks for "native", which is not available.
    """
    name = _scope.get()
    if name == "native":
        _require_native()
        return "native", "asked for"
    if name == "reference":
        return "reference", "asked for"
    if not native.STATUS.available:
        return "reference", native.STATUS.reason
    if not native.XLA_STATUS.available and _traced_for_xla():
        return "reference", f"traced for XLA, and {native.XLA_STATUS.reason}"
    if traced_for_export():
        return "reference", "traced for an export"
    return "native", native.STATUS.reason


def native_where_free_to_choose() -> contextlib.AbstractContextManager[None]:
    """The native op within a `with` where "auto" chooses and it is available: for exports that replace it later."""
    return _open_scope("native" if _scope.get() == "auto" and native.STATUS.available else _scope.get())


def supports_jit() -> bool:
    """Whether everything that "auto" may choose, XLA can compile.

    Not so where the native op has no XLA kernels: a function that was traced outside XLA, with the
    native op, may be called inside it.
    """
    return native.XLA_STATUS.available or not native.STATUS.available


def _traced_for_xla() -> bool:
    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def traced_for_export() -> bool:
    """Whether Keras or TensorFlow Lite traces a graph here and now that is to run elsewhere, for inference."""
    if tf.executing_eagerly():
        return False
    # Nothing else tells what a trace is for.
    callers = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_stack(None))
    return any(name.startswith(_EXPORTERS) for name in callers)


def _require_native() -> None:
    if not native.STATUS.available:
        raise RuntimeError(f"the native implementation is not available: {native.STATUS.reason}")
