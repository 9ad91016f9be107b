"""//cc/serving:saved_model_runner, a C++ program with the op linked in, against Python: the same bits.

Its models are made here with Python, where the op comes from the wheel.
"""

import pathlib
import re
import shutil
import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import tf_agc
from agc_testing import ACTIVATIONS, ALPHA, DATA_FORMATS, parameter_dtype
from tf_agc import native

pytestmark = pytest.mark.usefixtures("native_required")

_BINARIES = pathlib.Path(__file__).resolve().parents[2] / "bazel-bin" / "cc" / "serving"

# The log of TensorFlow 2.20, which the program cannot silence.
_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3"} if tf.__version__.startswith("2.20.") else {}


def _run(*arguments, binary="saved_model_runner", check=True):
    program = _BINARIES / binary
    if not program.is_file():
        pytest.fail(f"this test needs {program}: run tools/bazel.sh build //cc/serving/...")
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def _errors(done):
    """stderr without the note that TensorFlow's library writes on machines without CUDA, before the program begins."""
    return [
        line for line in done.stderr.splitlines() if not re.match(r"WARNING: All log messages before|I\d{4} ", line)
    ]


def _predict(model, signature, directory, **inputs):
    """The outputs of one run of the program, by name. `directory` is empty and holds the files in between."""
    flags = [
        f"--model={model}",
        f"--signature={signature}",
        f"--output_dir={directory}/outputs",
        "--runs=1",
        "--warmup=0",
    ]
    for name, value in inputs.items():
        np.save(directory / f"{name}.npy", value)
        flags.append(f"--input={name}={directory}/{name}.npy")
    _run(*flags)
    return {file.stem: np.load(file) for file in (directory / "outputs").iterdir()}


def _predict_in_python(model, signature, **inputs):
    function = tf.saved_model.load(str(model)).signatures[signature]
    return {name: value.numpy() for name, value in function(**{k: tf.constant(v) for k, v in inputs.items()}).items()}


def _assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert got[name].tobytes() == want[name].tobytes(), name


# ---- The op alone ----

_CHANNELS = 5
_SHAPE = (3, _CHANNELS, 7, _CHANNELS)  # maps in both layouts


class _Ops(tf.Module):
    """Every activation in both layouts, one output each."""

    @tf.function
    def __call__(self, x):
        rng = np.random.default_rng(1)
        gain = tf.constant(rng.uniform(-2, 2, _CHANNELS), parameter_dtype(x.dtype.name))
        mean_scale = tf.constant(rng.uniform(0, 1.5, _CHANNELS), parameter_dtype(x.dtype.name))
        return {
            f"{activation}_{data_format}": native.agc(x, gain, mean_scale, activation, ALPHA[activation], data_format)[
                0
            ]
            for activation in ACTIVATIONS
            for data_format in DATA_FORMATS
        }


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    path = tmp_path_factory.mktemp("ops") / "1"
    module = _Ops()
    signatures = {
        dtype: module.__call__.get_concrete_function(tf.TensorSpec((None, *_SHAPE[1:]), dtype, name="x"))
        for dtype in ("float16", "float32", "float64")
    }
    tf.saved_model.save(module, path, signatures)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_op_is_python_s_bit_for_bit(ops, dtype, tmp_path):
    x = np.random.default_rng(0).normal(1, 2, _SHAPE).astype(dtype)
    got = _predict(ops, dtype, tmp_path, x=x)
    assert len(got) == len(ACTIVATIONS) * len(DATA_FORMATS)
    _assert_same_bits(got, _predict_in_python(ops, dtype, x=x))


def test_an_empty_batch(ops, tmp_path):
    got = _predict(ops, "float32", tmp_path, x=np.zeros((0, *_SHAPE[1:]), "float32"))
    assert {value.shape for value in got.values()} == {(0, *_SHAPE[1:])}


def test_a_sample_does_not_depend_on_its_batch(ops, tmp_path):
    x = np.random.default_rng(0).normal(size=_SHAPE).astype("float32")
    (tmp_path / "batch").mkdir()
    batch = _predict(ops, "float32", tmp_path / "batch", x=x)
    (tmp_path / "single").mkdir()
    single = _predict(ops, "float32", tmp_path / "single", x=x[1:2])
    _assert_same_bits(single, {name: value[1:2] for name, value in batch.items()})


# ---- A whole model ----


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A convolutional network, exported by Keras; its input is named x, its output y."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((12, 12, 3), name="x")
    for activation in ("relu", "elu", "linear"):
        x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
        x = tf_agc.AutomaticGainControl(activation, gain_initializer="random_normal")(x)
    model = keras.Model(inputs, {"y": keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x))})
    path = tmp_path_factory.mktemp("network") / "1"
    with tf_agc.implementation("native"):
        model.export(path, verbose=False)
    return path


def test_a_network_gives_python_s_predictions(network, tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 12, 12, 3)).astype("float32")
    got = _predict(network, "serving_default", tmp_path, x=x)
    want = _predict_in_python(network, "serving_default", x=x)
    assert got.keys() == want.keys() == {"y"}
    # TensorFlow's own convolutions and products are not promised to be the same bits in two processes.
    np.testing.assert_allclose(got["y"], want["y"], rtol=1e-5, atol=1e-6)


