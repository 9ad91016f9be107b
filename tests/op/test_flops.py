"""What TensorFlow's profiler counts for the native op: as much as for the reference."""

import pytest
import tensorflow as tf
from tensorflow.python.framework import ops

import tf_agc
from agc_testing import ACTIVATIONS
from tf_agc import functional


def _flops(graph):
    options = tf.compat.v1.profiler.ProfileOptionBuilder(tf.compat.v1.profiler.ProfileOptionBuilder.float_operation())
    return tf.compat.v1.profiler.profile(graph, options=options.with_empty_output().build()).total_float_ops


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("data_format", functional.DATA_FORMATS)
@pytest.mark.parametrize("junction", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_profiler_counts_what_the_reference_computes(activation, data_format, junction, training, native_required):
    counts = {}
    for name in ("native", "reference"):
        with tf.Graph().as_default() as graph, tf_agc.implementation(name):
            x, shortcut = (tf.compat.v1.placeholder(tf.float32, [2, 5, 7, 3]) for _ in range(2))
            channels = 3 if data_format == "channels_last" else 5
            parameters = [tf.compat.v1.placeholder(tf.float32, [channels]) for _ in range(3)]
            optional = {"bias": parameters.pop(), "shortcut": shortcut} if junction else {}
            parameters = parameters[:2]
            y = tf_agc.agc(x, *parameters, **optional, activation=activation, data_format=data_format)
            if training:
                tf.gradients(y, [x, *parameters, *optional.values()])
        counts[name] = _flops(graph)
    # At least: a mean, a difference, a product.
    assert counts["native"] == counts["reference"] >= 3 * 2 * 5 * 7 * 3


def test_unknown_sizes_are_left_out(native_required):
    with tf.Graph().as_default() as graph, tf_agc.implementation("native"):
        x = tf.compat.v1.placeholder(tf.float32, [None, 5, 7, 3])
        tf_agc.agc(x, 1.0, 1.0)
        (op,) = [op for op in graph.get_operations() if op.type == "TfAgc>Agc"]
        with pytest.raises(ValueError, match="not fully defined"):
            ops.get_stats_for_node_def(graph, op.node_def, "flops")
