"""The training study: killed runs go on to the same bits, no row is lost or repeated, the search sees no test split.

Trained here are a few steps on the digits; what a study finds is not tested.
"""

import concurrent.futures
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import sklearn.datasets

import tf_agc

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"
VERSIONS = {"tf_agc": "0", "tensorflow": "2", "keras": "3", "python": "3.12"}
MACHINE = VERSIONS | {"cpu": "some", "cores": "2", "instruction set": "none", "commit": "abc"}


@pytest.fixture
def split_files(tmp_path):
    """Files of three splits of the digits."""
    from study import study_training
    from study.image_datasets import Split

    digits = sklearn.datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    files = {}
    for name, part in (("train", slice(0, 130)), ("validation", slice(200, 300)), ("test", slice(300, 400))):
        files[name] = str(tmp_path / f"{name}.npz")
        study_training.save_split(Split(images[part], digits.target[part]), pathlib.Path(files[name]))
    return files


# ---- One run


@pytest.mark.parametrize(("normalization", "killed"), [("agc", True), ("batch_norm", False)])
def test_a_resumed_run_is_the_uninterrupted_one(split_files, tmp_path, native_required, normalization, killed):
    """Killed, or left behind by the process that started it: weights, optimizer and results are the same bits."""
    from study import study_training

    job = study_training.Job(
        network="plain", normalization=normalization, precision="float32", batch_size=4, seed=3, learning_rate=0.01,
        epochs=2, augment=True, splits=split_files, checkpoint=str(tmp_path / "resumed.npz"), checkpoint_seconds=0.0,
    )  # fmt: skip

    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(tf_agc.__file__).parents[1])}
    command = [sys.executable, str(TOOLS), "study.study_training", json.dumps(dataclasses.asdict(job))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        message = json.loads(process.stdout.readline() or "{}")
        assert message.get("saved"), process.stderr.read()
        if killed:
            process.kill()
        process.stdout.close()
        process.stderr.read()
    assert process.returncode == (-9 if killed else 1)

    steps = []
    results = []
    for checkpoint in ("resumed.npz", "uninterrupted.npz"):
        keras.backend.clear_session()  # layers are called as in a fresh process
        changed = dataclasses.replace(job, checkpoint=str(tmp_path / checkpoint))
        seen = []
        result = study_training.train(changed, seen.append)
        steps.append([message["step"] for message in seen])
        results.append({key: value for key, value in result.items() if key not in ("seconds_per_step", "peak_mib")})
    resumed, uninterrupted = steps
    assert uninterrupted[-1] == 2 * 33  # 130 images are 32 batches of 4, and one of 2
    assert 0 < len(resumed) < len(uninterrupted) and resumed == uninterrupted[-len(resumed) :]
    assert results[0] == results[1]
    assert len(results[0]["curve"]) == 2 * study_training.RECORDS_PER_EPOCH
    assert len(results[0]["gains"]) == (3 * 6 if normalization == "agc" else 0)
    with np.load(tmp_path / "resumed.npz") as one, np.load(tmp_path / "uninterrupted.npz") as other:
        for name in set(one.files) - {"logs"}:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_diverged_run_ends_early(split_files, tmp_path, fresh_keras):
    from study import study_training

    # A rate that is only too high may end in a dead network instead, whose loss is finite: it depends on the processor.
    job = study_training.Job(
        network="plain", normalization="none", precision="float32", batch_size=10, seed=0, learning_rate=np.nan,
        epochs=50, augment=False, splits=split_files, checkpoint=str(tmp_path / "checkpoint.npz"),
    )  # fmt: skip
    result = study_training.train(job, lambda message: None)
    assert np.isnan(result["loss"]) and 0 <= result["accuracy"] <= 0.3
    assert 1 <= len(result["curve"]) <= study_training.RECORDS_PER_EPOCH and result["peak_mib"] > 100


def test_the_peak_is_forgotten():
    from benchmarks import memory

    block = np.ones(2**24)
    before = memory.peak_mib()
    del block
    memory.forget_peak()
    assert memory.peak_mib() <= before - 100  # of 128 MiB


def test_a_checkpoint_of_other_code_is_not_continued(tmp_path, monkeypatch):
    from study import study_training

    def state():
        variable = keras.Variable(np.zeros(3))
        return variable, study_training._State([variable], tmp_path / "checkpoint.npz")

    monkeypatch.setattr(study_training.machine, "describe", lambda: MACHINE | {"date": "today"})
    variable, saved = state()
    variable.assign([1, 2, 3])
    saved.step = 7
    saved.save()

    monkeypatch.setattr(study_training.machine, "describe", lambda: MACHINE | {"date": "tomorrow"})
    variable, same = state()
    same.restore()
    assert (same.step, variable.numpy().tolist()) == (7, [1, 2, 3])

    monkeypatch.setattr(study_training.machine, "describe", lambda: MACHINE | {"date": "today", "commit": "def"})
    variable, other = state()
    other.restore()
    assert (other.step, variable.numpy().tolist()) == (0, [0, 0, 0])


@pytest.mark.parametrize("augment", [False, True])
def test_batches(augment):
    """Every image once an epoch; shifted and mirrored as NumPy does; from any step on the same ones."""
    from study import training_recipe
    from study.image_datasets import Split

    images = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 2)).astype(np.uint8)
    split = Split(images, np.arange(10))

    def batches(**options):
        return list(training_recipe.training_batches(split, 4, 2, 1, augment, **options).as_numpy_iterator())

    everything = batches()
    assert [len(labels) for _, labels in everything] == [4, 4, 2] * 2
    orders = [np.concatenate([labels for _, labels in everything[part]]) for part in (slice(3), slice(3, 6))]
    assert [sorted(order) for order in orders] == [list(range(10))] * 2 and list(orders[0]) != list(orders[1])
    for expected, got in zip(everything[2:], batches(start=2), strict=True):
        np.testing.assert_array_equal(expected[0], got[0])
        np.testing.assert_array_equal(expected[1], got[1])

    changes = set()
    for image, label in ((image, label) for batch in everything for image, label in zip(*batch, strict=True)):
        padded = np.pad(images[label], [(4, 4), (4, 4), (0, 0)], mode="reflect")
        crops = {
            (top, left, step): padded[top : top + 6, left : left + 5][:, ::step]
            for top in range(9)
            for left in range(9)
            for step in (1, -1)
        }
        found = [change for change, crop in crops.items() if np.array_equal(crop, image)]
        assert found
        changes.add(found[0])
    if augment:
        tops, lefts, mirrored = map(set, zip(*changes, strict=True))
        assert len(tops) > 4 and len(lefts) > 4 and mirrored == {1, -1}
    else:
        np.testing.assert_array_equal(everything[0][0], images[everything[0][1]])


