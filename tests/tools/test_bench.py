"""The benchmark's tools: what they count, what they write and read again, and that our op is what is timed."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tf_agc import native


class _Copy:
    """A limit of one second for every copy."""

    def timers(self, size):
        return [lambda: 1.0, lambda: 2.0]


@pytest.mark.parametrize(
    ("network", "at_most"),
    [
        ("plain CNN, 6 layers", 0.55),
        ("ResNet-20, pre-activation", 0.55),
        ("ResNet-20, post-activation", 0.76),
        ("ResNet-50, 64x64", 0.84),
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

    rows = list(bench_cpu.measure(_Copy(), (2, 5, 3, 7), "channels_first", "bfloat16", peers=False, quick=True))
    rows = [row for row in rows if isinstance(row, bench_cpu.Row)]  # relu alone may be too short to be timed
    ours = {row.passes for row in rows if row.candidate == "tf_agc"}
    assert ours == set(bench_cpu.PASSES)
    assert {row.role for row in rows} == {"ours", "floor", "limit"}
    # Two, three or five passes over memory, of which the faster copy does two in one second.
    limits = {row.passes: row.limit_ms for row in rows if row.role == "ours"}
    assert limits["forward fresh"] == pytest.approx(1000)
    assert limits["backward in place"] == pytest.approx(1500)
    assert limits["forward + backward"] == pytest.approx(2500)


def test_relus_of_a_chain_stay_apart():
    from benchmarks import bench_cpu

    relu = next(c for c in bench_cpu._candidates((1, 4, 4, 3), "channels_last", "float32", False) if c.role == "floor")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        y = tf.compat.v1.placeholder(tf.float32, (1, 4, 4, 3))
        feed = {y: np.ones((1, 4, 4, 3))}
        for i in range(5):
            y = relu.make_layer(i)[0](y)
        options = tf.compat.v1.RunOptions(output_partition_graphs=True)
        metadata = tf.compat.v1.RunMetadata()
        session.run(y, feed, options, metadata)
    assert [node.op for graph in metadata.partition_graphs for node in graph.node].count("Relu") == 5


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
    assert line.split(" | ")[-4:] == ["2.00", "fast, graph", "8", "2.0 |"]


def test_monitor_counts_the_records_against_the_steps(fresh_keras, native_required, monkeypatch):
    from benchmarks import bench, bench_model, bench_monitor
    from tf_agc import models

    tiny = bench_model.Network(lambda norm: models.plain_cnn((8, 8, 3), 10, norm, filters=(4,)), (8, 8, 3), 4)
    monkeypatch.setitem(bench_model.NETWORKS, "tiny", tiny)
    row = bench_monitor.measure("tiny", quick=True)
    assert row.layers == 2 and row.record_ms > 0 and row.step_ms > 0
    half = dataclasses.replace(row, record_cpu_in_steps=10.0)
    assert half.share(10) == 0.5 and half.steps_for(0.02) == 490
    assert "| tiny, 4 | 2 |" in bench.monitor_table([half], {}) and "| 2.5 | 490 |" in bench.monitor_table([half], {})


def test_a_foreign_file_is_refused(tmp_path):
    from benchmarks import bench

    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other.csv is not a result of `bench.py cpu` or `bench.py model`"):
        bench.read_csv(path)


def test_machine_names_what_results_depend_on(native_required):
    from benchmarks import machine

    described = machine.describe()
    assert described["instruction set"] == native.instruction_set()
    assert all(described.values())
