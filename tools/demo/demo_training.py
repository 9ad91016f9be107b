"""One training run of the demo: the same recipe for every normalization, on every data set.

Nothing is printed, drawn or written to disk here.
"""

import dataclasses
import statistics
import time

import keras
import numpy as np
import rich.progress

import tf_agc
from study import training_recipe
from study.image_datasets import ImageDataset
from tf_agc.models import residual_cnn

NORMALIZATIONS = ("agc", "batch_norm", "none")
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
        calibration = tf_agc.calibrate(model, dataset.train.images[: training_recipe.CALIBRATION_IMAGES])

    steps_per_epoch = training_recipe.steps_per_epoch(dataset.train, recipe.batch_size)
    model.compile(
        optimizer=training_recipe.optimizer(recipe.learning_rate, recipe.epochs * steps_per_epoch),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # The native op and its peers are compared as TensorFlow runs them without XLA.
        jit_compile=False,
    )
    timer = StepTimer()
    history = model.fit(
        training_recipe.training_batches(dataset.train, recipe.batch_size, recipe.epochs, recipe.seed, recipe.augment),
        steps_per_epoch=steps_per_epoch,
        validation_data=training_recipe.evaluation_batches(dataset.validation),
        epochs=recipe.epochs,
        shuffle=False,  # training_batches does it
        callbacks=[timer, ProgressBar(progress, normalization, steps_per_epoch)],
        verbose=0,
    )
    _, test_accuracy = model.evaluate(training_recipe.evaluation_batches(dataset.test), verbose=0)
    return Run(
        normalization=normalization,
        model=model,
        history=history.history,
        test_accuracy=test_accuracy,
        step_ms=timer.median_ms(),
        parameters=model.count_params(),
        calibration=calibration,
    )


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
    return model.predict(images.astype(np.float32), batch_size=training_recipe.EVALUATION_BATCH, verbose=0)
