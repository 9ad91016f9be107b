"""How TensorFlow vectorizes TfAgc>Agc and TfAgc>AgcGrad: in tf.vectorized_map, jacobian, batch_jacobian.

Only shapes change here: the mapped axis is folded into the batch or into the channels of the same op.
No arithmetic.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

# Private: a custom op has no public way to take part in vectorization, and without it every element
# is an iteration of a tf.while_loop.
from tensorflow.python.ops.parallel_for import pfor

# What the ops' inputs and outputs are: maps [N, ..., C] or [N, C, ...], means [N, C], channels [C]. Behind them stand
# those for bias and shortcut, lists of none or one.
_AGC_INPUTS, _AGC_OUTPUTS = ("maps", "channels", "channels"), ("maps", "means")
_AGC_GRAD_INPUTS = ("maps", "means", "maps", "means", "channels", "channels")
_AGC_GRAD_OUTPUTS = ("maps", "channels", "channels")
_OPTIONAL = {"num_bias": "channels", "num_shortcut": "maps"}

# The axis of each, counted without the mapped axis, into which the mapped axis is folded.
_INTO_BATCH = {"maps": 0, "means": 0}
_INTO_CHANNELS = {
    b"N...C": {"maps": -1, "means": 1, "channels": 0},
    b"NC...": {"maps": 1, "means": 1, "channels": 0},
}


def register(ops: Any) -> None:
    """Registers how both ops are vectorized, where that is not done: as `gradients.register`.

    Args:
        ops: the module of generated op wrappers, as `tf.load_op_library` returns it.
    """
    with contextlib.suppress(AssertionError):
        pfor.RegisterPFor("TfAgc>Agc")(functools.partial(_convert_agc, ops.tf_agc_agc))
    with contextlib.suppress(AssertionError):
        pfor.RegisterPFor("TfAgc>AgcGrad")(functools.partial(_convert_agc_grad, ops.tf_agc_agc_grad))


def _convert_agc(agc: Callable[..., Any], loop: Any) -> list[Any]:
    inputs = (*_AGC_INPUTS, *_optional(loop))
    into = _into_channels(loop) if _parameters_are_mapped(loop, inputs) else _INTO_BATCH
    outputs = _folded(agc, loop, into, inputs, _AGC_OUTPUTS)
    return [pfor.wrap(output) for output in outputs]


def _convert_agc_grad(agc_grad: Callable[..., Any], loop: Any) -> list[Any]:
    inputs, outputs = (*_AGC_GRAD_INPUTS, *_optional(loop)), (*_AGC_GRAD_OUTPUTS, *_optional(loop))
    # Asked first, since folding into the channels stacks the parameters.
    parameters_are_mapped = _parameters_are_mapped(loop, inputs)

    def folded(into: dict[str, int]) -> list[tf.Tensor]:
        return _folded(agc_grad, loop, into, inputs, outputs)

    if parameters_are_mapped:
        results = folded(_into_channels(loop))
    else:
        # The parameters' gradients are sums over the batch, and must not be over the mapped axis.
        # A graph drops the one of these two that nobody reads.
        both = zip(folded(_INTO_BATCH), folded(_into_channels(loop)), outputs, strict=True)
        results = [of_batch if kind == "maps" else of_channels for of_batch, of_channels, kind in both]
    return [pfor.wrap(result) for result in results]


def _optional(loop: Any) -> list[str]:
    """What stands behind the other inputs, or outputs."""
    return [kind for name, kind in _OPTIONAL.items() for _ in range(loop.get_attr(name))]


def _parameters_are_mapped(loop: Any, kinds: tuple[str, ...]) -> bool:
    return any(value.is_stacked for value, kind in zip(loop.inputs, kinds, strict=True) if kind == "channels")


def _into_channels(loop: Any) -> dict[str, int]:
    return _INTO_CHANNELS[loop.get_attr("data_format")]


def _folded(
    op: Callable[..., Any], loop: Any, into: dict[str, int], inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> list[tf.Tensor]:
    """Runs an op once for all elements, with the mapped axis folded away around it."""
    loop.stack_inputs([index for index, kind in enumerate(inputs) if kind in into])
    values = [value.t for value in loop.inputs]
    length = tf.cast(loop.pfor.loop_len_vector, tf.int64)
    size = tf.shape(values[0], out_type=tf.int64)[1:][into["maps"]]
    folded = [_merge(value, into[kind]) if kind in into else value for value, kind in zip(values, inputs, strict=True)]
    attributes = {name: loop.get_attr(name) for name in ("activation", "alpha", "data_format")}
    shortcut = [folded.pop() for _ in range(loop.get_attr("num_shortcut"))]
    bias = [folded.pop() for _ in range(loop.get_attr("num_bias"))]
    results = tf.nest.flatten(op(*folded, bias, shortcut, **attributes))
    return [
        _split(result, into[kind], length, size) if kind in into else result
        for result, kind in zip(results, outputs, strict=True)
    ]


def _merge(value: tf.Tensor, axis: int) -> tf.Tensor:
    """Merges axis 0 into the one that is `axis` of the others."""
    axis %= tf.rank(value) - 1
    value = tf.transpose(value, tf.concat([tf.range(1, axis + 1), [0], tf.range(axis + 1, tf.rank(value))], axis=0))
    shape = tf.shape(value, out_type=tf.int64)
    merged = shape[axis : axis + 1] * shape[axis + 1]
    return tf.reshape(value, tf.concat([shape[:axis], merged, shape[axis + 2 :]], axis=0))


def _split(value: tf.Tensor, axis: int, length: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Undoes `_merge`: makes an axis 0 of `length` out of an axis, of which `size` is left."""
    axis %= tf.rank(value)
    shape = tf.shape(value, out_type=tf.int64)
    value = tf.reshape(value, tf.concat([shape[:axis], length, [size], shape[axis + 1 :]], axis=0))
    return tf.transpose(value, tf.concat([[axis], tf.range(axis), tf.range(axis + 1, tf.rank(value))], axis=0))