# ---- The matrix


class Trainer:
    """In place of training: invents results, notes its jobs, and is interrupted at the job that it is told."""

    def __init__(self):
        self.jobs = []
        self.interrupted_at = None
        self.stopped = 0

    def stop(self):
        self.stopped += 1

    def train(self, job, log, show):
        if len(self.jobs) == self.interrupted_at:
            raise KeyboardInterrupt
        self.jobs.append(job)
        show(0.5)
        layers = ["first", "second"] if job["normalization"].startswith("agc") else []
        return {
            "accuracy": 0.5 + 0.01 * len(self.jobs),
            "loss": 1.0,
            "seconds_per_step": 0.01,
            "peak_mib": 500.0,
            "curve": [{"epoch": 1.0, "loss": 1.5, "accuracy": 0.4, "validation_accuracy": 0.3}],
            "gains": [
                {"epoch": epoch, "layer": layer, "gain": epoch + 1, "output_std": 1.0, "sparsity": 0.5}
                for epoch in (0.0, 1.0)
                for layer in layers
            ],
        }


@pytest.fixture
def trainer(monkeypatch):
    from benchmarks import machine
    from study import study

    trainer = Trainer()
    monkeypatch.setattr(study, "_Trainings", lambda lock: trainer)
    monkeypatch.setattr(study, "RUNS_AT_ONCE", 1)  # in the order of the plan
    monkeypatch.setattr(study, "_split_files", lambda *_: {name: name for name in ("train", "validation", "test")})
    monkeypatch.setattr(study, "_digest", lambda files: "0123")
    monkeypatch.setattr(machine, "describe", lambda: MACHINE)
    return trainer


SEARCHED = 7 * (4 + 4 + 3)  # methods, rates at the batches 128, 2 and 8 of --quick


@pytest.fixture
def call(tmp_path):
    """Calls the tool in this process, with directories of this test's own."""
    from study import study

    def call(command, *arguments):
        options = ["--results_dir", str(tmp_path / "results")]
        if command == "run":
            options += ["--work_dir", str(tmp_path / "work")]
        study.main([command, *map(str, arguments), *options])

    return call