def test_latency_is_printed(network, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 12, 12, 3), "float32"))
    done = _run(f"--model={network}", f"--input=x={tmp_path}/x.npy", "--runs=20", "--warmup=3")
    given, returned, latency = done.stdout.splitlines()
    assert (given, returned) == ("input x: float32 [2,12,12,3]", "output y: float32 [2,10]")
    number = r"(\d+\.\d{3})"
    form = rf"latency in ms: p50 {number}, p90 {number}, p99 {number}, max {number} \(20 runs after 3 to warm up\)"
    times = [float(time) for time in re.fullmatch(form, latency).groups()]
    assert times == sorted(times) and times[0] > 0
    assert not _errors(done)


# ---- Without the op ----

_NOT_REGISTERED = "Op type not registered 'TfAgc>Agc' in binary running on "


def test_without_the_op_a_graph_does_not_load(tmp_path):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, (None, 4, 4, 2), name="x")
        y, _ = native.agc(x, tf.ones(2), tf.ones(2), "relu", 0.0, "channels_last")
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "1"), {"x": x}, {"y": y})
    np.save(tmp_path / "x.npy", np.ones((1, 4, 4, 2), "float32"))
    arguments = (f"--model={tmp_path}/1", f"--input=x={tmp_path}/x.npy")
    _run(*arguments)
    done = _run(*arguments, binary="saved_model_runner_without_ops", check=False)
    assert done.returncode == 1
    (line,) = _errors(done)
    assert line.startswith(f"saved_model_runner: cannot load {tmp_path}/1: {_NOT_REGISTERED}")


def test_without_the_op_a_model_of_functions_does_not_run(network, tmp_path):
    # Keras's SavedModels keep their ops in functions, which TensorFlow looks into when it first runs them.
    np.save(tmp_path / "x.npy", np.ones((1, 12, 12, 3), "float32"))
    arguments = (f"--model={network}", f"--input=x={tmp_path}/x.npy", f"--output_dir={tmp_path}/outputs")
    done = _run(*arguments, binary="saved_model_runner_without_ops", check=False)
    assert done.returncode == 1
    (line,) = _errors(done)
    assert line.startswith(f'saved_model_runner: signature "serving_default" failed: {_NOT_REGISTERED}')
    assert not any((tmp_path / "outputs").iterdir())


# ---- Types, and bad input ----


class _Types(tf.Module):
    @tf.function
    def all_types(self, b, u, i, j):
        return {"b": ~b, "u": u + 1, "i": i + 1, "j": j + 1}

    @tf.function
    def text(self, i):
        return {"text": tf.strings.as_string(i), "path/like": i}

    @tf.function
    def fail(self, i):
        return {"i": tf.ensure_shape(i, (7,))}


@pytest.fixture(scope="module")
def types(tmp_path_factory):
    path = tmp_path_factory.mktemp("types") / "1"
    module = _Types()
    spec = {
        "b": tf.TensorSpec((), tf.bool, name="b"),
        "u": tf.TensorSpec(None, tf.uint8, name="u"),
        "i": tf.TensorSpec((None,), tf.int32, name="i"),
        "j": tf.TensorSpec((2, None), tf.int64, name="j"),
    }
    signatures = {
        "types": module.all_types.get_concrete_function(**spec),
        "text": module.text.get_concrete_function(spec["i"]),
        "fail": module.fail.get_concrete_function(spec["i"]),
    }
    tf.saved_model.save(module, path, signatures)
    return path


def test_other_types(types, tmp_path):
    inputs = {
        "b": np.array(True),
        "u": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        "i": np.array([-5, 2**31 - 2], np.int32),
        "j": np.array([[2**40], [-1]], np.int64),
    }
    want = {"b": np.array(False), **{name: inputs[name] + 1 for name in "uij"}}
    _assert_same_bits(_predict(types, "types", tmp_path, **inputs), want)


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "i.npy", np.arange(3, dtype=np.int32))
    np.save(tmp_path / "long.npy", np.arange(3, dtype=np.int64))
    np.save(tmp_path / "rank2.npy", np.zeros((2, 3), np.int32))
    np.save(tmp_path / "fortran.npy", np.zeros((2, 3), np.int32, "F"))
    np.save(tmp_path / "strings.npy", np.array(["a"]))
    whole = (tmp_path / "i.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-1])
    (tmp_path / "file").write_text("a file")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "i.npy").write_text("somebody's")
    return tmp_path


