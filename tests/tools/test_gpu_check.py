"""tools/gpu/gpu_check.py without a GPU: what it expects, how it counts and what it reports.

The driver is fake_cuda_driver.c, whose device is this process's memory; the launchers are a class that computes
what is expected. Nothing of the CUDA kernels runs here.
"""

import csv
import ctypes
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import agc_numerics
from agc_testing import ACTIVATIONS, DTYPES, EPSILON, parameter_dtype
from tf_agc import reference

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ("y", "mean", "dx", "dgain", "dmean_scale", "dbias", "dshortcut")
ADDENDS = ((), ("bias",), ("shortcut",), ("bias", "shortcut"))


@pytest.fixture(scope="module")
def driver_file(tmp_path_factory):
    """The fake driver; where CUDA's own header is installed, the compiler compares the types of its functions."""
    library = tmp_path_factory.mktemp("driver") / "libcuda_fake.so"
    include = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{include}", "-o", library]
    subprocess.run([*command, ROOT / "tests" / "tools" / "fake_cuda_driver.c"], check=True)
    return str(library)


@pytest.fixture
def fake(driver_file, monkeypatch):
    """The fake driver's variables; `Driver()` finds it."""
    from gpu import gpu_driver

    library = ctypes.CDLL(driver_file)
    original = gpu_driver.Driver
    monkeypatch.setattr(gpu_driver, "Driver", lambda: original(driver_file))
    devices, elapsed = ctypes.c_int.in_dll(library, "fake_devices"), ctypes.c_float.in_dll(library, "fake_elapsed_ms")
    devices.value, elapsed.value = 1, 2.0
    return library


@pytest.fixture
def launchers(monkeypatch):
    """Makes `Launchers` compute, wrongly by what a test adds to `wrong`."""
    from gpu import gpu_driver

    _Launchers.wrong, _Launchers.launched = {}, 0
    monkeypatch.setattr(gpu_driver, "Launchers", _Launchers)
    return _Launchers


class _Launchers:
    wrong: dict = {}
    launched = 0
    trial: tuple[int, ...] = ()

    def __init__(self, library):
        self._x = None

    def start(self, stream):
        assert stream

    def try_plan(self, *trial):
        type(self).trial = trial

    def describe(self, args):
        segment, cluster, _, prefetch = self.trial if any(self.trial) else (128, 2, 0, 0)
        # Backward alone knows of the last; some plans do not fit.
        hint = prefetch if hasattr(args, "dy") else 0
        return f"{'two launches' if cluster == 1 else 'on chip'}: {segment} {cluster} {hint}"

    def workspace_bytes(self, args):
        return 24

    def launch(self, args, workspace, stream):
        from gpu import gpu_driver, gpu_numerics

        type(self).launched += 1
        assert workspace % 8 == 0 and stream
        batch, positions, channels = args.shape.batch, args.shape.positions, args.shape.channels
        dtype, activation = DTYPES[args.data_type], ACTIVATIONS[args.activation]
        u = parameter_dtype(dtype)
        channels_first = args.shape.layout == 1
        maps = (batch, channels, positions) if channels_first else (batch, positions, channels)

        def array(address, shape, kind):
            kind = np.dtype(kind)
            memory = (ctypes.c_char * (int(np.prod(shape)) * kind.itemsize)).from_address(address)
            return np.frombuffer(memory, kind).reshape(shape)

        def of_maps(address):
            values = gpu_numerics.decode(array(address, maps, gpu_numerics.storage(dtype)), dtype)
            return np.moveaxis(values, 1, 2) if channels_first else values

        forward = isinstance(args, gpu_driver.ForwardArgs)
        if forward:
            self._x = args.x  # which backward does not get; nothing runs in place here
        per_map = (batch, channels)
        case = agc_numerics.Case(
            of_maps(self._x),
            array(args.gain, (channels,), u).astype(float),
            array(args.mean_scale, (channels,), u).astype(float),
            np.zeros((batch, positions, channels)) if forward else of_maps(args.dy),
            np.zeros(per_map) if forward else array(args.dmean, per_map, u).astype(float),
            dtype,
            activation,
            args.alpha,
            array(args.bias, (channels,), u).astype(float) if args.bias else None,
            of_maps(args.shortcut) if args.shortcut else None,
        )
        assert args.alpha == gpu_numerics.ALPHA.get(activation, 0)
        if not forward:  # what agc.h says of a call backward
            assert gpu_numerics.has_dshortcut(case) == bool(args.shortcut) == bool(args.dshortcut)
            assert bool(args.bias) == bool(args.dbias)
        want = gpu_numerics.expected(case)
        for name in ("y", "mean") if forward else want.keys() - {"y", "mean"}:
            values = want[name] * self.wrong.get(name, 1)
            if gpu_numerics.result_kinds(case)[name] == "maps":
                values = gpu_numerics.encode(np.moveaxis(values, 1, 2) if channels_first else values, dtype)
                array(getattr(args, name), maps, values.dtype)[...] = values
            else:
                array(getattr(args, name), values.shape, u)[...] = values