def read_results(tmp_path):
    from study import study_results

    return study_results.Results(tmp_path / "results")


def test_interrupted_and_continued(trainer, call, tmp_path, capsys):
    """No run is lost or done twice; searches are told of no test split, the comparison ends on it."""
    trainer.interrupted_at = 5
    with pytest.raises(SystemExit, match="130"):
        call("run", "--quick", "--search")
    assert "Interrupted: the same command goes on." in capsys.readouterr().err
    assert len(read_results(tmp_path).runs) == 5 and trainer.stopped == 1
    trainer.interrupted_at = None
    call("run", "--quick", "--search")
    call("run", "--quick", "--search")
    assert len(trainer.jobs) == SEARCHED == len({json.dumps(job) for job in trainer.jobs})
    assert all(list(job["splits"]) == ["train", "validation"] for job in trainer.jobs)

    call("run", "--quick")
    results = read_results(tmp_path)
    compared = results.runs[SEARCHED:]
    assert len(results.runs) == len(trainer.jobs) == SEARCHED + 21 == len(results.finished())
    assert all(list(job["splits"]) == ["train", "validation", "test"] for job in trainer.jobs[SEARCHED:])
    assert {run.split for run in results.runs[:SEARCHED]} == {"validation"}
    assert {run.split for run in compared} == {"test"}
    # The later searches were better, and so the highest rate won.
    rates = {run.batch_size: run.learning_rate for run in compared}
    assert rates == {128: 0.6, 2: 0.15, 8: 0.15}
    agc = compared[0]
    assert (agc.normalization, agc.mean_gain, agc.sparsity, agc.commit) == ("agc", 2.0, 0.5, "abc")
    assert np.isnan(compared[2].mean_gain)
    assert len(results.curves) == SEARCHED + 21 and len(results.gains) == 2 * 3 * 2 * 2

    call("run", "--quick", "--estimate")
    assert "21 of 21 runs are finished; the others take about 0.0 hours" in capsys.readouterr().out

    call("table")
    table = capsys.readouterr().out
    for text in (
        "| digits, 4 epochs, float32 | plain | 128 | AGC | 0.05: ",
        "### digits, 4 epochs, float32",
        "| plain | 128 | BatchNorm | -2.0 |  |  | one seed | 1.00 |",
        "| plain | AGC | 2, 128 | +7.0 |  |",
    ):
        assert text in table
    call("plot")
    for path in capsys.readouterr().out.split():
        assert pathlib.Path(path).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {
        f"digits_4_float32_{name}.png" for name in ("accuracy", "curves_plain", "memory", "gains_plain")
    }


def test_one_batch_size_is_not_drawn_against_batch_sizes(trainer, call, tmp_path, capsys):
    call("run", "--quick", "--search", "--normalization", "agc", "none")
    call("run", "--quick", "--batch_size", 128, "--normalization", "agc", "none")
    call("plot")
    names = {path.name for path in (tmp_path / "results").glob("*.png")}
    assert names == {f"digits_4_float32_{name}.png" for name in ("curves_plain", "memory", "gains_plain")}


def test_killed_between_two_files(trainer, call, tmp_path, monkeypatch):
    """What was written of a run that counts as unfinished is replaced, not repeated."""
    from benchmarks import result_files

    write = result_files.write_csv

    def die_at_runs(path, *arguments, **options):
        if path.name == "runs.csv":
            raise KeyboardInterrupt
        write(path, *arguments, **options)

    monkeypatch.setattr(result_files, "write_csv", die_at_runs)
    with pytest.raises(SystemExit, match="130"):
        call("run", "--quick", "--search")
    assert (len(read_results(tmp_path).runs), len(read_results(tmp_path).curves)) == (0, 1)
    monkeypatch.setattr(result_files, "write_csv", write)
    call("run", "--quick", "--search")
    assert (len(read_results(tmp_path).runs), len(read_results(tmp_path).curves)) == (SEARCHED, SEARCHED)


