"""The wheel, installed in a venv of its own outside the source tree, and what is inside it. Nothing is compiled."""

import email
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
import tensorflow as tf

import tf_agc
from tf_agc import native

ROOT = pathlib.Path(__file__).resolve().parents[2]

OPS = "tf_agc/native_library/libtf_agc.so"
XLA = "tf_agc/native_library/libtf_agc_xla.so"

# What each library exports, and what it needs of TensorFlow.
EXPORTED = {
    OPS: ["TfAgcCounters", "TfAgcCudaBuild", "TfAgcGpuProblem", "TfAgcInstructionSet", "TfAgcResetCounters"],
    XLA: ["TfAgcXlaCounters", "TfAgcXlaResetCounters", "TfAgcXlaUseGpuCalls"],
}
TENSORFLOW = {
    OPS: ["libtensorflow_framework.so.2"],
    XLA: ["libtensorflow_framework.so.2", "libtensorflow_cc.so.2"],
}
SYSTEM = ["libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"]
# With the static CUDA runtime in it: thread-local variables, and what glibc before 2.34 had in libraries of their own.
SYSTEM_CUDA = ["ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libdl.so.2", "librt.so.1", "libpthread.so.0"]

RUN = """
import json
import numpy as np
import tensorflow as tf
import tf_agc

x = tf.constant(np.arange(24, dtype=np.float32).reshape(1, 4, 2, 3))
ones = tf.ones([3])
results = []
for name in ("native", "reference"):
    with tf_agc.implementation(name):
        results.append(tf_agc.agc(x, ones, ones, activation="relu").numpy())
np.testing.assert_allclose(*results, rtol=1e-6)
jitted = tf.function(lambda: tf_agc.agc(x, ones, ones, activation="relu"), jit_compile=True)
np.testing.assert_array_equal(jitted(), results[0])
native = tf_agc.native
print(json.dumps([
    tf_agc.__file__,
    native.STATUS.available and native.XLA_STATUS.available,
    str(native.STATUS.library),
    str(native.XLA_STATUS.library),
]))
"""


@pytest.fixture(scope="module")
def wheel():
    wheels = list((ROOT / "bazel-bin" / "wheel").glob("*.whl"))
    if len(wheels) != 1:
        pytest.fail(f"expected one wheel in bazel-bin/wheel, found {wheels}: run tools/build.sh")
    return wheels[0]


@pytest.fixture(scope="module")
def content(wheel, tmp_path_factory):
    directory = tmp_path_factory.mktemp("content")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


