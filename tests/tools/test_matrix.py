"""tools/test_matrix.sh: which suites it runs, what it prints of them, and that none that passed runs twice.

The suite and the Pythons are stubs; git is real.
"""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

ORDINARY = "bash cat cut date dirname git head mkdir nproc rm sed sort tail".split()

# Of the checkout that is tested: the suite, which writes down how it was called, and the set-up that the table asks.
SUITE = """#!/bin/bash
echo "$("$PYTHON") $*" >> {log}
if [[ -e {result} ]]; then cat {result}; exit 1; fi
echo "===== 3 passed, 1 skipped in 5.00s ====="
echo "I0000 port.cc:153] of TensorFlow"
"""
SETUP = """
VENV=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/venv-$2
"""


class Matrix:
    def __init__(self, directory):
        self.checkout, self.path, self.log, self.result = (directory / n for n in ("checkout", "bin", "log", "result"))
        self.path.mkdir()
        for name in ORDINARY:
            (self.path / name).symlink_to(shutil.which(name))
        self.executable(self.path / "python3.10", "#!/bin/bash\n[[ $1 == -c ]] || echo 3.10\n")
        self.executable(self.path / "python3.12", "#!/bin/bash\nexit 1\n")  # pyenv's, of a version that is not chosen
        pyenv = directory / "pyenv" / "versions" / "3.12.1" / "bin" / "python"
        self.executable(pyenv, "#!/bin/bash\n[[ $1 == -c ]] || echo 3.12\n")
        self.environment = {"PATH": str(self.path), "PYENV_ROOT": str(directory / "pyenv"), "HOME": str(directory)}

        tools = self.checkout / "tools"
        self.executable(tools / "test.sh", SUITE.format(log=self.log, result=self.result))
        self.executable(tools / "setup.sh", SETUP)
        for release in ("2.9", "2.21"):
            self.executable(
                tools / f"venv-{release}" / "bin" / "python", f"#!/bin/bash\necho '| {release}.0 | 3.1 | 3.x |'\n"
            )
            lock = self.checkout / "requirements" / f"tensorflow-{release}.lock"
            lock.parent.mkdir(exist_ok=True)
            lock.write_text(f"tensorflow=={release}.0\n")
        shutil.copy(ROOT / "tools" / "test_matrix.sh", tools)
        (self.checkout / ".gitignore").write_text("/.cache/\n")
        self.git("init", "--quiet")
        self.commit()

    def executable(self, file, text):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def git(self, *arguments):
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
        command = [self.path / "git", "-C", self.checkout, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=self.environment).stdout.strip()

    def commit(self):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=all")

    def run(self, *arguments):
        self.log.unlink(missing_ok=True)
        command = [self.path / "bash", self.checkout / "tools" / "test_matrix.sh", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        return result, calls


@pytest.fixture
def matrix(tmp_path):
    return Matrix(tmp_path)


def test_every_release_on_every_python(matrix):
    result, calls = matrix.run("-k", "layer")
    assert result.returncode == 0, result.stderr
    # The newest release first, and by number; what is not there is said.
    assert calls == [
        f"{python} --tensorflow {release} -k layer" for release in ("2.21", "2.9") for python in ("3.10", "3.12")
    ]
    assert "there is no Python 3.11 here" in result.stderr and "there is no Python 3.13 here" in result.stderr
    assert result.stdout.startswith(f"Commit {matrix.git('rev-parse', '--short', 'HEAD')}, ")
    rows = [f"| {release}.0 | 3.1 | 3.x | 3 passed, 1 skipped in 5.00s |" for release in ("2.21", "2.21", "2.9", "2.9")]
    assert result.stdout.splitlines()[2:] == ["| TensorFlow | Keras | Python | result |", "|---|---|---|---|", *rows]


def test_what_passed_is_not_run_again(matrix):
    first, calls = matrix.run()
    second, again = matrix.run()
    assert (len(calls), again) == (4, [])
    assert second.stdout == first.stdout
    assert len(matrix.run("-k", "layer")[1]) == 4
    matrix.commit()
    assert len(matrix.run("-k", "layer")[1]) == 4


def test_what_failed_is_run_again(matrix):
    matrix.result.write_text("===== 1 failed, 2 passed in 5.00s =====\n")
    result, _ = matrix.run()
    assert result.returncode == 1
    assert result.stdout.count("| 1 failed, 2 passed in 5.00s |") == 4
    matrix.result.write_text("===== 1 failed\ntf_agc: the C++ files are not formatted\n")
    assert matrix.run()[0].stdout.count("| tf_agc: the C++ files are not formatted |") == 4
    matrix.result.unlink()
    result, calls = matrix.run()
    assert (result.returncode, len(calls)) == (0, 4)


def test_changes_without_a_commit(matrix):
    (matrix.checkout / "requirements" / "tensorflow-2.22.lock").write_text("tensorflow==2.22.0\n")
    result, calls = matrix.run()
    assert "changes without a commit are not tested" in result.stderr
    assert len(calls) == 4


def test_no_python(matrix):
    (matrix.path / "python3.10").unlink()
    shutil.rmtree(matrix.environment["PYENV_ROOT"])
    result, calls = matrix.run()
    assert (result.returncode, calls) == (1, [])
    assert result.stderr.endswith("tf_agc: there is no Python here: install Python 3.10 to 3.13.\n")


def test_nightly_needs_uv(matrix):
    matrix.executable(matrix.path / "python3", "#!/bin/bash\n")
    result, calls = matrix.run("--nightly")
    assert (result.returncode, calls) == (1, [])
    assert "there is no uv" in result.stderr
