"""One training run of the study. `python tools study.study_training JOB` is the fresh process in which it happens.

Killed at any point and started again, it goes on from its checkpoint to the same bits. It sees the splits that its job
names and no other. It writes its checkpoint and, line by line in JSON, messages to standard output; which runs there
are, and what becomes of their results, is study.py's.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import tf_agc  # noqa: E402
from benchmarks import (
    machine,  # noqa: E402
    memory,  # noqa: E402
)
from study import training_recipe  # noqa: E402
from study.image_datasets import Split  # noqa: E402
from tf_agc import models, monitor  # noqa: E402

NETWORKS: dict[str, Callable[..., keras.Model]] = {
    "plain": models.plain_cnn,
    "resnet20_post": models.resnet,
    "resnet20_pre": functools.partial(models.residual_cnn, blocks=3),
}


def _agc(place: models.Place, mean_scale: str | None = None, **options: Any) -> list[keras.layers.Layer]:
    """The recipe's layer, but for these arguments of it."""
    if place.pooled:
        mean_scale = "zeros"
    return [tf_agc.AutomaticGainControl(place.activation, mean_scale_initializer=mean_scale, **options)]


@dataclasses.dataclass(frozen=True)
class Method:
    """What a network is trained with: arguments of tf_agc.models, and of tf_agc.calibrate."""

    normalization: str | models.Normalization
    standardized: bool
    branch_factor: float = 0.5


