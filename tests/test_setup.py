"""tools/setup.sh on machines that lack something: one sentence, a non-zero status, and nothing else.

The machines are directories of stubs, the only PATH that the script sees. Nothing is installed, built or fetched.
"""

import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# What the script may take for granted on any machine.
ORDINARY = "awk cat chmod cut dirname mkdir rm sha256sum timeout".split()

# An interpreter that knows the questions that the script asks. `-m venv` makes one more of the same.
PYTHON = r"""#!/bin/sh
case "$*" in
  *version_info*) echo {version} ;;
  *"import ensurepip"*) exit {venv_status} ;;
  "-m venv "*) mkdir -p "$3/bin"; cat "$0" > "$3/bin/python"; chmod +x "$3/bin/python"; echo venv >> "{log}" ;;
  "-m pip "*) echo pip >> "{log}"; exit {pip_status} ;;
  *importlib.metadata*) [ -n "{tensorflow}" ] || exit 1; echo "{tensorflow}" ;;
  *) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""


class Machine:
    """A checkout and a PATH on which everything is in order until a test takes something away."""

    def __init__(self, directory):
        self.checkout = directory / "checkout"
        self.path = directory / "bin"
        self.log = directory / "log"
        self.environment = {}
        self.path.mkdir(parents=True)
        (self.checkout / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "setup.sh", self.checkout / "tools")
        shutil.copy(ROOT / ".bazelversion", self.checkout)
        (self.checkout / "requirements.lock").write_text("tensorflow==2.21.0\n")
        for name in ORDINARY:
            (self.path / name).symlink_to(shutil.which(name))
        self.add("df", "printf 'Filesystem\\n/dev/disk 0 0 99999999 0%% /\\n'")
        self.add("g++", "exit 0")
        self.add("id", '[ "$1" = -u ] && echo 1000 || echo somebody')
        self.add("uname", "echo x86_64")
        self.add("apt-get", 'echo "apt-get $*" >> ' + str(self.log))
        self.add("bazel", "echo bazel 7.4.1")
        self.add_python()

    def add(self, name, script):
        file = self.path / name
        file.unlink(missing_ok=True)
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def add_python(self, name="python3", version="3.11", venv_status=0, pip_status=0, tensorflow="2.21.0"):
        script = PYTHON.format(
            version=version, venv_status=venv_status, pip_status=pip_status, tensorflow=tensorflow, log=self.log
        )
        (self.path / name).write_text(script)
        (self.path / name).chmod(0o755)

    def remove(self, name):
        (self.path / name).unlink()

    def set_up(self):
        bash = shutil.which("bash")
        return subprocess.run(
            [bash, "-c", f"source {self.checkout}/tools/setup.sh; echo finished"],
            env={"PATH": str(self.path), **self.environment},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def check_succeeds(self):
        result = self.set_up()
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert result.stdout.endswith("finished\n")

    def check_fails(self, *words):
        result = self.set_up()
        assert result.returncode == 1
        assert "finished" not in result.stdout
        assert re.fullmatch(r"tf_agc: [^\n]+\.\n", result.stderr), result.stderr
        for word in words:
            assert word in result.stderr


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_second_run_does_nothing(machine):
    machine.check_succeeds()
    assert machine.calls() == ["venv", "pip"]
    configured = (machine.checkout / ".bazelrc.configured").read_text()
    assert f"TF_AGC_PYTHON={machine.checkout}/.venv/bin/python\n" in configured
    assert "common --noenable_bzlmod\n" in configured

    # Neither the interpreter nor Bazel is asked again.
    machine.add_python(version="2.7")
    machine.add("bazel", "exit 1")
    machine.check_succeeds()
    assert machine.calls() == ["venv", "pip"]
    assert (machine.checkout / ".bazelrc.configured").read_text() == configured


def test_cuda_counts_for_one_call(machine):
    configured = machine.checkout / ".bazelrc.configured"
    machine.environment["TF_AGC_CUDA"] = "1"
    machine.check_succeeds()
    assert "build --config=cuda\n" in configured.read_text()
    del machine.environment["TF_AGC_CUDA"]
    machine.check_succeeds()
    assert "--config=cuda" not in configured.read_text()


def test_half_made_venv_is_made_again(machine):
    machine.add_python(pip_status=1)
    machine.check_fails("pip could not install requirements.lock", ".cache/pip.log")
    machine.add_python()
    machine.check_succeeds()
    assert machine.calls() == ["venv", "pip"] * 2


def test_changed_lock_makes_the_venv_again(machine):
    machine.check_succeeds()
    (machine.checkout / "requirements.lock").write_text("tensorflow==2.21.1\n")
    machine.check_succeeds()
    assert machine.calls() == ["venv", "pip"] * 2


def test_chosen_interpreter_replaces_the_venv(machine):
    machine.check_succeeds()
    machine.add_python("python3.13", version="3.13")
    machine.environment["PYTHON"] = "python3.13"
    machine.check_succeeds()
    machine.check_succeeds()
    assert machine.calls() == ["venv", "pip"] * 2


def test_vanished_bazel_is_looked_for_again(machine):
    machine.check_succeeds()
    machine.remove("bazel")
    machine.add("bazelisk", "echo bazel 7.4.1")
    machine.check_succeeds()
    assert (machine.checkout / ".cache" / "bazel").read_text() == f"7 {machine.path}/bazelisk\n"


def test_root_installs_what_is_missing(machine):
    machine.remove("g++")
    machine.add("id", "echo 0")
    machine.add("env", 'shift; exec "$@"')
    machine.add(
        "apt-get",
        f"""echo "apt-get $*" >> {machine.log}
