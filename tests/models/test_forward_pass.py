"""What a pass of `calibrate` and `GainMonitor` says of a model whose outputs do not depend on its inputs."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import tf_agc

_WARNING = "the outputs of model 'pooled' do not depend on its inputs: they are the same for all samples of the batch"


def _pooled(dense="glorot_uniform", activation=None, **arguments):
    inputs = keras.Input((6, 7, 3))
    x = layers.GlobalAveragePooling2D()(tf_agc.AutomaticGainControl(**arguments)(inputs))
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


def test_a_last_layer_of_zeros_is_said_too():
    with pytest.warns(UserWarning, match="a last layer whose weights are all 0 shows the same"):
        tf_agc.calibrate(_pooled("zeros", mean_scale_initializer="zeros"), _batch(8))


@pytest.mark.parametrize(
    "model, batch",
    [
        (_pooled(mean_scale_initializer="zeros"), _batch(8)),
        (_pooled(mean_scale_initializer="zeros", activation="softmax"), 1e-2 * _batch(8)),
        (_pooled("zeros"), _batch(1)),
        (_pooled(), np.repeat(_batch(1), 8, axis=0)),
    ],
    ids=["mean let through", "probabilities", "one sample", "equal samples"],
)
def test_others_do_not_warn(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tf_agc.calibrate(model, batch)
