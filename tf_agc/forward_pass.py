"""One eager forward pass in inference that leaves no trace: through it `calibrate` and `GainMonitor` look at a model.

Layers report through the context variables of `tf_agc.layer`; what becomes of a report is the caller's.
"""

import contextvars
import warnings
from typing import Any

import keras
import ml_dtypes  # a dependency of TensorFlow and Keras; NumPy's finfo knows no bfloat16
import numpy as np
import tensorflow as tf

from tf_agc import model_graph
from tf_agc.layer import AutomaticGainControl, Observer


def agc_layers(model: keras.Model) -> list[AutomaticGainControl]:
    """Every AutomaticGainControl layer of a model, those inside nested models and custom layers included."""
    return [layer for layer in model_graph.sublayers(model) if isinstance(layer, AutomaticGainControl)]


def convert_batch(batch: Any) -> Any:
    """The batch with tensors as its leaves, and None where an optional input has none: what `model(batch)` takes.

    Raises:
        TypeError: batch is a data set, or nothing that becomes tensors.
        ValueError: batch is empty or not finite.
    """
    if isinstance(batch, tf.data.Dataset):
        raise TypeError("batch must be one batch of inputs, got a tf.data.Dataset: pass one of its batches")
    message = f"batch must be one batch of inputs, as arrays or tensors, got {type(batch).__name__}"
    if batch is None:
        raise TypeError(message)
    try:
        batch = keras.tree.map_structure(_convert_leaf, batch)
    except (TypeError, ValueError) as error:
        raise TypeError(message) from error
    leaves = [_dense_values(leaf) for leaf in keras.tree.flatten(batch) if leaf is not None]
    if not leaves or any(tf.size(leaf) == 0 for leaf in leaves):
        shapes = [leaf.shape.as_list() for leaf in leaves]
        raise ValueError(f"batch must have at least one sample, got shapes {shapes}")
    for leaf in leaves:
        if leaf.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(leaf))):
            raise ValueError("batch must be finite, got NaN or Inf")
    return batch


def run(model: keras.Model, batch: Any, observer: contextvars.ContextVar[Observer | None], observe: Observer) -> None:
    """Calls the model on a batch, as in inference, while `observer` is `observe`.

    The model's state (moving averages, states of recurrent layers, seeds) is put back, also after an error. The weights
    of AutomaticGainControl layers are not state: what `observe` assigns to them stays. A warning tells where the
    outputs do not depend on the batch.

    Raises:
        RuntimeError: a layer was not reached, and this TensorFlow does not let us see whether a tf.function hides it.
    """
    reached: set[AutomaticGainControl] = set()

    def note(layer: AutomaticGainControl, *tensors: Any) -> None:
        if tf.executing_eagerly():
            reached.add(layer)
        observe(layer, *tensors)

    state = [(variable, variable.numpy()) for variable in _state(model)]
    inside = _inside.set(True)
    token = observer.set(note)
    try:
        with model_graph.forgetting(model):
            outputs = model(batch, training=False)
    finally:
        observer.reset(token)
        _inside.reset(inside)
        for variable, value in state:
            # What did not change is left alone: an assignment under a strategy would make all replicas' states one.
            if not np.array_equal(variable.numpy(), value):
                variable.assign(value)
    hidden = [layer.path or layer.name for layer in agc_layers(model) if layer not in reached]
    if hidden and not _SEES_INTO_FUNCTIONS:
        raise RuntimeError(
            f"layer '{hidden[0]}' was not reached: if a tf.function hides it, tf_agc needs the property "
            f"Function._run_functions_eagerly to look inside, which TensorFlow {tf.__version__} does not have"
        )
    if _ignores_inputs(batch, outputs):
        warnings.warn(
            f"the outputs of model '{model.name}' do not depend on its inputs: they are the same for all samples of "
            "the batch, up to rounding error. Where a pooling or a mean over the map reads a linear "
            "AutomaticGainControl with a mean scale of 1, that layer needs mean_scale_initializer='zeros'. A last "
            "layer whose weights are all 0, or so small that its outputs differ by less than 1e-6, shows the same and "
            "needs nothing",
            stacklevel=3,
        )


def _ignores_inputs(batch: Any, outputs: Any) -> bool:
    """Whether the samples of a batch differ, and what a model gives for them does not."""
    inputs = [x for x in keras.tree.flatten(batch) if isinstance(x, tf.Tensor) and x.shape.rank]
    if not any(bool(tf.reduce_any(tf.not_equal(x, x[:1]))) for x in inputs):
        return False
    samples = max(len(x) for x in inputs)
    values = [y for y in keras.tree.flatten(outputs) if isinstance(y, tf.Tensor) and y.dtype.is_floating]
    values = [y for y in values if y.shape.rank and len(y) == samples]
    return bool(values) and all(map(_is_constant, values))


def _is_constant(y: tf.Tensor) -> bool:
    """Whether all samples are the same up to rounding error: their own, or that of values of about 1 that cancelled."""
    spread = float(tf.reduce_max(tf.reduce_max(y, axis=0) - tf.reduce_min(y, axis=0)))
    largest = float(tf.reduce_max(tf.abs(y)))
    return spread <= max(1e-6, float(ml_dtypes.finfo(y.dtype.as_numpy_dtype).eps) * largest)


# Whether this thread (or whatever else has a context of its own) is in `run`.
_inside = contextvars.ContextVar("tf_agc_inside_forward_pass", default=False)

# Private: tf.config.run_functions_eagerly, the public way to see into a tf.function, is the whole process's. Where a
# later TensorFlow has it elsewhere, only models that hide layers in a tf.function cannot be looked at.
try:
    from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

    _runs_eagerly_in_process = Function._run_functions_eagerly.fget
    _SEES_INTO_FUNCTIONS = True
except (ImportError, AttributeError):
    _SEES_INTO_FUNCTIONS = False


def _runs_eagerly(function: Any) -> bool:
    """Whether a tf.function, when it is called here and now, runs its Python code instead of a graph.

    In a pass they do, since a layer in a graph has no values to show. Not so TensorFlow's own, without which
    tf.vectorized_map would not work, and not within code that is being traced.
    """
    if not (_inside.get() and tf.executing_eagerly()):
        return bool(_runs_eagerly_in_process(function))
    module = getattr(function.python_function, "__module__", None) or ""
    return not module.startswith("tensorflow.")


if _SEES_INTO_FUNCTIONS:
    # For good, not set and restored in each pass: outside of a pass this answers what TensorFlow's own property does.
    Function._run_functions_eagerly = property(_runs_eagerly)


def _convert_leaf(leaf: Any) -> Any:
    return leaf if leaf is None or isinstance(leaf, (tf.SparseTensor, tf.RaggedTensor)) else tf.convert_to_tensor(leaf)


def _dense_values(leaf: Any) -> tf.Tensor:
    """All values of a tensor that may be sparse or ragged."""
    if isinstance(leaf, tf.SparseTensor):
        return leaf.values
    return leaf.flat_values if isinstance(leaf, tf.RaggedTensor) else leaf


def _state(model: keras.Model) -> list[keras.Variable]:
    weights = {id(weight) for layer in agc_layers(model) for weight in layer.weights}
    state = [variable for variable in model.non_trainable_variables if id(variable) not in weights]
    for layer in model_graph.sublayers(model):
        # Keras counts these among no layer's variables.
        if isinstance(layer, keras.layers.RNN) and layer.stateful and layer.states is not None:
            state.extend(keras.tree.flatten(layer.states))
    return state