def test_the_order_of_the_matrix():
    from study import study, study_report, study_training

    assert set(study.NETWORKS) == set(study_training.NETWORKS)
    assert set(study.NORMALIZATIONS) == set(study_report.TITLES) == set(study_training.METHODS)
    cells = study.FULL.comparison(lambda cell: cell.batch_size / 1000)
    assert len(cells) == len(set(cells))
    planned = {
        (each.network, each.batch_size, each.epochs, method): max(
            other.seeds
            for other in study.FULL.comparisons
            if method in other.normalizations
            and (other.network, other.batch_size, other.epochs) == (each.network, each.batch_size, each.epochs)
        )
        for each in study.FULL.comparisons
        for method in each.normalizations
    }
    kinds = [(cell.network, cell.batch_size, cell.epochs, cell.normalization) for cell in cells]
    assert {kind: kinds.count(kind) for kind in kinds} == planned
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert all(cell.learning_rate == cell.batch_size / 1000 for cell in cells)
    searched = study.FULL.search()
    assert {cell.split for cell in searched} == {"validation"} and {cell.seed for cell in searched} == {1000}
    assert {cell.precision for cell in cells + searched} == {"mixed_bfloat16"}
    # Every method at every batch size is searched.
    assert {(cell.network, cell.batch_size, cell.normalization) for cell in cells} == {
        (cell.network, cell.batch_size, cell.normalization) for cell in searched
    }


def test_a_part_of_the_matrix():
    from study import study

    def plan(*arguments):
        return study.plan_of(study.parse_options(["run", *arguments]))

    chosen = plan("--network", "plain", "--batch_size", "128", "--normalization", "agc", "none", "--epochs", "2")
    cells = chosen.comparison(lambda *_: 0.1)
    assert [(cell.seed, cell.normalization) for cell in cells] == [
        (seed, name) for seed in range(3) for name in ("agc", "none")
    ]
    assert {(cell.network, cell.batch_size, cell.epochs) for cell in cells} == {("plain", 128, 2)}
    assert {cell.seed for cell in plan("--seeds", "1").comparison(lambda *_: 0.1)} == {0}
    assert {cell.network for cell in plan("--batch_size", "2").search()} == set(study.NETWORKS)


# ---- Choosing and comparing


def run_row(**changes):
    from study import study_results

    values = dict(
        dataset="digits", split="validation", network="plain", normalization="agc", precision="float32",
        batch_size=128, seed=0, learning_rate=0.1, epochs=2, accuracy=0.5, loss=1.0, seconds_per_step=0.1,
        peak_mib=1.0, mean_gain=1.0, sparsity=0.5, machine="one", commit="abc",
    )  # fmt: skip
    return study_results.Run(**values | changes)


def test_the_best_learning_rate(tmp_path):
    from study import study_results

    results = study_results.Results(tmp_path)
    wanted = run_row(learning_rate=0.0).cell
    with pytest.raises(
        study_results.StudyError,
        match="^no learning rate was searched for plain, agc, batch 128, seed 0 on digits in float32: "
        "run the same command with --search first$",
    ):
        results.best_learning_rate(wanted)
    results.runs = [
        run_row(learning_rate=0.4, accuracy=0.7),
        run_row(learning_rate=0.2, accuracy=0.7),
        run_row(learning_rate=0.1, accuracy=0.6),
        run_row(learning_rate=0.8, accuracy=0.9, loss=float("nan")),
        run_row(learning_rate=0.3, accuracy=0.9, split="test"),
        run_row(learning_rate=0.5, accuracy=0.9, normalization="none"),
        run_row(learning_rate=0.6, accuracy=0.9, epochs=3),
        run_row(learning_rate=0.7, accuracy=0.9, batch_size=2),
        run_row(learning_rate=0.9, accuracy=0.9, precision="mixed_bfloat16"),
    ]
    assert results.best_learning_rate(wanted) == 0.2


def test_margins():
    from study import study_report

    ours, theirs = np.random.default_rng(0).normal(70, 1, (2, 5))
    value, margin = study_report.difference(ours.tolist(), theirs.tolist())
    assert value == pytest.approx(ours.mean() - theirs.mean())
    assert margin == pytest.approx(2 * np.sqrt(ours.var(ddof=1) / 5 + theirs.var(ddof=1) / 5))
    # Student's t of two equal deviations: 2 / sqrt(2 / 3) at four degrees of freedom.
    assert study_report.p_value([1.0, 2.0, 3.0], [3.0, 4.0, 5.0]) == pytest.approx(0.0705, abs=1e-4)
    assert np.isnan(study_report.p_value([1.0], [2.0, 3.0]))
    assert study_report.verdict(1.0, 2.0) == "equal" and study_report.verdict(-1.0, 2.0) == "equal"
    assert study_report.verdict(3.0, 2.0) == "better" and study_report.verdict(-3.0, 2.0) == "worse"
    assert study_report.verdict(3.0, study_report.difference([1.0], [2.0, 3.0])[1]) == "one seed"


