"""Exports in two other runtimes, TensorFlow Lite's interpreter and onnxruntime: ours, and Keras's own ways."""

import subprocess
import sys

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

import tf_agc
from agc_testing import ACTIVATIONS, python
from tf_agc import AutomaticGainControl, StandardizedConv2D

pytestmark = pytest.mark.usefixtures("fresh_keras")

X = np.random.default_rng(0).normal(1, 2, (3, 8, 9, 3)).astype(np.float32)


def _model():
    """Every activation, with bias and shortcut from the second on; outputs of the order of 1 that differ."""
    outputs = inputs = keras.Input(X.shape[1:], name="image")
    for seed, activation in enumerate(ACTIVATIONS):
        shortcut = outputs if seed else None
        convolution = StandardizedConv2D if seed % 2 else keras.layers.Conv2D
        initializer = keras.initializers.HeNormal(seed)
        outputs = convolution(4, 3, padding="same", kernel_initializer=initializer)(outputs)
        outputs = AutomaticGainControl(
            activation,
            gain_initializer=keras.initializers.RandomNormal(1, 1, seed=seed),
            mean_scale_initializer=keras.initializers.RandomUniform(0.5, 1, seed=seed),
            use_bias=seed > 0,
            bias_initializer=keras.initializers.RandomNormal(0, 1, seed=seed),
        )(outputs, shortcut)
    outputs = keras.layers.GlobalMaxPooling2D()(outputs)
    return keras.Model(inputs, keras.layers.Dense(5, kernel_initializer=keras.initializers.HeNormal(9))(outputs))


@pytest.fixture
def exported(tmp_path):
    model = _model()
    expected = model(X).numpy()
    assert np.std(expected, axis=0).min() > 0.1  # what is equal for every sample would prove little
    return tf_agc.export_saved_model(model, tmp_path / "model"), expected


def _assert_same(got, expected):
    # Each runtime adds in an order of its own: some units in the last place per layer.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_tensorflow_lite(exported):
    version, expected = exported
    converter = tf.lite.TFLiteConverter.from_saved_model(str(version))
    # No `target_spec` of TensorFlow's ops: what Lite has itself must do.
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    answer = interpreter.get_signature_runner("serving_default")(image=X)
    _assert_same(answer["output_0"], expected)
    # Nothing looks at shapes, which would cut the graph into parts for XNNPACK, that computes most of it.
    assert not {"SHAPE", "STRIDED_SLICE", "PACK"} & {op["op_name"] for op in interpreter._get_ops_details()}


def test_onnx(exported, tmp_path):
    version, expected = exported
    file = tmp_path / "model.onnx"
    # A process of its own: tf2onnx changes settings of the TensorFlow that it runs in.
    done = subprocess.run(
        [sys.executable, "-m", "tf2onnx.convert", "--saved-model", version, "--output", file],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    inference = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (answer,) = inference.run(["output_0"], {"image": X})
    _assert_same(answer, expected)


_WAYS = """
import sys
import keras, numpy as np, tensorflow as tf
import tf_agc
where, *ways = sys.argv[1:]
model = keras.saving.load_model(where + "/model.keras")
model.predict(np.load(where + "/x.npy"), verbose=0)  # traced, with the native op
for way in ways:
    file = where + "/" + way
    if way == "from_keras_model.tflite":
        with open(file, "wb") as opened:
            opened.write(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    elif way == "archive":
        archive = keras.export.ExportArchive()
        archive.track(model)
        archive.add_endpoint("answer", model, [tf.TensorSpec([None, 8, 9, 3], name="image")])
        archive.write_out(file, verbose=False)
    else:
        kinds = {"tflite": "litert", "onnx": "onnx"}
        model.export(file, format=kinds.get(way.partition(".")[2], "tf_saved_model"), verbose=False)
# Training and predicting go on with the native op.
concrete = tf.function(model).get_concrete_function(tf.TensorSpec([None, 8, 9, 3]))
assert "TfAgc>Agc" in {op.type for op in concrete.graph.get_operations()}
"""

_LOAD = """
import sys
import numpy as np, tensorflow as tf
assert "tf_agc" not in sys.modules
x = np.load(sys.argv[1] + "/x.npy")
for way in sys.argv[2:]:
    loaded = tf.saved_model.load(sys.argv[1] + "/" + way)
    (answer,) = next(iter(loaded.signatures.values()))(image=tf.constant(x)).values()
    np.save(sys.argv[1] + "/" + way + ".npy", answer)
"""


@pytest.fixture
def saved(tmp_path, native_required):
    """A model in a file, and what it answers."""
    model = _model()
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", X)
    return tmp_path, model(X).numpy()


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_keras_s_own_ways(saved):
    where, expected = saved
    tflite = ["from_keras_model.tflite"]
    if not keras.__version__.startswith("3.12."):  # which has no format="litert"
        tflite.append("exported.tflite")
    python("-c", _WAYS, where, "exported", "archive", *tflite)
    python("-c", _LOAD, where, "exported", "archive")
    for way in ("exported", "archive"):
        _assert_same(np.load(where / f"{way}.npy"), expected)
    for way in tflite:
        interpreter = tf.lite.Interpreter(model_content=(where / way).read_bytes())
        (answer,) = interpreter.get_signature_runner()(image=X).values()
        _assert_same(answer, expected)


def test_keras_s_own_onnx(saved):
    where, expected = saved
    # A process of its own: tf2onnx changes settings of the TensorFlow that it runs in.
    python("-c", _WAYS, where, "exported.onnx")
    inference = onnxruntime.InferenceSession(where / "exported.onnx", providers=["CPUExecutionProvider"])
    (answer,) = inference.run(None, {inference.get_inputs()[0].name: X})
    _assert_same(answer, expected)
