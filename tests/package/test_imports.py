"""The arrows of docs/architecture.md: imports of Python modules, and includes of C++ files, point one way."""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def sources_of(folder, package=""):
    """The source of every module below a folder, by the name that it is imported by."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = (package, *file.relative_to(folder).with_suffix("").parts)
        found[".".join(part for part in parts if part not in ("", "__init__"))] = file.read_text(encoding="utf-8")
    return found


TF_AGC, TOOLS = sources_of(ROOT / "tf_agc", "tf_agc"), sources_of(ROOT / "tools")


def imports_of(sources):
    """What each module imports, within functions too: the modules among `sources`, and other names as they stand."""
    graph = {}
    for name, source in sources.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                graph[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                # tf_agc is flat: one dot is the package.
                base = ".".join(part for part in ("tf_agc" * node.level, node.module) if part)
                members = {f"{base}.{alias.name}" for alias in node.names}
                graph[name].update(members & sources.keys() or {base})
    return graph


def in_order(graph):
    """The nodes, each behind those that it points to; a circle is a CycleError."""
    return list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("sources", [TF_AGC, TOOLS], ids=["tf_agc", "tools"])
def test_no_circle_of_modules(sources):
    # A module that imports its own package as a whole makes one, too: it would find it half loaded.
    assert set(in_order(imports_of(sources))) >= sources.keys()


def test_no_circle_of_folders():
    graph = {}
    for name, names in imports_of(TOOLS).items():
        folder = name.partition(".")[0]
        graph.setdefault(folder, set()).update({other.partition(".")[0] for other in names} - {folder})
    assert set(in_order(graph)) >= {"benchmarks", "demo", "fuzz", "gpu", "study"}


def test_nothing_points_up():
    tests = {"conftest", "tests", *(file.stem for file in (ROOT / "tests").rglob("*.py"))}
    tools = {name.partition(".")[0] for name in TOOLS} - {"__main__"}
    for sources, above in ((TF_AGC, tools | tests), (TOOLS, tests)):
        for name, names in imports_of(sources).items():
            assert not {other.partition(".")[0] for other in names} & above, name


def test_a_circle_is_found():
    with pytest.raises(graphlib.CycleError):
        in_order(imports_of({"a": "def f():\n    from b import c", "b": "from a import f"}))


# ---- C++ ----

CC = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in sorted((ROOT / "cc").rglob("*"))
    if file.suffix in {".h", ".cc", ".cu"}
}

# What the files of a folder may include of cc, and which headers of others by the start of their path; the C++ and C
# libraries' own stand in <angles>, and so do CUDA's.
FOLDERS = {
    "cc/core": {"cc/core/", "gtest/", "benchmark/"},
    "cc/ops": {"cc/ops/", "absl/", "tensorflow/"},
    "cc/kernels": {
        "cc/kernels/",
        "cc/ops/",
        "cc/core/",
        "absl/",
        "tensorflow/",
        "xla/stream_executor/",
        "cuda_build.h",
    },
    "cc/xla": {"cc/xla/", "cc/kernels/arguments.h", "cc/core/", "absl/", "tensorflow/", "xla/"},
    "cc/serving": {"cc/serving/", "absl/", "tensorflow/", "gtest/"},
}

# All that these reach in cc, beside themselves.
REACH = {
    "cc/core/types.h": set(),
    "cc/core/parallel.h": set(),
    "cc/core/cpu.h": set(),
    "cc/core/scheduling.h": {"types.h"},
    "cc/core/job.h": {"parallel.h"},
    # Compiled once for every instruction-set level: no inline function of a header may get into it (loops.h).
    "cc/core/loops.cc": {"loops.h", "types.h", "simd_per_level.h", "activations_per_level.h"},
    "cc/core/cuda/plan.h": {"types.h"},
    "cc/core/cuda/emulation/emulation.cc": {"cuda/emulation/emulation.h"},
    "cc/core/cuda/primitives.h": {"cuda/emulation/emulation.h", "types.h"},
    "cc/core/cuda/agc_cuda.h": {"types.h"},
}


def includes_of(sources):
    """What each file includes in "quotes"."""
    return {name: set(re.findall(r'^ *# *include "(.*)"', text, re.MULTILINE)) for name, text in sources.items()}


def test_no_circle_of_includes():
    assert set(in_order(includes_of(CC))) >= CC.keys()


def test_includes_point_down():
    for name, names in includes_of(CC).items():
        folder = "/".join(name.split("/")[:2])
        above = {other for other in names if not other.startswith(tuple(FOLDERS[folder]))}
        assert not above, name
        assert {other for other in names if other.startswith("cc/")} <= CC.keys(), name
        # In angles another library would go unseen.
        others = re.findall(r"^ *# *include <((?:absl|Eigen|google|tensorflow|tsl|xla)\b.*)>", CC[name], re.MULTILINE)
        assert not others, name


def test_cuda_is_not_known_above_it():
    for name, names in includes_of(CC).items():
        cuda = {other for other in names if other.startswith("cc/core/cuda/")}
        if name.startswith(("cc/kernels/", "cc/xla/")):
            assert cuda <= {"cc/core/cuda/agc_cuda.h"}, name
        elif not name.startswith("cc/core/cuda/"):
            assert not cuda, name


def test_the_calls_of_xla_know_no_tensorflow():
    graph = includes_of(CC)
    reached = {other for file in _reached(graph, "cc/xla/custom_call.cc") for other in graph.get(file, ())}
    assert {other for other in reached if not other.startswith("cc/")} == {"xla/ffi/api/ffi.h"}


@pytest.mark.parametrize("name", REACH)
def test_lower_files_reach_nothing_else(name):
    assert _reached(includes_of(CC), name) - {name} == {f"cc/core/{other}" for other in REACH[name]}


def _reached(graph, name):
    found, left = set(), {name}
    while left:
        found |= left
        left = {other for file in left for other in graph[file] if other in graph} - found
    return found


def test_a_circle_of_includes_is_found():
    sources = {"a.h": '#include <vector>\n#include "b.h"\n', "b.h": '#include "a.h"\n'}
    assert includes_of(sources) == {"a.h": {"b.h"}, "b.h": {"a.h"}}
    with pytest.raises(graphlib.CycleError):
        in_order(includes_of(sources))
