"""The benchmark's tools: what they count, what they write and read again, and that our op is what is timed."""

import argparse
import collections
import dataclasses
import functools
import pathlib
import re

import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf

import tf_agc
from tf_agc import native

ROOT = pathlib.Path(__file__).resolve().parents[2]


class _Copy:
    """A limit of one second for every copy."""

    def timers(self, size):
        return [lambda: 1.0, lambda: 2.0]


@pytest.mark.parametrize(
    ("network", "at_most"),
    [
        ("plain CNN, 6 layers", 0.52),
        ("ResNet-20, pre-activation", 0.51),
        ("ResNet-20, post-activation", 0.56),
        ("ResNet-50, 64x64", 0.66),
    ],
)
def test_kept_activations_against_batch_normalization(fresh_keras, native_required, network, at_most):
    from benchmarks import bench_model

    at_size = bench_model.NETWORKS[network]
    images, labels = at_size.data()
    agc, batch_norm, none = (
        bench_model.kept_bytes(at_size.make(name), images, labels) for name in ("agc", "batch_norm", "none")
    )
    assert none < agc <= at_most * batch_norm


def test_times_our_op(native_required):
    from benchmarks import bench_cpu

    job = bench_cpu.Job((2, 5, 3, 7), "channels_first", "bfloat16", peers=False)
    rows = list(bench_cpu.measure(_Copy(), job, quick=True))
    rows = [row for row in rows if isinstance(row, bench_cpu.Row)]  # relu alone may be too short to be timed
    assert all(job.made(row) for row in rows)
    ours = {row.passes for row in rows if row.candidate == "tf_agc"}
    assert ours == set(bench_cpu.PASSES)
    assert {row.role for row in rows} == {"ours", "floor", "limit"}
    # Two, three or five passes over memory, of which the faster copy does two in one second.
    limits = {row.passes: row.limit_ms for row in rows if row.role == "ours"}
    assert limits["forward fresh"] == pytest.approx(1000)
    assert limits["backward in place"] == pytest.approx(1500)
    assert limits["forward + backward"] == pytest.approx(2500)


def test_times_junctions(native_required):
    from benchmarks import bench_cpu

    job = bench_cpu.Job((2, 5, 3, 8), "channels_last", "bfloat16", junction=True, peers=False)
    rows = [row for row in bench_cpu.measure(_Copy(), job, quick=True) if isinstance(row, bench_cpu.Row)]
    assert all(job.made(row) for row in rows)
    assert not any(dataclasses.replace(job, junction=False).made(row) for row in rows)
    for candidate in ("tf_agc", "tf_agc + Add + relu"):
        assert {row.passes for row in rows if row.candidate == candidate} == set(bench_cpu.JUNCTION_PASSES)
    # Three, five or eight passes over memory, of which the faster copy does two in one second.
    limits = {row.passes: row.limit_ms for row in rows if row.role == "ours"}
    assert limits["junction forward fresh"] == pytest.approx(1500)
    assert limits["junction backward in place"] == pytest.approx(2500)
    assert limits["junction forward + backward"] == pytest.approx(4000)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_candidate_is_a_junction(data_format, dtype):
    from benchmarks import bench_cpu

    job = bench_cpu.Job((3, 5, 3, 8), data_format, dtype, junction=True)
    x, _, (shortcut, *_) = bench_cpu._maps(job)
    names = []
    for candidate in bench_cpu._candidates(job):
        if candidate.jit:  # of which there is one without, made alike
            continue
        layer, trained = candidate.make_layer(0)
        try:
            with tf_agc.implementation("reference"), tf.GradientTape() as tape:
                z = layer(x, tf.constant(16.0, x.dtype, x.shape)) - 16  # relu changes nothing there
                y = layer(x, shortcut)
        except (tf.errors.OpError, ValueError):
            assert data_format == "channels_first" or dtype != "float32", candidate.name
            continue
        tolerance = 1e-5 if dtype == "float32" else 0.2
        np.testing.assert_allclose(tf.cast(y, "float32"), tf.cast(tf.nn.relu(z + shortcut), "float32"), atol=tolerance)
        assert np.std(tf.cast(z, "float32")) > 0.5
        assert None not in tape.gradient(y, trained), candidate.name
        names.append(candidate.name)
    assert {"tf_agc", "tf_agc + Add + relu", "Add + relu alone", "composite of stock ops, graph"} <= set(names)


