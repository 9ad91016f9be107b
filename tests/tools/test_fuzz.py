"""The fuzzer: it counts what it ran, and finds what is planted. What it finds in the product has tests elsewhere.

The examples that import TensorFlow run in this process, and those in a process of their own are others.
"""

import pathlib
import re

import numpy as np
import pytest

import tf_agc

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"


# ---- The examples


@pytest.fixture
def fuzz_rounds(native_required, monkeypatch):
    from fuzz import fuzz_op, fuzz_rounds

    monkeypatch.setattr(fuzz_rounds, "EXAMPLES", 20)
    monkeypatch.setattr(fuzz_op, "MODES", ("eager", "eager", "function", "unknown shapes"))
    return fuzz_rounds


def run_round(fuzz_rounds, module, tmp_path, seed=7):
    return fuzz_rounds.run_round(module.examples(), module.outcome, seed, tmp_path / "example")


def test_right_and_wrong_calls(fuzz_rounds, tmp_path):
    from fuzz import fuzz_op

    done = run_round(fuzz_rounds, fuzz_op, tmp_path)
    assert (done["seed"], done["finding"]) == (7, None)
    assert sum(done["counts"].values()) == 20
    assert {outcome.split(",")[0] for outcome in done["counts"]} >= {"compared", "refused"}


def test_a_seed_is_a_reproduction(fuzz_rounds, tmp_path):
    from fuzz import fuzz_op

    def examples_of(seed):
        seen = []
        fuzz_rounds.run_round(
            fuzz_op.examples(), lambda example: seen.append(repr(example)), seed, tmp_path / "example"
        )
        return seen

    assert examples_of(1) == examples_of(1) != examples_of(2)


def test_right_and_wrong_graphs(fuzz_rounds, tmp_path):
    from fuzz import fuzz_graph

    done = run_round(fuzz_rounds, fuzz_graph, tmp_path)
    assert done["finding"] is None and sum(done["counts"].values()) == 20
    for kind in ("right, compared, TfAgc>", "mutations, not imported: "):
        assert any(outcome.startswith(kind) for outcome in done["counts"]), done["counts"]


EXAMPLE = dict(
    sizes=(2, 3, 5), dtype="float32", activation="relu", alpha=0.0, data_format="channels_last", x=("normal",),
    dy=("normal",), gain=(2.0, -0.5), mean_scale=(1.0,), seed=0, mode="eager",
)  # fmt: skip


BOTH = dict(bias=(0.5, -1.0), shortcut=("normal",))


def accepts_everything(*arguments, **options):
    return None


def names_nothing(*arguments, **options):
    raise ValueError("wrong")


def wrong_type(*arguments, **options):
    raise RuntimeError("gain must be something else")


@pytest.mark.parametrize(
    ("changes", "planted", "message"),
    [
        ({"wrong": ("gain", (4,))}, accepts_everything, "gain was accepted"),
        ({"wrong": ("gain", "None")}, names_nothing, "gain is not named: wrong"),
        ({"wrong": ("gain", "None")}, wrong_type, "gain must be something else"),
        ({"wrong": ("gain", (4,)), "bias": (1.0,), "shortcut": ("normal",)}, accepts_everything, "gain was accepted"),
    ],
)
def test_what_refuses_badly(monkeypatch, changes, planted, message):
    from fuzz import fuzz_op

    example = fuzz_op.Example(**EXAMPLE | changes)
    assert fuzz_op.outcome(example).startswith("refused, gain: ")
    monkeypatch.setattr(tf_agc, "agc", planted)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        fuzz_op.outcome(example)


@pytest.mark.parametrize(
    ("changes", "index", "message"),
    [
        ({}, 0, "y: 1 of .* differ"),
        ({}, 1, "dx: 1 of .* differ"),
        ({}, 2, "dgain: 1 of .* differ"),
        ({}, 3, "dmean_scale: 1 of .* differ"),
        (BOTH, 2, "dgain: 1 of .* differ"),
        (BOTH, 4, "dbias: 1 of .* differ"),
        (BOTH, 5, "dshortcut: 1 of .* differ"),
        (BOTH | {"dy": ("nan",), "sizes": (1, 3, 1)}, 4, "dbias: NaN in dy is lost"),
        (BOTH | {"dy": ("nan",), "sizes": (1, 1, 1)}, 5, "dshortcut: NaN in dy is lost"),
        (BOTH | {"shortcut": ("normal", "inf")}, 0, "y: 1 of .* differ"),
        ({"x": ("normal", "nan")}, 0, "y: 1 of .* differ"),
        ({"x": ("nan",)}, 0, "y: "),
        ({"x": ("nan",)}, 2, "dgain: NaN in x or dy is lost"),
        ({"sizes": (1, 3, 1), "dy": ("nan",)}, 1, "dx: NaN in dy is lost"),
        ({"gain": (0.0,), "activation": "elu", "alpha": 1.0}, 2, "dgain: 1 of .* differ"),
        ({"sizes": (0, 3, 5)}, 2, "Mismatched elements"),
    ],
)
def test_a_wrong_number_is_found(monkeypatch, changes, index, message, native_required):
    """One element of one result, where nothing but that element is wrong."""
    from fuzz import fuzz_op

    example = fuzz_op.Example(**EXAMPLE | changes)
    assert "eager" in fuzz_op.outcome(example)
    call = fuzz_op._call

    def planted(*arguments):
        results = [*map(np.array, call(*arguments))]
        results[index].flat[0] = 77
        return [fuzz_op.tf.constant(result) for result in results]

    monkeypatch.setattr(fuzz_op, "_call", planted)
    with pytest.raises(AssertionError, match=message):
        fuzz_op.outcome(example)


