"""Many threads, many nodes, forked processes, and steps that fail in the middle: right results then and afterwards.

What the threads call, and for minutes, is tools/fuzz/stress.py's; here it runs once.
"""

import pathlib
import re
import threading

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import cancellation  # private: no public name

from agc_testing import python
from tf_agc import native

pytestmark = pytest.mark.usefixtures("native_required")

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def stress(monkeypatch):
    monkeypatch.setenv("TF_AGC_IMPLEMENTATION", "native")
    from fuzz import stress

    return stress


# ---- Threads ----


def test_64_threads():
    # A process of its own, for its inter-op threads. Each thread: 4 eager calls, 3 of one SavedModel, 3 of one graph.
    lines = python(TOOLS, "fuzz.stress", "threads", "--minutes", 0).stdout.splitlines()
    assert lines[-4:] == [
        "eager: 256 calls",
        "SavedModel: 192 calls",
        "graph of 128 nodes: 192 calls",
        "640 calls in 64 threads, seed 0: 0 findings",
    ]


def test_another_result_is_a_finding(stress):
    numbers = iter(range(100))
    broken = {"counts": [lambda: [np.array(next(numbers))]], "raises": [lambda: [np.zeros(10 - next(numbers))]]}
    good = {"good": [lambda: [np.ones(3)]]}
    calls, findings = stress.call_at_once({**broken, **good}, threads=12, minutes=0)
    assert calls == {"counts": 12, "raises": 12, "good": 12}
    kinds = [re.match(r"thread \d+, (\w+): (another result|Traceback)", finding).groups() for finding in findings]
    assert kinds.count(("counts", "another result")) == 12 and len(kinds) == 24
    assert {kind for kind, _ in kinds} == {"counts", "raises"} and ("raises", "Traceback") in kinds


@pytest.mark.parametrize("per_step, growth", [(0.0, 0), (1e-3, 1)])
def test_growth_is_that_after_the_warm_up(stress, per_step, growth):
    rows = [stress.Resident(step, 500 + per_step * step - 400 * (step < 200)) for step in range(10, 1001, 10)]
    slope, error, start = stress.growth_of(rows)
    np.testing.assert_allclose([slope, start], [growth, 500 + 200 * per_step], atol=1e-6)
    assert error < 1e-6


def test_memory_is_recorded(stress):
    rows = stress.train(5)
    assert [row.step for row in rows] == [1, 2, 3, 4, 5]
    assert all(row.resident_mib > 100 for row in rows)


# ---- Processes ----

_IMPORTS = """
import threading
results, ready = [], threading.Barrier(8)
def work():
    ready.wait()
    import tf_agc
    y = tf_agc.agc([[[1.0], [3.0]]], 2.0, 1.0, activation="relu")
    results.append((tf_agc.native.STATUS.available, y.numpy().tolist()))
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(results == [(True, [[[0.0], [2.0]]])] * 8)
"""


def test_import_from_several_threads():
    assert python("-c", _IMPORTS).stdout == "True\n"


# On large maps and with a gradient, so that the child needs a pool of threads.
_FORK = """
import os
import numpy as np
import tensorflow as tf
import tf_agc

def work():
    x = tf.constant(np.random.default_rng(0).standard_normal((1, 256, 256, 16)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf_agc.agc(x, 2.0, 1.0, activation="relu")
    jitted = tf.function(lambda x: tf_agc.agc(x, 2.0, 1.0, activation="relu"), jit_compile=True)
    return b"".join(value.numpy().tobytes() for value in (y, tape.gradient(y, x), jitted(x)))

assert tf_agc.native.STATUS.available and tf_agc.native.XLA_STATUS.available
read, write = os.pipe()
child = os.fork()
if child == 0:
    with os.fdopen(write, "wb") as pipe:
        pipe.write(work())
    os._exit(0)
os.close(write)
with os.fdopen(read, "rb") as pipe:
    of_child = pipe.read()
print(os.waitpid(child, 0)[1], len(of_child) == 3 * 4 * 256 * 256 * 16, of_child == work())
"""