def _chain_of_five(name, training, **job):
    """Runs a chain in a graph as TensorFlow has optimized it; returns how often that has each op."""
    from benchmarks import bench_cpu

    job = bench_cpu.Job((1, 4, 4, 3), "channels_last", "float32", **job)
    candidate = next(candidate for candidate in bench_cpu._candidates(job) if candidate.name == name)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        shape = (1, 4, 4, 3)
        inputs = [tf.compat.v1.placeholder(tf.float32, shape) for _ in range(7 if job.junction else 2)]
        feed = {maps: np.full(shape, 0.1 * i) for i, maps in enumerate(inputs)}
        x, dy, *shortcuts = inputs
        y, trained = x, []
        for i in range(5):
            layer, parameters = candidate.make_layer(i)
            y = layer(y, shortcuts[i] if job.junction else None)
            trained += parameters
        session.run(tf.compat.v1.global_variables_initializer())
        results = tf.gradients(y, [x, *shortcuts, *trained], dy) if training else y
        options = tf.compat.v1.RunOptions(output_partition_graphs=True)
        metadata = tf.compat.v1.RunMetadata()
        session.run(results, feed, options, metadata)
    # oneDNN renames what it computes.
    return collections.Counter(
        node.op.removeprefix("_MklNative") for graph in metadata.partition_graphs for node in graph.node
    )


def test_relus_of_a_chain_stay_apart():
    assert _chain_of_five("relu alone", training=False)["Relu"] == 5


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("tf_agc", {"TfAgc>Agc": 5, "Relu": 0, "AddV2": 0}, {"TfAgc>AgcGrad": 5, "ReluGrad": 0}),
        ("tf_agc + Add + relu", {"TfAgc>Agc": 5, "Relu": 5, "AddV2": 5}, {"TfAgc>AgcGrad": 5, "ReluGrad": 5}),
        (
            "fused_batch_norm, graph",
            {"FusedBatchNormV3": 5, "Relu": 5, "AddV2": 5},
            {"FusedBatchNormGradV3": 5, "ReluGrad": 5},
        ),
        ("Add + relu alone", {"Relu": 5, "AddV2": 5}, {"ReluGrad": 5}),
    ],
)
def test_junctions_of_a_chain_stay_apart(native_required, name, forward, backward):
    """And nothing but junctions is timed: no sums of gradients, no copies."""
    found = _chain_of_five(name, training=False, junction=True)
    assert {op: found[op] for op in forward} == forward
    found = _chain_of_five(name, training=True, junction=True)
    expected = forward | backward | {"AddN": 0}
    assert {op: found[op] for op in expected} == expected


def test_results_can_be_read_again(tmp_path):
    from benchmarks import bench, bench_cpu, result_files

    def row(candidate, role, ms):
        return bench_cpu.Row(
            (1, 2, 3, 4), "channels_last", "float32", "forward + backward", candidate, role, ms, 0.5, 2.0
        )

    rows = [row("tf_agc", "ours", 4.0), row("slow, XLA", "peer", 16.0), row("fast, graph", "peer", 8.0)]
    path = tmp_path / "rows.csv"
    result_files.write_csv(path, rows, {"cpu": "some: thing", "commit": "abc"})
    assert bench.read_csv(path) == (rows, {"cpu": "some: thing", "commit": "abc"})
    line = bench.cpu_table(rows, {}).splitlines()[2]
    assert line == ("| 1x2x3x4 | channels_last, float32 | forward + backward | 4 ± 0.5 | 2.00 | fast, graph: 8 | 2.0 |")


