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

from tf_agc import functional
from tf_agc.implementation import supports_jit

# By identity: with their default arguments these are the fused activations, slopes included
# (Keras's leaky_relu has 0.2, unlike its LeakyReLU layer).
FUSED = {
    keras.activations.linear: "linear",
    keras.activations.relu: "relu",
    keras.activations.relu6: "relu6",
    keras.activations.leaky_relu: "leaky_relu",
    keras.activations.elu: "elu",
}

# Who wants to see a layer's input before it computes (`calibrate`), and its output (`GainMonitor`): called with the
# layer and the tensor. Context variables and no patched method, so that nothing stays behind in a model.
observer: contextvars.ContextVar[Callable[["AutomaticGainControl", tf.Tensor], None] | None] = contextvars.ContextVar(
    "tf_agc_observer", default=None
)
output_observer: contextvars.ContextVar[Callable[["AutomaticGainControl", tf.Tensor], None] | None] = (
    contextvars.ContextVar("tf_agc_output_observer", default=None)
)


@keras.saving.register_keras_serializable(package="tf_agc")
class AutomaticGainControl(keras.layers.Layer):
    """Automatic gain control: normalization that needs no batch statistics.

    Subtracts from every map (one channel of one sample) `mean_scale` times its own mean, and scales
    the difference by `gain`:

        outputs = activation(gain * (inputs - mean_scale * mean(inputs, spatial axes)))

    Every sample is treated alone, in training as in inference: there are no moving averages, and
    `training` has no effect. There is no offset; follow with a bias where one is wanted.

    Source: B. Ruff, "Deep Control", [arXiv 1706.03907](https://arxiv.org/abs/1706.03907). Only its
    abstract is known to us: initial values, what is learned and constraints are our decisions.
    "AGC" here is not adaptive gradient clipping.

    The initial gain matters in deep networks: see `tf_agc.calibrate`.

    Args:
        activation: Name of a Keras activation, a callable, or `None` (linear). `"linear"`,
            `"relu"`, `"relu6"`, `"leaky_relu"` and `"elu"`, or Keras's functions of these names,
            are computed in the same pass and save the memory of one map; others are applied to the
            linear output and must keep its shape.
        data_format: `"channels_last"` or `"channels_first"`. `None` means
            `keras.config.image_data_format()`.
        alpha: Slope of leaky_relu (`None`: 0.2) or scale of elu (`None`: 1.0) below 0; finite and
            >= 0. An error for any other activation.
        gain_initializer: Initializer of the gain. All zeros is refused for a fused activation:
            no gradient would ever reach the gain.
        mean_scale_initializer: Initializer of the mean scale.
        gain_regularizer: Optional regularizer of the gain.
        mean_scale_regularizer: Optional regularizer of the mean scale.
        gain_constraint: Optional constraint of the gain.
        mean_scale_constraint: Optional constraint of the mean scale.
        train_mean_scale: Whether the mean scale is trainable.
        **kwargs: Base layer keyword arguments (e.g. `name` and `dtype`).

    Input shape:
        `(batch, ..., channels)`, or `(batch, channels, ...)` for channels_first, with 1 to 6
        spatial axes; spatial sizes may be unknown. Integers are cast to the compute dtype. A mask
        is passed on; masked positions count in the mean.

    Output shape:
        Same as the input, in the compute dtype of the layer. Weights are float32 (float64 under a
        float64 policy), whatever the compute dtype.

    Raises:
        ValueError: an argument or an input shape that does not fit.
    """

    def __init__(
        self,
        activation: str | Callable[..., Any] | None = None,
        data_format: str | None = None,
        alpha: float | None = None,
        gain_initializer: Any = "ones",
        mean_scale_initializer: Any = "ones",
        gain_regularizer: Any = None,
        mean_scale_regularizer: Any = None,
        gain_constraint: Any = None,
        mean_scale_constraint: Any = None,
        train_mean_scale: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        self.gain_initializer = keras.initializers.get(gain_initializer)
        self.mean_scale_initializer = keras.initializers.get(mean_scale_initializer)
        self.gain_regularizer = keras.regularizers.get(gain_regularizer)
        self.mean_scale_regularizer = keras.regularizers.get(mean_scale_regularizer)
        self.gain_constraint = keras.constraints.get(gain_constraint)
        self.mean_scale_constraint = keras.constraints.get(mean_scale_constraint)
        self.train_mean_scale = train_mean_scale

        self.supports_masking = True
        # Where this is False, Keras compiles models with this layer without XLA.
        self.supports_jit = supports_jit()

        if self.data_format not in functional.DATA_FORMATS:
            raise ValueError(
                "Argument `data_format` must be 'channels_last', 'channels_first' or None. "
                f"Received: data_format={data_format}"
            )
        if self._fused is None and alpha is not None:
            raise ValueError(
                "Argument `alpha` is only valid for the activations 'leaky_relu' and 'elu'. "
                f"Received: activation={activation}, alpha={alpha}"
            )
        functional.resolve_alpha(self._fused or "linear", alpha)
        self.alpha = None if alpha is None else float(alpha)
        if self._fused not in (None, "linear") and _always_gives(self.gain_initializer, 0):
            raise ValueError(
                "Argument `gain_initializer` must not be zeros with the activation "
                f"'{self._fused}': no gradient reaches a gain of 0 there. "
                f"Received: gain_initializer={gain_initializer}"
            )

    @property
    def _fused(self) -> str | None:
        """Name of the activation that is part of the op, None where it is applied afterwards."""
        try:
            return FUSED.get(self.activation)
        except TypeError:  # a callable that cannot be hashed
            return None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self._check_rank(input_shape)
        axis = functional.channel_axis(self.data_format)
        channels = input_shape[axis]
        if channels is None:
            raise ValueError(
                f"The channel axis ({axis}) of the inputs to AutomaticGainControl must have a "
                f"defined size. Received: input_shape={input_shape}"
            )
        self._check_positions(input_shape)
        self._warns_of_one_position = not self._has_one_position(input_shape) and _always_gives(
            self.mean_scale_initializer, 1
        )
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={axis: channels})

        # No half weights and no casts by a mixed policy: a step of the optimizer would be lost in
        # their rounding, and the op takes float32 parameters whatever the dtype of its input.
        dtype = "float64" if self.variable_dtype == "float64" else "float32"
        self.gain = self.add_weight(
            name="gain",
            shape=(channels,),
            dtype=dtype,
            initializer=self.gain_initializer,
            regularizer=self.gain_regularizer,
            constraint=self.gain_constraint,
            autocast=False,
        )
        self.mean_scale = self.add_weight(
            name="mean_scale",
            shape=(channels,),
            dtype=dtype,
            initializer=self.mean_scale_initializer,
            regularizer=self.mean_scale_regularizer,
            constraint=self.mean_scale_constraint,
            trainable=self.train_mean_scale,
            autocast=False,
        )

    def call(self, inputs: Any) -> tf.Tensor:
        if tf.as_dtype(inputs.dtype).is_integer:  # Keras casts floats alone
            inputs = tf.cast(inputs, self.compute_dtype)
        self._warn_of_one_position(inputs.shape)
        observe = observer.get()
        if observe is not None:
            observe(self, inputs)
        outputs = functional.agc(
            inputs,
            self.gain,
            self.mean_scale,
            activation=self._fused,
            alpha=self.alpha,
            data_format=self.data_format,
        )
        outputs = outputs if self._fused else self.activation(outputs)
        observe = output_observer.get()
        if observe is not None:
            observe(self, outputs)
        return outputs

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        self._check_rank(input_shape)
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        config = {
            "activation": keras.activations.serialize(self.activation),
            "data_format": self.data_format,
            "alpha": self.alpha,
            "gain_initializer": keras.initializers.serialize(self.gain_initializer),
            "mean_scale_initializer": keras.initializers.serialize(self.mean_scale_initializer),
            "gain_regularizer": keras.regularizers.serialize(self.gain_regularizer),
            "mean_scale_regularizer": keras.regularizers.serialize(self.mean_scale_regularizer),
            "gain_constraint": keras.constraints.serialize(self.gain_constraint),
            "mean_scale_constraint": keras.constraints.serialize(self.mean_scale_constraint),
            "train_mean_scale": self.train_mean_scale,
        }
        return {**super().get_config(), **config}

    def _check_rank(self, input_shape: tuple[int | None, ...]) -> None:
        if not 3 <= len(input_shape) <= 8:
            raise ValueError(
                "AutomaticGainControl expects inputs of rank 3 to 8 (batch, 1 to 6 spatial axes, "
                f"channels). Received: input_shape={input_shape}"
            )

    def _has_one_position(self, shape: Any) -> bool:
        spatial = shape[1:-1] if self.data_format == "channels_last" else shape[2:]
        return set(spatial) == {1}

    def _warn_of_one_position(self, shape: Any) -> None:
        """Says once what `_check_positions` could not, where sizes are known only when a call is made or traced."""
        if self._warns_of_one_position and self._has_one_position(shape):
            self._warns_of_one_position = False
            warnings.warn(
                f"The maps that the layer '{self.path or self.name}' is called with have one position each, which is "
                "its own mean: the outputs are activation(0) where mean_scale is 1. "
                f"Received: inputs.shape={tuple(shape)}",
                stacklevel=2,
            )

    def _check_positions(self, input_shape: tuple[int | None, ...]) -> None:
        """A map of one position is its own mean: nothing is left of it at a mean scale of 1."""
        if not self._has_one_position(input_shape) or not _always_gives(self.mean_scale_initializer, 1):
            return
        message = (
            "The inputs to AutomaticGainControl have one position for each map, and its mean is "
            "the map itself: the outputs are {} 0 at a mean_scale of 1. Leave the layer out here, or "
            "start with mean_scale_initializer='zeros'. "
            f"Received: input_shape={input_shape}, train_mean_scale={self.train_mean_scale}"
        )
        if not self.train_mean_scale:
            raise ValueError(message.format("always"))
        warnings.warn(message.format("at first"), stacklevel=2)


def _always_gives(initializer: Any, value: int) -> bool:
    constants = {0: keras.initializers.Zeros, 1: keras.initializers.Ones}
    if isinstance(initializer, keras.initializers.Constant):
        return bool(np.all(np.equal(initializer.value, value)))
    return isinstance(initializer, constants[value])
