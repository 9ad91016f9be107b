"""TensorFlow's own distribution: the losses of one process with the whole batch, and nothing but gradients exchanged.

Each run is a process of its own: logical devices and workers are chosen before TensorFlow starts.
"""

import asyncio
import csv
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

import tf_agc
from agc_testing import python

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "tools" / "examples" / "distributed_training.py"


@dataclasses.dataclass
class Run:
    """What the example prints of one normalization."""

    losses: list[float]
    trainable: int  # parameters
    sums: list[int]  # numbers in each sum over all replicas, in one step


def _run(*arguments):
    inherited = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
    package = str(pathlib.Path(tf_agc.__file__).parents[1])
    # A session of its own, so that workers do not outlive a parent that had to be killed.
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env={**inherited, "PYTHONPATH": package, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, errors
    summaries = re.findall(r"(\d+) trainable parameters; .*: \[(.*)\]", output)
    runs = {}
    for name, (trainable, sums) in zip(dict.fromkeys(re.findall(r"(\w+), step", output)), summaries, strict=True):
        losses = [float(loss) for loss in re.findall(rf"^{name}, step \d+: loss (\S+)$", output, re.MULTILINE)]
        assert len(losses) == 6
        runs[name] = Run(losses, int(trainable), [int(size) for size in sums.split(", ") if size])
    return runs


_ALL = ("--normalization", "agc", "batch_norm", "synchronized_batch_norm")


@pytest.fixture(scope="module")
def one_process():
    return _run(*_ALL)


@pytest.mark.parametrize("where", ["--replicas", "--workers"])  # MirroredStrategy, MultiWorkerMirroredStrategy
def test_losses_and_what_is_exchanged(where, one_process, native_required):
    two = _run(where, "2", *_ALL)
    for name in ("agc", "synchronized_batch_norm"):
        np.testing.assert_allclose(two[name].losses, one_process[name].losses, rtol=1e-5)
    losses = np.array(two["batch_norm"].losses)
    assert np.abs(losses / one_process["batch_norm"].losses - 1).max() > 1e-3

    # Logical devices sum the gradients, listed once for each of them, workers the gradients and the loss. Statistics
    # would be counted.
    gradients = two["agc"].trainable
    assert two["agc"].sums == ([gradients, gradients] if where == "--replicas" else [gradients, 1])
    assert len(two["synchronized_batch_norm"].sums) > 10


@pytest.mark.parametrize("config", ["{bad", ""])
def test_a_cluster_description_that_is_no_json(monkeypatch, config):
    from examples import distributed_training

    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(SystemExit, match=re.escape(f"TF_CONFIG must be JSON, got '{config}': Expect")):
        distributed_training.main()


def test_a_worker_that_fails_ends_the_others(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(tf_agc.__file__).parents[1]))
    from examples import distributed_training

    (free,) = distributed_training.free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        # The second worker cannot listen there, and the first one would wait for it.
        monkeypatch.setattr(distributed_training, "free_ports", lambda count: [free, taken.getsockname()[1]])
        with pytest.raises(SystemExit, match="a worker failed: see its error above"):
            asyncio.run(distributed_training.run_workers(2, "--normalization", "agc"))
    children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not any("distributed_training" in pathlib.Path(f"/proc/{pid}/cmdline").read_text() for pid in children)


_FIT = """
import sys
import keras, numpy as np, tensorflow as tf, tf_agc
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
random = np.random.default_rng(0)
x, y = random.standard_normal((32, 6, 6, 3)).astype("float32"), random.standard_normal((32, 1)).astype("float32")
mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for name, strategy in [("one", tf.distribute.get_strategy()), ("two", mirrored)]:
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([
            keras.Input((6, 6, 3)), keras.layers.Conv2D(4, 3), tf_agc.AutomaticGainControl("relu"),
            keras.layers.Flatten(), keras.layers.Dense(1),
        ])
        tf_agc.calibrate(model, x)
        model.compile(OPTIMIZER, "mse")
    monitor = tf_agc.GainMonitor(sys.argv[1] + "/" + name, x[:4])
    history = model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[monitor]).history
    print(*history["loss"])
"""


def test_fit_calibrate_and_monitor_under_mirrored_strategy(tmp_path, native_required):
    fit = _FIT.replace("OPTIMIZER", "keras.optimizers.SGD(0.05)")
    lines = python("-c", fit, tmp_path).stdout.splitlines()
    one, two = ([float(loss) for loss in line.split()] for line in lines[-2:])
    np.testing.assert_allclose(two, one, rtol=1e-5)
    with (tmp_path / "one" / "gains.csv").open() as first, (tmp_path / "two" / "gains.csv").open() as second:
        rows, others = list(csv.DictReader(first)), list(csv.DictReader(second))
    assert [row["step"] for row in rows] == [row["step"] for row in others] == ["0", "4", "8", "12"]
    for row, other in zip(rows, others, strict=True):
        for column in set(row) - {"layer"}:
            assert float(other[column]) == pytest.approx(float(row[column]), rel=1e-4)


def test_clipping_on_several_replicas(tmp_path, native_required):
    page = (SCRIPT.parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (clips_the_sum,) = re.findall(r"^class ClipsTheSum.*?\n\n\n", page, re.MULTILINE | re.DOTALL)
    losses = {}
    for name, optimizer in {
        "Keras's": "keras.optimizers.SGD(0.2, global_clipnorm=1.0)",
        "the page's": "ClipsTheSum(0.2)",
    }.items():
        fit = _FIT.replace("import sys", f"import sys\nimport keras, tensorflow as tf\n{clips_the_sum}", 1)
        where = tmp_path / name
        where.mkdir()
        lines = python("-c", fit.replace("OPTIMIZER", optimizer), where).stdout.splitlines()
        losses[name] = np.array([[float(loss) for loss in line.split()] for line in lines[-2:]])
    one, two = losses["Keras's"]
    assert np.abs(two / one - 1).max() > 1e-3  # what the page warns of
    np.testing.assert_allclose(losses["the page's"], [one, one], rtol=1e-4)
