"""The demo: one small residual CNN trained with AGC, with BatchNormalization and with neither.

Options, the order of things and error messages live here; the work is in demo_training.py,
demo_report.py, study/image_datasets.py and predict.py.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import time

from option_types import at_least

# Read when TensorFlow and tf_agc are imported. The demo is to show the native op, so it must not
# fall back to the reference; and of TensorFlow's log only errors are news here.
os.environ["TF_AGC_IMPLEMENTATION"] = "native"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

TOOLS = pathlib.Path(__file__).resolve().parents[1]
CHECKOUT = TOOLS.parent
SAVED_TEST_IMAGES = 500


class DemoError(Exception):
    """The demo cannot go on; the message is one sentence that says what to do."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains one small residual CNN with AutomaticGainControl, with BatchNormalization and without "
        "normalization, compares them, and predicts with the exported AGC model in a fresh process.",
    )
    parser.add_argument(
        "--dataset",
        choices=["digits", "cifar10", "fashion_mnist", "mnist"],
        default="digits",
        help="digits (default) comes with scikit-learn; the others are downloaded unless --data_dir has them",
    )
    parser.add_argument(
        "--data_dir",
        type=pathlib.Path,
        default=CHECKOUT / ".cache" / "tensorflow_datasets",
        help="directory of TensorFlow Datasets (default: .cache/tensorflow_datasets in the checkout)",
    )
    parser.add_argument(
        "--output_dir",
        type=pathlib.Path,
        help="new or empty directory (default: demo_output in the checkout, or demo_output_2 and so on)",
    )
    parser.add_argument("--epochs", type=at_least(1), help="passes over the training images (default: by data set)")
    parser.add_argument("--batch_size", type=at_least(1), help="images in a training step (default: by data set)")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of the weights and of the images' order (default: 0)"
    )
    return parser.parse_args()


def make_output_dir(requested: pathlib.Path | None) -> pathlib.Path:
    """Makes the directory for the results; never one that already holds something."""
    if requested is not None:
        try:
            requested.mkdir(parents=True, exist_ok=True)
            used = any(requested.iterdir())
        except OSError as error:
            raise DemoError(f"cannot use {requested} for results: {error.strerror}") from error
        if used:
            raise DemoError(f"{requested} is not empty: pass another --output_dir, or remove it")
        return requested.resolve()
    number = 1
    while True:
        path = CHECKOUT / ("demo_output" if number == 1 else f"demo_output_{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
        number += 1


def run(options: argparse.Namespace, output_dir: pathlib.Path) -> None:
    # Here and not above: TensorFlow takes seconds to import, --help and a wrong option must not.
    import absl.logging
    import numpy as np
    import rich.console
    import rich.progress

    import tf_agc
    from benchmarks import machine
    from demo import demo_report, demo_training
    from study import image_datasets

    absl.logging.set_verbosity(absl.logging.ERROR)  # of TensorFlow Datasets and Keras
    described = machine.describe()
    console = rich.console.Console()
    try:
        tf_agc.implementation("native")
        dataset = image_datasets.load(options.dataset, options.data_dir.expanduser())
    except (RuntimeError, image_datasets.DatasetUnavailableError) as error:
        raise DemoError(str(error)) from error
    recipe = demo_training.RECIPES[options.dataset].changed(options.epochs, options.batch_size, options.seed)

    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description:12}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        console=console,
    ) as progress:
        runs = [
            demo_training.train(normalization, dataset, recipe, progress)
            for normalization in demo_training.NORMALIZATIONS
        ]
    console.print()
    console.print(demo_report.table(runs, dataset, recipe))

    agc = runs[0]
    demo_report.draw_learning_curves(runs, dataset, recipe, output_dir / "learning_curves.png")
    logits = demo_training.predict(agc.model, dataset.test.images)
    demo_report.draw_predictions(dataset, logits.argmax(axis=-1), output_dir / "predictions.png")
    demo_report.write_results(runs, dataset, recipe, described, output_dir / "results.json")
    (output_dir / "calibration.txt").write_text(f"{agc.calibration}\n", encoding="utf-8")

    model, images, expected = (output_dir / name for name in ("model", "test_images.npy", "test_logits.npy"))
    agc.model.export(model, verbose=False)
    np.save(images, dataset.test.images[:SAVED_TEST_IMAGES])
    np.save(expected, logits[:SAVED_TEST_IMAGES])
    command = [sys.executable, str(TOOLS), "demo.predict", str(model), str(images), str(expected)]
    if subprocess.run(command, check=False).returncode != 0:
        raise DemoError(f"the fresh process failed: see above, or run {' '.join(command)}")


def main() -> None:
    options = parse_options()
    start = time.monotonic()
    output_dir = None
    try:
        output_dir = make_output_dir(options.output_dir)
        print(f"Results go to {output_dir}", flush=True)
        run(options, output_dir)
        print(f"Done in {time.monotonic() - start:.0f} s: see {output_dir}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except (DemoError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        # Nothing was written: do not leave an empty directory behind.
        if options.output_dir is None and output_dir is not None:
            with contextlib.suppress(OSError):
                output_dir.rmdir()


if __name__ == "__main__":
    main()
