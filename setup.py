# Only what pyproject.toml cannot say: the wheel holds a native library, which is the same for every Python version, and
# version and dependencies follow from the TensorFlow that it was built for.

import pathlib
import runpy
import sys

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.dist import Distribution

PACKAGE = pathlib.Path(__file__).resolve().parent / "tf_agc"


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


built_for = PACKAGE / "native_library" / "tensorflow_version.txt"
if not built_for.is_file():
    sys.exit(f"there is no {built_for}: run ./tools/build.sh, which builds the native library and this file.")
tensorflow = built_for.read_text(encoding="utf-8").strip()

setup(
    distclass=BinaryDistribution,
    cmdclass={"bdist_wheel": PlatformWheel},
    version=runpy.run_path(str(PACKAGE / "version.py"))["version_for"](tensorflow),
    install_requires=[
        f"tensorflow=={tensorflow}",  # with another one the library would not be opened: C++ has no stable ABI
        "keras>=3.12",  # the lowest version tested: the newest that Python 3.10 gets
        "rich",  # Keras's own dependency
    ],
)