METHODS = {
    "agc": Method("agc", standardized=True),
    "agc_alone": Method("agc_alone", standardized=False),  # the first version: no part of the recipe
    "batch_norm": Method("batch_norm", standardized=False),
    "batch_norm_standardized": Method("batch_norm", standardized=True),
    "group_norm": Method("group_norm", standardized=False),
    "group_norm_standardized": Method("group_norm", standardized=True),
    "none": Method("none", standardized=False),
    # The recipe, each part of it left out in turn.
    "agc_plain_kernels": Method("agc", standardized=False),
    "agc_mean_scale_1": Method(functools.partial(_agc, mean_scale="ones"), standardized=True),
    "agc_no_mean": Method(functools.partial(_agc, mean_scale="zeros", train_mean_scale=False), standardized=True),
    "agc_no_bias": Method(functools.partial(_agc, use_bias=False), standardized=True),
    "agc_no_branch_factor": Method("agc", standardized=True, branch_factor=1.0),
}
RECORDS_PER_EPOCH = 4
_MONITORED_IMAGES = 32
# Between two looks at the clock. At batch 1 a step is much shorter than what Python needs for a look.
_IMAGES_PER_CALL = 64
_WARM_UP_CALLS = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process has to do.

    Attributes:
        network: a name in NETWORKS.
        normalization: a name in METHODS.
        precision: Keras's policy, "float32" or "mixed_bfloat16".
        batch_size: images in a step.
        seed: of the initial weights, the order of the images and their augmentation.
        learning_rate: the schedule's peak.
        epochs: passes over the training split.
        augment: whether images are shifted and mirrored at random.
        splits: the files (`save_split`) of "train", "validation" and, only where it is the one to report on, "test".
        checkpoint: the file to go on from, if it exists, and to write.
        checkpoint_seconds: between two of them.
    """

    network: str
    normalization: str
    precision: str
    batch_size: int
    seed: int
    learning_rate: float
    epochs: int
    augment: bool
    splits: dict[str, str]
    checkpoint: str
    checkpoint_seconds: float = 20.0


def save_split(split: Split, path: pathlib.Path) -> None:
    beside = path.with_name(f"new-{path.name}")
    np.savez(beside, images=split.images, labels=split.labels)
    os.replace(beside, path)


def load_split(path: str) -> Split:
    with np.load(path) as file:
        return Split(file["images"], file["labels"])


class _State:
    """All that a run is at one moment, in memory and in its checkpoint."""

    def __init__(self, variables: list, path: pathlib.Path) -> None:
        self._variables = variables
        self._path = path
        # A resumed run is the uninterrupted one only on the same machine and with the same code.
        self._made_by = {key: value for key, value in machine.describe().items() if key != "date"}
        self.step = 0
        self.seconds: list[float] = []  # of a step, for each call
        self.peak_mib = 0.0
        self.curve: list[dict] = []
        self.gains: list[dict] = []

    def save(self) -> None:
        logs = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        logs["made_by"] = self._made_by
        beside = self._path.with_name(f"new-{self._path.name}")
        arrays = {str(index): variable.numpy() for index, variable in enumerate(self._variables)}
        np.savez(beside, logs=json.dumps(logs), **arrays)
        os.replace(beside, self._path)

    def restore(self) -> None:
        if not self._path.exists():
            return
        with np.load(self._path) as file:
            logs = json.loads(str(file["logs"]))
            if logs.pop("made_by") != self._made_by:
                return
            vars(self).update(logs)
            for index, variable in enumerate(self._variables):
                variable.assign(file[str(index)])


def train(job: Job, report: Callable[[dict], None]) -> dict:
    """Trains one network, from its checkpoint where there is one, and leaves its last checkpoint behind.

    Args:
        job: what to do.
        report: is called with "step", "steps" and whether the state is "saved".

    Returns:
        "accuracy" and "loss" on the last of the job's splits, "seconds_per_step" (median), "peak_mib" (of training
        alone), and the lists "curve" and "gains".
    """
    keras.utils.set_random_seed(job.seed)
    splits = {name: load_split(path) for name, path in job.splits.items()}
    train_split = splits["train"]
    method = METHODS[job.normalization]
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(job.precision)
    try:
        model = NETWORKS[job.network](
            train_split.images.shape[1:],
            int(train_split.labels.max()) + 1,
            method.normalization,
            standardized=method.standardized,
        )
    finally:
        keras.config.set_dtype_policy(policy)
    has_agc = job.normalization.startswith("agc")
    if has_agc:
        images = train_split.images[: training_recipe.CALIBRATION_IMAGES]
        tf_agc.calibrate(model, images, branch_factor=method.branch_factor)
    steps_per_epoch = training_recipe.steps_per_epoch(train_split, job.batch_size)
    steps = job.epochs * steps_per_epoch
    optimizer = training_recipe.optimizer(job.learning_rate, steps)
    optimizer.build(model.trainable_variables)
    totals = tf.Variable(tf.zeros(3, tf.float64))  # images, sum of their losses, how many were right
    state = _State([*model.variables, *optimizer.variables, totals], pathlib.Path(job.checkpoint))
    state.restore()

    train_steps = _training_function(model, optimizer, totals)
    evaluate = _evaluation_function(model)
    batches = iter(
        training_recipe.training_batches(
            train_split, job.batch_size, job.epochs, job.seed, job.augment, start=state.step
        )
    )
    records = [steps_per_epoch * part // RECORDS_PER_EPOCH for part in range(RECORDS_PER_EPOCH * job.epochs + 1)]
    monitored_images = tf.constant(train_split.images[:_MONITORED_IMAGES])

    def record_gains() -> None:
        if has_agc:
            for layer, values in monitor.layer_statistics(model, monitored_images).items():
                means = {name: float(np.mean(values[name])) for name in ("gain", "output_std", "sparsity")}
                state.gains.append({"epoch": state.step / steps_per_epoch, "layer": layer} | means)

    if state.step == 0:
        record_gains()
    memory.forget_peak()
    saved_at = time.monotonic()
    calls = 0
    while state.step < steps:
        count = min(
            max(1, _IMAGES_PER_CALL // job.batch_size),
            next(step for step in records if step > state.step) - state.step,
        )
        start = time.perf_counter()
        train_steps(batches, tf.constant(count))
        calls += 1
        if calls > _WARM_UP_CALLS or not state.seconds:
            state.seconds.append((time.perf_counter() - start) / count)
        state.step += count
        if state.step in records:
            # Before the evaluation, whose batches are larger than some in training.
            state.peak_mib = max(state.peak_mib, memory.peak_mib())
            images, loss, right = totals.numpy()
            totals.assign(tf.zeros_like(totals))
            point = {"epoch": state.step / steps_per_epoch, "loss": loss / images, "accuracy": right / images}
            if state.step % steps_per_epoch == 0:
                point["validation_accuracy"], _ = evaluate(splits["validation"])
                record_gains()
            state.curve.append(point)
            if not math.isfinite(point["loss"]):
                state.step = steps
            memory.forget_peak()
        saved = state.step == steps or time.monotonic() - saved_at >= job.checkpoint_seconds
        if saved:
            state.peak_mib = max(state.peak_mib, memory.peak_mib())
            state.save()
            saved_at = time.monotonic()
        report({"step": state.step, "steps": steps, "saved": saved})
    accuracy, loss = evaluate(list(splits.values())[-1])
    return {
        "accuracy": accuracy,
        "loss": loss,
        "seconds_per_step": statistics.median(state.seconds),
        "peak_mib": state.peak_mib,
        "curve": state.curve,
        "gains": state.gains,
    }


_LOSSES = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")


def _right(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1) == labels, tf.float64))


def _training_function(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, totals: tf.Variable
) -> Callable[..., None]:
    """Not Keras's fit, which can go on from the end of an epoch alone."""

    # The native op and its peers are compared as TensorFlow runs them without XLA.
    @tf.function(jit_compile=False)
    def train_steps(batches, count):
        for _ in tf.range(count):
            # Not two steps' maps in memory at once.
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            images, labels = next(batches)
            with tf.GradientTape() as tape:
                logits = tf.cast(model(images, training=True), tf.float32)
                losses = _LOSSES(labels, logits)
                loss = tf.reduce_mean(losses)
            gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
            optimizer.apply(gradients, model.trainable_variables)
            number = tf.cast(tf.size(labels), tf.float64)
            totals.assign_add(tf.stack([number, number * tf.cast(loss, tf.float64), _right(logits, labels)]))

    return train_steps


def _evaluation_function(model: keras.Model) -> Callable[[Split], tuple[float, float]]:
    @tf.function(jit_compile=False, reduce_retracing=True)
    def evaluate_batch(images, labels):
        logits = tf.cast(model(images, training=False), tf.float32)
        return _right(logits, labels), tf.reduce_sum(tf.cast(_LOSSES(labels, logits), tf.float64))

    def evaluate(split: Split) -> tuple[float, float]:
        """Accuracy and mean loss."""
        parts = [evaluate_batch(*batch) for batch in training_recipe.evaluation_batches(split)]
        right, loss = np.sum(parts, axis=0) / len(split.labels)
        return float(right), float(loss)

    return evaluate


def main() -> None:
    def report(message: dict) -> None:
        # Where nobody reads any more, this fails, and the process ends with the one that started it.
        print(json.dumps(message), flush=True)

    tf_agc.implementation("native")  # or an error that says why there is nothing to measure
    report({"result": train(Job(**json.loads(sys.argv[1])), report)})


if __name__ == "__main__":
    main()
