"""A portable export in two other runtimes: TensorFlow Lite's interpreter and, by way of tf2onnx, onnxruntime."""

import subprocess
import sys

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

import tf_agc
from agc_testing import ACTIVATIONS
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
