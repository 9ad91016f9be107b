"""Example: one training loop for one device, several devices of a machine, or several machines.

    python tools/examples/distributed_training.py               one device, the whole batch
    python tools/examples/distributed_training.py --replicas 2  MirroredStrategy over two logical CPUs
    python tools/examples/distributed_training.py --workers 2   MultiWorkerMirroredStrategy over two processes

On a cluster, start it without options on every machine, with TF_CONFIG set as TensorFlow describes it. With AGC every
run prints the same losses, because each sample is normalized alone, and replicas exchange gradients and the loss alone.
`--normalization batch_norm synchronized_batch_norm` shows two that differ: the first has other losses with each number
of replicas; the second has the same ones, for an exchange of statistics in every layer.

Keras's `fit` trains under MirroredStrategy too; under MultiWorkerMirroredStrategy it fails (Keras 3.15.1, TensorFlow
2.21.0), hence the loop below.
"""

import argparse
import asyncio
import json
import os
import socket
import sys

# Read when TensorFlow is imported: of its log only errors are news here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

BATCH = 16  # over all replicas
STEPS = 6
TIMEOUT_SECONDS = 180  # for all workers of this machine: one whose partner died would wait for it


def train(strategy, normalization: str) -> None:
    """Trains a small network under a strategy; the chief prints the loss of every step, and what a step exchanges."""
    import keras
    import numpy as np
    import tensorflow as tf

    from tf_agc import models

    random = np.random.default_rng(0)
    images = random.uniform(0, 255, (BATCH * STEPS, 16, 16, 3)).astype("float32")
    labels = random.integers(0, 10, BATCH * STEPS)
    batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(BATCH)
    batches = strategy.experimental_distribute_dataset(batches)  # every replica gets its part of every batch

    def synchronized_batch_norm(place):
        return [keras.layers.BatchNormalization(synchronized=True), keras.layers.Activation(place.activation)]

    with strategy.scope():
        keras.utils.set_random_seed(0)  # the same initial weights on every worker
        chosen = synchronized_batch_norm if normalization == "synchronized_batch_norm" else normalization
        model = models.plain_cnn((16, 16, 3), 10, chosen, filters=(8, 16))
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
        optimizer.build(model.trainable_variables)
    loss_sum = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

    def replica_step(images, labels):
        with tf.GradientTape() as tape:
            # A replica's share of the whole batch's mean: the optimizer adds the gradients of all replicas.
            loss = loss_sum(labels, model(images, training=True)) / BATCH
        optimizer.apply(tape.gradient(loss, model.trainable_variables))
        return loss

    @tf.function
    def step(images, labels):
        losses = strategy.run(replica_step, args=(images, labels))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    # Every worker takes every step, and iterates to the end: the others wait for one that does not.
    is_chief = strategy.extended.should_save_summary
    for number, batch in enumerate(batches, start=1):
        loss = float(step(*batch))
        if is_chief:
            print(f"{normalization}, step {number}: loss {loss:.9g}")
    if is_chief:
        operations = step.get_concrete_function(*batch).graph.get_operations()
        reduced = [op.inputs[0].shape.num_elements() for op in operations if op.type == "CollectiveReduceV2"]
        trainable = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
        print(
            f"{trainable} trainable parameters; numbers in each sum over all replicas in a step, listed once for every "
            f"replica of this process: {reduced}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["agc", "batch_norm", "synchronized_batch_norm"]
    parser.add_argument("--normalization", nargs="+", choices=names, default=["agc"], help="trained one by one")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--replicas", type=int, default=1, help="logical CPUs of one process")
    where.add_argument("--workers", type=int, default=1, help="processes on this machine")
    options = parser.parse_args()
    if min(options.replicas, options.workers) < 1:
        parser.error("--replicas and --workers must be at least 1")
    if options.workers > 1:
        asyncio.run(run_workers(options.workers, "--normalization", *options.normalization))
        return

    import tensorflow as tf

    if "TF_CONFIG" in os.environ:
        try:
            json.loads(os.environ["TF_CONFIG"])
        except ValueError as error:
            sys.exit(f"TF_CONFIG must be JSON, got {os.environ['TF_CONFIG']!r}: {error}")
        strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else that runs an op
    elif options.replicas > 1:
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * options.replicas)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(options.replicas)])
    else:
        strategy = tf.distribute.get_strategy()
    for normalization in options.normalization:
        train(strategy, normalization)


async def run_workers(count: int, *arguments: str) -> None:
    """Runs this script in `count` processes that find each other through TF_CONFIG; ends all when one fails."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    workers = []
    try:
        for index in range(count):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment = os.environ | {"TF_CONFIG": json.dumps(config)}
            command = [sys.executable, __file__, *arguments]
            workers.append(await asyncio.create_subprocess_exec(*command, env=environment))
        for ended in asyncio.as_completed([worker.wait() for worker in workers], timeout=TIMEOUT_SECONDS):
            if await ended != 0:
                sys.exit("a worker failed: see its error above")
    except asyncio.TimeoutError:
        sys.exit(f"the workers did not end within {TIMEOUT_SECONDS} seconds")
    finally:
        for worker in workers:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


if __name__ == "__main__":
    main()
