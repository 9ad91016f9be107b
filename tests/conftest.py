"""Fixtures of all tests, and hypothesis's settings."""

import os

# Before TensorFlow is imported: its start-up notes would fill the reports.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis  # noqa: E402
import keras  # noqa: E402
import pytest  # noqa: E402

from agc_testing import Counters  # noqa: E402
from tf_agc import native  # noqa: E402

# The same examples in every run: a test that fails by chance stops somebody else's change.
hypothesis.settings.register_profile("tf_agc", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tf_agc")


@pytest.fixture
def native_required():
    """Fails, and does not skip: without the library these tests would prove nothing."""
    if not native.STATUS.available:
        pytest.fail(f"this test needs the native library: {native.STATUS.reason}")


@pytest.fixture(params=["eager", "function"])
def mode(request):
    return request.param


@pytest.fixture
def counters(native_required):
    counters = Counters()
    counters.reset()
    return counters


@pytest.fixture
def fresh_keras():
    """The same layer names and random weights in whatever order the tests run."""
    keras.backend.clear_session(free_memory=False)  # freeing collects garbage, 0.3 s a test
    keras.utils.set_random_seed(0)