def test_step_times_of_one_machine_are_compared():
    from study import study_report

    def row(machine, milliseconds):
        return run_row(machine=machine, seconds_per_step=milliseconds / 1e3)

    assert study_report._step_ratio([row("old", 1), row("new", 10)], [row("new", 20), row("new", 30)]) == "2.50"
    assert study_report._step_ratio([row("old", 1)], [row("new", 20)]) == ""


def test_two_learning_rates_are_not_mixed(tmp_path):
    from study import study_report, study_results

    results = study_results.Results(tmp_path)
    results.runs = [run_row(split="test"), run_row(split="test", seed=1, learning_rate=0.2)]
    with pytest.raises(study_results.StudyError, match=r"plain, 128, agc has runs at the learning rates \[0.1, 0.2\]"):
        study_report.tables(results)


@pytest.mark.parametrize(("base", "expected"), [(300, 350), (998, 1), (1001, 0)])
def test_the_largest_batch(base, expected):
    from study import study_memory

    row = study_memory.largest_batch("some", "agc", 1000, lambda network, normalization, batch: base + 2 * batch)
    assert expected * 0.98 <= row.largest_batch <= expected
    assert expected == 0 or row.peak_mib == base + 2 * row.largest_batch
    other = dataclasses.replace(row, normalization="batch_norm", largest_batch=10)
    line = f"| some | 1000 | {row.largest_batch} | 10 | {row.largest_batch / 10:.2f} |"
    half_done = dataclasses.replace(row, network="interrupted")
    assert study_memory.table([row, other, half_done]).splitlines()[2:] == [line]


def test_a_batch_that_kills_its_process_is_too_large(monkeypatch):
    from benchmarks import bench_model
    from study import study_memory
    from study.study_results import StudyError

    status = -signal.SIGKILL

    def peak(network, normalization, batch):
        if batch > 10:
            raise subprocess.CalledProcessError(status, "python")
        return float(batch)

    monkeypatch.setattr(bench_model, "peak_of_fresh_process", peak)
    assert study_memory.largest_batch("some", "agc", 1000).largest_batch == 10
    status = 1
    with pytest.raises(StudyError, match="some with agc at a batch of 16 ended with 1: see above"):
        study_memory.largest_batch("some", "agc", 1000)


def test_memory_goes_on(trainer, call, tmp_path, monkeypatch, capsys):
    """Killed between two networks, it measures the others alone; rows of another limit are not mixed in."""
    from study import study_memory

    measured = []

    def largest_batch(network, normalization, limit_mib):
        if len(measured) == 2:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append((network, normalization))
        return study_memory.LargestBatch(network, normalization, float(limit_mib), 10 * len(measured), 99.0)

    monkeypatch.setattr(study_memory, "largest_batch", largest_batch)
    with pytest.raises(SystemExit, match="130"):
        call("memory")
    call("memory", "--network", "plain")
    assert measured[-1] == "interrupted"  # the plain network was finished
    call("memory")
    measured.remove("interrupted")
    assert len(measured) == len(set(measured)) == len(study_memory.NETWORKS) * len(study_memory.NORMALIZATIONS)
    assert f"| {study_memory.NETWORKS['plain']} | 2048 | 10 | 20 | 0.50 |" in capsys.readouterr().out
    expected = ".*memory.csv was made with another limit_mib: remove it, or pass another --results_dir$"
    assert_one_sentence(call, "memory", "--limit_mib", 1024, match=expected)


# ---- Sentences


def assert_one_sentence(call, *arguments, match):
    with pytest.raises(SystemExit, match=f"^error: {match}") as error:
        call(*arguments)
    assert "\n" not in str(error.value)


def test_a_foreign_header_is_refused(trainer, call, tmp_path):
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "runs.csv"
    path.write_text("# keras: 3\nnetwork,accuracy\nplain,1\n", encoding="utf-8")
    expected = r".*runs.csv must have the columns dataset,split,.*, got network,accuracy: pass another --results_dir$"
    assert_one_sentence(call, "run", "--quick", "--search", match=expected)
    assert path.read_text(encoding="utf-8") == "# keras: 3\nnetwork,accuracy\nplain,1\n"
    assert not trainer.jobs


def test_results_of_another_version_are_refused(trainer, call, tmp_path):
    read_results(tmp_path).add(run_row(), [], [], VERSIONS | {"keras": "2"})
    expected = ".*results has results of keras 2, and this is 3: pass another --results_dir$"
    assert_one_sentence(call, "run", "--quick", "--search", match=expected)


