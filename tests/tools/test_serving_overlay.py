"""tools/serving/apply_overlay.py on small trees of TensorFlow Serving's shape, and what Bazel makes of such a tree."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import pytest

from serving import apply_overlay

ROOT = pathlib.Path(__file__).resolve().parents[2]

# As in their release 2.20.0, with everything left out that the overlay does not look at.
WORKSPACE = """workspace(name = "tf_serving")

local_repository(
    name = "ignore_remote_predict",
    path = "tensorflow_serving/experimental/tensorflow/ops/remote_predict/",
)

# TensorFlow.
load("//tensorflow_serving:repo.bzl", "tensorflow_http_archive")
tensorflow_http_archive(
    name = "org_tensorflow",
    git_commit = "72fbba3d20f4616d7312b5e2b7f79daf6e82f2fa",
    patch_cmds = [
        \"\"\"python3 -c 'print("a script in a string")'\"\"\",
    ],
)
"""

BUILD = """package(default_visibility = ["//visibility:private"])

load("//tensorflow_serving:serving.bzl", "if_not_v2", "if_v2")

SUPPORTED_TENSORFLOW_OPS = if_v2([]) + if_not_v2([
    "@org_tensorflow//tensorflow/contrib:contrib_kernels",
]) + [
    "@org_tensorflow_text//tensorflow_text:ops_lib",
    # Another one.
    "//tensorflow_serving/model_servers:other_ops",
]

cc_library(
    name = "server_lib",
    srcs = ["server.cc"],
    deps = ["@org_tensorflow//tensorflow/core:lib"] + SUPPORTED_TENSORFLOW_OPS,
)
"""

VERSION = """
// For example "0.5.0+nightly.sha.a1b2c3d".
#define TF_MODELSERVER_MAJOR_VERSION 2
#define TF_MODELSERVER_MINOR_VERSION 20
#define TF_MODELSERVER_PATCH_VERSION 0
#define TF_MODELSERVER_VERSION_SUFFIX ""
"""


# As between releases in July 2026, likewise.
DEVELOPMENT = {
    "WORKSPACE": """workspace(name = "tf_serving")

load("//tensorflow_serving:repo.bzl", "tensorflow_http_archive")
tensorflow_http_archive(
    name = "org_tensorflow",
    git_commit = "2f504bde54087483657c7066f9982a146c32ddfc",
    patch = "//third_party/tensorflow:tensorflow.patch",
    patch_cmds = [
        "echo -e 'cc_library(deps = [a])' >> BUILD",
        \"\"\"python3 -c 'import re
for p in []: pass'\"\"\",
    ],
    repo_mapping = {"@local_xla": "@local_xla"},
)
""",
    "tensorflow_serving/model_servers/BUILD": """
