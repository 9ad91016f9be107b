"""Long runs: `threads` (many callers at once, each result compared bit for bit) and `memory` (resident memory of training).

What is called and what counts as a finding. Exits with 1 on a finding. Times are measured elsewhere: bench.py.
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

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import machine  # noqa: E402
import memory  # noqa: E402
import result_files  # noqa: E402
import tf_agc  # noqa: E402

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt  # noqa: E402

_SEED = 0
_INTER_OP_THREADS = 8  # more than a small machine has cores: nodes must meet
_NODES = 64  # of one graph, that may all run at once
_WARM_UP = 0.2  # of the steps: pools, traces and the allocator's arenas fill
_SAMPLES = 100
# MiB in 1000 steps. One leaked mean of the smallest layer, 8 x 8 floats a step, is 0.24.
_ALLOWED_GROWTH = 0.1

Task = Callable[[], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Resident:
    """Resident memory of the process after so many training steps."""

    step: int
    resident_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    threads = commands.add_parser("threads", help="eager calls, one SavedModel, one graph of many nodes, all at once")
    threads.add_argument("--minutes", type=float, default=1, help="0: one call of each kind in each thread")
    threads.add_argument("--threads", type=int, default=64)
    threads.set_defaults(run=run_threads)
    steps = commands.add_parser("memory", help="training steps, and the memory that they leave resident")
    steps.add_argument("--steps", type=int, default=10_000)
    steps.add_argument("--csv", type=pathlib.Path, help="write the results here")
    steps.add_argument("--plot", type=pathlib.Path, help="write the plot here (PNG)")
    steps.set_defaults(run=run_memory)
    options = parser.parse_args()
    tf.config.threading.set_inter_op_parallelism_threads(_INTER_OP_THREADS)
    with tf_agc.implementation("native"):  # an error where there is none, for the threads below too
        pass
    sys.exit(1 if options.run(options) else 0)


# ---- Many callers ----


def run_threads(options: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        tasks = make_tasks(pathlib.Path(directory))
    calls, findings = call_at_once(tasks, options.threads, options.minutes)
    for kind, number in calls.items():
        print(f"{kind}: {number} calls")
    print(f"{sum(calls.values())} calls in {options.threads} threads, seed {_SEED}: {len(findings)} findings")
    print("\n".join(findings[:10]))
    return bool(findings)


def make_tasks(directory: pathlib.Path) -> dict[str, list[Task]]:
    """What threads may call, by kind. All of one kind share what they call; only their arguments differ."""
    rng = np.random.default_rng(_SEED)
    eager, saved, graph = [], [], []
    shapes = [(1, 33, 31, 16), (3, 17, 13, 40), (8, 8, 8, 64), (2, 64, 64, 8)]
    for shape, dtype, activation in zip(shapes, ("float32", "float16", "bfloat16", "float64"), ("relu", "elu") * 2):
        x = tf.cast(rng.standard_normal(shape), dtype)
        gain = tf.cast(rng.uniform(0.5, 2, shape[-1]), "float64" if dtype == "float64" else "float32")
        eager.append(lambda x=x, gain=gain, activation=activation: _forward_and_backward(x, gain, activation))

    keras.utils.set_random_seed(_SEED)
    tf_agc.export_saved_model(_network(), directory / "model", portable=False)
    loaded = tf.saved_model.load(directory / "model" / "1")
    serve = loaded.signatures["serving_default"]
    many = _graph_of_many_nodes()
    for batch in (1, 2, 5):
        images = tf.constant(rng.standard_normal((batch, 16, 16, 3)), tf.float32)
        # The loaded object goes with the function, which alone would not keep its variables.
        saved.append(lambda images=images, _=loaded: [value.numpy() for value in serve(images).values()])
        graph.append(lambda images=images: [many(images).numpy()])
    return {"eager": eager, "SavedModel": saved, f"graph of {2 * _NODES} nodes": graph}


def _forward_and_backward(x: tf.Tensor, gain: tf.Tensor, activation: str) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        tape.watch([x, gain])
        y = tf_agc.agc(x, gain, 1.0, activation)
    return [value.numpy() for value in (y, *tape.gradient(y, [x, gain]))]


def _graph_of_many_nodes() -> Callable[[tf.Tensor], tf.Tensor]:
    """Chains of two nodes, the second in place, that do not wait for each other."""

    @tf.function
    def many(x):
        chains = [tf_agc.agc(tf_agc.agc(x + i, 1.0 + i, 1.0, "relu"), 2.0, 0.5, "elu") for i in range(_NODES)]
        return tf.stack(chains)

    return many


def _network() -> keras.Model:
    layers = [keras.Input((16, 16, 3))]
    for filters in (8, 16, 32):
        layers += [keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)]
        layers += [tf_agc.AutomaticGainControl("relu")]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)])


def call_at_once(tasks: dict[str, list[Task]], threads: int, minutes: float) -> tuple[dict[str, int], list[str]]:
    """Calls every task in every thread, at least once, each thread beginning with another one.

    Returns:
        Calls by kind, and a line for each result that is not, bit for bit, the one that a lone call gave before.
    """
    flat = [(kind, task, [value.tobytes() for value in task()]) for kind, some in tasks.items() for task in some]
    calls, findings, lock = dict.fromkeys(tasks, 0), [], threading.Lock()
    ready = threading.Barrier(threads)
    end = time.monotonic() + 60 * minutes

    def work(number: int) -> None:
        ready.wait()
        first = True
        while first or time.monotonic() < end:
            first = False
            for i in range(len(flat)):
                kind, task, want = flat[(number + i) % len(flat)]
                try:
                    wrong = [value.tobytes() for value in task()] != want
                    finding = f"thread {number}, {kind}: another result" if wrong else None
                except Exception:
                    finding = f"thread {number}, {kind}: {traceback.format_exc()}"
                with lock:
                    calls[kind] += 1
                    findings.extend([finding] if finding else [])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return calls, findings


# ---- Memory ----


def run_memory(options: argparse.Namespace) -> bool:
    rows = train(options.steps)
    growth, error, start = growth_of(rows)
    print(
        f"{options.steps} steps: {growth:+.4f} ± {error:.4f} MiB in 1000 steps, from {start:.1f} MiB after the warm-up"
    )
    meta = {**machine.describe(), "seed": str(_SEED), "growth in 1000 steps, MiB": f"{growth:.4f} ± {error:.4f}"}
    if options.csv:
        result_files.write_csv(options.csv, rows, meta, digits=7)
    if options.plot:
        _draw(rows, meta, options.plot)
    return growth > _ALLOWED_GROWTH


def train(steps: int) -> list[Resident]:
    """Training steps of a network in a graph and of the op alone, eager and with another batch each time."""
    keras.utils.set_random_seed(_SEED)
    rng = np.random.default_rng(_SEED)
    images, labels = rng.standard_normal((8, 16, 16, 3)).astype("float32"), rng.integers(10, size=8)
    model, gain = _network(), tf.ones([8])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rows = []
    for step in range(1, steps + 1):
        model.train_on_batch(images, labels)
        _forward_and_backward(tf.ones([1 + step % 8, 32, 32, 8]), gain, "relu")
        if step % max(1, steps // _SAMPLES) == 0:
            gc.collect()  # what waits for Python's collector is no leak
            rows.append(Resident(step, memory.resident_mib()))
    return rows


def growth_of(rows: list[Resident]) -> tuple[float, float, float]:
    """A straight line through what came after the warm-up: MiB in 1000 steps, its standard error, MiB at its start."""
    rows = [row for row in rows if row.step >= _WARM_UP * rows[-1].step]
    steps, resident = np.array([(row.step / 1000, row.resident_mib) for row in rows]).T
    (slope, start), covariance = np.polyfit(steps - steps[0], resident, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0])), float(start)


def _draw(rows: list[Resident], meta: dict[str, str], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4))
    axes.plot([row.step for row in rows], [row.resident_mib for row in rows], "C0.-")
    axes.axvspan(0, _WARM_UP * rows[-1].step, color="0.92", label="warm-up")
    axes.set_ylim(0, 1.2 * max(row.resident_mib for row in rows))
    axes.set_xlabel("training steps")
    axes.set_ylabel("resident memory, MiB")
    axes.set_title(f"growth in 1000 steps: {meta['growth in 1000 steps, MiB']} MiB")
    axes.legend()
    figure.text(0.5, 0.01, f"{meta['cpu']}, TensorFlow {meta['tensorflow']}, {meta['date']}", ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
