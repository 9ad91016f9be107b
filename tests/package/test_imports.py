"""The arrows of docs/architecture.md among Python modules and among the folders of tools: imports point one way."""

import ast
import graphlib
import pathlib

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
