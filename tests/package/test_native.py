"""Finding and loading the library; what `import tf_agc` and `python -m tf_agc` say without it."""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

import tf_agc
from agc_testing import python
from tf_agc import __main__, native
from tf_agc.version import PATCH, version_for

_PACKAGE = pathlib.Path(native.__file__).parent


@pytest.fixture
def package(tmp_path):
    """A copy of the package without a library, as in a wheel."""
    copy = tmp_path / "tf_agc"
    shutil.copytree(_PACKAGE, copy, ignore=shutil.ignore_patterns("native_library", "__pycache__"))
    (copy / "native_library").mkdir()
    return copy


def _install(package, content, version=tf.__version__):
    library = package / "native_library" / "libtf_agc.so"
    if isinstance(content, bytes):
        library.write_bytes(content)
    else:
        shutil.copy(content, library)
    (package / "native_library" / "tensorflow_version.txt").write_text(version + "\n")
    return library


def _status(package, op_is_registered=False):
    """The status that a fresh import of the copy's native.py comes to, in this process.

    This process has the op already; a library that is opened all the same must not have it.
    """
    registered = contextlib.nullcontext() if op_is_registered else _PATCH_OPS
    with registered:
        return _imported_again(package).STATUS


_PATCH_OPS = unittest.mock.patch.object(op_def_registry, "get", return_value=None)


def _imported_again(package):
    spec = importlib.util.spec_from_file_location("copied_native", package / "native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_available(native_required):
    status = native.STATUS
    assert status.available and status.built_for == tf.__version__
    assert status.library.name == "libtf_agc.so"
    assert status.reason == f"built for TensorFlow {tf.__version__}"


def test_instruction_set(native_required):
    assert native.instruction_set() in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "baseline")


def test_cuda_build(native_required):
    assert re.fullmatch(r"|\d+\.\d+,( sm_\d+)+, PTX \d+", native.cuda_build())


DRIVER_TOO_OLD = """
import ctypes, warnings
import tensorflow

class Function:
    def __call__(self):
        return b"the NVIDIA driver runs CUDA 12.8 at most, and tf_agc was built with CUDA 13.0"

class Library(ctypes.CDLL):  # as if the library had found such a driver
    def __getattr__(self, name):
        return Function() if name == "TfAgcGpuProblem" else super().__getattr__(name)

ctypes.CDLL = Library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    import tf_agc
for warning in caught:
    print(warning.category.__name__, warning.filename, warning.message)
print(tf_agc.agc(tensorflow.ones([1, 2, 2, 3]), 1.0, 0.5).numpy().sum())
from tf_agc import __main__
__main__.main()
"""


def test_a_driver_that_is_too_old_leaves_the_op_on_the_cpu(native_required):
    problem = "the NVIDIA driver runs CUDA 12.8 at most, and tf_agc was built with CUDA 13.0"
    warning, result, *rows = python("-c", DRIVER_TOO_OLD).stdout.splitlines()
    cure = "Update the driver, or build with an older CUDA."
    assert warning == f"RuntimeWarning <string> tf_agc leaves its op on the CPU: {problem}. {cure}"
    assert result == "6.0"
    assert f"CUDA:            {native.cuda_build() or 'not built in'}; not used: {problem}" in rows
    # Whoever asked for the reference misses nothing.
    assert "leaves its op" not in python("-c", DRIVER_TOO_OLD, TF_AGC_IMPLEMENTATION="reference").stdout


def test_the_drivers_version_is_asked(native_required, tmp_path):
    if not native.cuda_build():
        pytest.skip("tf_agc is built without CUDA")
    source = 'extern "C" int cuDriverGetVersion(int* version) { *version = 11080; return 0; }'
    compiler = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run(compiler, input=source, text=True, check=True)
    code = """
import tf_agc
from tensorflow.python.framework import kernels
registered = kernels.get_registered_kernels_for_op("TfAgc>Agc").kernel
print(sorted({kernel.device_type for kernel in registered}), tf_agc.native.gpu_problem())
"""
    found = python("-c", code, LD_LIBRARY_PATH=str(tmp_path)).stdout
    assert "'GPU'" not in found and "the NVIDIA driver runs CUDA 11.8 at most" in found
    assert "'GPU'" in python("-c", code).stdout