def test_results_of_other_images_are_refused(trainer, call, tmp_path, monkeypatch):
    from study import study

    call("run", "--quick", "--search")
    # Of another data set: nothing to compare.
    read_results(tmp_path).add(run_row(), [], [], VERSIONS | {"cifar10 images": "4567"})
    monkeypatch.setattr(study, "_digest", lambda files: "89ab")
    expected = ".*results has results of digits images 0123, and this is 89ab: pass another --results_dir$"
    assert_one_sentence(call, "run", "--quick", match=expected)


def test_other_images_are_told_apart(split_files, tmp_path):
    from study import study, study_training

    files = dict(split_files)
    digest = study._digest(files)
    assert study._digest(files) == digest
    other = study_training.load_split(files["test"])
    other.labels[0] += 1
    files["test"] = str(tmp_path / "other.npz")
    study_training.save_split(other, tmp_path / "other.npz")
    assert study._digest(files) != digest
    cell = run_row().cell
    assert study._checkpoint(cell, digest, tmp_path) != study._checkpoint(cell, study._digest(files), tmp_path)


@pytest.mark.parametrize("used", ["work", "results"])
def test_two_at_once_are_refused(trainer, call, tmp_path, used):
    (tmp_path / used).mkdir()
    other = os.open(tmp_path / used, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        expected = f"another run uses .*{used}: wait for it, or use another directory$"
        assert_one_sentence(call, "run", "--quick", "--search", match=expected)
    finally:
        os.close(other)
    assert not trainer.jobs


def test_other_sentences(trainer, call, capsys):
    assert_one_sentence(call, "run", "--quick", match="no learning rate was searched for plain, agc, batch 128, ")
    assert_one_sentence(
        call, "run", "--quick", "--network", "resnet20_pre", match="--quick is the plain network on digits"
    )
    expected = "nothing of the plan is left by these options. It has resnet20_pre at a batch of 128 over 8 epochs; "
    assert_one_sentence(call, "run", "--network", "resnet20_pre", "--batch_size", 1, match=expected)
    assert_one_sentence(call, "table", match=".*results has no results: pass another --results_dir, or run the study")
    assert_one_sentence(call, "plot", match=".*results has no results: ")
    with pytest.raises(SystemExit, match="2"):
        call("run", "--epochs", 0)
    assert "argument --epochs: must be >= 1, got 0" in capsys.readouterr().err
    call("run", "--estimate")
    assert "0 of 150 runs are finished; the others take about" in capsys.readouterr().out


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """Runs a text in place of study_training.py."""
    from study import study

    monkeypatch.setattr(study, "TOOLS", tmp_path)
    with (tmp_path / "lock").open("w") as lock:
        yield study._Trainings(lock.fileno())


def test_a_training_process_that_fails(trainings, tmp_path):
    from study import study_results

    (tmp_path / "__main__.py").write_text("raise MemoryError('too large')", encoding="utf-8")
    message = "^a training process ended with exit code 1: see .*log; the same command goes on$"
    with pytest.raises(study_results.StudyError, match=message):
        trainings.train({}, tmp_path / "log", lambda done: None)
    assert "too large" in (tmp_path / "log").read_text(encoding="utf-8")


def test_stopped_processes(trainings, tmp_path):
    """All that run at a time end, and none starts after them."""
    from study import study_results

    sleeping = 'import time; print(\'{"step": 1, "steps": 2}\', flush=True); time.sleep(1000)'
    (tmp_path / "__main__.py").write_text(sleeping, encoding="utf-8")
    started = threading.Barrier(3)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(trainings.train, {}, tmp_path / f"log{number}", lambda done: started.wait())
            for number in range(2)
        ]
        started.wait()
        trainings.stop()
        for future in futures:
            with pytest.raises(study_results.StudyError, match="exit code -9"):
                future.result()
    with pytest.raises(concurrent.futures.CancelledError):
        trainings.train({}, tmp_path / "log", lambda done: None)


def test_several_runs_at_once(trainer, call, tmp_path, monkeypatch):
    from study import study

    monkeypatch.setattr(study, "RUNS_AT_ONCE", 2)
    together = threading.Barrier(2)
    train = trainer.train

    def train_together(*arguments):
        together.wait(60)
        return train(*arguments)

    monkeypatch.setattr(trainer, "train", train_together)
    call("run", "--quick", "--search", "--batch_size", 128)  # an even number of runs
    assert len(read_results(tmp_path).runs) == len({json.dumps(job) for job in trainer.jobs}) == 7 * 4
