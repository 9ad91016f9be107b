"""The hooks of .pre-commit-config.yaml are the formatters of tools/test.sh, in the versions of the locks."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]


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