# ---- Expectations ----


@pytest.mark.parametrize("addends", ADDENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_expectations_are_the_reference(activation, addends):
    from gpu import gpu_numerics

    case = gpu_numerics.make_case((3, 35, 7), "float64", activation, 1, addends)
    inputs = {name: tf.constant(getattr(case, name)) for name in ("x", "gain", "mean_scale", *addends)}
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        x, gain, mean_scale = (inputs[name] for name in ("x", "gain", "mean_scale"))
        optional = {name: inputs[name] for name in addends}
        y, mean = reference.agc(x, gain, mean_scale, activation, case.alpha, "channels_last", **optional)
    upstream = [tf.constant(case.dy), tf.constant(case.dmean)]
    gradients = tape.gradient([y, mean], inputs, output_gradients=upstream)
    want = {"y": y, "mean": mean} | {f"d{name}": gradient for name, gradient in gradients.items()}
    if activation == "linear":  # which writes no dshortcut: it is dy
        want.pop("dshortcut", None)
    got = gpu_numerics.expected(case)
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_storage(dtype):
    from gpu import gpu_numerics

    values = np.concatenate([np.random.default_rng(0).standard_normal(1000) * 100, [0, -0.0, 1e-3, np.inf, -np.inf]])
    values = np.append(values, [1 + 2.0**-8, 1 + 3 * 2.0**-8])  # halfway between two values of bfloat16
    values = values.astype(np.float32).astype(np.float64)
    stored = gpu_numerics.encode(values, dtype)
    assert stored.dtype == gpu_numerics.storage(dtype)
    want = tf.cast(tf.cast(tf.constant(values, tf.float32), dtype), tf.float64)
    np.testing.assert_array_equal(gpu_numerics.decode(stored, dtype), want)
    assert np.isnan(gpu_numerics.decode(gpu_numerics.encode(np.array([np.nan]), dtype), dtype)).all()


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_wrong_is_seen(name, dtype):
    from gpu import gpu_numerics

    case = gpu_numerics.make_case((2, 35, 6), dtype, "relu", 2, ("bias", "shortcut"))
    want = gpu_numerics.expected(case)
    assert set(gpu_numerics.errors(case, want, want).values()) == {0.0}
    off = 2 if name.startswith("d") else 1 + 200 * EPSILON[dtype]
    worst = gpu_numerics.errors(case, want, want | {name: want[name] * off})
    assert worst.pop(name) > 1 and set(worst.values()) == {0.0}
    missing = want[name].copy()
    missing.flat[0] = np.nan
    assert np.isnan(gpu_numerics.errors(case, want, want | {name: missing})[name])


# ---- ctypes ----


def test_structures_are_those_of_the_header(tmp_path):
    from gpu import gpu_driver

    kinds = {"Shape": gpu_driver.Shape, "ForwardArgs": gpu_driver.ForwardArgs, "BackwardArgs": gpu_driver.BackwardArgs}
    asserts = []
    for name, kind in kinds.items():
        asserts.append(f"static_assert(sizeof(tf_agc::core::{name}) == {ctypes.sizeof(kind)});")
        for field, _ in kind._fields_:
            offset = getattr(kind, field).offset
            asserts.append(f"static_assert(offsetof(tf_agc::core::{name}, {field}) == {offset});")
    for kind, names in (
        ("DataType", ("Half", "Bfloat16", "Float", "Double")),
        ("Activation", ("Linear", "Relu", "Relu6", "LeakyRelu", "Elu")),
        ("Layout", ("ChannelsLast", "ChannelsFirst")),
    ):
        asserts += [f"static_assert(int(tf_agc::core::{kind}::k{name}) == {i});" for i, name in enumerate(names)]
    source = tmp_path / "layout.cc"
    source.write_text('#include <cstddef>\n#include "cc/core/agc.h"\n' + "\n".join(asserts) + "\n")
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", f"-I{ROOT}", source], check=True)


def test_launchers_are_those_of_the_header(tmp_path):
    """The header's functions, defined in terms of what ctypes passes, answer through `Launchers`."""
    from gpu import gpu_driver

    source, library = tmp_path / "launchers.cc", tmp_path / "liblaunchers.so"
    source.write_text("""#include <cstdio>
#include "cc/core/cuda/agc_cuda.h"
int64_t TfAgcCudaForwardWorkspaceBytes(const tf_agc::core::ForwardArgs* args) { return args->shape.batch << 32; }
int64_t TfAgcCudaBackwardWorkspaceBytes(const tf_agc::core::BackwardArgs* args) { return args->shape.channels; }
int TfAgcCudaForward(const tf_agc::core::ForwardArgs* args, void* workspace, void* stream) {
  return args->alpha == 0.5 && args->mean == args && workspace == nullptr && stream == args ? 0 : 1;
}
int TfAgcCudaBackward(const tf_agc::core::BackwardArgs*, void*, void*) { return 7; }
const char* TfAgcCudaErrorString(int error) { return error == 7 ? "seven" : "other"; }
static int tried;
void TfAgcCudaTry(int segment_bytes, int cluster, int sharing, int prefetch) {
  tried = segment_bytes + 10 * cluster + 100 * sharing + 1000 * prefetch;
}
void TfAgcCudaDescribeForward(const tf_agc::core::ForwardArgs* args, char* text, int64_t size) {
  snprintf(text, size, "forward %d %d", tried, static_cast<int>(args->shape.batch));
}
void TfAgcCudaDescribeBackward(const tf_agc::core::BackwardArgs* args, char* text, int64_t size) {
  snprintf(text, size, "backward %d %d", tried, static_cast<int>(args->shape.channels));
}
""")
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT}", "-o", library, source], check=True)
    launchers = gpu_driver.Launchers(library)
    forward = gpu_driver.ForwardArgs(gpu_driver.Shape(3, 1, 1, 0), alpha=0.5)
    forward.mean = ctypes.addressof(forward)
    assert launchers.workspace_bytes(forward) == 3 << 32
    launchers.launch(forward, None, ctypes.addressof(forward))
    backward = gpu_driver.BackwardArgs(gpu_driver.Shape(3, 1, 5, 0))
    assert launchers.workspace_bytes(backward) == 5
    with pytest.raises(gpu_driver.Error, match=r"^TfAgcCudaBackward: seven \(7\)$"):
        launchers.launch(backward, None, 1)
    with pytest.raises(gpu_driver.Error, match=r"^TfAgcCudaForward: other \(1\)$"):
        launchers.start(1)
    launchers.try_plan(1, 2, 3, 4)
    assert launchers.describe(forward) == "forward 4321 3" and launchers.describe(backward) == "backward 4321 5"
    launchers.try_plan()
    assert launchers.describe(forward) == "forward 0 3"


