"""Models with the layer, saved here and loaded in a fresh process. Which op runs is not saved."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_agc
from agc_testing import ALPHA_ARGUMENT, python
from tf_agc import AutomaticGainControl

pytestmark = pytest.mark.usefixtures("fresh_keras")


def _model(gain_initializer="random_normal"):
    inputs = keras.Input((None, None, 3))
    x, shortcut = inputs, None
    for activation in ("relu", "leaky_relu", "elu", "tanh", None):
        number = {ALPHA_ARGUMENT[activation]: 0.3} if activation in ALPHA_ARGUMENT else {}
        x = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(x)
        norm = AutomaticGainControl(
            activation, **number, gain_initializer=gain_initializer, use_bias=True, bias_initializer="random_normal"
        )
        x = shortcut = norm(x, shortcut)
    return keras.Model(inputs, keras.layers.GlobalMaxPooling2D()(x))


# As it was saved while the mean scale started at 1 and there was no bias unless one was asked for.
_EARLIER = """
{"module": "tf_agc.layer", "class_name": "AutomaticGainControl", "config": {"name": "agc", "trainable": true,
"dtype": {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}, "registered_name": null},
"activation": "leaky_relu", "data_format": "channels_last", "negative_slope": 0.1, "alpha": null,
"gain_initializer": {"module": "keras.initializers", "class_name": "Ones", "config": {}, "registered_name": null},
"mean_scale_initializer": {"module": "keras.initializers", "class_name": "Ones", "config": {}, "registered_name": null},
"gain_regularizer": null, "mean_scale_regularizer": null, "gain_constraint": null, "mean_scale_constraint": null,
"train_mean_scale": true, "use_bias": false,
"bias_initializer": {"module": "keras.initializers", "class_name": "Zeros", "config": {}, "registered_name": null},
"bias_regularizer": null, "bias_constraint": null, "train_gain": true},
"registered_name": "tf_agc>AutomaticGainControl", "build_config": {"input_shape": [null, 6, 7, 3]}}
"""


def test_a_layer_that_was_saved_with_the_earlier_defaults_keeps_them():
    saved = json.loads(_EARLIER)
    layer = keras.saving.deserialize_keras_object(saved)
    again = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert again == saved
    x = np.random.default_rng(0).standard_normal((2, 6, 7, 3)).astype(np.float32)
    want = tf_agc.agc(x, 1.0, 1.0, activation="leaky_relu", negative_slope=0.1)
    np.testing.assert_allclose(layer(x), want, rtol=1e-6, atol=1e-6)
    layer.load_own_variables({"gain": np.full(3, 2.0), "mean_scale": np.full(3, 3.0)})  # all that a file of it has
    assert [weight.name for weight in layer.weights] == ["gain", "mean_scale"]
    np.testing.assert_array_equal(layer.get_weights(), [[2] * 3, [3] * 3])


_LOAD = """
import json, sys
import numpy as np, tensorflow as tf, keras
import tf_agc
where = sys.argv[1]
x = np.load(where + "/x.npy")
model = keras.saving.load_model(where + "/model.keras")
np.save(where + "/keras.npy", model.predict(x, verbose=0))
config = json.load(open(where + "/model.json"))
other = keras.models.model_from_json(json.dumps(config))
other.load_weights(where + "/model.weights.h5")
np.save(where + "/weights.npy", other(x))
exported = tf.saved_model.load(where + "/exported")
with tf.GradientTape() as tape:
    y = exported.serve(x)
    loss = tf.reduce_sum(y**2)
np.save(where + "/exported.npy", y)
gradients = tape.gradient(loss, exported.trainable_variables)
np.save(where + "/gradients.npy", np.concatenate([g.numpy().ravel() for g in gradients]))
saved = tf.saved_model.load(where + "/saved")
(y,) = saved.signatures["serving_default"](tf.constant(x)).values()
np.save(where + "/saved.npy", y)
print(json.dumps([layer.get_config() for layer in model.layers], default=str))
"""


def test_round_trips_in_a_fresh_process(tmp_path, native_required):
    model = _model()
    x = np.random.default_rng(0).standard_normal((2, 6, 7, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    (tmp_path / "model.json").write_text(model.to_json())
    model.export(tmp_path / "exported", verbose=False)
    tf.saved_model.save(model, tmp_path / "saved")

    (tmp_path / "load.py").write_text(_LOAD)
    configs = json.loads(python(tmp_path / "load.py", tmp_path).stdout.splitlines()[-1])

    want = model(x)
    for name in ("keras", "weights", "exported", "saved"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), want, rtol=1e-5, atol=1e-6)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    np.testing.assert_allclose(
        np.load(tmp_path / "gradients.npy"),
        np.concatenate([gradient.numpy().ravel() for gradient in gradients]),
        rtol=1e-4,
        atol=1e-5,
    )
    agc = [config for config in configs if "mean_scale_initializer" in config]
    assert [config["activation"] for config in agc] == ["relu", "leaky_relu", "elu", "tanh", "linear"]
    assert [config["negative_slope"] for config in agc] == [None, 0.3, None, None, None]
    assert [config["alpha"] for config in agc] == [None, None, 0.3, None, None]


def test_the_choice_is_not_saved(tmp_path, native_required):
    # Saved under one implementation, loaded under the other.
    model = _model()
    x = np.random.default_rng(0).standard_normal((2, 6, 7, 3)).astype(np.float32)
    with tf_agc.implementation("reference"):
        model.save(tmp_path / "model.keras")
        model.export(tmp_path / "reference", verbose=False)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-5, atol=1e-6)

    # A SavedModel holds the graph that was traced: the scope around the export chooses its ops.
    exported = tf.saved_model.load(tmp_path / "reference")
    graph = exported.signatures["serving_default"].graph.as_graph_def()
    ops = {node.op for function in graph.library.function for node in function.node_def}
    assert "TfAgc>Agc" not in ops and "Mean" in ops
    np.testing.assert_allclose(exported.serve(x), model(x), rtol=1e-5, atol=1e-6)


_FINE_TUNE = """
import sys
import numpy as np, tensorflow as tf
where = sys.argv[1]
assert "tf_agc" not in sys.modules
try:
    tf.saved_model.load(where + "/native")
except RuntimeError as error:
    print(error)
import tf_agc
x = np.load(where + "/x.npy")
losses = {}
for name in ("native", "reference"):
    model = tf.saved_model.load(where + "/" + name)
    losses[name] = []
    for _ in range(5):
        with tf.GradientTape() as tape:
            # A penalty on the gradient: the second order of a loaded function, too.
            with tf.GradientTape() as inner:
                inner.watch(x := tf.convert_to_tensor(x))
                y = model.serve(x)
            penalty = tf.reduce_mean(tf.square(inner.gradient(y, x)))
            loss = tf.reduce_mean(tf.square(y - 1)) + penalty
        gradients = tape.gradient(loss, model.trainable_variables)
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.05 * gradient)
        losses[name].append(float(loss))
np.testing.assert_allclose(losses["native"], losses["reference"], rtol=1e-4)
assert losses["native"][-1] < losses["native"][0], losses
"""


def test_a_saved_model_is_fine_tuned_after_the_import_and_not_loaded_before(tmp_path, native_required):
    model = _model("ones")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2, 6, 7, 3)).astype(np.float32))
    for name in ("native", "reference"):
        with tf_agc.implementation(name):
            model.export(tmp_path / name, verbose=False)

    done = python("-c", _FINE_TUNE, tmp_path)
    assert "Op type not registered 'TfAgc>Agc'" in done.stdout
