"""`bench.py model`: one training step of whole networks, their kept activations, and peak memory.

What is measured and how; options, tables and files are bench.py's. `python tools benchmarks.bench_model NETWORK
NORMALIZATION BATCH` is the fresh process in which peak memory is taken; it prints one number.
"""

import dataclasses
import functools
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import tf_agc  # noqa: E402
from benchmarks import memory  # noqa: E402
from tf_agc import models  # noqa: E402

_TOOLS = pathlib.Path(__file__).resolve().parents[1]

# agc_plain_kernels is AGC behind Keras's convolutions: what the standardized ones cost.
NORMALIZATIONS = ("agc", "agc_plain_kernels", "batch_norm", "group_norm", "none")
# (normalization, jit) of every step that is timed.
VARIANTS = [(norm, False) for norm in NORMALIZATIONS] + [(norm, True) for norm in ("agc", "batch_norm", "none")]
_STEPS = 15
_QUICK_STEPS = 4
_MEMORY_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Network:
    """A network at the size at which it is measured.

    Attributes:
        make: makes it for a normalization, and with `standardized` as in tf_agc.models.
        image: height, width and channels.
        batch: images in a step.
        classes: number of labels.
    """

    make: Callable[..., keras.Model]
    image: tuple[int, int, int]
    batch: int
    classes: int = 10

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (self.batch, *self.image)).astype("float32")
        return images, random.integers(0, self.classes, self.batch)


_CIFAR = (32, 32, 3)
_resnet50 = functools.partial(
    models.resnet,
    (64, 64, 3),
    10,
    filters=(64, 128, 256, 512),
    blocks=(3, 4, 6, 3),
    bottleneck=True,
    large_images=True,
)
NETWORKS = {
    "plain CNN, 6 layers": Network(functools.partial(models.plain_cnn, _CIFAR, 10), _CIFAR, 128),
    "ResNet-20, pre-activation": Network(functools.partial(models.residual_cnn, _CIFAR, 10, blocks=3), _CIFAR, 128),
    "ResNet-20, post-activation": Network(functools.partial(models.resnet, _CIFAR, 10), _CIFAR, 128),
    "ResNet-50, 64x64": Network(_resnet50, (64, 64, 3), 32),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One network with one normalization.

    Attributes:
        jit: whether the step was compiled by XLA.
        step_ms: median milliseconds of a training step.
        spread_ms: half the distance between the quartiles.
        kept_mib: forward tensors that the gradient's part of the graph reads, in MiB.
        peak_mib: largest resident memory of a fresh process that trains some steps, in MiB.
    """

    network: str
    normalization: str
    jit: bool
    batch: int
    step_ms: float
    spread_ms: float
    kept_mib: float
    peak_mib: float


def measure(name: str, quick: bool) -> Iterator[Row]:
    """Times the steps of one network with every normalization, in turns."""
    network = NETWORKS[name]
    images, labels = network.data()
    trained = {variant: compiled(network, *variant) for variant in VARIANTS}
    for model in trained.values():
        for _ in range(2):
            model.train_on_batch(images, labels)
    milliseconds: dict[tuple[str, bool], list[float]] = {variant: [] for variant in trained}
    for _ in range(_QUICK_STEPS if quick else _STEPS):
        for variant, model in trained.items():
            start = time.perf_counter()
            model.train_on_batch(images, labels)
            milliseconds[variant].append(1e3 * (time.perf_counter() - start))
    kept = {norm: kept_bytes(trained[norm, False], images, labels) / 2**20 for norm in NORMALIZATIONS}
    del trained, model
    for (norm, jit), samples in milliseconds.items():
        lower, middle, upper = statistics.quantiles(samples, n=4)
        # What XLA keeps, it decides for itself.
        memory = (math.nan, math.nan) if jit else (kept[norm], peak_of_fresh_process(name, norm, network.batch))
        yield Row(name, norm, jit, network.batch, middle, (upper - lower) / 2, *memory)


def kept_bytes(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> int:
    """Bytes of the forward pass that its gradient reads, from the graph of both: activations, what follows from images.

    Weights do not count, nor what is computed of weights alone: a standardized kernel, of any batch the same.
    """
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    boundary = 0

    @tf.function
    def gradients(x, y):
        nonlocal boundary
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        boundary = len(tf.compat.v1.get_default_graph().get_operations())
        return tape.gradient(value, [variable.value for variable in model.trainable_variables])

    graph = gradients.get_concrete_function(tf.constant(images), tf.constant(labels)).graph
    operations = graph.get_operations()
    index = {operation.name: i for i, operation in enumerate(operations)}
    activations: set[str] = set()
    for operation in operations:
        given = {tensor.op.name for tensor in operation.inputs}
        is_input = operation.type == "Placeholder" and operation.outputs[0].dtype != tf.resource
        if is_input or given & activations:
            activations.add(operation.name)
    kept = {
        tensor.name: tensor.shape.num_elements() * tensor.dtype.size
        for operation in operations[boundary:]
        for tensor in operation.inputs
        if index[tensor.op.name] < boundary
        and tensor.op.name in activations
        and tensor.op.type != "Placeholder"
        and tensor.shape.num_elements() is not None
        and tensor.dtype.is_floating
    }
    return sum(kept.values())


def compiled(network: Network, normalization: str, jit: bool = False) -> keras.Model:
    """The network ready to train, calibrated where it is AGC's."""
    keras.utils.set_random_seed(0)
    if normalization == "agc_plain_kernels":
        model = network.make("agc", standardized=False)
    else:
        model = network.make(normalization)
    if normalization.startswith("agc"):
        tf_agc.calibrate(model, network.data()[0][:32])
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )
    return model


def peak_of_fresh_process(network: str, normalization: str, batch: int) -> float:
    """Largest resident memory, in MiB, of a process that trains some steps."""
    command = [sys.executable, str(_TOOLS), "benchmarks.bench_model", network, normalization, str(batch)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def _print_peak_memory(name: str, normalization: str, batch: str) -> None:
    network = dataclasses.replace(NETWORKS[name], batch=int(batch))
    images, labels = network.data()
    model = compiled(network, normalization)
    try:
        for _ in range(_MEMORY_STEPS):
            model.train_on_batch(images, labels)
    except tf.errors.ResourceExhaustedError:
        print("inf")
        return
    print(memory.peak_mib())


if __name__ == "__main__":
    _print_peak_memory(*sys.argv[1:])