def test_driver(fake):
    from gpu import gpu_driver

    driver = gpu_driver.Driver()
    assert driver.describe() == {
        "gpu": "Fake GPU",
        "compute capability": "9.0",
        "multiprocessors": "132",
        "L2": "0 MiB",
        "memory": "1 GiB",
        "driver's CUDA": "13.0",
    }
    live = ctypes.c_int.in_dll(fake, "fake_live_allocations")
    before = live.value
    buffer = driver.upload(np.arange(5, dtype=np.int16), offset=2, repeat=3)
    assert buffer.address % 256 == 2
    np.testing.assert_array_equal(driver.download(buffer, (15,), np.dtype(np.int16)), [0, 1, 2, 3, 4] * 3)
    np.testing.assert_array_equal(driver.download(buffer, (2,), np.dtype(np.int16), first=8), [3, 4])
    other = driver.allocate(buffer.size)
    driver.copy(other, buffer)
    np.testing.assert_array_equal(driver.download(other, (5,), np.dtype(np.int16)), [0, 1, 2, 3, 4])
    driver.fill(buffer, 0xFF)
    np.testing.assert_array_equal(driver.download(buffer, (15,), np.dtype(np.int16)), [-1] * 15)
    assert live.value == before + 2
    del buffer, other
    assert live.value == before
    with pytest.raises(gpu_driver.Error, match=r"^cuMemAlloc_v2: out of memory \(2\)$"):
        driver.allocate(2**31)
    driver.empty_kernel()()