@pytest.fixture(scope="module")
def dist_info(content):
    (directory,) = content.glob("*.dist-info")
    return directory


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of a venv with this wheel. The dependencies are those of the project's own venv."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory / "venv", with_pip=True)
    python = directory / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], check=True)
    (site,) = (directory / "venv" / "lib").glob("python*/site-packages")
    # Last on the path: the project's venv has tf_agc as well, and it must not be found there.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run(python, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TF_AGC"))}
    result = subprocess.run(
        [python, *arguments], cwd=python.parents[2], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def read_elf(tool, *arguments):
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def test_op_runs_natively(installed):
    package, available, *libraries = json.loads(run(installed, "-c", RUN).splitlines()[-1])
    assert available
    for file in (package, *libraries):
        assert pathlib.Path(file).is_relative_to(installed.parents[1])


def test_module_tells_what_is_in_use(installed):
    output = run(installed, "-m", "tf_agc")
    assert re.search(r"^implementation: +native ", output, re.MULTILINE)
    assert re.search(r"^XLA kernels: +loaded ", output, re.MULTILINE)
    assert re.search(r"^CUDA: +(not built in|\d+\.\d+, sm_\d.*, PTX \d+)$", output, re.MULTILINE)
    assert str(installed.parents[1]) in output


def test_name_and_tag(wheel, dist_info):
    version = re.escape(tf_agc.__version__)
    tag = rf"manylinux_2_\d+_{platform.machine()}"
    assert re.fullmatch(rf"tf_agc-{version}-py3-none-{tag}(\.manylinux\w+)*\.whl", wheel.name)
    fields = email.message_from_string((dist_info / "WHEEL").read_text(encoding="utf-8"))
    assert fields["Root-Is-Purelib"] == "false"
    assert all(re.fullmatch(r"py3-none-manylinux\w+", tag) for tag in fields.get_all("Tag"))


def test_metadata(dist_info):
    fields = email.message_from_string((dist_info / "METADATA").read_text(encoding="utf-8"))
    assert fields["Name"] == "tf-agc"
    assert fields["Version"] == tf_agc.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == "<3.14,>=3.10"
    # The native library is used with the TensorFlow that it was built for and no other.
    assert fields.get_all("Requires-Dist") == [
        f"tensorflow=={tf.__version__}",
        "keras>=3.12",
        "rich",
        *(f'{package}; extra == "plot"' for package in ("matplotlib", "tensorboard")),
    ]
    assert fields.get_all("Provides-Extra") == ["plot"]
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert (dist_info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_holds_the_package_and_nothing_else(content):
    files = {str(file.relative_to(content)) for file in content.rglob("*") if file.is_file()}
    package = {file for file in files if ".dist-info/" not in file}
    sources = {f"tf_agc/{file.name}" for file in (ROOT / "tf_agc").iterdir() if file.suffix in (".py", ".typed")}
    assert package == sources | {OPS, XLA, "tf_agc/native_library/tensorflow_version.txt"}


def test_records_the_tensorflow_version(content):
    recorded = (content / OPS).with_name("tensorflow_version.txt").read_text(encoding="utf-8")
    assert recorded == tf.__version__ + "\n"


def _sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_same_inputs_give_the_same_bytes(wheel, tmp_path):
    # Another directory, with other times and modes of the files, another order, umask and time zone than in Bazel.
    package = [file for file in (ROOT / "tf_agc").iterdir() if file.suffix in (".py", ".typed")]
    sources = [ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE")] + sorted(package)[::-1]
    sources = [source.relative_to(ROOT) for source in sources]
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tf_agc").mkdir(parents=True)
    for source in sources:
        shutil.copyfile(ROOT / source, elsewhere / source)
    libraries = [f"--library={ROOT / 'bazel-bin' / 'cc' / pathlib.Path(name).name}" for name in (XLA, OPS)]
    made_for = [f"--tensorflow_version={tf.__version__}", f"--platform={sysconfig.get_platform()}"]
    options = [*libraries, *made_for, f"--output={tmp_path / 'made'}"]
    command = [sys.executable, ROOT / "tools" / "make_wheel.py", *options]
    subprocess.run([*command, *sources], check=True, cwd=elsewhere, env={"TZ": "Asia/Tokyo"}, umask=0o077)
    (made,) = (tmp_path / "made").iterdir()
    assert made.name == wheel.name
    # Not the bytes themselves: pytest would compare megabytes for hours.
    assert _sha256(made) == _sha256(wheel), "or bazel-bin/cc has libraries of another build: run tools/build.sh"


def test_setup_without_a_library(tmp_path):
    (tmp_path / "tf_agc").mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True)
    file = tmp_path / "tf_agc" / "native_library" / "tensorflow_version.txt"
    assert done.returncode == 1
    assert done.stderr == (
        f"there is no {file}: run ./tools/build.sh, which builds the native library and this file.\n"
    )


@pytest.mark.parametrize("library", [OPS, XLA])
def test_names_no_directory_of_the_build(content, library):
    # A checkout elsewhere would give other bytes.
    code = (content / library).read_bytes()
    assert [name for name in (bytes(ROOT), b"execroot", b"/sandbox/", b"site-packages") if name in code] == []


@pytest.mark.parametrize("library", [OPS, XLA])
def test_exports_only_the_c_interface(content, library):
    symbols = read_elf("nm", "-D", "--defined-only", "--format=just-symbols", content / library).split()
    assert sorted(symbols) == EXPORTED[library]


@pytest.mark.parametrize("library", [OPS, XLA])
def test_needs_only_tensorflow_and_the_system(content, library):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", read_elf("readelf", "-Wd", content / library))
    assert set(needed) <= {*TENSORFLOW[library], *SYSTEM, *(SYSTEM_CUDA if native.cuda_build() else [])}

    # System libraries have versioned symbols (memcpy@GLIBC_2.14); all others must be TensorFlow's.
    symbols = read_elf("nm", "-D", "--undefined-only", content / library)
    others = {symbol for kind, symbol in re.findall(r" (\w) (\S+)$", symbols, re.MULTILINE) if kind == "U"}
    others = {symbol for symbol in others if "@" not in symbol}
    tensorflow = pathlib.Path(sysconfig.get_paths()["purelib"], "tensorflow")
    files = [tensorflow / file for file in TENSORFLOW[library]]
    provided = read_elf("nm", "-D", "--defined-only", "--format=just-symbols", *files).split()
    assert others <= {symbol.partition("@")[0] for symbol in provided}


@pytest.mark.parametrize("library", [OPS, XLA])
def test_asks_nobody_for_cuda(content, library):
    # TensorFlow's library has stubs of these functions, and the linker would take them without a word.
    symbols = read_elf("nm", "-D", "--undefined-only", "--format=just-symbols", content / library).split()
    assert [symbol for symbol in symbols if re.match(r"(__)?cu(da|[A-Z])", symbol)] == []


@pytest.mark.parametrize("library", [OPS, XLA])
def test_is_hardened(content, library):
    dynamic = read_elf("readelf", "-Wd", content / library)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "BIND_NOW" in dynamic

    segments = read_elf("readelf", "-Wl", content / library)
    assert re.search(r"GNU_STACK .* RW +0x", segments)
    assert "GNU_RELRO" in segments
