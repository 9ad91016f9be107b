"""The TensorFlow op on a GPU, for `gpu_check.sh --tensorflow`: tests, transposes around it, its time in a graph."""

import pathlib
import re
import statistics
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, device_properties_pb2, rewriter_config_pb2
from tensorflow.python.framework import meta_graph
from tensorflow.python.grappler import cluster, tf_optimizer

import tf_agc
from benchmarks import bench_shapes
from gpu.gpu_report import Report, Row
from tf_agc import native

_CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
_TESTS = (
    "op/test_functional.py",
    "op/test_kernel.py",
    "gradients/test_gradient.py",
    "gradients/test_higher_order.py",
    "op/test_in_place.py",
    "op/test_errors.py",
)

# Ops in the longer chain; one op is a chain of these minus a chain of one, over the difference.
_CHAIN = 9
_MEASUREMENTS = 15


def check(report: Report, limits) -> None:
    """Runs everything; what stands in the way of the rest is raised.

    Args:
        report: where to.
        limits: gpu_check.Check, whose deadline counts.
    """
    transposes = around_our_op(channels=16, layers=3)
    report.note(
        f"layout optimizer, float32 channels_last, 3 x (convolution + AGC), training step: {transposes['all']} "
        f"transposes, {transposes['ours']} of them beside our op"
    )
    if not native.STATUS.available or not native.cuda_build():
        raise RuntimeError("the tf_agc that Python imports is not built with CUDA: TF_AGC_CUDA=1 ./tools/build.sh")
    if not tf.config.list_physical_devices("GPU"):
        raise RuntimeError("TensorFlow finds no GPU")
    report.note(f"tf_agc with CUDA {native.cuda_build()}, TensorFlow {tf.__version__}")
    _runs_on_the_gpu(report)
    _times_of_networks(report)
    _times(report, limits)
    if not limits.out_of_time(report, "the tests"):
        _tests(report, limits.seconds_left)


def _runs_on_the_gpu(report: Report) -> None:
    tf.config.set_soft_device_placement(False)
    try:
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            with tf.device("/GPU:0"):
                y = tf_agc.agc(tf.ones([2, 3, 3, 8], dtype), 1.0, 0.5, "relu")
            if "GPU" not in y.device or not np.allclose(tf.cast(y, tf.float32), 0.5):
                report.fail(f"{dtype}: {y.device} gives {y.numpy().ravel()[:3]} instead of 0.5")
    finally:
        tf.config.set_soft_device_placement(True)


