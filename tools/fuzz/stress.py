"""Long runs: many callers at once, what training leaves resident in memory, more elements than 32 bits count.

What is called, and what is a finding: exits with 1 on one. Nothing is timed. Control: TF_AGC_IMPLEMENTATION=reference.
"""

import argparse
import dataclasses
import gc
import os
import pathlib
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_AGC_IMPLEMENTATION", "native")  # an error where there is none

import keras  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import tensorflow as tf  # noqa: E402

import tf_agc  # noqa: E402
from benchmarks import (
    machine,  # noqa: E402
    memory,  # noqa: E402
    result_files,  # noqa: E402
)
from option_types import at_least, not_negative  # noqa: E402
from tf_agc.implementation import DEFAULT  # noqa: E402

_SEED = 0
_INTER_OP_THREADS = 8  # more than a small machine has cores, so that nodes meet
_CHAINS = 64  # of one graph, that need not wait for each other
_WARM_UP = 0.2  # of the steps: pools, traces and the allocator's arenas fill
_SAMPLES = 100
_LARGE_GIB = 18  # two tensors
_FEWEST_STEPS = 1000  # for a line through what follows the warm-up
_ALLOWED = 0.1  # MiB in 1000 steps: 100 bytes a step

Task = Callable[..., list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Resident:
    step: int  # of training
    resident_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    threads = commands.add_parser("threads", help="eager calls, one SavedModel, one graph of many nodes, all at once")
    threads.add_argument("--minutes", type=not_negative, default=1, help="0: every call once in each thread")
    threads.add_argument("--threads", type=at_least(1), default=64)
    threads.set_defaults(run=run_threads)
    steps = commands.add_parser("memory", help="training steps, and the memory that they leave resident")
    steps.add_argument("--steps", type=at_least(_FEWEST_STEPS), default=10_000)
    steps.add_argument("--csv", type=pathlib.Path, help="write the results here")
    steps.add_argument("--plot", type=pathlib.Path, help="write the plot here (PNG)")
    steps.set_defaults(run=run_memory)
    large = commands.add_parser("large", help=f"2**32 and more halves in one map; needs {_LARGE_GIB} GiB of memory")
    large.set_defaults(run=run_large)
    options = parser.parse_args()
    tf.config.threading.set_inter_op_parallelism_threads(_INTER_OP_THREADS)
    sys.exit(1 if options.run(options) else 0)


def run_threads(options: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        tasks = make_tasks(pathlib.Path(directory))
    calls, findings = call_at_once(tasks, options.threads, options.minutes)
    print("\n".join([*(f"{kind}: {number} calls" for kind, number in calls.items()), *findings[:10]]))
    print(f"{sum(calls.values())} calls in {options.threads} threads, seed {_SEED}: {len(findings)} findings")
    return bool(findings)


def make_tasks(directory: pathlib.Path) -> dict[str, list[Task]]:
    """What threads may call, by kind. Those of one kind share all but their arguments."""
    rng = np.random.default_rng(_SEED)
    eager = []
    for shape, dtype, activation, optional in (
        ((1, 33, 31, 16), "float32", "relu", ("bias", "shortcut")),
        ((3, 17, 13, 40), "float16", "elu", ("shortcut",)),
        ((8, 8, 8, 64), "bfloat16", "relu", ()),
        ((2, 64, 64, 8), "float64", "linear", ("bias", "shortcut")),
    ):
        x, shortcut = (tf.cast(rng.standard_normal(shape), dtype) for _ in range(2))
        gain, bias = (
            tf.cast(rng.uniform(0.5, 2, shape[-1]), "float64" if dtype == "float64" else "float32") for _ in range(2)
        )
        inputs = {"x": x, "gain": gain} | {
            name: value for name, value in (("bias", bias), ("shortcut", shortcut)) if name in optional
        }
        eager.append(lambda inputs=inputs, activation=activation: _forward_and_backward(inputs, activation))

    keras.utils.set_random_seed(_SEED)
    tf_agc.export_saved_model(_network(), directory / "model", portable=False)
    serve = (loaded := tf.saved_model.load(str(directory / "model" / "1"))).signatures["serving_default"]

    @tf.function(input_signature=[tf.TensorSpec([None, 16, 16, 3])])
    def many(x):  # the second node of a chain writes over the first one's output
        chains = []
        for i in range(_CHAINS):
            first = tf_agc.agc(x + i, 1.0 + i, 1.0, activation="relu")
            chains.append(tf_agc.agc(first, 2.0, 0.5, 0.1, x if i % 2 else None, "elu"))
        return tf.stack(chains)

    batches = [tf.constant(rng.standard_normal((batch, 16, 16, 3)), tf.float32) for batch in (1, 2, 5)]
    # The signature alone would not keep the variables of what was loaded.
    saved = [lambda x=x, _=loaded: [value.numpy() for value in serve(x).values()] for x in batches]
    graph = [lambda x=x: [many(x).numpy()] for x in batches]
    return {"eager": eager, "SavedModel": saved, f"graph of {2 * _CHAINS} nodes": graph}


def _forward_and_backward(inputs: dict[str, tf.Tensor], activation: str) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = tf_agc.agc(mean_scale=1.0, activation=activation, **inputs)
    return [value.numpy() for value in (y, *tape.gradient(y, inputs).values())]


def _network() -> keras.Model:
    layers = [keras.Input((16, 16, 3))]
    for filters in (8, 16, 32):
        layers += [keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)]
        layers += [tf_agc.AutomaticGainControl("relu")]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)])