def test_main_on_a_gpu_machine(native_required, capsys, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a GPU"] if kind == "GPU" else [])
    __main__.main()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("transposes: ")
    assert 'tf.config.optimizer.set_experimental_options({"layout_optimizer": False})' in line


def test_missing(package):
    status = _status(package)
    assert not status.available and status.built_for is None
    assert status.reason == f"there is no native library at {status.library} (reinstall tf-agc)"


def test_missing_in_a_checkout(package):
    (package.parent / "WORKSPACE").touch()
    assert _status(package).reason.endswith(f"(run ./tools/build.sh in {package.parent})")


def test_another_version_is_not_opened(package):
    # Not a library at all: opening it would be another error.
    _install(package, b"nothing", version="2.0.0")
    status = _status(package)
    assert not status.available and status.built_for == "2.0.0"
    assert status.reason == (
        f"the native library was built for TensorFlow 2.0.0, this is TensorFlow {tf.__version__} "
        "(install the tf-agc release for this TensorFlow)"
    )
    (package.parent / "WORKSPACE").touch()
    assert "run ./tools/build.sh" in _status(package).reason


def test_no_version(package):
    library = _install(package, b"nothing")
    library.with_name("tensorflow_version.txt").unlink()
    assert "tensorflow_version.txt is not readable" in _status(package).reason


@pytest.mark.parametrize("version", ["", "two", "2.20"])
def test_no_such_version(package, version):
    library = _install(package, b"nothing", version=version)
    status = _status(package)
    assert not status.available and status.built_for is None
    version_file = library.with_name("tensorflow_version.txt")
    assert status.reason == f"{version_file} must hold a TensorFlow version, got {version!r} (reinstall tf-agc)"


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"no library\n" * 100])
def test_not_a_library(package, content):
    _install(package, content)
    status = _status(package)
    assert not status.available and "cannot be loaded" in status.reason


@pytest.mark.parametrize("kept", [0.999, 0.9, 0.5, 0.1, 100, 64])
def test_truncated(package, kept, native_required):
    content = native.STATUS.library.read_bytes()
    size = int(len(content) * kept) if kept < 1 else kept
    library = _install(package, content[:size])
    status = _status(package)
    assert not status.available and status.reason.startswith(f"{library} is truncated")


@pytest.mark.parametrize("kept", [0.999, 0.9, 0.5, 0.1, 64])
def test_zeros_at_the_end(package, kept, native_required):
    # What a full disk or a power failure leaves: the right size, and no content.
    content = native.STATUS.library.read_bytes()
    size = int(len(content) * kept) if kept < 1 else kept
    library = _install(package, content[:size].ljust(len(content), b"\0"))
    assert _status(package).reason == f"{library} is truncated (reinstall tf-agc)"


def test_without_a_table_of_sections(package, native_required):
    # Programs that make libraries smaller remove it; it runs without.
    content = bytearray(native.STATUS.library.read_bytes())
    content[40:48] = bytes(8)  # where it is
    content[60:62] = bytes(2)  # how many there are
    assert not native._is_truncated(_install(package, bytes(content)))


def test_not_readable(package):
    library = _install(package, b"")
    library.unlink()
    library.symlink_to("/proc/self/mem")  # a file whose first bytes nobody can read, root included
    reason = _status(package).reason
    assert reason == f"{library} is not readable: [Errno 5] Input/output error (reinstall tf-agc)"


def test_wrappers_that_cannot_be_made(package, monkeypatch):
    # TensorFlow reads the ops' names from the library, and a damaged one may hold anything.
    library = _install(package, b"damaged")
    monkeypatch.setattr(tf, "load_op_library", lambda _: b"\xab".decode())
    assert _status(package).reason.startswith(f"{library} cannot be loaded: 'utf-8' codec can't decode byte 0xab")


def test_the_op_from_another_library(package, native_required):
    # A second copy would register the kernels again, and TensorFlow then runs neither.
    library = _install(package, native.STATUS.library)
    status = _status(package, op_is_registered=True)
    assert not status.available
    assert status.reason == f"this process has the op TfAgc>Agc already, from another library than {library}"
    assert native.agc(tf.ones([1, 2, 3]), *[tf.ones([3])] * 2, "relu", 0.0, "channels_last")[0].shape == (1, 2, 3)


