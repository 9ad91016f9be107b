"""Standardized convolutions: Keras's convolution layers, whose filters have mean 0 and one norm.

Weights and their standardization live here. What normalizes maps is `tf_agc.layer`'s.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_agc import graph_marks, implementation

# Behind a ReLU half of a centred signal is left: with this norm the variance is 1 again (He et al., arXiv 1502.01852).
NORM = math.sqrt(2)
# Added to a filter's squared norm, so that a constant filter becomes zeros, and not NaN.
EPSILON = 1e-8

_Shape = tuple[int | None, ...]


def standardize(kernel: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Returns a kernel whose filters have mean 0 and norm sqrt(2).

        w = kernel - mean(kernel)
        sqrt(2) * w / sqrt(sum(w ** 2) + 1e-8)

    with the mean and the sum over the inputs of each filter. The gradient goes through both.

    Source: weight standardization, [arXiv 1903.10520](https://arxiv.org/abs/1903.10520), as it is scaled in
    [arXiv 2101.08692](https://arxiv.org/abs/2101.08692), with a norm of sqrt(2) for inputs behind a ReLU.

    Args:
        kernel: float32 or float64, of any shape.
        axes: those over which a filter sums.

    Returns:
        A tensor of the same shape and dtype.
    """

    def with_gradient(kernel: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        centred = kernel - tf.reduce_mean(kernel, axes, keepdims=True)
        scale = NORM * tf.math.rsqrt(tf.reduce_sum(tf.square(centred), axes, keepdims=True) + EPSILON)
        result = centred * scale

        # Written from the result, which the convolution keeps in any case: else training would keep `centred` too, as
        # large as all kernels together.
        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            mean = tf.reduce_mean(upstream, axes, keepdims=True)
            along = tf.reduce_sum(upstream * result, axes, keepdims=True) / NORM**2
            return scale * (upstream - (result * along + mean))

        return result, gradient

    if implementation.traced_for_export():  # with no need of a gradient, which a SavedModel would have functions for
        return with_gradient(kernel)[0]
    return tf.custom_gradient(with_gradient)(kernel)


def _in_full_precision(kernel: Any) -> tf.Tensor:
    kernel = tf.convert_to_tensor(kernel)
    return tf.cast(kernel, "float64" if kernel.dtype == "float64" else "float32")


def rescale_separable(layer: keras.layers.SeparableConv1D | keras.layers.SeparableConv2D) -> None:
    """Gives the filters of a separable convolution norms of 1 and NORM, in the directions that they have.

    They are not standardized, and what normalizes the output makes up for the norms. With those of Glorot's
    initializer, which are far smaller, the first steps of an optimizer such as Adam would turn them all over.
    """
    for kernel, norm in ((layer.depthwise_kernel, 1.0), (layer.pointwise_kernel, NORM)):
        filters = 2 if kernel is layer.depthwise_kernel else 1  # axes of the kernel that are not summed over
        axes = list(range(len(kernel.shape) - filters))
        kernel.assign(norm * tf.math.l2_normalize(_in_full_precision(kernel), axes, epsilon=1e-30))  # zeros stay so


class StandardizedConvolution(keras.layers.Layer):
    """What the layers below add to Keras's: before it in the order of base classes."""

    def __init__(self, *args: Any, use_gain: bool = False, gain_initializer: Any = "ones", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_gain = use_gain
        self.gain_initializer = keras.initializers.get(gain_initializer)
        self.gain: keras.Variable | None = None

    def build(self, input_shape: _Shape) -> None:
        channels = input_shape[-1 if self.data_format == "channels_last" else 1]
        if channels is not None:
            self._check_inputs_of_filter(channels, input_shape)
        if self.use_gain:
            # Before the kernel: with lora_rank, Keras's build locks the layer.
            self.gain = self.add_weight(
                name="gain", shape=self._gain_shape(channels), initializer=self.gain_initializer, autocast=False
            )
        super().build(input_shape)

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        # Standardized in the variable's own precision: a mixed policy casts what comes of it.
        if kwargs.get("name") in ("kernel", "lora_kernel_a", "lora_kernel_b"):
            kwargs["autocast"] = False
        return super().add_weight(*args, **kwargs)

    def call(self, inputs: Any) -> Any:
        # Inside TimeDistributed, inputs have that layer's compute dtype.
        outputs = self._convolve(inputs, tf.cast(self.standardized_kernel(), inputs.dtype))
        if self.bias is not None:
            shape = [1] * len(outputs.shape)
            shape[-1 if self.data_format == "channels_last" else 1] = -1
            outputs = keras.ops.add(outputs, keras.ops.reshape(self.bias, shape))
        return self.activation(outputs)

    def standardized_kernel(self) -> tf.Tensor:
        """The kernel that convolves, in the compute dtype; `kernel` is the raw one, which is trained and saved."""
        kernel = standardize(_in_full_precision(self.kernel), self._filter_axes())
        if self.gain is not None:
            kernel *= tf.cast(tf.convert_to_tensor(self.gain), kernel.dtype)
        kernel = tf.cast(kernel, self.compute_dtype)
        if not tf.executing_eagerly():
            kernel = tf.identity(kernel, "standardized_kernel")
            graph_marks.mark(kernel, self)
        return kernel

    def start_from(self, kernel: keras.Variable) -> None:
        """Takes over the kernel of another layer, standardized: that is what convolves in any case.

        How far an optimizer's step turns a filter depends on the norm of the raw one. This norm is that of He's
        initializer, with which networks were measured; Glorot's is smaller, and Adam's first steps turn wide filters
        all over.
        """
        self.kernel.assign(standardize(_in_full_precision(kernel), self._filter_axes()))

    def _inputs_of_filter(self, channels: int) -> int:
        return math.prod(self.kernel_size) * (channels // self.groups)

    def _filter_axes(self) -> list[int]:
        """The axes of the kernel over which a filter sums; the gain has the others."""
        return list(range(self.rank + 1))

    def _gain_shape(self, channels: int | None) -> _Shape:
        return (self.filters,)

    def _convolve(self, inputs: Any, kernel: tf.Tensor) -> Any:
        return keras.ops.conv(
            inputs,
            kernel,
            strides=list(self.strides),
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )

    def _check_inputs_of_filter(self, channels: int, input_shape: _Shape) -> None:
        # Not where the groups do not divide the channels: Keras says that.
        if self._inputs_of_filter(channels) == 1:
            raise ValueError(
                f"The filters of {type(self).__name__} must have more than one input each, as nothing is left of one "
                f"input's weight without its mean. Received: kernel_size={self.kernel_size}, input_shape={input_shape}"
            )

    def get_config(self) -> dict[str, Any]:
        config = {
            "use_gain": self.use_gain,
            "gain_initializer": keras.initializers.serialize(self.gain_initializer),
        }
        return {**super().get_config(), **config}


class _StandardizedConv(StandardizedConvolution):
    """For Keras's layers that save and load their kernel and bias alone, by name of neither."""

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.gain is not None:
            store["gain"] = self.gain

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        if self.gain is not None:
            self.gain.assign(store["gain"])


@keras.saving.register_keras_serializable(package="tf_agc")
class StandardizedConv1D(_StandardizedConv, keras.layers.Conv1D):
    """`keras.layers.Conv1D` with standardized filters: see `tf_agc.StandardizedConv2D`."""

    def _convolve(self, inputs: Any, kernel: tf.Tensor) -> Any:
        if self.padding != "causal":
            return super()._convolve(inputs, kernel)
        before = (self.dilation_rate[0] * (self.kernel_size[0] - 1), 0)
        steps_axis = 1 if self.data_format == "channels_last" else 2
        padding = [before if axis == steps_axis else (0, 0) for axis in range(3)]
        return keras.ops.conv(
            keras.ops.pad(inputs, padding),
            kernel,
            strides=list(self.strides),
            padding="valid",
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@keras.saving.register_keras_serializable(package="tf_agc")
class StandardizedConv2D(_StandardizedConv, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with standardized filters, for convolutions in front of an `AutomaticGainControl`.

    Every filter that convolves has mean 0 and norm sqrt(2) over its inputs (the positions of the kernel and the
    input channels of its group):

        w = kernel - mean(kernel)
        outputs = convolve(inputs, gain * sqrt(2) * w / sqrt(sum(w ** 2) + 1e-8)) + bias

    The inputs behind a ReLU are positive, and a filter of mean 0 does not pass their level on. The `kernel` that is
    trained, saved and regularized is the raw one, and the gradient goes through the standardization, which is
    computed in float32 under mixed policies. `tf_agc.export_saved_model` writes the standardized kernel as a constant:
    a server sees a plain convolution, and nothing is standardized there.

    Source: weight standardization, [arXiv 1903.10520](https://arxiv.org/abs/1903.10520), as it is scaled in
    [arXiv 2101.08692](https://arxiv.org/abs/2101.08692).

    Example:

    ```python
    x = keras.Input((32, 32, 3))
    y = tf_agc.StandardizedConv2D(16, 3, padding="same", use_bias=False)(x)
    y = tf_agc.AutomaticGainControl("relu")(y)
    # The end of a residual branch, where no normalization follows before the addition.
    y = tf_agc.StandardizedConv2D(3, 3, padding="same", use_gain=True)(y)
    y = keras.layers.Add()([x, y])
    ```

    Args:
        *args: As of `keras.layers.Conv2D`.
        use_gain: Whether every filter has a learned factor. An `AutomaticGainControl` that follows has one itself.
        gain_initializer: Initializer of the gain.
        **kwargs: As of `keras.layers.Conv2D`, LoRA and quantization among them: the kernel that LoRA makes is
            standardized.

    Input shape, output shape: as of `keras.layers.Conv2D`, in the compute dtype.

    Raises:
        ValueError: filters have one input each (a 1x1 kernel over one channel), of which nothing would be left; what
            Keras's layer raises.
    """


@keras.saving.register_keras_serializable(package="tf_agc")
class StandardizedConv3D(_StandardizedConv, keras.layers.Conv3D):
    """`keras.layers.Conv3D` with standardized filters: see `tf_agc.StandardizedConv2D`."""


@keras.saving.register_keras_serializable(package="tf_agc")
class StandardizedDepthwiseConv2D(StandardizedConvolution, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with standardized filters: see `tf_agc.StandardizedConv2D`.

    The inputs of a filter are the positions of the kernel; the gain has shape [input channels, depth_multiplier].
    """

    def _inputs_of_filter(self, channels: int) -> int:
        return math.prod(self.kernel_size)

    def _filter_axes(self) -> list[int]:
        return list(range(self.rank))

    def _gain_shape(self, channels: int | None) -> _Shape:
        return (channels, self.depth_multiplier)

    def _convolve(self, inputs: Any, kernel: tf.Tensor) -> Any:
        return keras.ops.depthwise_conv(
            inputs,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
