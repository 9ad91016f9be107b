"""The scope `implementation` and the decision: which of the two runs, here and now."""

import dataclasses
import importlib.util
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_agc
from tf_agc import native
from tf_agc.implementation import resolve

_X = np.random.default_rng(0).standard_normal((2, 4, 5, 3)).astype(np.float32)


@pytest.fixture
def unavailable(monkeypatch):
    status = dataclasses.replace(native.STATUS, available=False, reason="it is on holiday")
    monkeypatch.setattr(native, "STATUS", status)


def _ops(function, *arguments):
    graph = function.get_concrete_function(*arguments).graph
    return {operation.type for operation in graph.get_operations()}


def _agc():
    """A function without a trace."""
    return tf.function(lambda x: tf_agc.agc(x, 2.0, 1.0, activation="relu"))


def test_auto_is_native(native_required):
    assert resolve()[0] == "native"
    assert "TfAgc>Agc" in _ops(_agc(), _X)


def test_reference_is_counted_by_no_kernel(counters):
    with tf_agc.implementation("reference"):
        tf_agc.agc(_X, 2.0, 1.0)
    assert counters.read()["forward"] == 0
    tf_agc.agc(_X, 2.0, 1.0)
    assert counters.read()["forward"] == 1


def test_scopes_nest_and_end(native_required):
    with tf_agc.implementation("reference"):
        assert resolve() == ("reference", "asked for")
        with tf_agc.implementation("native"):
            assert resolve() == ("native", "asked for")
            with tf_agc.implementation("auto"):
                assert resolve()[0] == "native"
        assert resolve()[0] == "reference"
        with pytest.raises(KeyError), tf_agc.implementation("native"):
            raise KeyError
        assert resolve()[0] == "reference"
    assert resolve()[0] == "native"


def test_a_function_keeps_what_was_chosen_when_it_was_traced(native_required):
    function = _agc()
    with tf_agc.implementation("reference"):
        assert "TfAgc>Agc" not in _ops(function, _X)
    assert "TfAgc>Agc" not in _ops(function, _X)
    assert "TfAgc>Agc" in _ops(_agc(), _X)


def test_a_scope_inside_a_function(native_required):
    @tf.function
    def function(x):
        with tf_agc.implementation("reference"):
            return tf_agc.agc(x, 2.0, 1.0)

    assert "TfAgc>Agc" not in _ops(function, _X)


def test_both_agree_through_a_model(native_required, fresh_keras):
    model = keras.Sequential([keras.Input((4, 5, 3)), tf_agc.AutomaticGainControl("elu")])
    got = model(_X)
    with tf_agc.implementation("reference"):
        want = model(_X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_scope_belongs_to_its_thread(native_required):
    seen = []
    with tf_agc.implementation("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolve()[0]))
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_unavailable(unavailable):
    assert resolve() == ("reference", "it is on holiday")
    assert tf_agc.agc(_X, 2.0, 1.0).shape == _X.shape
    message = "the native implementation is not available: it is on holiday"
    with pytest.raises(RuntimeError, match=message):
        tf_agc.implementation("native")


def test_becomes_unavailable_to_an_explicit_choice(native_required, request):
    with tf_agc.implementation("native"):
        request.getfixturevalue("unavailable")
        with pytest.raises(RuntimeError, match="it is on holiday"):
            tf_agc.agc(_X, 2.0, 1.0)


@pytest.mark.parametrize("name", ["cuda", "", None, 1])
def test_unknown_name(name):
    message = f"name must be one of 'auto', 'native', 'reference', got {name!r}"
    with pytest.raises(ValueError, match=message):
        tf_agc.implementation(name)


@pytest.fixture
def without_xla(monkeypatch):
    status = dataclasses.replace(native.XLA_STATUS, available=False, reason="it is ill")
    monkeypatch.setattr(native, "XLA_STATUS", status)


def test_xla_without_its_kernels_uses_the_reference(native_required, without_xla):
    used = []

    def function(x):
        used.append(resolve())
        return tf_agc.agc(x, 2.0, 1.0, activation="relu")

    np.testing.assert_allclose(
        tf.function(function, jit_compile=True)(_X), tf_agc.agc(_X, 2.0, 1.0, activation="relu"), rtol=1e-4, atol=1e-5
    )
    assert used == [("reference", "traced for XLA, and it is ill")]
    assert resolve()[0] == "native"


def test_a_function_inside_xla_without_its_kernels_uses_the_reference(native_required, without_xla):
    inner = _agc()
    outer = tf.function(lambda x: inner(x) + 1.0, jit_compile=True)
    np.testing.assert_allclose(outer(_X), inner(_X) + 1.0, rtol=1e-4, atol=1e-5)


def test_xla_with_its_kernels_is_native(native_required):
    assert "TfAgc>Agc" in _ops(tf.function(lambda x: tf_agc.agc(x, 2.0, 1.0), jit_compile=True), _X)


def _imported_again():
    """A copy of the module, which reads the environment variable anew."""
    spec = importlib.util.find_spec("tf_agc.implementation")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("value, used", [("reference", "reference"), ("", "native")])
def test_environment_variable(value, used, monkeypatch, native_required):
    monkeypatch.setenv("TF_AGC_IMPLEMENTATION", value)
    module = _imported_again()
    assert module.resolve()[0] == used
    with module.implementation("native"):  # a scope wins
        assert module.resolve()[0] == "native"


def test_environment_variable_asks_for_what_is_missing(unavailable, monkeypatch):
    monkeypatch.setenv("TF_AGC_IMPLEMENTATION", "native")
    module = _imported_again()  # does not fail
    with pytest.raises(RuntimeError, match="not available: it is on holiday"):
        module.resolve()


def test_bad_environment_variable(monkeypatch):
    monkeypatch.setenv("TF_AGC_IMPLEMENTATION", "fast")
    message = "TF_AGC_IMPLEMENTATION must be one of 'auto', 'native', 'reference' or unset, got 'fast'"
    with pytest.raises(ValueError, match=message):
        _imported_again()
