"""The hooks of .pre-commit-config.yaml are the formatters of tools/test.sh, in the versions of requirements.lock."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_hooks_run_the_locked_formatters():
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    tests = (ROOT / "tools" / "test.sh").read_text(encoding="utf-8")
    assert re.findall(r"- repo: (.*)", config) == ["local"]  # another repository would have a version of its own
    tools = re.findall(r"entry: \.venv/bin/(\S+)", config)
    assert tools == ["ruff", "ruff", "clang-format"]
    for tool in set(tools):
        assert re.search(rf"^{tool}==", lock, re.MULTILINE)
        assert f'"${{VENV}}/bin/{tool}"' in tests
