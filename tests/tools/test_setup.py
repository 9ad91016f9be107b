"""tools/setup.sh on machines that lack something: one sentence, a non-zero status, and nothing else. What
tools/build_wheel.sh does with the wheel that Bazel made, and tools/lock.sh with what uv found; the locks themselves.

The machines are directories of stubs, the only PATH that the script sees. Nothing is installed, built or fetched.
"""

import hashlib
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What the script may take for granted on any machine.
ORDINARY = "awk cat chmod cmp cp cut dirname mkdir mktemp mv rm sed sha256sum timeout".split()

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
        for name in ("setup.sh", "build_wheel.sh", "lock.sh"):
            shutil.copy(ROOT / "tools" / name, self.checkout / "tools")
        shutil.copy(ROOT / ".bazelversion", self.checkout)
        (self.checkout / "requirements").mkdir()
        self.lock("2.20.0")
        self.lock("2.21.0")
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

    def lock(self, tensorflow):
        file = self.checkout / "requirements" / f"tensorflow-{tensorflow.rpartition('.')[0]}.lock"
        file.write_text(f"tensorflow=={tensorflow} \\\n    --hash=sha256:0\n")

    def locks(self):
        return {file.name: file.read_text() for file in (self.checkout / "requirements").iterdir()}

    def set_up(self, *arguments):
        return self.run("-c", f"source {self.checkout}/tools/setup.sh; echo $* finished", "bash", *arguments)

    def run_tool(self, name, *arguments):
        return self.run(self.checkout / "tools" / name, *arguments)

    def run(self, *arguments):
        return subprocess.run(
            [shutil.which("bash"), *arguments],
            env={"PATH": str(self.path), **self.environment},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def check_succeeds(self, *arguments):
        result = self.set_up(*arguments)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert result.stdout.endswith("finished\n")

    def check_fails(self, *words, arguments=()):
        result = self.set_up(*arguments)
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
    machine.check_fails("pip could not install requirements/tensorflow-2.21.lock", ".cache/pip.log")
    machine.add_python()
    machine.check_succeeds()
    assert machine.calls() == ["venv", "pip"] * 2


def test_changed_lock_makes_the_venv_again(machine):
    machine.check_succeeds()
    machine.lock("2.21.1")
    machine.check_succeeds()
    assert machine.calls() == ["venv", "pip"] * 2


def test_other_tensorflow_has_a_venv_of_its_own(machine):
    machine.check_succeeds()
    default = (machine.checkout / ".bazelrc.configured").read_text()
    assert "-tensorflow-2.21.0-" in default

    machine.add_python(tensorflow="2.20.0")
    for arguments in (["--tensorflow", "2.20", "-k", "layer"], ["--tensorflow=2.20", "-k", "layer"]):
        result = machine.set_up(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.endswith("-k layer finished\n")  # the choice is taken off the script's arguments
        configured = (machine.checkout / ".bazelrc.configured").read_text()
        assert f"TF_AGC_PYTHON={machine.checkout}/.cache/venv-2.20/bin/python\n" in configured
        assert "-tensorflow-2.20.0-" in configured

    # The default's venv is as it was, by either name.
    machine.check_succeeds()
    machine.check_succeeds("--tensorflow", "2.21")
    assert (machine.checkout / ".bazelrc.configured").read_text() == default
    assert machine.calls() == ["venv", "pip"] * 2


def test_new_lock_becomes_the_default(machine):
    machine.check_succeeds()
    machine.lock("2.22.0")
    machine.add_python(tensorflow="2.22.0")
    machine.check_succeeds()
    assert machine.calls() == ["venv", "pip"] * 2
    assert "-tensorflow-2.22.0-" in (machine.checkout / ".bazelrc.configured").read_text()


@pytest.mark.parametrize("tensorflow", ["2.19", "2.20.0", "2.20 2.21", ""])
def test_unknown_tensorflow(machine, tensorflow):
    message = f"--tensorflow must be one of 2.20 2.21 (those with a lock in requirements), got '{tensorflow}'."
    machine.check_fails(message, arguments=["--tensorflow", tensorflow])
    machine.check_fails(message, arguments=[f"--tensorflow={tensorflow}"])
    assert machine.calls() == []


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


def test_venv_of_somebody_else_is_left_alone(machine):
    own = machine.checkout / ".venv" / "own"
    own.parent.mkdir()
    own.write_text("own")
    machine.check_fails(f"{own.parent} was not made by this script: move it away, then start again.")
    assert own.read_text() == "own"
    assert machine.calls() == []


def test_a_space_in_the_path(tmp_path):
    machine = Machine(tmp_path / "my work")
    result = machine.run(machine.checkout / "tools" / "build_wheel.sh")
    assert result.returncode == 1
    assert f"tf_agc: {machine.checkout} has a space in its name" in result.stderr
    assert machine.calls() == []


def test_checkout_of_somebody_else(machine):
    # A file in the directory's place stops root as well.
    (machine.checkout / ".cache").touch()
    machine.check_fails("cannot be written by somebody")


@pytest.fixture
def builder(machine):
    """A machine whose Bazel makes the wheel out of the file `content`."""
    (machine.checkout / "content").write_text("one")
    machine.add(
        "bazel",
        f"""[ "$*" = "build //:wheel" ] || {{ echo bazel 7.4.1; exit; }}
mkdir -p bazel-bin/wheel; cat content > bazel-bin/wheel/tf_agc-0.21.0.whl; echo bazel >> {machine.log}""",
    )
    return machine


def test_wheel_goes_into_dist(builder):
    for _ in range(2):  # The second time, the same wheel is there already.
        result = builder.run_tool("build_wheel.sh", "--tensorflow", "2.21")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.endswith(f"{hashlib.sha256(b'one').hexdigest()}  tf_agc-0.21.0.whl\n")
        (wheel,) = (builder.checkout / "dist").iterdir()
        assert wheel.read_text() == "one"


def test_other_wheel_in_dist_is_left_alone(builder):
    assert builder.run_tool("build_wheel.sh").returncode == 0
    (builder.checkout / "content").write_text("two")
    result = builder.run_tool("build_wheel.sh")
    (wheel,) = (builder.checkout / "dist").iterdir()
    assert result.returncode == 1
    assert result.stderr == (
        f"tf_agc: {wheel} is another build of the same version, and was left alone: "
        "remove it, or raise PATCH in tf_agc/version.py.\n"
    )
    assert wheel.read_text() == "one"


@pytest.mark.parametrize("arguments", [["2.20"], ["--tensorflow", "2.20", "-k"], ["--release"]])
def test_other_arguments_of_build_wheel(builder, arguments):
    result = builder.run_tool("build_wheel.sh", *arguments)
    assert result.returncode == 1
    assert result.stderr == (
        f"tf_agc: build_wheel.sh takes --tensorflow X and nothing else, got '{' '.join(arguments)}'.\n"
    )
    assert builder.calls() == []


def test_help_of_build_wheel(builder):
    result = builder.run_tool("build_wheel.sh", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "tools/build_wheel.sh [--tensorflow X]" in result.stdout
    assert builder.calls() == []


@pytest.fixture
def locker(machine):
    """A machine whose uv writes down what it is asked for, behind what was in the lock before."""
    machine.add("uv", 'while [ "$1" != -o ]; do shift; done; read -r wanted; echo "+ $wanted" >> "$2"')
    return machine


def test_locks_are_made_anew(locker):
    before = locker.locks()
    result = locker.run_tool("lock.sh")
    assert (result.returncode, result.stderr) == (0, "")
    assert locker.locks() == {
        f"tensorflow-2.{minor}.lock": before[f"tensorflow-2.{minor}.lock"] + f"+ tensorflow==2.{minor}.0\n"
        for minor in (20, 21)
    }


@pytest.mark.parametrize("version, file, start", [("2.22.0", "2.22", "2.21"), ("2.20.1", "2.20", "2.20")])
def test_lock_of_one_release(locker, version, file, start):
    before = locker.locks()
    result = locker.run_tool("lock.sh", version)
    assert (result.returncode, result.stderr) == (0, "")
    changed = {f"tensorflow-{file}.lock": before[f"tensorflow-{start}.lock"] + f"+ tensorflow=={version}\n"}
    assert locker.locks() == before | changed


def test_failing_uv_leaves_the_locks_alone(locker):
    locker.add("uv", "echo no such version >&2; exit 1")
    before = locker.locks()
    result = locker.run_tool("lock.sh", "2.99.0")
    assert result.returncode == 1
    assert "no such version\ntf_agc: uv could not make a lock for TensorFlow 2.99.0: " in result.stderr
    assert locker.locks() == before


@pytest.mark.parametrize("arguments", [["2.22"], ["new"], ["2.22.0", "2.23.0"]])
def test_other_arguments_of_lock(locker, arguments):
    before = locker.locks()
    result = locker.run_tool("lock.sh", *arguments)
    assert result.returncode == 1
    assert result.stderr == (
        f"tf_agc: lock.sh takes no argument or a whole version such as 2.22.0, got '{' '.join(arguments)}'.\n"
    )
    assert locker.locks() == before


def test_no_uv(machine):
    result = machine.run_tool("lock.sh")
    assert result.returncode == 1
    assert result.stderr == "tf_agc: there is no uv: run 'python3 -m pip install uv', then start again.\n"


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.lock")), ids=lambda lock: lock.stem)
def test_lock_holds_what_is_required(lock):
    required = re.findall(r"^[\w-]+", (ROOT / "requirements" / "requirements.in").read_text(), re.MULTILINE)
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.MULTILINE))
    assert {name.replace("_", "-") for name in required} <= pinned.keys()
    assert f"tensorflow-{pinned['tensorflow'].rpartition('.')[0]}" == lock.stem
