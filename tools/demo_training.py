"""One training run of the demo: the same recipe for every normalization, on every data set.

Nothing is printed, drawn or written to disk here.
"""

import dataclasses
import statistics
import time

import keras
import numpy as np
import rich.progress
import tensorflow as tf

import tf_agc
from image_datasets import ImageDataset, Split
from tf_agc.models import residual_cnn

NORMALIZATIONS = ("agc", "batch_norm", "none")
GRADIENT_NORM = 1.0
CALIBRATION_IMAGES = 256
EVALUATION_BATCH = 250
# Buffers are allocated and caches are filled in the first steps.
WARM_UP_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a data set is trained on; chosen on the validation split.

    Attributes:
        filters: channels of the network's stages.
        epochs: passes over the training split.
        batch_size: images in a step.
        learning_rate: the schedule's peak.
        augment: whether images are flipped and shifted at random.
        seed: of the initial weights, the order of the images and their augmentation.
    """

    filters: tuple[int, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    augment: bool = False
    seed: int = 0

    def changed(self, epochs: int | None, batch_size: int | None, seed: int) -> "Recipe":
        """Returns a copy; the learning rate stays proportional to the batch size."""
        batch_size = batch_size or self.batch_size
        return dataclasses.replace(
            self,
            epochs=epochs or self.epochs,
            batch_size=batch_size,
            learning_rate=self.learning_rate * batch_size / self.batch_size,
            seed=seed,
        )


RECIPES = {
    "digits": Recipe(filters=(32, 64), epochs=20, batch_size=16, learning_rate=0.1),
    "mnist": Recipe(filters=(16, 32, 64), epochs=2, batch_size=128, learning_rate=0.1),
    "fashion_mnist": Recipe(filters=(16, 32, 64), epochs=3, batch_size=128, learning_rate=0.1),
    "cifar10": Recipe(filters=(16, 32, 64), epochs=8, batch_size=128, learning_rate=0.1, augment=True),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network and what was measured.

    Attributes:
        normalization: one of NORMALIZATIONS.
        model: the trained network.
        history: for each epoch "loss", "accuracy", "val_loss" and "val_accuracy".
        test_accuracy: fraction of the test split.
        step_ms: median time of a training step after the warm-up, input pipeline included.
        parameters: number of weights, moving averages included.
        calibration: what `tf_agc.calibrate` returned; None without AGC.
    """

    normalization: str
    model: keras.Model
    history: dict[str, list[float]]
    test_accuracy: float
    step_ms: float
    parameters: int
    calibration: tf_agc.calibration.CalibrationTable | None


def train(normalization: str, dataset: ImageDataset, recipe: Recipe, progress: rich.progress.Progress) -> Run:
    """Trains one network; adds its bar to `progress`."""
    keras.utils.set_random_seed(recipe.seed)
    model = residual_cnn(
        dataset.train.images.shape[1:],
        len(dataset.class_names),
        normalization=normalization,
        filters=recipe.filters,
    )
    calibration = None
    if normalization == "agc":
        calibration = tf_agc.calibrate(model, dataset.train.images[:CALIBRATION_IMAGES])

    steps_per_epoch = -(-len(dataset.train.images) // recipe.batch_size)
    model.compile(
        optimizer=keras.optimizers.SGD(
            _learning_rate(recipe, steps_per_epoch),
            momentum=0.9,
            nesterov=True,
            clipnorm=GRADIENT_NORM,  # weight by weight, not over all of them
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # The native op and its peers are compared as TensorFlow runs them without XLA.
        jit_compile=False,
    )
    timer = StepTimer()
    history = model.fit(
        training_batches(dataset.train, recipe),
        validation_data=evaluation_batches(dataset.validation),
        epochs=recipe.epochs,
        shuffle=False,  # training_batches does it
        callbacks=[timer, ProgressBar(progress, normalization, steps_per_epoch)],
        verbose=0,
    )
    _, test_accuracy = model.evaluate(evaluation_batches(dataset.test), verbose=0)
    return Run(
        normalization=normalization,
        model=model,
        history=history.history,
        test_accuracy=test_accuracy,
        step_ms=timer.median_ms(),
        parameters=model.count_params(),
        calibration=calibration,
    )


def _learning_rate(recipe: Recipe, steps_per_epoch: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear warm-up over the first twentieth, then half a cosine down to 0."""
    steps = recipe.epochs * steps_per_epoch
    warm_up = max(1, steps // 20)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=recipe.learning_rate,
        warmup_steps=warm_up,
        decay_steps=max(1, steps - warm_up),
    )


def training_batches(split: Split, recipe: Recipe) -> tf.data.Dataset:
    """Shuffled, and where the recipe says so augmented, batches; the last one may be smaller."""
    data = tf.data.Dataset.from_tensor_slices((split.images, split.labels))
    data = data.shuffle(len(split.images), seed=recipe.seed)
    if recipe.augment:
        # A seed of its own for each image: the same images come out however many threads work.
        seeds = tf.data.Dataset.random(seed=recipe.seed, rerandomize_each_iteration=True).batch(2)
        data = tf.data.Dataset.zip(data, seeds).map(_augment, num_parallel_calls=tf.data.AUTOTUNE)
    return data.batch(recipe.batch_size).map(_to_float).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(split: Split) -> tf.data.Dataset:
    data = tf.data.Dataset.from_tensor_slices((split.images, split.labels))
    return data.batch(EVALUATION_BATCH).map(_to_float).prefetch(tf.data.AUTOTUNE)


def _augment(example: tuple[tf.Tensor, tf.Tensor], seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Shifts by up to 4 pixels in each direction, and mirrors one image in two."""
    image, label = example
    padded = tf.pad(image, [[4, 4], [4, 4], [0, 0]], mode="REFLECT")
    image = tf.image.stateless_random_crop(padded, image.shape, seed)
    return tf.image.stateless_random_flip_left_right(image, seed), label


def _to_float(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.cast(images, tf.float32), labels


class StepTimer(keras.callbacks.Callback):
    """Measures every training step, without the callbacks between steps."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None) -> None:
        self._seconds.append(time.perf_counter() - self._start)

    def median_ms(self) -> float:
        warm = self._seconds[WARM_UP_STEPS:] or self._seconds[-1:]
        return 1000 * statistics.median(warm)


class ProgressBar(keras.callbacks.Callback):
    """One bar of a rich.progress.Progress for a whole training run."""

    def __init__(self, progress: rich.progress.Progress, name: str, steps_per_epoch: int) -> None:
        super().__init__()
        self._progress = progress
        self._name = name
        self._steps_per_epoch = steps_per_epoch

    def on_train_begin(self, logs=None) -> None:
        steps = self.params["epochs"] * self._steps_per_epoch
        self._task = self._progress.add_task(self._name, total=steps, note="")

    def on_train_batch_end(self, batch, logs=None) -> None:
        self._progress.advance(self._task)

    def on_epoch_end(self, epoch, logs=None) -> None:
        self._progress.update(self._task, note=f"validation {logs['val_accuracy']:.1%}")


def predict(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Returns the logits of uint8 images."""
    return model.predict(images.astype(np.float32), batch_size=EVALUATION_BATCH, verbose=0)
