"""The public names, and what their types tell a user's type checker."""

import inspect
import re

import pytest
from mypy import api

import tf_agc

PUBLIC = [
    "AutomaticGainControl",
    "GainMonitor",
    "StandardizedConv1D",
    "StandardizedConv2D",
    "StandardizedConv3D",
    "StandardizedDepthwiseConv2D",
    "__version__",
    "agc",
    "calibrate",
    "conversion_table",
    "convert",
    "export_saved_model",
    "implementation",
    "plot_gains",
]

# A user's program. Behind `# ->` stands what mypy says of the line; of all others it must say nothing.
PROGRAM = """
import numpy as np
import tf_agc

x = np.zeros((2, 4, 4, 3), np.float32)
tf_agc.agc(x, gain=1.0, mean_scale=[1.0, 1.0, 1.0], activation="leaky_relu", alpha=0.1, data_format="channels_last")
tf_agc.agc(x, 1.0, 1.0, None, None, None)
tf_agc.agc(x, 1.0, 1.0, bias=[0.0, 0.0, 0.0], shortcut=x, activation="relu")
tf_agc.agc(x)  # -> error: Missing positional arguments "gain", "mean_scale" in call to "agc"
tf_agc.agc(x, 1.0, 1.0, activation=6)  # -> error: Argument "activation" to "agc" has incompatible type "int"
tf_agc.agc(x, 1.0, 1.0, slope=0.1)  # -> error: Unexpected keyword argument "slope" for "agc"

layer = tf_agc.AutomaticGainControl("relu", gain_initializer="ones", name="agc_1", dtype="float32")
reveal_type(layer)  # -> note: Revealed type is "tf_agc.layer.AutomaticGainControl"
tf_agc.AutomaticGainControl(lambda z: z)
tf_agc.AutomaticGainControl("relu", use_bias=True, bias_initializer="zeros", train_gain=False)
tf_agc.AutomaticGainControl(data_format=1)  # -> error: Argument "data_format" to "AutomaticGainControl"
tf_agc.AutomaticGainControl(train_mean_scale="no")  # -> error: Argument "train_mean_scale" to "AutomaticGainControl"

tf_agc.StandardizedConv2D(4, 3, padding="same", use_bias=False, use_gain=True)
tf_agc.calibrate(layer, x, target_std={"agc_1": 0.5}, branch_factor=1)
table = tf_agc.calibrate(layer, x, target_std=1)
reveal_type(table)  # -> note: Revealed type is "tf_agc.calibration.CalibrationTable"
reveal_type(table[0].kept)  # -> note: Revealed type is "list[int]"
table[0].gains  # -> error: "CalibratedLayer" has no attribute "gains"
tf_agc.calibrate(layer, x, std=1.0)  # -> error: Unexpected keyword argument "std" for "calibrate"

with tf_agc.implementation("reference"):
    pass
tf_agc.implementation(None)  # -> error: Argument 1 to "implementation" has incompatible type "None"

reveal_type(tf_agc.__version__)  # -> note: Revealed type is "str"
tf_agc.native_library  # -> error: Module has no attribute "native_library"
"""


def test_all_is_the_interface():
    assert tf_agc.__all__ == PUBLIC
    others = {
        name for name, value in vars(tf_agc).items() if not name.startswith("_") and not inspect.ismodule(value)
    } - set(PUBLIC)
    assert not others, f"public by their names, but not in __all__: {others}"
    modules = {name: value for name, value in vars(tf_agc).items() if inspect.ismodule(value)}
    foreign = {name for name, module in modules.items() if not module.__name__.startswith("tf_agc.")}
    assert all(name.startswith("_") for name in foreign), foreign


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_public_names_are_documented(name):
    value = getattr(tf_agc, name)
    assert value.__doc__, f"tf_agc.{name} has no docstring"
    # Keras and TensorFlow put wrappers around; users see through them.
    assert inspect.unwrap(value).__module__.startswith("tf_agc.")


def test_users_program(tmp_path, monkeypatch):
    """Types come from the installed wheel, which must have py.typed: mypy ignores a package without it."""
    monkeypatch.chdir(tmp_path)  # in the checkout mypy would take its sources
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    output, errors, _ = api.run([str(program), f"--cache-dir={tmp_path}", "--config-file=", "--no-error-summary"])
    assert not errors
    said = {}
    for line, text in re.findall(r"^.*program\.py:(\d+): (.*)$", output, re.MULTILINE):
        said.setdefault(int(line), []).append(text)
    lines = enumerate(PROGRAM.splitlines(), start=1)
    expected = {number: line.partition("# -> ")[2] for number, line in lines if "# -> " in line}
    assert said.keys() == expected.keys(), output
    for number, text in expected.items():
        assert any(reply.startswith(text) for reply in said[number]), f"line {number}: {text}\n{output}"