def test_imported_again(native_required):
    # Notebooks and tests drop modules and import them anew; TensorFlow forgets nothing.
    again = _imported_again(_PACKAGE)
    assert again.STATUS.available and again.XLA_STATUS.available
    x = tf.constant([[[1.0], [3.0]]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y, _ = again.agc(x, tf.constant([2.0]), tf.ones([1]), "relu", 0.0, "channels_last")
    np.testing.assert_array_equal([y, tape.gradient(y, x)], [[[[0], [2]]], [[[-1], [1]]]])


def test_another_library(package):
    # A library that loads, and has nothing of ours.
    foreign = next(pathlib.Path("/usr/lib").rglob("libz.so.1*"), None) or next(pathlib.Path("/lib").rglob("libm.so.6"))
    _install(package, foreign)
    assert _status(package).reason.endswith("does not contain the ops TfAgc>Agc and TfAgc>AgcGrad")


_PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    import tf_agc
    import tf_agc.layer
ours = [w for w in caught if "tf_agc" in str(w.message)]
assert len(ours) == 1, ours
print(ours[0].category.__name__, ours[0].filename, ours[0].message)
print(tf_agc.agc([[[1.0], [3.0]]], 2.0, 1.0, activation="relu").numpy().ravel())
try:
    tf_agc.implementation("native")
except RuntimeError as error:
    print(error)
"""


def test_import_without_a_library(package):
    content = b"\x7fELF\x02\x01" + bytes(100)  # begins like one
    _install(package, content)
    program = package.parent / "program.py"
    program.write_text(_PROGRAM)
    warning, result, error = python(program, path=package.parent).stdout.splitlines()
    # One warning, of the right class, that points at the line with the import.
    assert warning.startswith(
        f"RuntimeWarning {program} tf_agc uses its slower reference in stock TensorFlow ops: "
        f"{package / 'native_library' / 'libtf_agc.so'} cannot be loaded:"
    )
    assert result == "[0. 2.]"
    assert error.startswith("the native implementation is not available: ")


_FAULTS = """
import sys, warnings
import tensorflow as tf
for path in sys.argv[1:]:
    sys.path.insert(0, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        import tf_agc
    print(*[w.message for w in caught if "tf_agc" in str(w.message)], sep=" AND ")
    print(tf_agc.agc(tf.constant([[[1.0], [3.0]]]), 2.0, 1.0, activation="relu").numpy().ravel())
    for name in [name for name in sys.modules if name.split(".")[0] == "tf_agc"]:
        del sys.modules[name]
    sys.path.remove(path)
"""


def test_import_with_a_bad_library(package, tmp_path, native_required):
    # One process for all: none of them loads, so each import finds TensorFlow as it was.
    whole = native.STATUS.library.read_bytes()
    other_machine = bytearray(whole)
    other_machine[18:20] = b"\x28\0" if whole[18] == 0xB7 else b"\xb7\0"  # Arm, else aarch64
    unresolved = tmp_path / "unresolved.so"
    source = "extern int of_another_tensorflow(void); int call(void) { return of_another_tensorflow(); }"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-z,now", "-x", "c", "-", "-o", unresolved]
    subprocess.run(command, input=source, text=True, check=True)
    libz = next(pathlib.Path("/usr/lib").rglob("libz.so.1*"))
    # What is installed, the version beside it, and how the reason begins or what is in it.
    file = f"{tmp_path}/{{}}/tf_agc/native_library/libtf_agc.so {{}}".format
    faults = {
        "truncated": (whole[: len(whole) // 2], tf.__version__, file("truncated", "is truncated")),
        "zeros": (whole[: len(whole) // 2].ljust(len(whole), b"\0"), tf.__version__, file("zeros", "is truncated")),
        "machine": (bytes(other_machine), tf.__version__, file("machine", "cannot be loaded")),
        "unresolved": (unresolved, tf.__version__, "undefined symbol: of_another_tensorflow"),
        "foreign": (libz, tf.__version__, file("foreign", "does not contain the ops")),
        "version": (native.STATUS.library, "2.0.0", "built for TensorFlow 2.0.0, this is TensorFlow"),
    }
    for name, (content, version, _) in faults.items():
        copy = tmp_path / name / "tf_agc"
        shutil.copytree(package, copy)
        _install(copy, content, version)
    lines = python("-c", _FAULTS, *[tmp_path / name for name in faults]).stdout.splitlines()
    assert len(lines) == 2 * len(faults)
    for warning, result, (name, (_, _, reason)) in zip(lines[::2], lines[1::2], faults.items(), strict=True):
        assert warning.startswith("tf_agc uses its slower reference in stock TensorFlow ops: "), name
        assert reason in warning and " AND " not in warning, name
        assert result == "[0. 2.]", name


# What a process does to others: files opened for writing, made, changed or removed; sockets; programs.
_AUDIT = """
import os, sys
import keras, tensorflow
events = []
changes = ("mkdir", "rename", "remove", "rmdir", "link", "symlink", "chmod", "chown", "utime", "truncate", "setxattr")
outside = ("socket", "subprocess", "urllib", "http", "ftplib", "smtplib", "tempfile", "shutil")
programs = ("system", "exec", "posix_spawn", "fork", "forkpty")
def hook(event, arguments):
    module, _, name = event.partition(".")
    opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if opened or module in outside or module == "os" and name in changes + programs:
        events.append(f"{event} {arguments[0]}")
sys.addaudithook(hook)
import tf_agc
print(tf_agc.native.STATUS.available and tf_agc.native.XLA_STATUS.available, events)
events.clear()
os.close(os.open(os.devnull, os.O_WRONLY))  # the hook sees what it is for
import socket
socket.socket().close()
print(events)
"""


def test_import_writes_nothing_and_calls_nobody(native_required):
    # Beyond TensorFlow's and Keras's own imports. -B: the cache of bytecode is Python's, and pip has filled it.
    imported, seen = python("-B", "-c", _AUDIT).stdout.splitlines()
    assert imported == "True []"
    assert seen.startswith("['open /dev/null', 'socket.__new__ ")


_READ_ONLY = """
import os, pathlib, sys
for directory in sys.argv[1:]:
    try:
        (pathlib.Path(directory) / "written").touch()
    except OSError as error:
        print(error.strerror)
import tensorflow as tf
import tf_agc
print(tf_agc.__file__, tf_agc.native.STATUS.available, tf_agc.native.XLA_STATUS.available)
print(tf_agc.agc(tf.constant([[[1.0], [3.0]]]), 2.0, 1.0, activation="relu").numpy().ravel())
"""


def test_nothing_can_be_written(package, tmp_path, native_required):
    shutil.copytree(_PACKAGE / "native_library", package / "native_library", dirs_exist_ok=True)
    home = tmp_path / "home"
    home.mkdir()
    directories = [package, package / "native_library", home]
    for directory in directories:
        directory.chmod(0o555)
    # root has the right to write where the bits forbid it, and gives it up.
    drop = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"] if os.access(home, os.W_OK) else []
    program = ["-c", _READ_ONLY, *directories]
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    lines = python(*program, path=tmp_path, prefix=drop, **environment).stdout.splitlines()
    assert lines == ["Permission denied"] * 3 + [f"{package / '__init__.py'} True True", "[0. 2.]"]
    assert list(home.iterdir()) == []


_BESIDE = """
import sys
import tensorflow as tf
from tensorflow.python.framework import op_def_registry
other = tf.load_op_library(sys.argv[1])
import tf_agc
assert op_def_registry.get("TfAgc>Agc") and op_def_registry.get("AudioMicrofrontend")
for _ in range(2):
    print(tf_agc.agc(tf.constant([[[1.0], [3.0]]]), 2.0, 1.0, activation="relu").numpy().ravel())
    print(other.audio_microfrontend(tf.zeros([2000], tf.int16)).shape)
print(tf_agc.native.STATUS.available, tf_agc.native.XLA_STATUS.available)
"""


def test_beside_another_library_of_ops(native_required):
    # One that TensorFlow's package brings, a library of its own like ours.
    library = pathlib.Path(tf.__file__).parent / "lite/experimental/microfrontend/python/ops/_audio_microfrontend_op.so"
    lines = python("-c", _BESIDE, library).stdout.splitlines()
    assert lines == ["[0. 2.]", "(11, 32)"] * 2 + ["True True"]


def test_main(native_required, capsys):
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("tf_agc", "TensorFlow", "Keras", "implementation", "library", "built for"),
        *("instruction set", "CUDA", "XLA kernels"),
    ]
    assert [line.split(":", 1)[1].strip() for line in lines] == [
        tf_agc.__version__,
        tf.__version__,
        keras.__version__,
        f"native (built for TensorFlow {tf.__version__})",
        str(native.STATUS.library),
        f"TensorFlow {tf.__version__}",
        native.instruction_set(),
        native.cuda_build() or "not built in",
        f"loaded (built for TensorFlow {tf.__version__})",
    ]


def test_main_without_a_library(package):
    done = python("-m", "tf_agc", path=package.parent)
    assert f"tf_agc:          {version_for(tf.__version__)}\n" in done.stdout
    assert "implementation:  reference (there is no native library at" in done.stdout
    assert "instruction set: unknown" in done.stdout
    assert "CUDA:            unknown" in done.stdout
    assert "XLA kernels:     not loaded (there is no native library at" in done.stdout


def test_other_backends():
    done = python("-c", "import tf_agc", check=False, KERAS_BACKEND="jax")
    message = (
        "ImportError: tf_agc needs Keras's tensorflow backend: unset KERAS_BACKEND or set it to 'tensorflow', got "
        "KERAS_BACKEND='jax'."
    )
    assert done.returncode == 1 and message in done.stderr


def test_keras_2(tmp_path):
    (tmp_path / "keras.py").write_text("__version__ = '2.15.0'")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import tf_agc"
    done = python("-c", code, check=False)
    assert done.returncode == 1
    assert "ImportError: tf_agc needs Keras 3, got Keras 2.15.0: pip install --upgrade keras" in done.stderr


# Ray Train sets the first in every worker. It is about tf.keras, which tf_agc does not use.
@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_legacy_keras_is_not_what_runs(value):
    code = (
        "import keras, tf_agc; model = keras.Sequential([keras.Input((4, 4, 3)), tf_agc.AutomaticGainControl('relu')]);"
        "model.compile('sgd', 'mse'); import numpy as np; x = np.ones((2, 4, 4, 3)); model.fit(x, x, verbose=0)"
    )
    python("-c", code, TF_USE_LEGACY_KERAS=value)


def test_the_backend_that_runs_counts():
    # Set after Keras was imported, it changes nothing.
    python("-c", "import keras, os; os.environ['KERAS_BACKEND'] = 'jax'; import tf_agc")


def test_an_empty_backend_is_none():
    python("-c", "import tf_agc", KERAS_BACKEND="")


def test_backend_of_the_configuration_file(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "numpy"}')
    done = python("-c", "import tf_agc", check=False, KERAS_HOME=str(tmp_path))
    assert done.returncode == 1
    # Either sentence: this backend's own import may fail first, for want of its packages.
    assert "ImportError: tf_agc needs Keras" in done.stderr.splitlines()[-1]
    assert "keras.json" in done.stderr or "got the backend 'numpy'" in done.stderr


def test_version_is_that_of_the_build(package):
    _install(package, b"nothing", version="2.20.0")
    done = python("-c", "import tf_agc; print(tf_agc.__version__)", path=package.parent)
    assert done.stdout == f"0.20.{PATCH}\n"


@pytest.mark.parametrize("tensorflow, minor", [("2.21.0", 21), ("2.9.3", 9), ("2.122.0-rc1", 122)])
def test_version_for(tensorflow, minor):
    assert version_for(tensorflow) == f"0.{minor}.{PATCH}"


def test_public_names():
    assert set(tf_agc.__all__) >= {*("AutomaticGainControl", "__version__", "agc", "calibrate", "implementation")}
    assert all(hasattr(tf_agc, name) for name in tf_agc.__all__)
    assert (_PACKAGE / "py.typed").is_file()
