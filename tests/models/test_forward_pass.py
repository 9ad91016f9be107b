"""What a pass of `calibrate` and `GainMonitor` keeps in memory, and what it says of models and layers.

That is, of a model whose outputs do not depend on its inputs, and of layers that it cannot see.
"""

import gc
import warnings
import weakref

import keras
import numpy as np
import pytest
from keras import layers

import tf_agc
from agc_testing import python
from tf_agc import model_graph

_WARNING = "the outputs of model 'pooled' do not depend on its inputs: they are the same for all samples of the batch"


def _pooled(dense="glorot_uniform", activation=None, mean_scale="ones"):
    inputs = keras.Input((6, 7, 3))
    x = layers.GlobalAveragePooling2D()(tf_agc.AutomaticGainControl(mean_scale_initializer=mean_scale)(inputs))
    return keras.Model(inputs, layers.Dense(4, activation, kernel_initializer=dense)(x), name="pooled")


def _batch(samples):
    return np.random.default_rng(0).standard_normal((samples, 6, 7, 3)).astype(np.float32)


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_outputs_that_do_not_depend_on_inputs(activation, tmp_path):
    model = _pooled(activation=activation)
    with pytest.warns(UserWarning, match=_WARNING) as caught:
        tf_agc.calibrate(model, _batch(8))
    assert [warning.filename for warning in caught] == [__file__]
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match=_WARNING):
        model.fit(_batch(8), np.zeros((8, 4)), verbose=0, callbacks=[tf_agc.GainMonitor(tmp_path, _batch(8))])


@pytest.mark.parametrize("dense", ["zeros", keras.initializers.Constant(1e-8)], ids=["zeros", "tiny"])
def test_a_last_layer_of_tiny_weights_is_said_too(dense):
    message = "A last layer whose weights are all 0, or so small that its outputs differ by less than 1e-6, shows the"
    with pytest.warns(UserWarning, match=message):
        tf_agc.calibrate(_pooled(dense, mean_scale="zeros"), _batch(8))


