"""CONTRIBUTING.md stays true: what its recipes name is where they say, and they leave no place out. The hooks of
.pre-commit-config.yaml are the formatters of tools/test.sh, in the versions of the locks.
"""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# A recipe, something that was added by it, and the folders where its code names that.
RECIPES = [
    ("Adding a dtype", "bfloat16", ("cc", "tf_agc")),  # tools choose among types
    ("Adding an activation", "relu6", ("cc", "tf_agc", "tools")),
]


def rows_of(title):
    """The table of a section: what each file is to get, by its path."""
    (section,) = re.findall(rf"^## {title}\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r"^\| `([\w/.]+)` \| (.+) \|$", section, re.MULTILINE))


def code_of(file):
    """A file without comments and docstrings."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return re.sub(r"//.*", "", text)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


@pytest.mark.parametrize("title, example, _", RECIPES)
def test_recipes_name_what_is_there(title, example, _):
    rows = rows_of(title)
    assert rows
    for path, what in rows.items():
        code = code_of(ROOT / path)
        missing = [name for name in re.findall(r"`(\w+)`", what) if not re.search(rf"\b{name}\b", code)]
        assert not missing, f"{title}: {path} has no {missing}"
        assert re.search(example, code, re.IGNORECASE), f"{title}: {path} does not name {example}"


@pytest.mark.parametrize("title, example, folders", RECIPES)
def test_recipes_leave_no_place_out(title, example, folders):
    files = [
        file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in (".cc", ".cu", ".h", ".py")
    ]
    # Tests take the lists of what they share; the emulation has CUDA's own types.
    files = [file for file in files if not file.name.endswith("_test.cc") and file.parent.name != "emulation"]
    naming = {str(file.relative_to(ROOT)) for file in files if re.search(example, code_of(file), re.IGNORECASE)}
    assert naming and not naming - rows_of(title).keys(), f"{title} leaves out {sorted(naming - rows_of(title).keys())}"


def test_hooks_run_the_locked_formatters():
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    locks = [path.read_text(encoding="utf-8") for path in (ROOT / "requirements").glob("*.lock")]
    tests = (ROOT / "tools" / "test.sh").read_text(encoding="utf-8")
    assert re.findall(r"- repo: (.*)", config) == ["local"]  # another repository would have a version of its own
    tools = re.findall(r"entry: \.venv/bin/(\S+)", config)
    assert tools == ["ruff", "ruff", "clang-format"]
    for tool in set(tools):
        assert locks and all(re.search(rf"^{tool}==", lock, re.MULTILINE) for lock in locks)
        assert f'"${{VENV}}/bin/{tool}"' in tests