def test_fork_before_any_op():
    # The child would hang or crash if importing had started threads or devices, which a fork does not copy.
    assert python("-c", _FORK).stdout.split() == ["0", "True", "True"]


# ---- Steps that fail in the middle ----

_X = np.random.default_rng(0).standard_normal((4, 33, 31, 16)).astype(np.float32)
_GAIN = np.linspace(0.5, 2, 16, dtype=np.float32)


def _agc(x, gain=_GAIN):
    return native.agc(x, gain, np.ones(16, np.float32), "relu", 0.0, "channels_last")[0]


@pytest.fixture
def results_stay():
    """The same bits before and after a test, eager and in a graph that writes in place."""
    graph = tf.function(lambda x: _agc(_agc(x + 1.0)))
    before = [_agc(_X).numpy(), graph(_X).numpy()]
    yield
    for _ in range(3):
        np.testing.assert_array_equal(_agc(_X), before[0])
        np.testing.assert_array_equal(graph(_X), before[1])


def test_an_error_in_the_middle_of_a_graph(results_stay):
    @tf.function(input_signature=[tf.TensorSpec(_X.shape), tf.TensorSpec([None])])
    def step(x, gain):
        with tf.GradientTape() as tape:
            tape.watch(x)
            chains = [_agc(_agc(_agc(x + float(i)), gain)) for i in range(8)]
            # No sum: TensorFlow's begins with a tensor that nobody reads any more, and which that is depends on time.
            y = tf.stack([*chains, *(_agc(x * float(i)) for i in range(8))])
        return y, tape.gradient(y, x)

    want = [value.numpy() for value in step(_X, _GAIN)]
    for _ in range(10):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"gain must have shape \[C\] = \[16\], got \[15\]"):
            step(_X, _GAIN[1:])
    for got, before in zip(step(_X, _GAIN), want, strict=True):
        np.testing.assert_array_equal(got, before)


def test_an_error_in_eager_calls(results_stay):
    for _ in range(10):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"gain must have shape \[C\] = \[16\], got \[15\]"):
            _agc(_X, _GAIN[1:])


def test_an_exception_between_nodes(results_stay):
    def fail(x):
        raise KeyError("in the middle")

    @tf.function
    def step(x):
        middle = tf.ensure_shape(tf.py_function(fail, [_agc(x + 1.0)], tf.float32), _X.shape)
        return _agc(middle) + tf.add_n([_agc(_agc(x * float(i))) for i in range(8)])

    for _ in range(10):
        with pytest.raises(tf.errors.UnknownError, match="KeyError: 'in the middle'"):
            step(_X)


def test_a_cancelled_step(results_stay):
    queue = tf.queue.FIFOQueue(1, tf.float32)
    in_the_middle = threading.Event()

    def reached(x):
        in_the_middle.set()
        return x

    @tf.function
    def step(x):
        middle = tf.ensure_shape(tf.py_function(reached, [_agc(x + 1.0)], tf.float32), _X.shape)
        with tf.control_dependencies([middle]):
            value = queue.dequeue()  # from an empty queue: waits until the step is cancelled
        return _agc(middle + value) + tf.add_n([_agc(_agc(x * float(i))) for i in range(8)])

    for _ in range(5):
        in_the_middle.clear()
        manager = cancellation.CancellationManager()
        cancelable = manager.get_cancelable_function(step.get_concrete_function(tf.TensorSpec(_X.shape)))
        raised = []

        def call(cancelable=cancelable, raised=raised):
            with pytest.raises(tf.errors.CancelledError) as error:
                cancelable(tf.constant(_X))
            raised.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        assert in_the_middle.wait(timeout=60)
        manager.start_cancel()
        thread.join(timeout=60)
        assert len(raised) == 1 and not thread.is_alive()
