"""Automatic gain control for TensorFlow: normalization without batch statistics (arXiv 1706.03907).

The public names, and the check that this process runs Keras 3 on TensorFlow. No logic lives here.
"""

import os as _os
import sys as _sys
import warnings as _warnings

# Before anything imports Keras: on another backend that import may fail with an error of its own. Afterwards the
# variable means nothing any more, and Keras itself is asked.
if "keras" not in _sys.modules and (_os.environ.get("KERAS_BACKEND") or "tensorflow") != "tensorflow":
    raise ImportError(
        "tf_agc needs Keras's tensorflow backend: unset KERAS_BACKEND or set it to 'tensorflow', "
        f"got KERAS_BACKEND={_os.environ['KERAS_BACKEND']!r}."
    )

try:
    import keras as _keras
except ImportError as _error:  # of a backend that is chosen in keras.json and not installed
    raise ImportError(
        "tf_agc needs Keras 3 on its tensorflow backend, and Keras cannot be imported "
        f"({_error}): check that it is installed, and the backend in ~/.keras/keras.json."
    ) from _error

# The package is asked, and not the variable TF_USE_LEGACY_KERAS: that says what `tf.keras` is, which nothing here uses.
if _keras.__version__.startswith(("1.", "2.")):
    raise ImportError(f"tf_agc needs Keras 3, got Keras {_keras.__version__}: pip install --upgrade keras")
if _keras.config.backend() != "tensorflow":  # chosen in ~/.keras/keras.json, or imported before with KERAS_BACKEND
    raise ImportError(
        "tf_agc needs Keras's tensorflow backend: set KERAS_BACKEND to 'tensorflow' before Keras is imported, "
        f"got the backend {_keras.config.backend()!r}."
    )

import tensorflow as _tf  # noqa: E402

from tf_agc import native as _native  # noqa: E402
from tf_agc.calibration import calibrate  # noqa: E402
from tf_agc.conversion import conversion_table, convert  # noqa: E402
from tf_agc.export import export_saved_model  # noqa: E402
from tf_agc.functional import agc  # noqa: E402
from tf_agc.gain_plot import plot_gains  # noqa: E402
from tf_agc.implementation import DEFAULT as _DEFAULT  # noqa: E402
from tf_agc.implementation import implementation  # noqa: E402
from tf_agc.layer import AutomaticGainControl  # noqa: E402
from tf_agc.monitor import GainMonitor  # noqa: E402
from tf_agc.standardized import (  # noqa: E402
    StandardizedConv1D,
    StandardizedConv2D,
    StandardizedConv3D,
    StandardizedDepthwiseConv2D,
)
from tf_agc.version import version_for as _version_for  # noqa: E402

# Nothing is built in a fresh checkout: its version is that of a build for the TensorFlow that runs.
__version__ = _version_for(_native.STATUS.built_for or _tf.__version__)

__all__ = [
    "AutomaticGainControl",
    "GainMonitor",
    "StandardizedConv1D",
    "StandardizedConv2D",
    "StandardizedConv3D",
    "StandardizedDepthwiseConv2D",
    "__version__",
    "agc",
    "calibrate",
    "conversion_table",
    "convert",
    "export_saved_model",
    "implementation",
    "plot_gains",
]

# Whoever set TF_AGC_IMPLEMENTATION has chosen: "reference" misses nothing, "native" raises in use.
if _DEFAULT == "auto" and not _native.STATUS.available:
    _warnings.warn(
        f"tf_agc uses its slower reference in stock TensorFlow ops: {_native.STATUS.reason}.",
        RuntimeWarning,
        stacklevel=2,
    )
elif _DEFAULT != "reference" and _native.STATUS.available and _native.gpu_problem():
    _warnings.warn(
        f"tf_agc leaves its op on the CPU: {_native.gpu_problem()}. Update the driver, or build with an older CUDA.",
        RuntimeWarning,
        stacklevel=2,
    )
