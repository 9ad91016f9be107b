"""Image data sets for the demo and the studies, all read through TensorFlow Datasets.

Reading and splitting only: no augmentation, no batches, no training.
"""

import contextlib
import dataclasses
import fcntl
import pathlib
import urllib.parse
from collections.abc import Iterator

import numpy as np
import requests
import sklearn.datasets
import tensorflow_datasets as tfds


class DatasetUnavailableError(Exception):
    """A data set cannot be had; the message is one sentence that says what to do."""


class Digits(tfds.core.GeneratorBasedBuilder):
    """TensorFlow Datasets builder of the handwritten digits inside scikit-learn's wheel."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1797 scans of handwritten digits, 8 x 8 pixels (sklearn.load_digits).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            # The scans come writer by writer. In this order the last ones, for validation and for
            # testing, are by other hands than the ones to train on.
            disable_shuffling=True,
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(slice(None, 1297)),
            "test": self._generate_examples(slice(1297, None)),
        }

    def _generate_examples(self, scans: slice):
        digits = sklearn.datasets.load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
        labels = digits.target
        for key, (image, label) in enumerate(zip(images[scans], labels[scans], strict=True)):
            yield key, {"image": image, "label": label}


with tfds.core.registered.skip_registration():  # its name is taken by the class that it extends

    class FashionMnist(tfds.image_classification.FashionMNIST):
        """TensorFlow Datasets' builder with the files of Debian's package dataset-fashion-mnist, without a network."""

        name = "fashion_mnist"
        FILES = pathlib.Path("/usr/share/datasets/fashion-mnist")

        EXAMPLES = {"train": 60000, "t10k": 10000}  # as in the files' names

        def _split_generators(self, dl_manager):
            def examples(split: str):
                paths = [self.FILES / f"{split}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")]
                return self._generate_examples(self.EXAMPLES[split], *dl_manager.extract(paths))

            return {"train": examples("train"), "test": examples("t10k")}


@dataclasses.dataclass(frozen=True)
class Split:
    """One split in memory.

    Attributes:
        images: uint8, shape [N, height, width, channels].
        labels: int64, shape [N].
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """A data set in memory. Choices are made on `validation`; `test` is for the reported figure."""

    name: str
    class_names: list[str]
    train: Split
    validation: Split
    test: Split


def load(name: str, data_dir: pathlib.Path) -> ImageDataset:
    """Reads a data set; prepares it in `data_dir` first where it is not there yet.

    The validation split is the last fifth of the training split.

    Args:
        name: a data set with "image" and "label" that TensorFlow Datasets knows, or "digits".
        data_dir: directory of TensorFlow Datasets; may be read-only where the data set is prepared.

    Raises:
        DatasetUnavailableError: it can be neither read nor prepared.
    """
    try:
        builder = _prepared_builder(name, data_dir)
        train, validation, test = tfds.as_numpy(
            builder.as_dataset(split=["train[:80%]", "train[80%:]", "test"], batch_size=-1, as_supervised=True)
        )
        class_names = builder.info.features["label"].names
    # TensorFlow Datasets lets through whatever the network, the disk and TensorFlow raise.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DatasetUnavailableError(
            f"cannot read or prepare the data set {name} in {data_dir} ({reason}): connect to the "
            "network and make the directory writable, or pass --data_dir with a TensorFlow "
            f"Datasets directory in which {name} is prepared"
        ) from error
    return ImageDataset(name, class_names, Split(*train), Split(*validation), Split(*test))


def _prepared_builder(name: str, data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    has_files = name == FashionMnist.name and FashionMnist.FILES.is_dir()

    def make_builder() -> tfds.core.DatasetBuilder:
        return FashionMnist(data_dir=data_dir) if has_files else tfds.builder(name, data_dir=data_dir)

    builder = make_builder()
    if builder.is_prepared():
        return builder
    if not has_files:
        _check_network(builder)
    data_dir.mkdir(parents=True, exist_ok=True)
    with _locked(data_dir / f".{name}.lock"):
        # Made anew: another process may have prepared the data set while this one waited.
        builder = make_builder()
        builder.download_and_prepare()
    return builder


def _check_network(builder: tfds.core.DatasetBuilder) -> None:
    """Fails within seconds without a network, where the download itself retries for minutes."""
    for url in list(builder.url_infos or ())[:1]:
        try:
            requests.head(url, timeout=10)
        except requests.RequestException as error:
            host = urllib.parse.urlsplit(url).hostname
            raise ConnectionError(f"no connection to {host}") from error


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