@pytest.mark.parametrize(
    "model, batch",
    [
        (_pooled(mean_scale="zeros"), _batch(8)),
        (_pooled(mean_scale=None), _batch(8)),
        (_pooled(mean_scale="zeros", activation="softmax"), 1e-2 * _batch(8)),
        (_pooled("zeros"), _batch(1)),
        (_pooled(), np.repeat(_batch(1), 8, axis=0)),
    ],
    ids=["mean let through", "part of it let through", "probabilities", "one sample", "equal samples"],
)
def test_others_do_not_warn(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tf_agc.calibrate(model, batch)


class _HeldInAttributes(keras.Model):
    """A functional model that holds a layer of its graph, and one that its graph does not have."""

    def __init__(self):
        inputs = keras.Input((6, 7, 3))
        first = tf_agc.AutomaticGainControl(name="first")
        super().__init__(inputs, first(inputs))
        self.second = tf_agc.AutomaticGainControl("relu", name="second")

    def call(self, x):
        return self.second(super().call(x))


def test_layers_in_attributes_of_a_functional_model():
    # With Keras 3.12 its own lists miss them.
    model = _HeldInAttributes()
    model(_batch(1))
    table = tf_agc.calibrate(model, 7 * _batch(8))
    assert [row.layer for row in table] == [layer.path for layer in (model.get_layer("first"), model.second)]
    assert np.all(model.second.gain.numpy() > 1) and np.all(model.get_layer("first").gain.numpy() < 1)


class _Alive(layers.Layer):
    """Adds one, and counts the outputs of such layers that are alive when it is called."""

    outputs: list[weakref.ref] = []
    counts: list[int] = []

    def call(self, x):
        gc.collect()
        type(self).counts.append(sum(output() is not None for output in self.outputs))
        y = x + 1
        if not isinstance(y, keras.KerasTensor):
            type(self).outputs.append(weakref.ref(y))
        return y


def _chain():
    inputs = keras.Input((6, 7, 3))
    x = tf_agc.AutomaticGainControl()(inputs)
    for _ in range(6):
        x = _Alive()(x)
    return keras.Model(inputs, x)


def _residual():
    inputs = keras.Input((6, 7, 3))
    x = shortcut = _Alive()(tf_agc.AutomaticGainControl()(inputs))
    for _ in range(4):
        x = _Alive()(x)
    x = layers.Add()([x, shortcut])
    return keras.Model(inputs, _Alive()(x))


def _sequential():
    return keras.Sequential([keras.Input((6, 7, 3)), tf_agc.AutomaticGainControl(), *(_Alive() for _ in range(6))])


def _nested():
    return keras.Sequential([keras.Input((6, 7, 3)), _chain()])


def _two_outputs():
    inputs = keras.Input((6, 7, 3))
    outputs = [_Alive()(tf_agc.AutomaticGainControl()(inputs))]
    for _ in range(5):
        outputs.append(_Alive()(outputs[-1]))
    return keras.Model(inputs, {"first": outputs[0], "last": outputs[-1]})


@pytest.mark.parametrize(
    "make, counts",
    [
        (_chain, [0, 1, 1, 1, 1, 1]),
        (_residual, [0, 1, 2, 2, 2, 0]),
        (_sequential, [0, 1, 1, 1, 1, 1]),
        (_nested, [0, 1, 1, 1, 1, 1]),
        (_two_outputs, [0, 1, 2, 2, 2, 2]),
    ],
)
def test_a_pass_keeps_only_what_is_still_read(make, counts, monkeypatch):
    model = make()
    for look in (tf_agc.calibrate, tf_agc.monitor.layer_statistics):
        monkeypatch.setattr(_Alive, "outputs", [])
        monkeypatch.setattr(_Alive, "counts", [])
        before = [set(vars(layer)) for layer in model_graph.sublayers(model)]
        look(model, _batch(4))
        assert _Alive.counts == counts
        assert [set(vars(layer)) for layer in model_graph.sublayers(model)] == before
    # Outside of a pass it is Keras who calls, and keeps all.
    monkeypatch.setattr(_Alive, "counts", [])
    model(_batch(4))
    assert _Alive.counts == list(range(6))


class _Cloning(layers.Layer):
    """Clones a model when it is called: Keras runs that model's graph too, with arguments of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, x):
        return keras.models.clone_model(self.model, call_function=lambda layer, *args, **kwargs: layer(*args))(x)


class _Doubling(keras.Model):
    """A functional model with a way of its own to run its graph."""

    def _run_through_graph(self, inputs, *args, **kwargs):
        outputs = super()._run_through_graph(inputs, *args, **kwargs)
        return outputs if outputs is None else 2 * outputs  # None while it is made


class _Fewer(layers.Layer):
    """Gives fewer outputs than it says."""

    def compute_output_spec(self, x):
        return [keras.KerasTensor(x.shape, x.dtype) for _ in range(2)]

    def call(self, x):
        return [x]


def test_graphs_that_keras_runs_in_another_way():
    inputs = keras.Input((6, 7, 3))
    inner = keras.Model(inputs, layers.ReLU()(inputs))
    model = keras.Model(inputs, tf_agc.AutomaticGainControl()(_Cloning(inner)(inputs)))
    [row] = tf_agc.calibrate(model, _batch(8))
    assert row.std_before.shape == (3,)

    doubling = _Doubling(inputs, layers.Identity()(inputs))
    model = keras.Model(inputs, tf_agc.AutomaticGainControl(mean_scale_initializer="zeros")(doubling(inputs)))
    [row] = tf_agc.calibrate(model, _batch(8))
    np.testing.assert_allclose(row.std_before, np.std(2 * _batch(8).astype(np.float64), (0, 1, 2)), rtol=1e-5)

    first, second = _Fewer()(tf_agc.AutomaticGainControl()(inputs))
    model = keras.Model(inputs, layers.Add()([first, second]), name="fewer")
    with pytest.raises(ValueError, match="an output of 'fewer' is not connected to its inputs"):
        tf_agc.calibrate(model, _batch(8))


ANOTHER_TENSORFLOW = """
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

Function._run_functions_eagerly = False  # no property: as a TensorFlow that keeps the switch elsewhere

import sys
import keras
import numpy as np
import tensorflow as tf
import tf_agc

x = np.random.default_rng(0).standard_normal((8, 6, 7, 3)).astype(np.float32)
layer = tf_agc.AutomaticGainControl("relu", name="agc")
model = keras.Sequential([keras.Input((6, 7, 3)), layer])
print([row.calls for row in tf_agc.calibrate(model, x)])
model.compile("sgd", "mse")
model.fit(x, x, verbose=0, callbacks=[tf_agc.GainMonitor(sys.argv[1], x)])

class Hidden(keras.Model):
    def __init__(self):
        super().__init__()
        self.agc = layer

    @tf.function
    def call(self, x):
        return self.agc(x)

hidden = Hidden()
hidden(x)
gain = layer.gain.numpy()
for look in (tf_agc.calibrate, tf_agc.monitor.layer_statistics):
    try:
        look(hidden, x)
    except RuntimeError as error:
        print(error)
assert np.array_equal(layer.gain, gain)
"""


def test_a_tensorflow_that_does_not_let_us_look_into_functions(tmp_path):
    calls, *errors = python("-c", ANOTHER_TENSORFLOW, tmp_path).stdout.splitlines()
    assert calls == "[1]" and (tmp_path / "gains.csv").exists()
    assert len(errors) == 2
    for error in errors:
        assert "agc' was not reached: if a tf.function hides it, tf_agc needs the property Function._run_funct" in error
