"""Whether converted models train: `run` trains models of keras.applications and their converted copies, `table` shows
the losses, one row for each model.

Both start from the same random weights, and see the same 32 images in every step: gratings in four directions, in
noise. The copy is made with `tf_agc.convert`'s defaults and calibrated on the images. What is compared is how far the
loss falls in training, no accuracy. One seed takes about half an hour of one core; InceptionResNetV2, NASNetMobile
and DenseNet121 take most of it, a minute and more each before the first step.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

from benchmarks import result_files
from option_types import at_least, not_negative
from study.study_results import StudyError, read_rows

# Read when TensorFlow is imported: of its log only errors are news here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

CSV = pathlib.Path(__file__).parent / "results" / "converted.csv"
# Every family that has BatchNormalization: its module in keras.applications, and a size of images for which its last
# maps have 2 x 2 positions or more, as BatchNormalization stays where they have one.
MODELS = {
    "ResNet50": ("resnet", 64),
    "ResNet50V2": ("resnet_v2", 64),
    "MobileNet": ("mobilenet", 64),
    "MobileNetV2": ("mobilenet_v2", 64),
    "MobileNetV3Small": ("mobilenet_v3", 64),
    "EfficientNetB0": ("efficientnet", 64),
    "EfficientNetV2B0": ("efficientnet_v2", 64),
    "DenseNet121": ("densenet", 64),
    "InceptionV3": ("inception_v3", 107),
    "InceptionResNetV2": ("inception_resnet_v2", 107),
    "Xception": ("xception", 71),
    "NASNetMobile": ("nasnet", 64),
}
NORMALIZATIONS = ("batch_norm", "agc")
OPTIMIZERS = ("adam", "sgd")
IMAGES = 32
CLASSES = 4
GRADIENT_NORM = 1.0  # of all gradients together
_LAST_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """A training, before it is done.

    Attributes:
        model: a name in MODELS.
        normalization: "batch_norm", the original, or "agc", the copy.
        optimizer: "adam", or "sgd" with a Nesterov momentum of 0.9.
        learning_rate: the same in every step.
        steps: of training.
        seed: of the initial weights and of dropout.
    """

    model: str
    normalization: str
    optimizer: str
    learning_rate: float
    steps: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Training(Case):
    """A finished one.

    Attributes:
        first_loss: before the first step.
        largest_loss: of all steps, NaN where one was not finite, which ends the training.
        last_loss: the mean of the last five steps.
        seconds: of all steps, the first of which traces.
        machine, commit: as in study_results.Run.
    """

    first_loss: float
    largest_loss: float
    last_loss: float
    seconds: float
    machine: str
    commit: str

    @property
    def case(self) -> Case:
        return Case(*(getattr(self, field.name) for field in dataclasses.fields(Case)))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="train what is not in the file yet; stop it whenever you like")
    run.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="only these")
    run.add_argument("--normalizations", choices=NORMALIZATIONS, nargs="+", default=NORMALIZATIONS, help="only these")
    run.add_argument("--seeds", type=at_least(0), nargs="+", default=[0], help="(default: 0)")
    run.add_argument("--steps", type=at_least(_LAST_STEPS), default=20, help="of each training (default: %(default)s)")
    run.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="(default: adam)")
    run.add_argument("--learning_rate", type=not_negative, default=1e-3, help="(default: %(default)s)")
    run.set_defaults(call=run_all)
    table = commands.add_parser("table", help="the losses as a Markdown table")
    table.set_defaults(call=lambda options: print(tables(_read(options.csv)[0])))
    for command in (run, table):
        command.add_argument("--csv", type=pathlib.Path, default=CSV, help="(default: results/converted.csv)")
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace) -> None:
    finished, meta = _read(options.csv)
    cases = [
        Case(model, normalization, options.optimizer, options.learning_rate, options.steps, seed)
        for seed in options.seeds
        for model in options.models
        for normalization in options.normalizations
    ]
    done = {training.case for training in finished}
    todo = [case for case in cases if case not in done]
    print(f"{len(cases) - len(todo)} of {len(cases)} trainings are finished.", flush=True)
    if not todo:
        return

    # Here and not above: TensorFlow takes seconds to import, --help and a wrong option must not.
    from benchmarks import machine

    described = machine.describe()
    versions = {name: described[name] for name in ("tf_agc", "tensorflow", "keras", "python")}
    if differing := machine.differing(versions, {**versions, **meta}):
        raise StudyError(f"{options.csv} was made with another {', '.join(differing)}: pass another --csv")
    where = f"{described['cpu']}, {described['cores']} cores, {described['instruction set']}"
    for case in todo:
        training = Training(**dataclasses.asdict(case), **train(case), machine=where, commit=described["commit"])
        finished.append(training)
        result_files.write_csv(options.csv, finished, versions)
        print(
            f"{case.model}, {case.normalization}, seed {case.seed}: {training.first_loss:.3g} .. "
            f"{training.last_loss:.3g}, largest {training.largest_loss:.3g}, {training.seconds:.0f} s",
            flush=True,
        )


def _read(path: pathlib.Path) -> tuple[list[Training], dict[str, str]]:
    return read_rows(path, Training) if path.exists() else ([], {})


def train(case: Case) -> dict[str, Any]:
    """What a training adds to its case."""
    import keras
    import numpy as np

    keras.backend.clear_session()
    model, images, labels = initial_model(case)
    optimizer = {
        "adam": lambda: keras.optimizers.Adam(case.learning_rate, global_clipnorm=GRADIENT_NORM),
        "sgd": lambda: keras.optimizers.SGD(
            case.learning_rate, momentum=0.9, nesterov=True, global_clipnorm=GRADIENT_NORM
        ),
    }[case.optimizer]()
    # XLA would take minutes for each of them.
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    losses: list[float] = []
    start = time.perf_counter()
    while len(losses) < case.steps and np.all(np.isfinite(losses)):
        losses.append(float(model.train_on_batch(images, labels)))
        model.reset_metrics()  # else it would be the mean of all steps
    finite = math.isfinite(sum(losses))
    return {
        "first_loss": losses[0],
        "largest_loss": max(losses) if finite else math.nan,
        "last_loss": statistics.fmean(losses[-_LAST_STEPS:]) if finite else math.nan,
        "seconds": time.perf_counter() - start,
    }


def initial_model(case: Case) -> tuple[Any, Any, Any]:
    """Returns a case's model before training, and its images and labels."""
    import keras

    import tf_agc

    module, size = MODELS[case.model]
    keras.utils.set_random_seed(case.seed)
    images, labels = gratings(size)
    images = getattr(keras.applications, module).preprocess_input(images)
    model = getattr(keras.applications, case.model)(
        weights=None, input_shape=images.shape[1:], classes=CLASSES, classifier_activation=None
    )
    if case.normalization == "agc":
        model = tf_agc.convert(model, calibrate_with=images)
    return model, images, labels


