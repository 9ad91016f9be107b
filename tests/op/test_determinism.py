"""Bit-equal results, whatever the thread count, the process, enable_op_determinism, jit_compile, the batch size and a
sample's place in the batch.

Run as a program, prints a hash of results for `sys.argv[1]` threads, `sys.argv[2]` being "deterministic" or not:
TensorFlow's pool has one size for the life of a process, and determinism is not switched off again.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config  # private: the public name only switches determinism on

import agc_testing
from agc_testing import ACTIVATIONS, DATA_FORMATS, DTYPES, check, make_case, results_of, run, step_of
from tf_agc import native

# Batch 1 with large maps, where positions or channel blocks are shared among threads; more samples
# than threads; few channels, many channels; sizes that no block divides.
_SHAPES = [(1, 301, 211, 16), (1, 97, 101, 130), (3, 67, 71, 33), (17, 13, 11, 65), (1, 9, 9, 2051)]


def _hash():
    digest = hashlib.sha256()
    for i, shape in enumerate(_SHAPES):
        for data_format in DATA_FORMATS:
            dtype, activation = DTYPES[i % 4], ACTIVATIONS[i % 5]
            case = make_case(shape, dtype, activation, data_format, bias=i % 2 == 0, shortcut=i % 3 > 0)
            for value in vars(run(case, native.agc)).values():
                digest.update(value.tobytes())
    return digest.hexdigest()


# Each is a process of its own, so equal results are equal in two processes too.
_PROCESSES = [(1, "-"), (2, "-"), (8, "-"), (2, "deterministic")]


def test_thread_counts_processes_and_op_determinism(native_required):
    paths = [os.path.dirname(os.path.dirname(native.__file__)), os.path.dirname(agc_testing.__file__)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TF_CPP_MIN_LOG_LEVEL": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(threads), determinism],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for threads, determinism in _PROCESSES
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    lines = [output.split() for output, _ in outputs]
    # The process says how many threads it really had, and whether TensorFlow was to be deterministic.
    assert [(int(threads), determinism) for threads, determinism, _ in lines] == _PROCESSES
    assert len({digest for *_, digest in lines}) == 1, lines


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("index", range(len(_SHAPES)))
def test_under_jit(index, data_format, native_required):
    # On the CPU XLA's program calls the same loops, from its own threads: more than the tolerance of `check`, which is
    # what a program in XLA's operations has to keep (test_xla.py).
    case = make_case(
        _SHAPES[index], DTYPES[index % 4], ACTIVATIONS[index % 5], data_format, bias=index != 1, shortcut=index != 2
    )
    got = results_of(tf.function(step_of(case, native.agc), jit_compile=True)(*case.tensors))
    check(case, got)
    for name, want in vars(run(case, native.agc)).items():
        np.testing.assert_array_equal(getattr(got, name), want, err_msg=name)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 13, 11, 37), (5, 64, 65, 40), (4, 1, 1, 9)])
def test_a_sample_and_its_neighbours(shape, dtype, data_format, native_required):
    case = make_case(shape, dtype, "elu", data_format, bias=True, shortcut=True)
    whole = run(case, native.agc)
    for n in (0, shape[0] // 2, shape[0] - 1):
        for neighbours in ([], [0], [shape[0] - 1, 1]):
            rows = [*neighbours, n]
            of_samples = ("x", "dy", "dmean", "shortcut")
            part = dataclasses.replace(case, **{name: tf.gather(getattr(case, name), rows) for name in of_samples})
            results = run(part, native.agc)
            for name in ("y", "mean", "dx", "dshortcut"):
                got, want = getattr(results, name)[-1], getattr(whole, name)[n]
                np.testing.assert_array_equal(got, want, err_msg=f"{name}, sample {n} in {rows}")


def test_repeated_calls(native_required):
    case = make_case((3, 67, 71, 33), bias=True, shortcut=True)
    first, second = run(case, native.agc), run(case, native.agc)
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(second, name))


if __name__ == "__main__":
    tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if sys.argv[2] == "deterministic":
        tf.config.experimental.enable_op_determinism()
    deterministic = "deterministic" if config.is_op_determinism_enabled() else "-"
    print(tf.config.threading.get_intra_op_parallelism_threads(), deterministic, _hash())