_FAIL = "--signature=fail"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--model is missing: the directory of a SavedModel (see --help)"),
        (["--models=x"], "unknown argument --models=x (flags are written --name=value; see --help)"),
        (["--runs=0", "--model=x"], '--runs must be a whole number from 1 to 1000000, got "0"'),
        (["--warmup=-1", "--model=x"], '--warmup must be a whole number from 0 to 1000000, got "-1"'),
        (
            ["--runs=99999999999999999999"],
            '--runs must be a whole number from 1 to 1000000, got "99999999999999999999"',
        ),
        (
            ["--model={dir}"],
            "--model must be the directory of one version of a SavedModel, with saved_model.pb in it, got {dir}",
        ),
        (["{model}"], '--signature must be one that the model has ("fail", "text", "types"), got "serving_default"'),
        (
            ["{model}", "--signature=__saved_model_init_op"],
            '--signature must be one that the model has ("fail", "text", "types"), got "__saved_model_init_op"',
        ),
        (["{model}", _FAIL, "--input=i"], '--input must be NAME=FILE.npy, got "i"'),
        (
            ["{model}", _FAIL, "--input=x={dir}/i.npy"],
            '--input must name an input of signature "fail" ("i"), got "x"',
        ),
        (["{model}", _FAIL, "--input=i={dir}/i.npy", "--input=i={dir}/i.npy"], '--input "i" is given twice'),
        (
            ["{model}", "--signature=types", "--input=b={dir}/i.npy"],
            '--input "b" must have dtype bool, got int32 in {dir}/i.npy',
        ),
        (["{model}", _FAIL], '--input is missing for "i" of signature "fail" ("i")'),
        (
            ["{model}", _FAIL, "--input=i={dir}/no.npy"],
            '--input "i": {dir}/no.npy cannot be read: No such file or directory',
        ),
        (
            ["{model}", _FAIL, "--input=i={dir}/long.npy"],
            '--input "i" must have dtype int32, got int64 in {dir}/long.npy',
        ),
        (
            ["{model}", _FAIL, "--input=i={dir}/rank2.npy"],
            '--input "i" must have shape [?], got [2,3] in {dir}/rank2.npy',
        ),
        (
            ["{model}", _FAIL, "--input=i={dir}/fortran.npy"],
            '--input "i": {dir}/fortran.npy is in Fortran order, expected C order (numpy.ascontiguousarray)',
        ),
        (
            ["{model}", _FAIL, "--input=i={dir}/strings.npy"],
            '--input "i": {dir}/strings.npy has dtype <U1, expected bool, uint8, or little-endian int32, int64, '
            "float16, float32 or float64",
        ),
        (
            ["{model}", _FAIL, "--input=i={dir}/cut.npy"],
            '--input "i": {dir}/cut.npy is truncated: shape [3] of int32 takes 12 bytes, got 11',
        ),
        (
            ["{model}", _FAIL, "--input=i={dir}/i.npy", "--output_dir={dir}/file"],
            "--output_dir {dir}/file cannot be made: ",
        ),
        (
            ["{model}", _FAIL, "--input=i={dir}/i.npy", "--output_dir={dir}/taken"],
            "--output_dir must have no file of an output yet, got {dir}/taken/i.npy",
        ),
        (
            ["{model}", "--signature=text", "--input=i={dir}/i.npy", "--output_dir={dir}/new"],
            'output "path/like" has a name that is no file name: run without --output_dir',
        ),
        (["{model}", _FAIL, "--input=i={dir}/i.npy"], 'signature "fail" failed: '),
    ],
)
def test_bad_input_is_one_line(types, files, arguments, message):
    done = _run(*[a.format(model=f"--model={types}", dir=files) for a in arguments], check=False)
    assert done.returncode == 1
    (line,) = _errors(done)
    expected = "saved_model_runner: " + message.format(dir=files)
    assert line.startswith(expected) if message.endswith(": ") else line == expected
    assert "latency" not in done.stdout
    assert (files / "taken" / "i.npy").read_text() == "somebody's"
    assert not (files / "new").exists()


def test_a_damaged_model(types, tmp_path):
    (tmp_path / "saved_model.pb").write_bytes((types / "saved_model.pb").read_bytes()[:-100])
    done = _run(f"--model={tmp_path}", check=False)
    assert done.returncode == 1
    (line,) = _errors(done)
    assert line.startswith(f"saved_model_runner: cannot load {tmp_path}: ")


@pytest.mark.parametrize("sizes", [[2**40, 2**40], [1] * 255])
def test_a_signature_with_an_invalid_shape(types, files, sizes):
    shutil.copytree(types, files / "model")
    model = saved_model_pb2.SavedModel.FromString((types / "saved_model.pb").read_bytes())
    shape = model.meta_graphs[0].signature_def["text"].inputs["i"].tensor_shape
    shape.Clear()
    for size in sizes:
        shape.dim.add(size=size)
    (files / "model" / "saved_model.pb").write_bytes(model.SerializeToString())
    done = _run(f"--model={files}/model", "--signature=text", f"--input=i={files}/i.npy", check=False)
    assert done.returncode == 1
    (line,) = _errors(done)
    assert line.startswith('saved_model_runner: "i" of the signature has no valid shape: ')


def test_outputs_that_no_file_holds(types, files):
    arguments = (f"--model={types}", "--signature=text", f"--input=i={files}/i.npy", "--runs=1", "--warmup=0")
    assert "output text: string [3]" in _run(*arguments).stdout
