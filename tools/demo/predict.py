"""Predicts with an exported model in a process of its own: `python tools demo.predict MODEL IMAGES [EXPECTED]`.

Knows nothing of training: only the SavedModel and `import tf_agc`, which loads the op.
"""

import argparse
import os
import pathlib
import sys

# Only TensorFlow's errors: its hints about this machine are not news here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

OP = "TfAgc>Agc"
BATCH_SIZE = 250
# float32 logits of a few convolutions; batches may be cut differently than in the other process.
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=pathlib.Path, help="directory of the SavedModel")
    parser.add_argument("images", type=pathlib.Path, help=".npy file: pixels 0 to 255, [N, height, width, channels]")
    parser.add_argument("expected", type=pathlib.Path, nargs="?", help=".npy file: logits to agree with")
    options = parser.parse_args()
    try:
        _predict(options.model, options.images, options.expected)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


def _predict(model_dir: pathlib.Path, images_file: pathlib.Path, expected_file: pathlib.Path | None) -> None:
    # Here and not above: TensorFlow takes seconds to import, --help must not.
    import numpy as np
    import tensorflow as tf

    import tf_agc

    images = np.load(images_file).astype(np.float32)
    with tf_agc.implementation("native"):  # raises where there is no native library
        model = tf.saved_model.load(str(model_dir))

    graph = model.signatures["serving_default"].graph.as_graph_def()
    nodes = [*graph.node, *(node for body in graph.library.function for node in body.node_def)]
    count = sum(node.op == OP for node in nodes)
    if not count:
        raise ValueError(f"the graph in {model_dir} has no op {OP}")

    batches = [images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE)]
    logits = np.concatenate([model.serve(batch) for batch in batches])
    classes = np.bincount(logits.argmax(axis=-1), minlength=logits.shape[-1])
    print(f"Fresh process: the graph in {model_dir.name}/ has {count} ops {OP};")
    print(f"predicted {len(images)} images, of each class {' '.join(map(str, classes))};")
    if expected_file is None:
        return
    expected = np.load(expected_file)
    if expected.shape != logits.shape:
        raise ValueError(f"expected must have shape {logits.shape}, got {expected.shape}")
    difference = float(np.max(np.abs(logits - expected)))
    print(f"maximum absolute difference of the logits from the training process: {difference:.3g}.")
    if not np.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise ValueError(f"the predictions do not agree within {TOLERANCE:g}")


if __name__ == "__main__":
    main()