def gratings(size: int) -> tuple[Any, Any]:
    """Returns IMAGES float32 images of values from 0 to 255, and labels: gratings in CLASSES directions, in noise."""
    import numpy as np

    random = np.random.default_rng(0)
    labels = np.arange(IMAGES) % CLASSES
    angles = (labels * np.pi / CLASSES)[:, None, None]
    rows, columns = np.mgrid[:size, :size]
    phases, wavelengths = random.uniform(0, 2 * np.pi, [IMAGES, 1, 1]), random.uniform(6, 12, [IMAGES, 1, 1])
    waves = np.sin(2 * np.pi * (rows * np.sin(angles) + columns * np.cos(angles)) / wavelengths + phases)
    colours = random.uniform(20, 60, [IMAGES, 1, 1, 3])
    images = 128 + waves[..., None] * colours + random.normal(0, 30, [IMAGES, size, size, 3])
    return np.clip(images, 0, 255).astype(np.float32), labels


def tables(trainings: Iterable[Training]) -> str:
    """Returns a Markdown table for each optimizer, rate and number of steps; several seeds are beside each other."""
    groups: dict[tuple, dict[str, dict[str, list[Training]]]] = {}
    for each in sorted(trainings, key=lambda each: (list(MODELS).index(each.model), each.seed)):
        by_model = groups.setdefault((each.optimizer, each.learning_rate, each.steps), {})
        by_model.setdefault(each.model, {name: [] for name in NORMALIZATIONS})[each.normalization].append(each)
    parts = []
    for (optimizer, rate, steps), by_model in groups.items():
        header = ["model", "images", "BatchNorm, loss", "largest", "converted, loss", "largest"]
        rows = [
            [
                model,
                "{0}x{0}".format(MODELS[model][1]),
                *(_losses(both[name], kind) for name in NORMALIZATIONS for kind in ("last_loss", "largest_loss")),
            ]
            for model, both in by_model.items()
        ]
        parts.append(f"{optimizer} at {rate:g}, {steps} steps:\n\n{result_files.markdown_table(header, rows)}")
    return "\n\n".join(parts)


def _losses(trainings: list[Training], kind: str) -> str:
    return ", ".join(f"{getattr(each, kind):.2g}" for each in trainings) or "-"


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    try:
        options.call(options)
    except KeyboardInterrupt:
        sys.exit("Interrupted: the same command goes on.")
    except (StudyError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