case "$*" in *install*) printf '#!/bin/sh\\n' > {machine.path}/g++; chmod +x {machine.path}/g++ ;; esac""",
    )
    machine.check_succeeds()
    assert machine.calls()[1].endswith(" install g++")


def test_failing_apt(machine):
    machine.remove("g++")
    machine.add("id", "echo 0")
    machine.add("apt-get", "echo no network >&2; exit 100")
    machine.check_fails("a C++ compiler is missing", "apt-get could not install", ".cache/apt.log")


def test_no_root_for_apt(machine):
    machine.remove("g++")
    machine.check_fails("a C++ compiler is missing", "only root", "sudo apt-get install g++")


def test_neither_debian_nor_ubuntu(machine):
    machine.remove("g++")
    machine.remove("apt-get")
    machine.check_fails("a C++ compiler is missing", "neither Debian nor Ubuntu")


def test_old_compiler(machine):
    machine.add("g++", "echo unknown option >&2; exit 1")
    machine.check_fails("-std=c++17 -march=x86-64-v4", "g++ 11 or newer")


def test_no_python(machine):
    machine.remove("python3")
    machine.check_fails("there is no python3", "Python 3.10 to 3.13")


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.14"])
def test_wrong_python(machine, version):
    machine.add_python(version=version)
    machine.check_fails(f"python3 is Python {version}", "3.10 to 3.13", "PYTHON=")


def test_no_venv_module(machine):
    machine.add_python(venv_status=1)
    machine.check_fails("python3's venv module is missing", "sudo apt-get install python3.11-venv")


def test_no_disk_space(machine):
    machine.add("df", "printf 'Filesystem\\n/dev/disk 0 0 1048576 0%% /\\n'")
    machine.check_fails("1024 MB of free disk space", "4096 MB")


def test_no_tensorflow(machine):
    machine.add_python(tensorflow="")
    machine.check_fails("no TensorFlow in", "remove that directory")


def test_wrong_tensorflow(machine):
    machine.add_python(tensorflow="2.20.0")
    machine.check_fails("TensorFlow 2.20.0 where 2.21 is needed")


@pytest.mark.parametrize("answer", ["exit 1", "echo bazel 6.5.0"])
def test_chosen_bazel_does_not_do(machine, answer):
    machine.add("my-bazel", answer)
    machine.environment["BAZEL"] = "my-bazel"
    machine.check_fails("BAZEL=my-bazel does not run")


def test_no_bazel_and_no_root(machine):
    machine.remove("bazel")
    machine.add("npm", "exit 1")
    machine.check_fails("Bazel is missing", "sudo apt-get install bazel-bootstrap")


def test_checkout_of_somebody_else(machine):
    # A file in the directory's place stops root as well.
    (machine.checkout / ".cache").touch()
    machine.check_fails("cannot be written by somebody")
