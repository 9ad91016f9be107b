"""Nothing comes from outside but what is pinned by hash, and everything that does is listed with its licence."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PAGE = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")


def rows(text):
    """Version and licence of each package in a table."""
    found = re.findall(r"^\| (\S+) \| (\d[^|]*) \| ([^|]+) \|$", text, re.M)
    return {name: (versions, licence) for name, versions, licence in found}


@pytest.fixture(scope="module")
def printed():
    """What tools/list_licences.py says of each lock."""
    command = [sys.executable, ROOT / "tools" / "list_licences.py", "--lock"]
    return {lock: subprocess.run([*command, lock], check=True, capture_output=True, text=True).stdout for lock in LOCKS}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_file_has_its_hash(lock):
    entries = re.split(r"^(?=[a-z0-9])", lock.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(entries) > 50
    for entry in entries:
        assert re.match(r"[a-z0-9_.-]+==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry


def test_page_lists_the_newest_lock(printed):
    listed, want = rows(PAGE), rows(printed[LOCKS[-1]])
    assert len(want) > 50
    # Not the licences: metadata is that of the one version that this Python has.
    assert {name: versions for name, (versions, _) in listed.items()} == {
        name: versions for name, (versions, _) in want.items()
    }, "write the output of tools/list_licences.py into docs/dependencies.md"
    assert all(licence.strip() for _, licence in listed.values())


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_licence_is_known(printed, lock):
    unknown = [name for name, (_, licence) in rows(printed[lock]).items() if licence == "unknown"]
    assert not unknown, "read the package's licence, and add it to KNOWN in tools/list_licences.py"


def test_bazel_fetches_nothing():
    files = [ROOT / "WORKSPACE", *(ROOT / "bazel").rglob("*.bzl"), *(ROOT / "bazel").rglob("*.tpl")]
    rules = re.compile(r"http_archive|http_file|git_repository|\.download|maven|https?://")
    found = [(file.name, match) for file in files for match in rules.findall(file.read_text(encoding="utf-8"))]
    assert found == []
