"""The Keras layer `AutomaticGainControl`.

Weights, configuration and Keras's checks live here; the arithmetic is `tf_agc.agc`'s, and which
implementation runs is never part of the layer.
"""

import contextvars
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_agc import functional, graph_marks, reference
from tf_agc.activations import KERAS_FUNCTIONS, find_fused
from tf_agc.implementation import supports_jit

# Who wants to see what a layer is called with, before it computes (`calibrate`), and its output (`GainMonitor`): called
# with the layer and its inputs and shortcut, or its output. Context variables and no patched method, so that nothing
# stays behind in a model.
Observer = Callable[..., None]
observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("tf_agc_observer", default=None)
output_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    "tf_agc_output_observer", default=None
)

_Shape = tuple[int | None, ...]

# At first a quarter of the mean goes. With standardized convolutions, networks become more accurate so than without any
# of it or all of it: docs/evidence.md.
MEAN_SCALE = 0.25


@keras.saving.register_keras_serializable(package="tf_agc")
class AutomaticGainControl(keras.layers.Layer):
    """Automatic gain control: normalization that needs no batch statistics.

    Subtracts from every map (one channel of one sample) `mean_scale` times its own mean, scales the difference by
    `gain`, and adds what it is given: a `bias` of its own, and a `shortcut`, the other input of a residual junction.

        outputs = activation(gain * (inputs - mean_scale * mean(inputs, spatial axes)) + bias + shortcut)

    Every sample is treated alone, in training as in inference: there are no moving averages, and
    `training` has no effect. The mean is over all positions of a map, in a sequence over later steps
    too: a causal network with this layer looks ahead.

    Source: B. Ruff, "Deep Control", [arXiv 1706.03907](https://arxiv.org/abs/1706.03907). Only its
    abstract is known to us: initial values, what is learned, constraints, bias and shortcut are our
    decisions. "AGC" here is not adaptive gradient clipping.

    A network becomes as accurate as with BatchNormalization where the convolutions in front of the layers are
    standardized (`tf_agc.StandardizedConv2D`), the last layer before a global pooling starts with
    `mean_scale_initializer="zeros"`, and `tf_agc.calibrate` sets the initial gains and biases.

    Example:

    ```python
    inputs = keras.Input((32, 32, 3))
    x = StandardizedConv2D(16, 3, padding="same", use_bias=False)(inputs)
    x = shortcut = AutomaticGainControl("relu")(x)
    x = StandardizedConv2D(16, 3, padding="same", use_bias=False)(x)
    # The end of a residual block, where others have a normalization, Add and ReLU. A global pooling follows.
    x = AutomaticGainControl("relu", mean_scale_initializer="zeros")(x, shortcut)
    x = keras.layers.GlobalAveragePooling2D()(x)
    ```

    Args:
        activation: Name of a Keras activation, a callable, or `None` (the same as `"linear"`). `"linear"`,
            `"relu"`, `"relu6"`, `"leaky_relu"` and `"elu"`, the functions of these names in
            `keras.activations`, `keras.ops` and `tf.nn`, and the layers `keras.layers.ReLU`, `LeakyReLU` and
            `ELU` are computed in the same pass and save the memory of one map; others are applied to the
            linear output and must keep its shape.
        data_format: `"channels_last"` or `"channels_first"`. `None` means
            `keras.config.image_data_format()`.
        negative_slope: Slope of leaky_relu below 0 (`None`: 0.2); finite and >= 0. An error for any other
            activation, and for a layer, which has its own.
        alpha: Scale of elu below 0 (`None`: 1.0); likewise.
        gain_initializer: Initializer of the gain. All zeros is refused for a fused activation:
            no gradient would ever reach the gain.
        mean_scale_initializer: Initializer of the mean scale; `None`: 0.25. `"zeros"` lets the mean through: right
            where a global pooling or a squeeze-and-excite block reads the maps. `"ones"` takes all of it away.
        gain_regularizer: Optional regularizer of the gain.
        mean_scale_regularizer: Optional regularizer of the mean scale.
        gain_constraint: Optional constraint of the gain. With a fused activation, a gain that becomes exactly 0
            stays 0 for good, as it gets no gradient: a constraint that can give 0, such as `"non_neg"`, warns.
            `activation=None` with the activation as a layer behind it has no such limit.
        mean_scale_constraint: Optional constraint of the mean scale.
        train_mean_scale: Whether the mean scale is trainable.
        use_bias: Whether a bias is added, one value a channel; it is trainable.
        bias_initializer: Initializer of the bias.
        bias_regularizer: Optional regularizer of the bias.
        bias_constraint: Optional constraint of the bias.
        train_gain: Whether the gain is trainable.
        **kwargs: Base layer keyword arguments (e.g. `name` and `dtype`).

    Call arguments:
        inputs: Tensor of one of the shapes below. What is not of the compute dtype is cast to it. A mask
            is passed on; masked positions count in the mean.
        shortcut: Optional tensor of the same shape, which is cast likewise; it is not broadcast.

    Input shape:
        `(batch, ..., channels)`, or `(batch, channels, ...)` for channels_first, with 1 to 6
        spatial axes; spatial sizes may be unknown.

    Output shape:
        Same as the input, in the compute dtype of the layer. Weights have the policy's variable dtype, as in
        Keras's layers: float32 under the mixed policies, which are the better choice for training in 16 bits.

    Raises:
        ValueError: an argument, an input shape, a shortcut or an activation's output shape that does not fit.
    """

    def __init__(
        self,
        activation: str | Callable[..., Any] | None = None,
        data_format: str | None = None,
        negative_slope: float | None = None,
        alpha: float | None = None,
        gain_initializer: Any = "ones",
        mean_scale_initializer: Any = None,
        gain_regularizer: Any = None,
        mean_scale_regularizer: Any = None,
        gain_constraint: Any = None,
        mean_scale_constraint: Any = None,
        train_mean_scale: bool = True,
        use_bias: bool = True,
        bias_initializer: Any = "zeros",
        bias_regularizer: Any = None,
        bias_constraint: Any = None,
        train_gain: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        if isinstance(self.activation, type):
            raise ValueError(
                "Argument `activation` must be a name, a function or a layer, not a class: pass an instance of it. "
                f"Received: activation={activation}"
            )
        fused = find_fused(self.activation)
        if fused is not None:
            if fused[1:] != (None, None):
                if (negative_slope, alpha) != (None, None):
                    raise ValueError(
                        "Arguments `negative_slope` and `alpha` must be None where the activation is a layer, which "
                        "has one of its own. "
                        f"Received: activation={activation}, negative_slope={negative_slope}, alpha={alpha}"
                    )
                _, negative_slope, alpha = fused
            # What is saved is the name, and no layer within the layer.
            self.activation = KERAS_FUNCTIONS[fused.activation]
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        self.gain_initializer = keras.initializers.get(gain_initializer)
        self.mean_scale_initializer = (
            keras.initializers.Constant(MEAN_SCALE)
            if mean_scale_initializer is None
            else keras.initializers.get(mean_scale_initializer)
        )
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.gain_regularizer = keras.regularizers.get(gain_regularizer)
        self.mean_scale_regularizer = keras.regularizers.get(mean_scale_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.gain_constraint = keras.constraints.get(gain_constraint)
        self.mean_scale_constraint = keras.constraints.get(mean_scale_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.train_gain = train_gain
        self.train_mean_scale = train_mean_scale
        self.use_bias = use_bias
        self.bias: keras.Variable | None = None

        self.supports_masking = True
        # Where this is False, Keras compiles models with this layer without XLA.
        self.supports_jit = supports_jit()

        if self.data_format not in functional.DATA_FORMATS:
            raise ValueError(
                "Argument `data_format` must be 'channels_last', 'channels_first' or None. "
                f"Received: data_format={data_format}"
            )
        if self._fused is None and (negative_slope, alpha) != (None, None):
            raise ValueError(
                "Argument `negative_slope` is only valid for the activation 'leaky_relu', and `alpha` for 'elu'. "
                f"Received: activation={activation}, negative_slope={negative_slope}, alpha={alpha}"
            )
        functional.resolve_alpha(self._fused or "linear", negative_slope, alpha)
        self.negative_slope = None if negative_slope is None else float(negative_slope)
        self.alpha = None if alpha is None else float(alpha)
        if self._loses_zero_gains and _always_gives(self.gain_initializer, 0):
            raise ValueError(
                "Argument `gain_initializer` must not be zeros with the activation "
                f"'{self._fused}': no gradient reaches a gain of 0 there. "
                f"Received: gain_initializer={gain_initializer}"
            )

    @property
    def _fused(self) -> str | None:
        """Name of the activation that is part of the op, None where it is applied afterwards."""
        # By identity: what is left of a layer with a slope is a function of Keras's and the number.
        return next((name for name, function in KERAS_FUNCTIONS.items() if function is self.activation), None)

    @property
    def _loses_zero_gains(self) -> bool:
        """Whether a gain of 0 would stay 0: a fused activation keeps y, which says nothing of the inputs then."""
        return self.train_gain and self._fused not in (None, "linear")

    # Keras wants the names of call's arguments where there are several.
    def build(self, inputs_shape: _Shape, shortcut_shape: _Shape | None = None) -> None:
        input_shape = self.compute_output_shape(inputs_shape, shortcut_shape)
        axis = reference.channel_axis(self.data_format)
        channels = input_shape[axis]
        if channels is None:
            raise ValueError(
                f"The channel axis ({axis}) of the inputs to AutomaticGainControl must have a "
                f"defined size. Received: input_shape={input_shape}"
            )
        self._check_positions(input_shape)
        self._check_symbolic_activation(input_shape)
        if self._loses_zero_gains and _can_give_zero(self.gain_constraint, channels, self.variable_dtype):
            warnings.warn(
                "The gain_constraint of AutomaticGainControl can make gains exactly 0, and with the activation "
                f"'{self._fused}' they stay 0 for good: no gradient reaches a gain of 0 there. Use activation=None "
                "with the activation as a layer behind it, or a constraint that keeps gains from 0. "
                f"Received: gain_constraint={self.gain_constraint}",
                stacklevel=2,
            )
        self._warns_of_one_position = not self._has_one_position(input_shape) and _always_gives(
            self.mean_scale_initializer, 1
        )
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={axis: channels})

        # Without casts by a mixed policy: the op takes float32 parameters whatever the dtype of its input.
        self.gain = self.add_weight(
            name="gain",
            shape=(channels,),
            initializer=self.gain_initializer,
            regularizer=self.gain_regularizer,
            constraint=self.gain_constraint,
            trainable=self.train_gain,
            autocast=False,
        )
        self.mean_scale = self.add_weight(
            name="mean_scale",
            shape=(channels,),
            initializer=self.mean_scale_initializer,
            regularizer=self.mean_scale_regularizer,
            constraint=self.mean_scale_constraint,
            trainable=self.train_mean_scale,
            autocast=False,
        )
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(channels,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
                autocast=False,
            )

    def call(self, inputs: Any, shortcut: Any = None) -> tf.Tensor:
        # Keras casts floats alone, and nothing with autocast=False.
        inputs = tf.cast(inputs, self.compute_dtype)
        if shortcut is not None:
            shortcut = tf.cast(shortcut, self.compute_dtype)
            self._check_shortcut(inputs.shape, shortcut.shape)
        self._warn_of_one_position(inputs.shape)
        observe = observer.get()
        if observe is not None:
            observe(self, inputs, shortcut)
        outputs = functional.agc(
            inputs,
            self._parameter(self.gain),
            self._parameter(self.mean_scale),
            None if self.bias is None else self._parameter(self.bias),
            shortcut,
            activation=self._fused,
            negative_slope=self.negative_slope,
            alpha=self.alpha,
            data_format=self.data_format,
        )
        if not tf.executing_eagerly():
            graph_marks.mark(outputs, self)
        if not self._fused:
            linear = outputs
            outputs = self.activation(linear)
            self._check_activation(linear.shape, outputs)  # what was not known when the layer was built
        observe = output_observer.get()
        if observe is not None:
            observe(self, outputs)
        return outputs

    def _parameter(self, variable: keras.Variable) -> tf.Tensor:
        return tf.cast(variable.value, "float64" if self.compute_dtype == "float64" else "float32")

    def compute_output_shape(self, inputs_shape: _Shape, shortcut_shape: _Shape | None = None) -> _Shape:
        self._check_rank(inputs_shape)
        if shortcut_shape is not None:
            self._check_shortcut(inputs_shape, shortcut_shape)
        return tuple(inputs_shape)

    def get_config(self) -> dict[str, Any]:
        config = {
            "activation": keras.activations.serialize(self.activation),
            "data_format": self.data_format,
            "negative_slope": self.negative_slope,
            "alpha": self.alpha,
            "gain_initializer": keras.initializers.serialize(self.gain_initializer),
            "mean_scale_initializer": keras.initializers.serialize(self.mean_scale_initializer),
            "gain_regularizer": keras.regularizers.serialize(self.gain_regularizer),
            "mean_scale_regularizer": keras.regularizers.serialize(self.mean_scale_regularizer),
            "gain_constraint": keras.constraints.serialize(self.gain_constraint),
            "mean_scale_constraint": keras.constraints.serialize(self.mean_scale_constraint),
            "train_mean_scale": self.train_mean_scale,
            "use_bias": self.use_bias,
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "train_gain": self.train_gain,
        }
        return {**super().get_config(), **config}

    # Keras would number the weights in a file, trainable ones first. A file of another kind of layer with as many
    # weights of shape [C] would then load without a word, and one of a layer with another train_gain in another order.
    # By name, the first is an error, and the second is right.
    def save_own_variables(self, store: Any) -> None:
        for name, weight in self._own_weights().items():
            store[name] = weight

    def load_own_variables(self, store: Any) -> None:
        weights = self._own_weights()
        if set(store.keys()) != set(weights):
            names = f"the weights {', '.join(weights)}" if weights else "no weights, as it is not built,"
            raise ValueError(
                f"Layer '{self.name}' expects {names} of an AutomaticGainControl with the same arguments. "
                f"Received: {', '.join(store.keys()) or 'none'}"
            )
        for name, weight in weights.items():
            weight.assign(store[name])

    # In one order whatever is trained, where Keras lists trainable weights first: set_weights, which knows no names,
    # would hand the mean scale of one layer to the gain of another.
    @property
    def weights(self) -> list[Any]:
        return list(self._own_weights().values())

    def _own_weights(self) -> dict[str, Any]:
        weights = {name: getattr(self, name, None) for name in ("gain", "mean_scale", "bias")}
        return {name: weight for name, weight in weights.items() if weight is not None}

    def _check_rank(self, input_shape: _Shape) -> None:
        if input_shape and isinstance(input_shape[0], tuple | list):  # as an Add layer is called
            raise ValueError(
                "AutomaticGainControl expects one tensor, and what is added to it as `shortcut=`. Received a list or "
                f"tuple of tensors: input_shape={input_shape}"
            )
        if len(input_shape) not in reference.RANKS:
            raise ValueError(
                "AutomaticGainControl expects inputs of rank 3 to 8 (batch, 1 to 6 spatial axes, "
                f"channels). Received: input_shape={input_shape}"
            )

    def _has_one_position(self, shape: Any) -> bool:
        return set(functional.spatial_sizes(shape, self.data_format)) == {1}

    def _warn_of_one_position(self, shape: Any) -> None:
        """Says once what `_check_positions` could not, where sizes are known only when a call is made or traced."""
        if self._warns_of_one_position and self._has_one_position(shape):
            self._warns_of_one_position = False
            warnings.warn(
                f"The maps that the layer '{self.path or self.name}' is called with have one position each, which is "
                "its own mean: nothing is left of them where mean_scale is 1. "
                f"Received: inputs.shape={tuple(shape)}",
                stacklevel=2,
            )

    def _check_positions(self, input_shape: _Shape) -> None:
        """A map of one position is its own mean: nothing is left of it at a mean scale of 1."""
        if not self._has_one_position(input_shape) or not _always_gives(self.mean_scale_initializer, 1):
            return
        message = (
            "The inputs to AutomaticGainControl have one position for each map, and its mean is "
            "the map itself: at a mean_scale of 1 {} is left of them. Leave the layer out here, or "
            "start with mean_scale_initializer='zeros'. "
            f"Received: input_shape={input_shape}, train_mean_scale={self.train_mean_scale}"
        )
        if not self.train_mean_scale:
            raise ValueError(message.format("nothing"))
        warnings.warn(message.format("initially nothing"), stacklevel=2)

    def _check_symbolic_activation(self, input_shape: _Shape) -> None:
        if self._fused:
            return
        activation = self.activation
        if not isinstance(activation, keras.Layer):
            # Keras's inference for a function of which nothing is known; the name takes none from other layers.
            activation = keras.layers.Lambda(activation, name="activation")
        try:
            outputs = activation.compute_output_spec(keras.KerasTensor(input_shape, self.compute_dtype))
        except Exception:  # anybody's code: where it fails, it says so itself when it is called
            return
        self._check_activation(input_shape, outputs)

    def _check_activation(self, input_shape: Any, outputs: Any) -> None:
        """Compares the shapes before and behind the activation, as far as they are known."""
        shapes = keras.tree.map_structure(lambda output: output.shape, outputs)
        if not _is_compatible(input_shape, shapes):
            raise ValueError(
                "Argument `activation` must keep the shape of what it is applied to. Received: "
                f"activation={getattr(self.activation, '__name__', self.activation)}, which makes "
                f"{shapes} of {input_shape}"
            )

    def _check_shortcut(self, inputs_shape: Any, shortcut_shape: Any) -> None:
        if not _is_compatible(inputs_shape, shortcut_shape):
            raise ValueError(
                "Argument `shortcut` must be one tensor with the shape of the inputs to AutomaticGainControl, as it is "
                f"not broadcast. Received: inputs.shape={inputs_shape}, shortcut.shape={shortcut_shape}"
            )


def _is_compatible(shape: Any, other: Any) -> bool:
    """Whether two shapes can be the same; `other` may be those of several tensors, which are not."""
    try:
        return bool(tf.TensorShape(shape).is_compatible_with(other))
    except TypeError:
        return False


def _can_give_zero(constraint: Any, channels: int, dtype: str) -> bool:
    """Whether a constraint makes 0 of weights that are not: tried, as it may be anybody's."""
    if constraint is None:
        return False
    with tf.init_scope():  # layers may be built while a function is traced
        for value in (1.0, -1.0, 1e-3, -1e-3, 1e-6, -1e-6):
            try:
                weights = constraint(tf.fill([channels], tf.cast(value, dtype)))
                if np.any(np.equal(keras.ops.convert_to_numpy(weights), 0)):
                    return True
            except Exception:  # anybody's code: where it fails, it says so itself when it is used
                continue
    return False


def _always_gives(initializer: Any, value: int) -> bool:
    constants = {0: keras.initializers.Zeros, 1: keras.initializers.Ones}
    if isinstance(initializer, keras.initializers.Constant):
        return bool(np.all(np.equal(initializer.value, value)))
    return isinstance(initializer, constants[value])