def test_junctions_of_a_chain_are_in_place(counters):
    """In inference all but the first, whose x is an argument; in training dx, while the next ones keep every x."""
    _chain_of_five("tf_agc", training=False, junction=True)
    counts = counters.read()
    assert (counts["forward"], counts["forward_in_place"]) == (5, 4)
    counters.reset()
    _chain_of_five("tf_agc", training=True, junction=True)
    counts = counters.read()
    assert (counts["forward"], counts["forward_in_place"]) == (5, 0)
    assert (counts["backward"], counts["dx_over_kept"]) == (5, 5)


def test_the_table_of_junctions():
    from benchmarks import bench, bench_cpu

    def row(candidate, role, ms, passes="junction forward + backward"):
        return bench_cpu.Row((1, 2, 3, 4), "channels_last", "float32", passes, candidate, role, ms, 0.5, 2.0)

    junctions = [
        row("tf_agc", "ours", 4.0),
        row("tf_agc + Add + relu", "ours", 8.0),
        row("slow, XLA", "peer", 16.0),
        row("fast, graph", "peer", 10.0),
    ]
    others = [row("tf_agc", "ours", 3.0, "forward + backward"), row("fast, graph", "peer", 1.0, "forward + backward")]
    (line,) = bench.junction_table([*others, *junctions], {}).splitlines()[2:3]
    assert line == "| 1x2x3x4 | channels_last, float32 | 4 ± 0.5 | 2.00 | 0.50 | fast, graph: 10 | 2.5 |"
    _, _, line, *rest = bench.cpu_table([*others, *junctions], {}, "forward + backward").splitlines()
    assert line == "| 1x2x3x4 | channels_last, float32 | forward + backward | 3 ± 0.5 | 1.50 | fast, graph: 1 | 0.3 |"
    assert not any("|" in each for each in rest)  # of junctions, none


def test_goes_on_with_a_file(tmp_path, monkeypatch):
    from benchmarks import bench, bench_cpu, result_files

    path = tmp_path / "rows.csv"
    row = bench_cpu.Row((1, 2, 3, 4), "channels_last", "float32", "junction forward fresh", "tf_agc", "ours", 1, 0, 1)
    result_files.write_csv(path, [row], {"date": "before", "commit": "abc", "cpu": "some"})
    options = argparse.Namespace(csv=path, resume=True, shapes=[(1, 2, 3, 4)], dtype="float32", only=None, quick=False)
    rows = bench._earlier_rows(options, {"date": "now", "commit": "abc", "cpu": "some"})
    assert rows == [row]
    assert [job.made(row) for job in bench.cpu_jobs(options)] == [False, True]
    with pytest.raises(SystemExit, match="rows.csv was measured with another commit: remove it, or name another file"):
        bench._earlier_rows(options, {"date": "now", "commit": "def", "cpu": "some"})
    options.resume = False
    assert bench._earlier_rows(options, {"commit": "def"}) == []
    options.csv, options.resume = None, True
    with pytest.raises(SystemExit, match="--resume needs --csv, the file to go on with"):
        bench._earlier_rows(options, {})


def test_junctions_are_timed_at_large_shapes():
    from benchmarks import bench, bench_shapes

    options = argparse.Namespace(shapes=None, dtype=None, only="junctions", quick=False)
    jobs = bench.cpu_jobs(options)
    assert all(job.junction and job.peers for job in jobs)
    assert {job.shape for job in jobs} == {shape for shape in bench_shapes.SHAPES if 4 * np.prod(shape) >= 8e6}
    assert {(job.data_format, job.dtype) for job in jobs} == {
        (data_format, dtype) for data_format in ("channels_last", "channels_first") for dtype in ("float32", "bfloat16")
    }
    options.only = "op"
    assert not any(job.junction for job in bench.cpu_jobs(options))
    options.only = None
    assert len(bench.cpu_jobs(options)) == len(set(bench.cpu_jobs(options)))


def test_the_loops_alone_are_timed_at_the_same_shapes():
    from benchmarks import bench_shapes

    source = (ROOT / "cc" / "core" / "agc_bench.cc").read_text(encoding="utf-8")
    (sizes,) = re.findall(r"kSizes\[\] = \{(.*?)\};", source, re.DOTALL)
    found = re.findall(r"\{(\d+), (\d+) \* (\d+), (\d+)\}", sizes)
    assert tuple(tuple(map(int, shape)) for shape in found) == bench_shapes.SHAPES


