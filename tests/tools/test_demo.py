"""The demo from the outside: its command line, its files, its fresh process, and its data."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import tf_agc

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"
PNG = b"\x89PNG\r\n\x1a\n"

# No proxy listens there: what these tests download would make them depend on the network.
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def run_tool(module, *arguments, package=pathlib.Path(tf_agc.__file__).parents[1]):
    """Runs a tool with the tf_agc that this process tests, or with another copy of it."""
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, str(TOOLS), module, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_one_sentence(result, pattern):
    """The tool stopped with exit code 1 and one line of its own; TensorFlow's log is not ours."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    assert re.search(pattern, lines[-1])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def output(data_dir, tmp_path_factory):
    """What one small run printed, and its directory. 1038 images are not a multiple of 200."""
    directory = tmp_path_factory.mktemp("output") / "new"
    options = ("--epochs", 2, "--batch_size", 200, "--seed", 3)
    result = run_tool("demo.demo", "--data_dir", data_dir, "--output_dir", directory, *options)
    assert result.returncode == 0, result.stderr
    return result.stdout, directory


def test_the_table_and_the_directory_are_printed(output):
    text, directory = output
    assert text.startswith(f"Results go to {directory}\n")
    assert text.rstrip().endswith(str(directory))
    for name, parameters in (
        ("AutomaticGainControl", "77,482"),
        ("BatchNormalization", "77,610"),
        ("none", "77,002"),
    ):
        assert re.search(rf"{name}\W+\d+\.\d ± \d+\.\d\W+\d+\.\d\W+{parameters}\W", text)


def test_the_files(output):
    _, directory = output
    for name in ("learning_curves.png", "predictions.png"):
        assert (directory / name).read_bytes().startswith(PNG)
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    assert results["dataset"] == "digits"
    assert results["images"] == {"train": 1038, "validation": 259, "test": 500}
    assert (results["recipe"]["epochs"], results["recipe"]["batch_size"]) == (2, 200)
    assert results["recipe"]["seed"] == 3
    assert results["machine"]["tf_agc"] == tf_agc.__version__
    assert [run["normalization"] for run in results["results"]] == ["agc", "batch_norm", "none"]
    for run in results["results"]:
        assert 0 <= run["test_accuracy"] <= 1
        assert len(run["history"]["val_accuracy"]) == 2
    assert "automatic_gain_control" in (directory / "calibration.txt").read_text(encoding="utf-8")


def test_the_fresh_process_agrees(output):
    text, _ = output
    assert "has 5 ops TfAgc>Agc" in text
    match = re.search(r"maximum absolute difference .* process: (\S+)\.\n", text)
    assert float(match[1]) <= 1e-4


def test_predict_notices_other_logits(output, tmp_path, monkeypatch):
    _, directory = output
    logits = np.load(directory / "test_logits.npy")
    logits[7, 3] += 0.01
    np.save(tmp_path / "other.npy", logits)
    from demo import predict

    arguments = (directory / "model", directory / "test_images.npy", tmp_path / "other.npy")
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="^error: the predictions do not agree within 0.0001$"):
        predict.main()


def test_a_used_output_directory_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious", encoding="utf-8")
    result = run_tool("demo.demo", "--output_dir", tmp_path)
    assert_one_sentence(result, "is not empty: pass another --output_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_default_output_directories_are_numbered(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_AGC_IMPLEMENTATION", "auto")  # demo.py sets it
    from demo import demo

    monkeypatch.setattr(demo, "CHECKOUT", tmp_path)
    names = [demo.make_output_dir(None).name for _ in range(3)]
    assert names == ["demo_output", "demo_output_2", "demo_output_3"]


def test_a_data_set_that_cannot_be_had(tmp_path):
    options = ("--output_dir", tmp_path / "output", "--data_dir", tmp_path / "data")
    result = run_tool("demo.demo", "--dataset", "mnist", *options)
    assert_one_sentence(result, r"the data set mnist in .*: connect to the network .*--data_dir")


def test_without_the_native_library(tmp_path):
    package = tmp_path / "tf_agc"
    shutil.copytree(
        pathlib.Path(tf_agc.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("native_library", "__pycache__"),
    )
    result = run_tool("demo.demo", "--output_dir", tmp_path / "output", package=tmp_path)
    assert_one_sentence(result, "the native implementation is not available: there is no native")


def test_two_processes_prepare_the_digits_at_once(tmp_path):
    code = (
        "import pathlib, sys; from study import image_datasets;"
        "digits = image_datasets.load('digits', pathlib.Path(sys.argv[1]));"
        "print(digits.train.labels.sum(), digits.test.images.sum())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(TOOLS)}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    # The notes about the preparation come before our line.
    first, second = (process.communicate(timeout=300)[0].splitlines()[-1] for process in processes)
    assert first == second


def test_the_digits(data_dir, output):
    """Reads what the run above prepared, once more, and compares it with scikit-learn's."""
    import sklearn.datasets

    from study import image_datasets

    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    digits = image_datasets.load("digits", data_dir)
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before

    expected = sklearn.datasets.load_digits()
    splits = (digits.train, digits.validation, digits.test)
    np.testing.assert_array_equal(np.concatenate([s.labels for s in splits]), expected.target)
    images = np.concatenate([split.images for split in splits])[..., 0]
    np.testing.assert_allclose(images, expected.images * (255 / 16), atol=0.5)
    assert digits.class_names == [str(digit) for digit in range(10)]