SUPPORTED_TENSORFLOW_OPS = if_v2([]) + if_not_v2([
    "@org_tensorflow//tensorflow/contrib:contrib_kernels",
    "@org_tensorflow//tensorflow/contrib:contrib_ops_op_lib",
]) + [
    "@org_tensorflow_text//tensorflow_text:ops_lib",
    # Support for TensorFlow Decision Forests inference ops.
    "@org_tensorflow_decision_forests//tensorflow_decision_forests/tensorflow/ops/inference:kernel_and_op",
]
""",
    "tensorflow_serving/model_servers/version.h": re.sub("VERSION [0-9]+", "VERSION 0", VERSION),
}


def _make_tree(directory, **changed):
    files = {apply_overlay.WORKSPACE: WORKSPACE, apply_overlay.BUILD: BUILD, apply_overlay.VERSION: VERSION, **changed}
    for name, text in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            file.write_text(text)
    return directory


def _contents(directory):
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def _overlay(tree, *arguments):
    """The script as a user starts it."""
    script = ROOT / "tools" / "serving" / "apply_overlay.py"
    return subprocess.run([sys.executable, script, tree, *arguments], capture_output=True, text=True, timeout=60)


def test_both_files_change_and_nothing_else(tmp_path):
    tree = _make_tree(tmp_path)
    (tree / apply_overlay.WORKSPACE).chmod(0o640)
    done = _overlay(tree)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"Changed WORKSPACE and tensorflow_serving/model_servers/BUILD in {tree}: "
        f"the server links @tf_agc//cc:ops_lib of {ROOT}.\n"
    )
    assert _contents(tree) == {
        apply_overlay.VERSION: VERSION.encode(),
        apply_overlay.WORKSPACE: WORKSPACE.replace(
            'workspace(name = "tf_serving")\n',
            'workspace(name = "tf_serving")\n\n# Custom ops.\nlocal_repository(\n'
            f'    name = "tf_agc",\n    path = "{ROOT}",\n)\n',
        ).encode(),
        apply_overlay.BUILD: BUILD.replace(
            ']) + [\n    "@org_tensorflow_text', ']) + [\n    "@tf_agc//cc:ops_lib",\n    "@org_tensorflow_text'
        ).encode(),
    }
    assert stat.S_IMODE((tree / apply_overlay.WORKSPACE).stat().st_mode) == 0o640


def test_a_second_time_says_so_and_changes_nothing(tmp_path):
    tree = _make_tree(tmp_path)
    apply_overlay.apply(tree)
    before = _contents(tree)
    done = _overlay(tree)
    assert (done.returncode, done.stdout) == (0, f"{tree} has the overlay already: nothing changed.\n")
    assert _contents(tree) == before


def test_another_release_on_request(tmp_path):
    tree = _make_tree(tmp_path, **{apply_overlay.VERSION: VERSION.replace("20", "21").replace('X ""', 'X "-rc1"')})
    assert _overlay(tree, "--release", "2.21.0-rc1").returncode == 0


def test_sources_between_releases(tmp_path):
    tree = _make_tree(tmp_path, **DEVELOPMENT)
    done = _overlay(tree)
    assert done.returncode == 0
    assert done.stderr == (
        f"warning: {tree} are sources between releases, whose TensorFlow may be another one than 2.20.0's: export with "
        "the same, and try what the server answers\n"
    )
    after = _contents(tree)
    for name, addition in (
        (apply_overlay.WORKSPACE, 'name = "tf_agc"'),
        (apply_overlay.BUILD, '"@tf_agc//cc:ops_lib"'),
    ):
        assert after[name].decode().count(addition) == 1
        assert set(DEVELOPMENT[name].splitlines()) <= set(after[name].decode().splitlines())


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("VERSION", None, "{file} is missing: this is not the source tree of TensorFlow Serving"),
        ("WORKSPACE", None, "{file} is missing: this is not the source tree of TensorFlow Serving"),
        ("BUILD", None, "{file} is missing: this is not the source tree of TensorFlow Serving"),
        ("VERSION", VERSION.replace("20", "19"), "{tree} must be the sources of TensorFlow Serving 2.20.0, got 2.19.0"),
        (
            "VERSION",
            VERSION.replace('""', '"-rc0"'),
            "{tree} must be the sources of TensorFlow Serving 2.20.0, got 2.20.0-rc0",
        ),
        ("VERSION", "#define TF_MODELSERVER_MAJOR_VERSION 2\n", "{file} does not say one version"),
        (
            "WORKSPACE",
            WORKSPACE.replace("tf_serving", "other"),
            '{file} must begin with workspace(name = "tf_serving")',
        ),
        ("WORKSPACE", WORKSPACE.replace("org_tensorflow", "tf"), "{file} must define the repository org_tensorflow"),
        ("WORKSPACE", WORKSPACE + "load(\n", "{file} cannot be read, line 17: '(' was never closed"),
        (
            "WORKSPACE",
            WORKSPACE + 'local_repository(name = "tf_agc", path = "/elsewhere")\n',
            f"{{file}} has a repository tf_agc already, and it is not {ROOT}: restore the file",
        ),
        (
            "WORKSPACE",
            WORKSPACE + f'local_repository(name = "tf_agc", path = "{ROOT}")\n',
            "WORKSPACE has the overlay and tensorflow_serving/model_servers/BUILD has not: "
            "restore both in {tree}, then start again",
        ),
        (
            "BUILD",
            BUILD.replace("    # Another one.\n", '    "@tf_agc//cc:ops_lib",\n'),
            "tensorflow_serving/model_servers/BUILD has the overlay and WORKSPACE has not: "
            "restore both in {tree}, then start again",
        ),
        ("BUILD", "", "{file} must assign SUPPORTED_TENSORFLOW_OPS once, got 0 times"),
        (
            "BUILD",
            BUILD + "SUPPORTED_TENSORFLOW_OPS = []\n",
            "{file} must assign SUPPORTED_TENSORFLOW_OPS once, got 2 times",
        ),
        (
            "BUILD",
            "SUPPORTED_TENSORFLOW_OPS = select({})\n",
            "{file}: SUPPORTED_TENSORFLOW_OPS must end with a list of labels, one a line, got select({{}})",
        ),
        (
            "BUILD",
            "SUPPORTED_TENSORFLOW_OPS = []\n",
            "{file}: SUPPORTED_TENSORFLOW_OPS must end with a list of labels, one a line, got []",
        ),
    ],
)
def test_an_unexpected_tree_is_refused_and_not_changed(tmp_path, file, text, message):
    name = getattr(apply_overlay, file)
    tree = _make_tree(tmp_path, **{name: text})
    before = _contents(tree)
    done = _overlay(tree)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "error: " + message.format(tree=tree, file=tree / name) + "\n"
    assert _contents(tree) == before


def test_a_failure_between_the_files_changes_none(tmp_path, monkeypatch):
    tree = _make_tree(tmp_path)
    before = _contents(tree)
    replace, calls = os.replace, []

    def fail_the_second_time(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_the_second_time)
    with pytest.raises(OSError, match="the disk is full"):
        apply_overlay.apply(tree)
    assert len(calls) == 2 and _contents(tree) == before


# ---- What Bazel makes of it ----

# Their tree, small enough to analyse. TensorFlow is the two targets that we may name and no others: a label of another
# one, or of a repository that only our own WORKSPACE has, is an error.
_BAZEL_TREE = {
    "WORKSPACE": 'workspace(name = "tf_serving")\n\nlocal_repository(name = "org_tensorflow", path = "tf")\n',
    "tf/WORKSPACE": 'workspace(name = "org_tensorflow")\n',
    "tf/tensorflow/core/BUILD": (
        '[cc_library(name = name, visibility = ["//visibility:public"]) for name in ("framework", "lib")]\n'
    ),
    "tensorflow_serving/model_servers/BUILD": (
        'SUPPORTED_TENSORFLOW_OPS = [\n    "@org_tensorflow//tensorflow/core:lib",\n]\n\n'
        'cc_binary(\n    name = "server",\n    srcs = ["server.cc"],\n    deps = SUPPORTED_TENSORFLOW_OPS,\n)\n'
    ),
    "tensorflow_serving/model_servers/server.cc": "int main() { return 0; }\n",
}


def _copy_of_the_dockerfile(directory):
    """What tools/serving/Dockerfile copies of this repository."""
    dockerfile = (ROOT / "tools" / "serving" / "Dockerfile").read_text()
    for source, target in re.findall(r"^COPY (\S+) /tf_agc/(\S+)$", dockerfile, re.M):
        (directory / target).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, directory / target)
    return directory


def test_bazel_finds_everything_that_the_op_needs(tmp_path):
    configured, stamp = ROOT / ".bazelrc.configured", ROOT / ".cache" / "bazel"
    if not configured.is_file() or not stamp.is_file():
        pytest.fail(f"this test needs a Bazel: run tools/setup.sh's scripts, such as tools/build.sh, in {ROOT}")
    tree, checkout = _make_tree(tmp_path / "serving", **_BAZEL_TREE), _copy_of_the_dockerfile(tmp_path / "tf_agc")
    script = checkout / "tools" / "serving" / "apply_overlay.py"
    subprocess.run([sys.executable, script, tree], check=True)
    assert f'path = "{checkout}"' in (tree / "WORKSPACE").read_text()
    _, bazel = stamp.read_text().split()
    # Both: what setup.sh writes may name a configuration that .bazelrc defines.
    ours = [f"--bazelrc={ROOT / '.bazelrc'}", f"--bazelrc={configured}"]
    startup = [f"--output_base={tmp_path}/output", "--batch", "--nohome_rc", *ours]
    try:
        done = subprocess.run(
            [bazel, *startup, "build", "--nobuild", "//tensorflow_serving/model_servers:server"],
            cwd=tree,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        # Bazel makes some of its directories read-only.
        subprocess.run(["chmod", "-R", "u+w", tmp_path / "output"], check=False)
        shutil.rmtree(tmp_path / "output", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "Build completed successfully" in done.stderr