def call_at_once(tasks: dict[str, list[Task]], threads: int, minutes: float) -> tuple[dict[str, int], list[str]]:
    """Calls every task in every thread, in rounds; each thread begins with another task.

    Returns:
        Calls by kind, and a line for each result that is not, bit for bit, the one that a lone call gave before.
    """
    flat = [(kind, task, [value.tobytes() for value in task()]) for kind, some in tasks.items() for task in some]
    calls, findings, lock = dict.fromkeys(tasks, 0), [], threading.Lock()
    ready, end = threading.Barrier(threads), time.monotonic() + 60 * minutes

    def work(number: int) -> None:
        ready.wait()
        position = number
        while position < number + len(flat) or time.monotonic() < end:
            kind, task, want = flat[position % len(flat)]
            position += 1
            try:
                finding = "another result" if [value.tobytes() for value in task()] != want else ""
            except Exception:
                finding = traceback.format_exc()
            with lock:
                calls[kind] += 1
                if finding:
                    findings.append(f"thread {number}, {kind}: {finding}")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return calls, findings


def run_memory(options: argparse.Namespace) -> bool:
    growth, error, start = growth_of(rows := train(options.steps))
    text = f"{growth:+.4f} ± {error:.4f}"
    meta = {**machine.describe(), "implementation": DEFAULT, "seed": str(_SEED), "growth in 1000 steps, MiB": text}
    print(f"{DEFAULT}: {text} MiB in 1000 steps after the warm-up, from {start:.1f} MiB on; {options.steps} steps")
    if options.csv:
        result_files.write_csv(options.csv, rows, meta, digits=7)
    if options.plot:
        _draw(rows, meta, options.plot)
    return not growth <= _ALLOWED  # NaN is one, too


def train(steps: int) -> list[Resident]:
    """Each step: one of a network's training, in a graph, and the op alone, eager, with another batch size."""
    keras.utils.set_random_seed(_SEED)
    rng = np.random.default_rng(_SEED)
    images, labels = rng.standard_normal((8, 16, 16, 3)).astype("float32"), rng.integers(10, size=8)
    model, ones = _network(), tf.ones([8])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rows = []
    for step in range(1, steps + 1):
        model.train_on_batch(images, labels)
        maps = tf.ones([1 + step % 8, 32, 32, 8])
        _forward_and_backward({"x": maps, "gain": ones, "bias": ones, "shortcut": maps}, "relu")
        if step % max(1, steps // _SAMPLES) == 0:
            gc.collect()  # what waits for Python's collector is no leak
            rows.append(Resident(step, memory.resident_mib()))
    return rows


def growth_of(rows: list[Resident]) -> tuple[float, float, float]:
    """The line through what follows the warm-up: MiB in 1000 steps, their standard error, MiB where it starts."""
    rows = [row for row in rows if row.step >= _WARM_UP * rows[-1].step]
    steps, resident = np.array([(row.step / 1000, row.resident_mib) for row in rows]).T
    (slope, start), covariance = np.polyfit(steps - steps[0], resident, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0])), float(start)


def run_large(_: argparse.Namespace) -> bool:
    available = psutil.virtual_memory().available / 2**30
    if available < _LARGE_GIB:
        sys.exit(f"error: {_LARGE_GIB} GiB of memory are needed, {available:.1f} are available")
    rows, columns = 2**16 + 1, 2**16
    row = np.random.default_rng(_SEED).integers(0, 8, columns).astype("float16")

    @tf.function
    def call(row):
        x = tf.tile(row[None, None, :, None], [1, rows, 1, 1])
        y = tf_agc.agc(x, 2.0, 1.0, activation="relu")
        return [y[0, index, :, 0] for index in (0, rows // 2, rows - 1)]

    exact = row.astype("float64")
    want = np.maximum(2 * (exact - exact.mean()), 0)
    error = float(np.max([np.abs(got.numpy().astype("float64") - want) for got in call(tf.constant(row))]))
    allowed = 2.0**-11 * float(want.max())  # one rounding to half
    print(f"{rows * columns} elements: first, middle and last row within {error:.2g} of float64, {allowed:.2g} allowed")
    return not error <= allowed


def _draw(rows: list[Resident], meta: dict[str, str], path: pathlib.Path) -> None:
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.plot([row.step for row in rows], [row.resident_mib for row in rows], "C0.-")
    axes.axvspan(0, _WARM_UP * rows[-1].step, color="0.9", label="warm-up")
    axes.set(xlabel="training steps", ylabel="resident memory, MiB", ylim=(0, 1.2 * rows[-1].resident_mib))
    axes.set_title(f"{meta['growth in 1000 steps, MiB']} MiB in 1000 steps after the warm-up")
    axes.legend()
    figure.supxlabel(f"{meta['cpu']}, TensorFlow {meta['tensorflow']}, {meta['date']}", fontsize=8, color="0.4")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
