"""The distribution's version: 0.<minor of the TensorFlow that it is built for>.<PATCH>. PATCH is kept here alone.

setup.py runs this file alone, so it imports nothing of the package and no TensorFlow.
"""

PATCH = 0


def version_for(tensorflow: str) -> str:
    """The version of a build for this TensorFlow: "0.21.0" for "2.21.0" where PATCH is 0."""
    return f"0.{tensorflow.split('.')[1]}.{PATCH}"
