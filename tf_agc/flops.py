"""What TensorFlow's profiler is told of TfAgc>Agc and TfAgc>AgcGrad: the floating-point operations of the reference.

No formula: both are counted in a graph of the reference and of its gradient.
"""

import contextlib
from typing import Any

import tensorflow as tf

# Private, and without a public counterpart: where the profiler looks up what an op costs.
from tensorflow.python.framework import ops

from tf_agc import reference
from tf_agc.op_attributes import reference_arguments

_STATISTIC = "flops"


def register() -> None:
    """Registers both counts, where they are not: TensorFlow keeps the first for the life of a process."""
    for name, with_gradient in (("TfAgc>Agc", False), ("TfAgc>AgcGrad", True)):
        with contextlib.suppress(KeyError):
            ops.RegisterStatistics(name, _STATISTIC)(lambda graph, node, of=with_gradient: _count(graph, node, of))


def _count(graph: tf.Graph, node: Any, of_gradient: bool) -> Any:
    """The operations of one node. Raises ValueError where its shapes are not known, as TensorFlow's own counts do."""
    inputs = graph.get_operation_by_name(node.name).inputs
    maps = inputs[0].shape
    maps.assert_is_fully_defined()
    options = reference_arguments(node.attr)
    channels = maps[reference.channel_axis(options["data_format"])]
    with tf.Graph().as_default() as counted:
        x, shortcut = (tf.compat.v1.placeholder(node.attr["T"].type, maps) for _ in range(2))
        gain, mean_scale, bias = (tf.compat.v1.placeholder(node.attr["U"].type, [channels]) for _ in range(3))
        tensors = {"x": x, "gain": gain, "mean_scale": mean_scale}
        tensors |= {"bias": bias} if node.attr["num_bias"].i else {}
        tensors |= {"shortcut": shortcut} if node.attr["num_shortcut"].i else {}
        y, _ = reference.agc(**tensors, **options)
        forward = counted.get_operations()
        if of_gradient:
            tf.gradients(y, list(tensors.values()))
        nodes = [op.node_def for op in counted.get_operations() if (op not in forward) == of_gradient]
        costs = (ops.get_stats_for_node_def(counted, each, _STATISTIC).value for each in nodes)
        return ops.OpStats(_STATISTIC, sum(cost for cost in costs if cost))
