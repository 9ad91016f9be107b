"""`python -m tf_agc`: which implementation is in use, and why. Prints, decides nothing."""

import keras
import tensorflow as tf

import tf_agc
from tf_agc import native
from tf_agc.implementation import resolve


def main() -> None:
    try:
        used, reason = resolve()
    except RuntimeError as error:  # TF_AGC_IMPLEMENTATION=native without the library
        used, reason = "none", str(error)
    status, xla = native.STATUS, native.XLA_STATUS
    rows = {
        "tf_agc": tf_agc.__version__,
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "implementation": f"{used} ({reason})",
        "library": str(status.library),
        "built for": f"TensorFlow {status.built_for}" if status.built_for else "unknown",
        "instruction set": native.instruction_set() if status.available else "unknown",
        "CUDA": _cuda() if status.available else "unknown",
        "XLA kernels": f"{'loaded' if xla.available else 'not loaded'} ({xla.reason})",
    }
    if tf.config.list_physical_devices("GPU"):
        # docs/troubleshooting.md says more.
        rows["transposes"] = (
            "TensorFlow adds them beside the op in float32 channels_last networks on a GPU; not after "
            'tf.config.optimizer.set_experimental_options({"layout_optimizer": False})'
        )
    for name, value in rows.items():
        print(f"{name + ':':17}{value}")


def _cuda() -> str:
    build, problem = native.cuda_build() or "not built in", native.gpu_problem()
    return f"{build}; not used: {problem}" if problem else build


if __name__ == "__main__":
    main()
