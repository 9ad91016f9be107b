"""Finds, checks and loads the native libraries, runs the op, and has its gradients, batching and cost registered.

Why a library is not in use is a status, never an exception: `import tf_agc` must not fail for it.
Nothing here decides which implementation runs, and nothing computes.
"""

import ctypes
import dataclasses
import os
import pathlib
import re
import struct
from typing import Any

import tensorflow as tf

# Private, and without a public counterpart: the one way to learn whether an op is registered.
from tensorflow.python.framework import op_def_registry

from tf_agc import batching, flops, gradients, op_attributes


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether a native library is loaded.

    Attributes:
        available: the ops (XLA_STATUS: under XLA too) can be used.
        reason: half a sentence, why they can or cannot be.
        library: where the library is expected.
        built_for: the TensorFlow version that the library was built for, None where unknown.
    """

    available: bool
    reason: str
    library: pathlib.Path
    built_for: str | None


def agc(
    x: tf.Tensor,
    gain: tf.Tensor,
    mean_scale: tf.Tensor,
    activation: str,
    alpha: float,
    data_format: str,
    *,
    bias: tf.Tensor | None = None,
    shortcut: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The op TfAgc>Agc: arguments, results and errors as `tf_agc.reference.agc` documents them.

    Raises:
        tf.errors.InvalidArgumentError: what the kernel refuses.
        ValueError: what the shape function refuses, while a graph is built.
    """
    y, mean = _ops.tf_agc_agc(
        x,
        gain,
        mean_scale,
        [] if bias is None else [bias],
        [] if shortcut is None else [shortcut],
        activation=activation,
        alpha=alpha,
        data_format=op_attributes.DATA_FORMATS[data_format],
    )
    return y, mean


def instruction_set() -> str:
    """The instruction-set level that the loaded library chose on this machine."""
    function = ctypes.CDLL(str(STATUS.library)).TfAgcInstructionSet
    function.restype = ctypes.c_char_p
    return function().decode()


def cuda_build() -> str:
    """The release of CUDA and the architectures in the loaded library, "" where it was built for CPUs alone."""
    function = ctypes.CDLL(str(STATUS.library)).TfAgcCudaBuild
    function.restype = ctypes.c_char_p
    return function().decode()


def gpu_problem() -> str:
    """Why the loaded library's GPU kernels are not used, "" where they are or it has none."""
    function = ctypes.CDLL(str(STATUS.library)).TfAgcGpuProblem
    function.restype = ctypes.c_char_p
    return function().decode()


def _find(name: str) -> Status:
    """Everything that can be known about a library without opening it."""
    package = pathlib.Path(__file__).resolve().parent
    library = package / "native_library" / name
    version_file = library.with_name("tensorflow_version.txt")
    checkout = (package.parent / "WORKSPACE").is_file()
    cure = f"run ./tools/build.sh in {package.parent}" if checkout else "reinstall tf-agc"

    try:
        if not library.is_file():
            return Status(False, f"there is no native library at {library} ({cure})", library, None)
        truncated = _is_truncated(library)
    except OSError as error:
        return Status(False, f"{library} is not readable: {error} ({cure})", library, None)
    try:
        built_for = version_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        return Status(False, f"{version_file} is not readable: {error} ({cure})", library, None)
    if not re.match(r"\d+\.\d+\.\d", built_for):
        reason = f"{version_file} must hold a TensorFlow version, got {built_for[:80]!r} ({cure})"
        return Status(False, reason, library, None)
    if built_for != tf.__version__:
        # C++ has no stable ABI between TensorFlow's versions: opening it could crash the process.
        if not checkout:
            cure = "install the tf-agc release for this TensorFlow"
        reason = (
            f"the native library was built for TensorFlow {built_for}, this is TensorFlow {tf.__version__} ({cure})"
        )
        return Status(False, reason, library, built_for)
    if truncated:
        return Status(False, f"{library} is truncated ({cure})", library, built_for)
    return Status(True, f"built for TensorFlow {built_for}", library, built_for)


def _is_truncated(library: pathlib.Path) -> bool:
    """Whether the end of an ELF file is missing, or zeros, which a full disk or a power failure leaves.

    dlopen maps such a file all the same, and the process dies of SIGBUS or SIGSEGV when it comes to the rest. Linkers
    write the table of sections last, and its last entry is never empty. A file without one, which some tools remove,
    and one that is not 64-bit and little-endian are left to dlopen.
    """
    with library.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return False
        (table,) = struct.unpack_from("<Q", header, 40)
        entry_size, entries = struct.unpack_from("<HH", header, 58)
        file.seek(table + entry_size * max(0, entries - 1))
        return entries > 0 and not any(file.read(entry_size))


def _is_loaded(library: pathlib.Path) -> bool:
    """Whether this process has loaded this very file."""
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _load() -> tuple[Status, Any]:
    """Returns the status and the module of generated op wrappers, None where there is none."""
    status = _find("libtf_agc.so")
    if not status.available:
        return status, None
    if op_def_registry.get("TfAgc>Agc") is not None and not _is_loaded(status.library):
        # TensorFlow would register the kernels once more, and then refuse to run either.
        reason = f"this process has the op TfAgc>Agc already, from another library than {status.library}"
        return dataclasses.replace(status, available=False, reason=reason), None
    try:
        ops = tf.load_op_library(str(status.library))
    except Exception as error:  # of a damaged library: UnicodeDecodeError, for one, from the wrappers that it generates
        reason = f"{status.library} cannot be loaded: {error}"
        return dataclasses.replace(status, available=False, reason=reason), None
    if not hasattr(ops, "tf_agc_agc") or not hasattr(ops, "tf_agc_agc_grad"):
        reason = f"{status.library} does not contain the ops TfAgc>Agc and TfAgc>AgcGrad"
        return dataclasses.replace(status, available=False, reason=reason), None
    gradients.register(ops)
    batching.register(ops)
    flops.register()
    return status, ops


def _load_xla() -> Status:
    """Loads the ops' XLA kernels: a library of its own, because it needs more of TensorFlow than the ops do."""
    if not STATUS.available:
        return STATUS
    status = _find("libtf_agc_xla.so")
    if not status.available:
        return status
    try:
        tf.load_library(str(status.library))
    except Exception as error:
        return dataclasses.replace(status, available=False, reason=f"{status.library} cannot be loaded: {error}")
    return status


# While the module is imported, so that Python's import lock makes it happen once in any thread, and
# so that a SavedModel with the op can be loaded after `import tf_agc`.
STATUS, _ops = _load()
XLA_STATUS = _load_xla()