def test_the_plot_has_what_was_timed(tmp_path):
    from benchmarks import bench_cpu, bench_plot

    def row(candidate, role, passes):
        return bench_cpu.Row((1, 2, 3, 4), "channels_last", "float32", passes, candidate, role, 3.0, 0.5, 2.0)

    op = [row(name, role, "forward + backward") for name, role in (("tf_agc", "ours"), ("fused_batch_norm", "peer"))]
    junction = [dataclasses.replace(one, passes=f"junction {one.passes}") for one in op]
    widths = []
    for rows in (op, junction, [*op, *junction]):
        bench_plot.draw(rows, {}, tmp_path / "plot.png")
        widths.append(matplotlib.image.imread(tmp_path / "plot.png").shape[1])
    assert widths[0] == widths[1] < widths[2]


def test_the_table_of_networks():
    from benchmarks import bench, bench_model

    rows = [
        bench_model.Row("some", name, jit, 8, ms, 0.5, kept, 99.0)
        for jit in (False, True)
        for name, ms, kept in (("agc", 6.0, 3.0), ("batch_norm", 12.0, 6.0), ("none", 8.0, 2.0))
    ]
    lines = bench.model_table(rows, {}).splitlines()
    assert lines[2] == "| some, 8 | agc | no | 6 | 0.5 | 0.50 | 0.75 | 3 | 0.50 | 99 |"
    assert lines[5] == "| some, 8 | agc | yes | 6 | 0.5 | 0.50 | 0.75 |  |  |  |"


def test_monitor_counts_the_records_against_the_steps(fresh_keras, native_required, monkeypatch):
    from benchmarks import bench, bench_model, bench_monitor
    from tf_agc import models

    tiny = bench_model.Network(functools.partial(models.plain_cnn, (8, 8, 3), 10, filters=(4,)), (8, 8, 3), 4)
    monkeypatch.setitem(bench_model.NETWORKS, "tiny", tiny)
    row = bench_monitor.measure("tiny", quick=True)
    assert row.layers == 2 and row.record_ms > 0 and row.step_ms > 0
    half = dataclasses.replace(row, record_cpu_in_steps=10.0)
    assert half.share(10) == 0.5 and half.steps_for(0.02) == 490
    assert "| tiny, 4 | 2 |" in bench.monitor_table([half], {}) and "| 2.5 | 490 |" in bench.monitor_table([half], {})


def test_serving_measures_both_runtimes(fresh_keras, native_required, monkeypatch, tmp_path):
    from benchmarks import bench, bench_model, bench_serving, result_files
    from tf_agc import models

    tiny = bench_model.Network(functools.partial(models.plain_cnn, (8, 8, 3), 10, filters=(4,)), (8, 8, 3), 4)
    monkeypatch.setitem(bench_model.NETWORKS, "tiny", tiny)
    rows = list(bench_serving.measure("tiny", quick=True))
    ops = {(row.runtime, row.normalization): row.ops for row in rows}
    assert len(rows) == len(ops) == 4 and all(row.median_ms > 0 for row in rows)
    for runtime in ("TensorFlow", "TensorFlow Lite"):
        # For each of two layers a mean, its scale, a subtraction and, where others have it in the convolution, a bias.
        assert 0 < ops[runtime, "agc"] - ops[runtime, "folded batch_norm"] <= 8
    result_files.write_csv(tmp_path / "serving.csv", rows, {})
    assert bench.serving_table(*bench.read_csv(tmp_path / "serving.csv")).count("tiny | TensorFlow") == 4


def test_a_foreign_file_is_refused(tmp_path):
    from benchmarks import bench

    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other.csv is not a result of `bench.py cpu`, `bench.py model` or"):
        bench.read_csv(path)


def test_machine_names_what_results_depend_on(native_required):
    from benchmarks import machine

    described = machine.describe()
    assert described["instruction set"] == native.instruction_set()
    assert all(described.values())