def test_time_of_one_call(fake):
    from gpu import gpu_driver

    driver, launches = gpu_driver.Driver(), ctypes.c_int.in_dll(fake, "fake_graph_launches")
    ctypes.c_float.in_dll(fake, "fake_elapsed_ms").value = 0.5
    launches.value, called = 0, []
    # Half a millisecond a graph of five calls: four graphs make the two milliseconds that one measurement takes.
    median, spread = driver.time_graph([lambda: called.append(0)] * 5)
    assert len(called) == 10  # to set up, and to capture
    assert launches.value == 1 + 1 + 21 * 4
    assert median == pytest.approx(0.5 / (4 * 5)) and spread == 0


def test_median_and_spread(fake):
    from gpu import gpu_driver

    driver, elapsed = gpu_driver.Driver(), ctypes.c_float.in_dll(fake, "fake_elapsed_ms")
    times = iter([2.0, 2.0, *range(10, 31)])  # a warm-up, how often to repeat, 21 measurements
    median, spread = driver.time(lambda: setattr(elapsed, "value", next(times)), count=2, stream=1)
    assert median == 20 / 2 and spread == pytest.approx((25.5 - 14.5) / 2 / 2)


# ---- The whole ----


@pytest.fixture
def check(tmp_path, fake, launchers, monkeypatch):
    """Runs gpu_check on few small shapes; returns its exit code and what it wrote."""
    from benchmarks import bench_shapes
    from gpu import gpu_check

    monkeypatch.setattr(gpu_check, "ODD_SHAPES", ((0, 3, 3, 8), (2, 1, 1, 5), (2, 3, 5, 7)))
    monkeypatch.setattr(bench_shapes, "LARGE_SHAPES", ((2, 3, 5, 8),))
    monkeypatch.setattr(gpu_check, "SWEPT_SHAPES", ((2, 3, 5, 8), (1, 2, 2, 8)))
    monkeypatch.setattr(bench_shapes, "LATENCY_SHAPE", (1, 2, 2, 8))
    monkeypatch.setattr(bench_shapes, "SHAPES", ((1, 4, 4, 8),))
    monkeypatch.setattr(bench_shapes, "CHANNELS_FIRST_SHAPES", ((1, 4, 4, 8),))
    monkeypatch.setenv("PATH", os.defpath)  # no compute-sanitizer
    library = tmp_path / "libtf_agc_cuda.so"
    library.touch()

    def run(*arguments):
        output = tmp_path / "output"
        code = gpu_check.main(["--library", str(library), "--output", str(output), *arguments])
        return code, json.loads((output / "gpu.json").read_text()), (output / "gpu.csv").read_text().splitlines()

    return run


def test_everything_is_right(check, launchers, capsys):
    code, results, rows = check("--commit", "abc")
    assert code == 0 and results["failures"] == []
    assert results["machine"]["gpu"] == "Fake GPU" and results["machine"]["commit"] == "abc"
    (correct,) = results["sections"]["correctness"]["notes"]
    assert correct.startswith(f"{3 * 2 * 4 * 5 + 2} cases; the largest error is 0.")
    assert list(results["sections"]) == [
        *("bandwidth", "latency", "correctness", "sweep", "pytorch", "sanitizer", "huge")
    ]
    assert results["sections"]["huge"]["notes"][0].startswith("left out: ")
    sanitizer = "left out: there is no compute-sanitizer in CUDA_HOME, on PATH or in /usr/local/cuda"
    assert results["sections"]["sanitizer"]["notes"] == [sanitizer]
    assert results["sections"]["latency"]["notes"][0] == "bfloat16 forward: 1.0 x an empty kernel"

    assert "# gpu: Fake GPU" in rows and "# commit: abc" in rows
    header, *rows = [row for row in rows if not row.startswith("#")]
    assert header == "section,shape,data_format,dtype,passes,candidate,ms,spread_ms,copy_ms"
    of_bandwidth = [row for row in rows if row.startswith("bandwidth,")]
    assert len(of_bandwidth) == 3 * (3 + 1) * 2
    # A pass backward is measured against one and a half copies; a junction's passes, against one and a half and two and
    # a half.
    bfloat16 = list(csv.reader(row for row in of_bandwidth if ",2x3x5x8,channels_last,bfloat16," in row))
    assert [row[5] for row in bfloat16] == ["tf_agc", "tf_agc", "tf_agc, junction", "tf_agc, junction"]
    assert [float(row[8]) / float(row[6]) for row in bfloat16] == pytest.approx([1, 1.5, 1.5, 2.5], rel=1e-3)
    output = capsys.readouterr().out
    assert "150% of the copy" in output and output.rstrip().splitlines()[-2] == "0 failed"


