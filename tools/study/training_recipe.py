"""What all training runs in tools/ share: batches of images, their order and augmentation, the rate's schedule.

No model and no training loop. Order and augmentation follow from the seed and the step alone, so that a run can go on
from any step as if it had never stopped.
"""

import keras
import numpy as np
import tensorflow as tf

from study.image_datasets import Split

GRADIENT_NORM = 1.0  # of all gradients together
# Of the kernels, times the rate. 5e-4 added to the gradient is the same in the long run: a momentum of 0.9 makes it ten
# times as much.
WEIGHT_DECAY = 5e-3
_NOT_DECAYED = ("gain", "mean_scale", "gamma", "beta", "bias")
CALIBRATION_IMAGES = 256
EVALUATION_BATCH = 250
_SHIFT = 4


def steps_per_epoch(split: Split, batch_size: int) -> int:
    return -(-len(split.images) // batch_size)


def optimizer(learning_rate: float, steps: int) -> keras.optimizers.Optimizer:
    """SGD whose rate rises linearly over the first twentieth of the steps, and falls to 0 over half a cosine."""
    warm_up = max(1, steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=learning_rate,
        warmup_steps=warm_up,
        decay_steps=max(1, steps - warm_up),
    )
    sgd = keras.optimizers.SGD(
        schedule, momentum=0.9, nesterov=True, global_clipnorm=GRADIENT_NORM, weight_decay=WEIGHT_DECAY
    )
    sgd.exclude_from_weight_decay(var_names=list(_NOT_DECAYED))
    return sgd


def training_batches(
    split: Split, batch_size: int, epochs: int, seed: int, augment: bool, start: int = 0
) -> tf.data.Dataset:
    """Shuffled batches of all epochs, one after the other.

    Args:
        split: the images; all of them are seen in every epoch.
        batch_size: images in a batch; the last one of an epoch may be smaller.
        epochs: passes over the split.
        seed: of order and augmentation.
        augment: whether images are shifted and mirrored at random.
        start: the first batch, counted over all epochs.

    Returns:
        Batches of float32 images [N, height, width, channels] and labels [N].
    """
    steps = steps_per_epoch(split, batch_size)
    orders = [np.random.default_rng([seed, epoch]).permutation(len(split.images)) for epoch in range(epochs)]
    images, labels, orders = map(tf.constant, (split.images, split.labels, np.stack(orders)))

    def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        first = step % steps * batch_size
        chosen = orders[step // steps, first : first + batch_size]
        batch_images = tf.gather(images, chosen)
        if augment:
            batch_images = _augment(batch_images, tf.stack([seed, step]))
        return tf.cast(batch_images, tf.float32), tf.gather(labels, chosen)

    data = tf.data.Dataset.range(start, epochs * steps)
    return data.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(split: Split) -> tf.data.Dataset:
    data = tf.data.Dataset.from_tensor_slices((split.images, split.labels)).batch(EVALUATION_BATCH)
    return data.map(lambda images, labels: (tf.cast(images, tf.float32), labels)).prefetch(tf.data.AUTOTUNE)


def _augment(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Shifts each image by up to 4 pixels in each direction, and mirrors one in two."""
    height, width = images.shape[1:3]
    images = tf.pad(images, [[0, 0], [_SHIFT, _SHIFT], [_SHIFT, _SHIFT], [0, 0]], mode="REFLECT")
    random = tf.random.stateless_uniform([3, tf.shape(images)[0], 1], seed, 0, 2 * (2 * _SHIFT + 1), tf.int32)
    top, left, mirrored = random[0] // 2, random[1] // 2, random[2] % 2 == 0
    rows, columns = top + tf.range(height), left + tf.range(width)
    columns = tf.where(mirrored, columns[:, ::-1], columns)
    images = tf.gather(images, rows, axis=1, batch_dims=1)
    return tf.gather(images, columns, axis=2, batch_dims=1)
