"""tools/study/image_datasets.py: data sets that need no network. (The digits are in test_demo.py.)"""

import gzip

import numpy as np

from study import image_datasets


def test_fashion_mnist_from_debians_files(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    counts = {"train": 20, "t10k": 5}
    images = {name: random.integers(0, 256, (count, 28, 28, 1), np.uint8) for name, count in counts.items()}
    labels = {name: random.integers(0, 10, count, np.uint8) for name, count in counts.items()}
    for name in counts:
        for part, header, values in (("images-idx3", 16, images[name]), ("labels-idx1", 8, labels[name])):
            with gzip.open(tmp_path / f"{name}-{part}-ubyte.gz", "wb") as file:
                file.write(bytes(header) + values.tobytes())
    monkeypatch.setattr(image_datasets.FashionMnist, "FILES", tmp_path)
    monkeypatch.setattr(image_datasets.FashionMnist, "EXAMPLES", counts)

    for _ in range(2):  # prepared, and read again
        dataset = image_datasets.load("fashion_mnist", tmp_path / "prepared")
        train = (np.concatenate([part.images for part in (dataset.train, dataset.validation)]), images["train"])
        for got, expected in (train, (dataset.test.images, images["t10k"])):
            assert sorted(map(bytes, got)) == sorted(map(bytes, expected))  # their order is the library's
        assert (len(dataset.train.labels), len(dataset.validation.labels), len(dataset.test.labels)) == (16, 4, 5)
        assert sorted(dataset.test.labels) == sorted(labels["t10k"])
        assert dataset.class_names[-1] == "Ankle boot"