def test_every_case_is_right(check):
    code, results, _ = check("--section", "correctness", "--full")
    assert code == 0
    (correct,) = results["sections"]["correctness"]["notes"]
    # Twice: without what is added to z, and with some of it.
    assert correct.startswith(f"{2 * (3 * 2 * 4 * 5 * 2 + 2 * 2 * 4)} cases; the largest error is 0.")


def test_the_sweep_times_each_plan_once(check, launchers):
    code, _, rows = check("--section", "sweep")
    assert code == 0 and launchers.trial == ()  # the rule's again
    swept = [row for row in csv.reader(rows) if row[0] == "sweep" and row[1] == "2x3x5x8"]
    others = {("forward", f"on chip: {segment} {cluster} 0") for segment in (128, 64) for cluster in (2, 4, 8)}
    others |= {
        ("backward", f"on chip: {segment} {cluster} {prefetch}")
        for segment in (128, 64)
        for cluster in (2, 4, 8)
        for prefetch in (0, 1)
    }
    # The rule's own, which the fake says is one of them, is not timed again.
    rule = "on chip: 128 2 0"
    others -= {("forward", rule), ("backward", rule)}
    of_rule = {("forward", f"the rule, {rule}"), ("backward", f"the rule, {rule}")}
    assert len(swept) == len(others | of_rule) and {(row[4], row[5]) for row in swept} == others | of_rule


@pytest.mark.parametrize("name", RESULTS)
def test_a_wrong_result_fails(check, launchers, name, capsys):
    launchers.wrong[name] = 4
    code, results, _ = check("--small", "--section", "correctness", "--section", "latency")
    assert code == 1
    what = "2x5x7x3 channels_last bfloat16 relu" + " bias shortcut" * (name in ("dbias", "dshortcut"))
    assert results["failures"][0].startswith(f"correctness: {what}: {name}")
    assert "times what is allowed" in results["failures"][0]
    assert results["sections"]["latency"]["notes"]  # and the rest goes on
    assert f"FAILED: {what}: {name} is off by" in capsys.readouterr().out