def _tests(report: Report, seconds: float) -> None:
    command = [sys.executable, "-m", "pytest", "-q", *_TESTS]
    # In the checkout itself Python would take the sources, and not the tf_agc that is installed.
    try:
        done = subprocess.run(command, cwd=_CHECKOUT / "tests", capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")  # bytes, whatever `text` is
        results = "".join(re.findall(r"^([.sxXFE]+) *(?:\[|$)", output, re.MULTILINE))
        said = f"pytest is incomplete: {results.count('.')} tests had passed after {seconds:.0f} seconds"
        if failed := results.count("F") + results.count("E"):
            report.fail(f"{said}, and {failed} failed")
        else:
            report.note(said)
        return
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode == 0:
        report.note(f"pytest, where the GPU is the default device: {''.join(last)}")
    else:
        report.fail(f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")


# ---- Transposes ----


def around_our_op(channels: int, layers: int) -> dict[str, int]:
    """Counts the transposes in the training step of a convolutional network after TensorFlow's layout optimizer.

    The optimizer runs for a GPU that it is told of, so this needs none.

    Returns:
        "all": transposes of the whole step; "ours": those whose input or output is one of our ops'.
    """

    def step(x, kernels, gain):
        with tf.device("/GPU:0"), tf.GradientTape() as tape:
            tape.watch([*kernels, gain])
            for kernel in kernels:
                x = tf.nn.conv2d(x, kernel, 1, "SAME")
                x, _ = native.agc(x, gain, tf.ones([channels]), "relu", 0.0, "channels_last")
            return tape.gradient(tf.reduce_sum(x**2), [*kernels, gain])

    kernel = tf.TensorSpec([3, 3, channels, channels])
    function = tf.function(step).get_concrete_function(
        tf.TensorSpec([4, 16, 16, channels]), [kernel] * layers, tf.TensorSpec([channels])
    )
    graph = meta_graph.create_meta_graph_def(graph=function.graph)
    graph.collection_def["train_op"].node_list.value.extend(output.op.name for output in function.outputs)

    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.layout_optimizer = rewriter_config_pb2.RewriterConfig.ON
    options.optimizers.append("layout")
    options.min_graph_nodes = -1
    gpu = device_properties_pb2.DeviceProperties(type="GPU", num_cores=132, environment={"architecture": "9.0"})
    devices = [device_properties_pb2.NamedDevice(name="/job:localhost/replica:0/task:0/device:GPU:0", properties=gpu)]
    nodes = tf_optimizer.OptimizeGraph(config, graph, cluster=cluster.Cluster(devices=devices)).node

    kinds = {node.name: node.op for node in nodes}
    transposes = {node.name for node in nodes if node.op == "Transpose"}
    ours = set()
    for node in nodes:
        inputs = {name.split(":")[0] for name in node.input}
        if node.op.startswith("TfAgc>"):
            ours |= inputs & transposes
        elif node.name in transposes and any(kinds.get(name, "").startswith("TfAgc>") for name in inputs):
            ours.add(node.name)
    return {"all": len(transposes), "ours": len(ours)}


# ---- Time ----


def _times_of_networks(report: Report) -> None:
    """A float32 training step of convolutions and our op, with and without the layout optimizer's transposes."""
    n, h, w, c, layers = 32, 56, 56, 64, 3
    with tf.device("/GPU:0"):
        x = tf.random.stateless_normal((n, h, w, c), [0, 1])
        kernels = [tf.random.stateless_normal((3, 3, c, c), [i, 1]) * 0.06 for i in range(layers)]
        gain = tf.ones([c])
    for optimized in (True, False):
        tf.config.optimizer.set_experimental_options({"layout_optimizer": optimized})

        @tf.function
        def step(x, kernels, gain):
            with tf.GradientTape() as tape:
                tape.watch([*kernels, gain])
                for kernel in kernels:
                    x = tf_agc.agc(tf.nn.conv2d(x, kernel, 1, "SAME"), gain, 0.5, activation="relu")
                loss = tf.reduce_sum(x**2)
            gradients = tape.gradient(loss, [*kernels, gain])
            return tf.add_n([tf.reshape(gradient, [-1])[0] for gradient in gradients])

        def milliseconds(step=step):
            start = time.perf_counter()
            for _ in range(5):
                result = step(x, kernels, gain)
            result.numpy()
            return 1e3 * (time.perf_counter() - start) / 5

        for _ in range(3):
            milliseconds()
        lower, middle, upper = statistics.quantiles([milliseconds() for _ in range(_MEASUREMENTS)], n=4)
        candidate = f"{layers} x (convolution + tf_agc), layout optimizer {'on' if optimized else 'off'}"
        passes = "forward + backward"
        spread = (upper - lower) / 2
        report.row(Row("tensorflow", (n, h, w, c), "channels_last", "float32", passes, candidate, middle, spread))
    tf.config.optimizer.set_experimental_options({"layout_optimizer": True})


def _times(report: Report, limits) -> None:
    """Forward and backward in a graph, ours and fused_batch_norm + relu, both channels_last."""
    for dtype in ("bfloat16", "float32"):
        for shape in bench_shapes.SHAPES:
            if limits.out_of_time(report, f"{shape} {dtype}"):
                return
            for name, layer in (("tf_agc", _ours), ("fused_batch_norm + relu", _fused_batch_norm)):
                try:
                    times = _time(layer, shape, dtype)
                except tf.errors.OpError as error:  # a type that cuDNN does not take
                    report.note(f"{name} does not run at {shape} {dtype}: {str(error).splitlines()[0]}")
                    continue
                report.row(Row("tensorflow", shape, "channels_last", dtype, "forward + backward", name, *times))


def _ours(x, scale, offset):
    return tf_agc.agc(x, scale, offset, activation="relu")


def _fused_batch_norm(x, scale, offset):
    y, _, _ = tf.compat.v1.nn.fused_batch_norm(x, scale, offset, is_training=True)
    return tf.nn.relu(y)


def _time(layer, shape: tuple[int, int, int, int], dtype: str) -> tuple[float, float]:
    """Median milliseconds of one op forward and backward, and half the distance of the quartiles."""
    with tf.device("/GPU:0"):
        x, dy = (tf.cast(tf.random.stateless_normal(shape, [seed, 1]), dtype) for seed in range(2))
        parameters = [[tf.Variable(tf.ones([shape[3]])) for _ in range(2)] for _ in range(_CHAIN)]

    def chain(length):
        @tf.function
        def run(x, dy):
            used = [parameter for of_layer in parameters[:length] for parameter in of_layer]
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = x
                for of_layer in parameters[:length]:
                    y = layer(y, *of_layer)
            # One number that needs everything: reading it is what waits for the GPU.
            gradients = tape.gradient(y, [x, *used], output_gradients=dy)
            return tf.add_n([tf.cast(tf.reshape(gradient, [-1])[0], tf.float32) for gradient in gradients])

        return lambda: run(x, dy).numpy()

    def seconds(run):
        start = time.perf_counter()
        for _ in range(5):
            run()
        return (time.perf_counter() - start) / 5

    long, short = chain(_CHAIN), chain(1)
    for run in (long, short, long, short):
        run()
    samples = [1e3 * (seconds(long) - seconds(short)) / (_CHAIN - 1) for _ in range(_MEASUREMENTS)]
    lower, middle, upper = statistics.quantiles(samples, n=4)
    return middle, (upper - lower) / 2