@pytest.mark.parametrize("optional", ["neither", "both"])
@pytest.mark.parametrize("op", ["TfAgc>Agc", "TfAgc>AgcGrad"])
def test_a_wrong_graph_is_found(monkeypatch, op, optional, native_required):
    from fuzz import fuzz_graph

    example = fuzz_graph.Example(
        op, (2, 3, 4), "float32", "elu", "channels_first", 0, ("const",), False, (), (), optional
    )
    assert fuzz_graph.outcome(example) == f"right, compared, {op}"
    run = fuzz_graph._run

    def planted(*arguments):
        operation, outputs, inputs = run(*arguments)
        return operation, [1.01 * output for output in outputs], inputs

    monkeypatch.setattr(fuzz_graph, "_run", planted)
    with pytest.raises(AssertionError, match="differ"):
        fuzz_graph.outcome(example)


@pytest.mark.parametrize(
    ("mutation", "outcome"),
    [
        (("attribute", "node", "alpha", ("f", float("nan"))), "refused: InvalidArgumentError"),
        (("attribute", "node", "data_format", ("s", b"NHWC")), "not imported: ValueError"),
        (("attribute", "node", "data_format", ("i", 3)), "not imported: ValueError"),
        (("remove", "node", "activation"), "not imported: ValueError"),
        (("attribute", "node", "num_bias", ("i", 2)), "not imported: ValueError"),
        (("attribute", "node", "activation", ("s", b"linear")), "not imported: ValueError"),
        (("feed", 1, (7,)), "refused: InvalidArgumentError"),
        (("op", "node", "TfAgc>Other"), "not imported: NotFoundError"),
    ],
)
def test_a_wrong_graph_is_refused(native_required, mutation, outcome):
    from fuzz import fuzz_graph

    example = fuzz_graph.Example(
        "TfAgc>AgcGrad", (2, 3, 4), "float32", "elu", "channels_last", 0, ("unknown",), False, (mutation,), (), "both"
    )
    assert fuzz_graph.outcome(example) == f"mutations, {outcome}"


# ---- The process that they run in, with other examples

_STUB = """
import ctypes, sys, types
from fuzz import fuzz_rounds
from hypothesis import strategies as st
sys.modules["fuzz.fuzz_op"] = types.SimpleNamespace(
    examples=lambda: st.integers(0, 1000), outcome=lambda example: {outcome}
)
fuzz_rounds.main(*sys.argv[2:])
"""


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs the command, where the outcome of an example, a number, is an expression."""
    from fuzz import fuzz

    def call(outcome, *options):
        (tmp_path / "__main__.py").write_text(_STUB.format(outcome=outcome), encoding="utf-8")
        monkeypatch.setattr(fuzz, "TOOLS", tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(TOOLS))
        with pytest.raises(SystemExit) as status:
            fuzz.main(["op", "--minutes", "0", "--seed", "7", *options])
        return status.value.code, capsys.readouterr().out

    return call


def test_counts(call):
    status, printed = call("'small' if example < 500 else 'large'")
    counts = re.fullmatch(
        r"op: 1 rounds, seeds 7 to 7, 100 examples\n +(\d+)  large\n +(\d+)  small\nNo finding.\n", printed
    )
    assert status == 0 and counts and sum(map(int, counts.groups())) == 100, printed


def test_a_finding_is_shrunk_and_printed(call):
    status, printed = call("'small' if example < 500 else 1 / 0")
    assert status == 1
    assert "\nFINDING, seed 7: python tools fuzz.fuzz op --seed 7 --minutes 0\n500\nTraceback" in printed
    assert "ZeroDivisionError: division by zero" in printed


def test_a_crash_is_a_finding(call):
    status, printed = call("'small' if example < 500 else ctypes.string_at(0)")
    assert status == 1
    found = re.search(
        r"\nFINDING, seed 7: python tools fuzz.fuzz op --seed 7 --minutes 0\n(\d+)\nexit status -11\n", printed
    )
    assert found and int(found[1]) >= 500 and "Segmentation fault" in printed, printed


def test_a_process_that_does_not_start_is_a_finding(call, monkeypatch):
    status, printed = call("this is no Python")
    assert status == 1 and "\nnone yet\nexit status 1\n" in printed and "SyntaxError" in printed


def test_options(capsys):
    from fuzz import fuzz

    for arguments, sentence in (
        (["layer"], "invalid choice: 'layer'"),
        (["op", "--minutes", "-1"], "argument --minutes: must be >= 0 and finite, got -1"),
        (["op", "--minutes", "nan"], "argument --minutes: must be >= 0 and finite, got nan"),
    ):
        with pytest.raises(SystemExit, match="2"):
            fuzz.main(arguments)
        assert sentence in capsys.readouterr().err