def test_results_that_change_fail(check, launchers, monkeypatch):
    once = launchers.launch

    def launch(self, args, workspace, stream):
        type(self).wrong = {"mean": 1 + 2.0**-23 * (launchers.launched // 2 % 2)}
        once(self, args, workspace, stream)

    monkeypatch.setattr(launchers, "launch", launch)
    code, results, _ = check("--small", "--section", "correctness")
    assert code == 1
    assert "mean has other bits when it is computed again" in results["failures"][0]


def test_a_section_that_breaks_does_not_stop_the_others(check, monkeypatch):
    from gpu import gpu_check

    def broken(self, report):
        report.note("so far")
        raise ValueError("something else")

    monkeypatch.setattr(gpu_check.Check, "bandwidth", broken)
    code, results, _ = check("--section", "bandwidth", "--section", "latency")
    assert code == 1
    assert results["failures"] == ["bandwidth: ValueError: something else"]
    assert results["sections"]["bandwidth"]["notes"] == ["so far", "FAILED: ValueError: something else"]
    assert len(results["sections"]["latency"]["notes"]) == 4


def test_one_shape_alone(check):
    code, _, rows = check("--section", "bandwidth", "--shape", "2,9,11,64")
    assert code == 0
    timed = [row for row in rows if row.startswith("bandwidth")]
    assert timed and all("2x9x11x64" in row for row in timed)


def test_the_deadline_leaves_out_what_is_not_begun(check, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexit 86\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    code, results, rows = check("--minutes", "0")
    assert code == 0
    measured = [row.split(",")[1] for row in rows if not row.startswith(("#", "section"))]
    assert measured == ["1x2x2x8"]  # the empty kernel, which all latencies are measured against
    notes = {name: section["notes"] for name, section in results["sections"].items()}
    del notes["pytorch"]  # which may be absent
    assert {name: note[0] for name, note in notes.items()} == {
        "bandwidth": "left out for want of time, from (2, 3, 5, 8) channels_last bfloat16 on",
        "latency": "left out for want of time, from bfloat16 on",
        "correctness": "left out for want of time, from (2, 3, 5, 8) bfloat16 relu on",
        "sweep": "left out for want of time, from (2, 3, 5, 8) on",
        "sanitizer": "left out for want of time, from memcheck on",
        "huge": "left out for want of time, from its only case on",
    }


@pytest.mark.parametrize(
    ("says", "exits", "failures", "notes"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, 0, "ERROR SUMMARY: 0 errors"),
        ("========= Invalid __shared__ read of size 16 bytes", 86, 2, "FAILED: "),
        ("wrong result", 1, 2, "FAILED: "),
        ("========= Error: Device not supported.", 1, 0, "not available here: Error: Device not supported."),
    ],
)
def test_sanitizer(check, tmp_path, monkeypatch, says, exits, failures, notes):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {exits}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    code, results, _ = check("--section", "sanitizer")
    assert code == (1 if failures else 0) and len(results["failures"]) == failures
    first, second = results["sections"]["sanitizer"]["notes"]
    assert notes in first and (exits not in (0, 1) or says.strip("= ") in first)
    assert second.startswith(("racecheck: ", "FAILED: racecheck "))


def test_huge_tensors_repeat_a_sample(fake, launchers, monkeypatch, tmp_path):
    from gpu import gpu_call, gpu_driver, gpu_numerics

    driver, case = gpu_driver.Driver(), gpu_numerics.make_case((1, 9, 8), "float16", "relu", seed=1)
    one, many = (gpu_call.Call(driver, launchers(None), case, "channels_last", repeat=n) for n in (1, 5))
    one.run()
    many.run()
    for name in ("y", "mean", "dx"):
        for sample in range(5):
            np.testing.assert_array_equal(many.sample(name, sample), one.sample(name, 0))
    assert many.results()["y"].shape == (5, 9, 8)


def test_a_call_like_another_has_its_maps(fake, launchers):
    from gpu import gpu_call, gpu_driver, gpu_numerics

    driver = gpu_driver.Driver()
    case = gpu_numerics.make_case((2, 9, 8), "bfloat16", "relu", 1, ("bias", "shortcut"))
    first = gpu_call.Call(driver, launchers(None), case, "channels_first")
    second = gpu_call.Call(driver, launchers(None), case, "channels_first", like=first)
    first.run()
    second.run()
    for name, values in second.results().items():
        np.testing.assert_array_equal(values, first.results()[name])


def test_a_driver_that_is_too_old_for_the_library(check, launchers, monkeypatch, capsys):
    from gpu import gpu_check, gpu_driver

    def start(self, stream):
        raise gpu_driver.Error("TfAgcCudaForward: CUDA driver version is insufficient for CUDA runtime version (35)")

    monkeypatch.setattr(launchers, "start", start)
    assert gpu_check.main(["--library", __file__]) == 2
    sentence = "TfAgcCudaForward: CUDA driver version is insufficient for CUDA runtime version (35)"
    assert capsys.readouterr().err == f"tf_agc: nothing was checked: {sentence}.\n"


def test_enough_sets_to_leave_the_cache(fake, launchers):
    from gpu import gpu_check, gpu_driver

    check = gpu_check.Check(gpu_driver.Driver(), None, None)
    assert check.sets((1, 8, 8, 64), "float32") == 4 * 2**16 // (2 * 4 * 8 * 8 * 64)  # of an L2 cache of 64 KiB
    assert check.sets((1024, 8, 8, 64), "float32") == 2
    assert check.sets((1, 1, 1, 1), "float32") == 512


# ---- Where there is nothing to check ----


def test_without_a_gpu(monkeypatch, capsys, fake, tmp_path):
    from gpu import gpu_check, gpu_driver

    ctypes.c_int.in_dll(fake, "fake_devices").value = 0
    assert gpu_check.main(["--output", str(tmp_path / "output")]) == 2
    assert capsys.readouterr().err == "tf_agc: nothing was checked: the driver finds no GPU.\n"
    assert not (tmp_path / "output").exists()
    monkeypatch.undo()
    with pytest.raises(gpu_driver.NoGpu, match="^there is no GPU driver on this machine .*libnone.so"):
        gpu_driver.Driver("libnone.so")


def test_without_a_library_and_a_compiler(monkeypatch, capsys, fake, tmp_path):
    from gpu import gpu_check

    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.main(["--output", str(tmp_path / "output")]) == 2
    assert "there is no nvcc to build the kernels with; name a built library" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.parse_arguments(["--library", "none.so"])
    assert "--library must name a built libtf_agc_cuda.so, got none.so" in capsys.readouterr().err


def test_compiles_what_bazel_does(monkeypatch, tmp_path):
    # What only tests compile lies in the same directory, and is no CUDA.
    from gpu import gpu_check

    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/arguments\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    gpu_check.build("90", tmp_path)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert not any(argument.startswith("-L") for argument in arguments)
    # As in the toolkit of Python's index, where nvcc would not look.
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    assert gpu_check.main(["--build-for", "90", "--output", str(tmp_path / "built")]) == 0
    assert f"-L{tmp_path}/lib" in (tmp_path / "arguments").read_text().splitlines()
    assert str(tmp_path / "built" / "libtf_agc_cuda.so") in (tmp_path / "arguments").read_text().splitlines()
    assert "-gencode=arch=compute_90,code=sm_90" in arguments
    compiled = {pathlib.Path(argument) for argument in arguments}
    directory = ROOT / "cc" / "core" / "cuda"
    libraries = [rule for rule in (directory / "BUILD").read_text().split("\n)\n") if "library(" in rule]
    lists = [re.search(r"^    srcs = \[(.*?)\]", rule, re.M | re.S)[1] for rule in libraries if "testonly" not in rule]
    sources = {directory / name for names in lists for name in re.findall(r'"(.*?)"', names)}
    assert {file for file in compiled if file.parent == directory} == sources


def test_earlier_results_are_left_alone(tmp_path, capsys):
    from gpu import gpu_check

    (tmp_path / "gpu.csv").write_text("earlier")
    with pytest.raises(SystemExit):
        gpu_check.main(["--output", str(tmp_path)])
    assert f"--output must be a directory without results, and {tmp_path} has some" in capsys.readouterr().err
    assert (tmp_path / "gpu.csv").read_text() == "earlier"


def test_the_script_needs_no_tensorflow(tmp_path):
    # An interpreter in which neither can be imported; --help comes after all imports.
    program = (
        "import runpy, sys; sys.modules['tensorflow'] = sys.modules['keras'] = None; del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "tools" / "gpu" / "gpu_check.sh", "--help"],
        env={"PATH": os.defpath, "PYTHON": python},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--tensorflow" in done.stdout


# ---- TensorFlow ----


@pytest.mark.parametrize("output", ["....s [ 40%]\n..", "..F.s [ 40%]\n.."])
def test_tests_that_do_not_end_in_time(output, monkeypatch):
    from gpu import gpu_tensorflow

    class Report:
        def __init__(self):
            self.notes, self.failures = [], []
            self.note, self.fail = self.notes.append, self.failures.append

    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout, output=output.encode())

    monkeypatch.setattr(subprocess, "run", run)
    report = Report()
    gpu_tensorflow._tests(report, 60)
    if "F" in output:
        assert report.failures == ["pytest is incomplete: 5 tests had passed after 60 seconds, and 1 failed"]
    else:
        assert report.notes == ["pytest is incomplete: 6 tests had passed after 60 seconds"]


def test_transposes_around_the_op(native_required):
    # Two convolutions and two of our ops, on a GPU that only the layout optimizer believes in.
    from gpu import gpu_tensorflow

    counted = gpu_tensorflow.around_our_op(channels=8, layers=2)
    assert 0 < counted["ours"] <= counted["all"]
