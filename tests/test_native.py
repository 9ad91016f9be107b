"""Finding and loading the library; what `import tf_agc` and `python -m tf_agc` say without it."""

import importlib.util
import pathlib
import re
import shutil

import keras
import pytest
import tensorflow as tf
from agc_testing import python

import tf_agc
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


def _status(package):
    """The status that a fresh import of the copy's native.py comes to, in this process."""
    spec = importlib.util.spec_from_file_location("copied_native", package / "native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.STATUS


def test_available(native_required):
    status = native.STATUS
    assert status.available and status.built_for == tf.__version__
    assert status.library.name == "libtf_agc.so"
    assert status.reason == f"built for TensorFlow {tf.__version__}"


def test_instruction_set(native_required):
    assert native.instruction_set() in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "baseline")


def test_cuda_build(native_required):
    assert re.fullmatch(r"|\d+\.\d+,( sm_\d+)+, PTX \d+", native.cuda_build())


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
    if not native._is_truncated(library):
        # What is lost behind the last segment (symbol tables) nobody needs to run it. Not opened
        # here: this process has the same ops already.
        assert kept > 0.9
        return
    status = _status(package)
    assert not status.available and status.reason.startswith(f"{library} is truncated")


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
print(tf_agc.agc([[[1.0], [3.0]]], 2.0, 1.0, "relu").numpy().ravel())
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


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"KERAS_BACKEND": "jax"},
            "ImportError: tf_agc needs Keras's tensorflow backend: unset KERAS_BACKEND or set it "
            "to 'tensorflow', got KERAS_BACKEND='jax'.",
        ),
        (
            {"TF_USE_LEGACY_KERAS": "1"},
            "ImportError: tf_agc needs Keras 3 and does not work with the legacy tf_keras: unset "
            "TF_USE_LEGACY_KERAS, got TF_USE_LEGACY_KERAS='1'.",
        ),
    ],
)
def test_other_kerases(environment, message):
    done = python("-c", "import tf_agc", check=False, **environment)
    assert done.returncode == 1 and message in done.stderr


def test_backend_of_the_configuration_file(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "numpy"}')
    done = python("-c", "import tf_agc", check=False, KERAS_HOME=str(tmp_path))
    assert done.returncode == 1
    # Either sentence: this backend's own import may fail first, for want of its packages.
    assert "ImportError: tf_agc needs Keras" in done.stderr.splitlines()[-1]
    assert "keras.json" in done.stderr or "configuration file" in done.stderr


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
