"""`bench.py serving`: the latency of exported networks, one image, one thread, in TensorFlow and in TensorFlow Lite.

What is measured and how; options, the table and the file are bench.py's, the networks bench_model.py's. In inference a
network with BatchNormalization is one without, once it is folded into the convolutions: convolutions with biases.
"""

import collections
import contextlib
import dataclasses
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

# Private, and without a public counterpart: the graph as Grappler makes it, for its nodes to be counted.
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import tf_agc
from benchmarks import bench_model

# What stands for each: "none" has biases, as folded BatchNormalization leaves them.
NORMALIZATIONS = {"agc": "agc", "folded batch_norm": "none"}
_CALLS = 300
_QUICK_CALLS = 20
_WARM_UP_CALLS = 10


@dataclasses.dataclass(frozen=True)
class Row:
    """One network with one normalization in one runtime.

    Attributes:
        ops: the nodes of the graph that the runtime is given, constants left out.
        median_ms: milliseconds of a call with one image.
        spread_ms: half the distance between the quartiles.
    """

    network: str
    runtime: str
    normalization: str
    ops: int
    median_ms: float
    spread_ms: float


def use_one_thread() -> None:
    """Before anything else of TensorFlow runs."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def measure(name: str, quick: bool) -> Iterator[Row]:
    """Times calls of one network with every normalization and in every runtime, in turns."""
    network = bench_model.NETWORKS[name]
    image = np.random.default_rng(0).normal(size=(1, *network.image)).astype("float32")
    with tempfile.TemporaryDirectory() as directory:
        calls: dict[tuple[str, str], tuple[int, Callable[[], object]]] = {}
        for shown, normalization in NORMALIZATIONS.items():
            keras.utils.set_random_seed(0)
            inputs = keras.Input(batch_shape=image.shape, name="image")
            model = keras.Model(inputs, network.make(normalization)(inputs))
            version = tf_agc.export_saved_model(model, pathlib.Path(directory, normalization), verbose=False)
            calls["TensorFlow", shown] = _tensorflow(version, image)
            calls["TensorFlow Lite", shown] = _lite(version, image)
        milliseconds: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
        for turn in range(_WARM_UP_CALLS + (_QUICK_CALLS if quick else _CALLS)):
            for key, (_, call) in calls.items():
                start = time.perf_counter()
                call()
                if turn >= _WARM_UP_CALLS:
                    milliseconds[key].append(1e3 * (time.perf_counter() - start))
    for (runtime, shown), samples in milliseconds.items():
        lower, middle, upper = statistics.quantiles(samples, n=4)
        yield Row(name, runtime, shown, calls[runtime, shown][0], middle, (upper - lower) / 2)


def _tensorflow(version: pathlib.Path, image: np.ndarray) -> tuple[int, Callable[[], object]]:
    loaded = tf.saved_model.load(version)
    answer = loaded.signatures["serving_default"]
    given = tf.constant(image)
    # As a model server runs it: what is called is inlined, and nodes that nothing reads are gone.
    nodes = convert_variables_to_constants_v2(answer).graph.as_graph_def().node
    ops = sum(node.op not in ("Const", "Placeholder", "Identity", "NoOp") for node in nodes)
    return ops, lambda keep=loaded: answer(image=given)


def _lite(version: pathlib.Path, image: np.ndarray) -> tuple[int, Callable[[], object]]:
    with contextlib.redirect_stderr(io.StringIO()):
        content = tf.lite.TFLiteConverter.from_saved_model(str(version)).convert()
    interpreter = tf.lite.Interpreter(model_content=content, num_threads=1)
    answer = interpreter.get_signature_runner("serving_default")
    ops = sum(op["op_name"] != "DELEGATE" for op in interpreter._get_ops_details())
    return ops, lambda keep=interpreter: answer(image=image)
