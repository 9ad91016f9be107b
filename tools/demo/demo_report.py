"""What the demo shows of finished runs: the table, the two pictures and results.json.

Nothing is trained or measured here.
"""

import dataclasses
import importlib.metadata
import json
import math
import pathlib

import numpy as np
import rich.table
from matplotlib.figure import Figure

from demo.demo_training import Recipe, Run
from study.image_datasets import ImageDataset
from study.training_recipe import GRADIENT_NORM

TITLES = {
    "agc": "AutomaticGainControl",
    "batch_norm": "BatchNormalization",
    "none": "none",
}
COLORS = {"agc": "tab:blue", "batch_norm": "tab:orange", "none": "tab:gray"}


def standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy measured on so many images: the sampling error alone, not the seed's."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def table(runs: list[Run], dataset: ImageDataset, recipe: Recipe) -> rich.table.Table:
    images = len(dataset.test.images)
    result = rich.table.Table(
        title=f"{dataset.name}: residual CNN, {_budget(recipe)}",
        caption=(
            f"Test accuracy on {images} images, ± its standard error; one seed. "
            "Step time: median, jit_compile=False. Parameters include moving averages."
        ),
        min_width=72,
    )
    result.add_column("normalization")
    for heading in ("test accuracy %", "ms per step", "parameters"):
        result.add_column(heading, justify="right")
    for run in runs:
        error = standard_error(run.test_accuracy, images)
        result.add_row(
            TITLES[run.normalization] + ("" if _converged(run) else " (diverged)"),
            f"{100 * run.test_accuracy:.1f} ± {100 * error:.1f}",
            f"{run.step_ms:.1f}",
            f"{run.parameters:,}",
        )
    return result


def draw_learning_curves(runs: list[Run], dataset: ImageDataset, recipe: Recipe, path: pathlib.Path) -> None:
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    epochs = range(1, recipe.epochs + 1)
    for run in runs:
        style = {"color": COLORS[run.normalization], "marker": ".", "linewidth": 1.5}
        loss_axes.plot(epochs, run.history["loss"], **style)
        accuracy_axes.plot(
            epochs,
            100 * np.array(run.history["val_accuracy"]),
            label=f"{TITLES[run.normalization]}, test {100 * run.test_accuracy:.1f} %",
            **style,
        )
    loss_axes.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    losses = np.concatenate([run.history["loss"] for run in runs])
    if np.nanmax(losses) > 10 * np.nanmin(losses):
        loss_axes.set_yscale("log")
    accuracy_axes.set(title="Validation accuracy", xlabel="epoch", ylabel="%")
    accuracy_axes.legend(loc="lower right")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{dataset.name}: residual CNN, {_budget(recipe)}")
    figure.savefig(path)


def draw_predictions(dataset: ImageDataset, predicted: np.ndarray, path: pathlib.Path) -> None:
    """Draws the first test images, and below them the first ones that were misread.

    Args:
        dataset: its test split is drawn.
        predicted: class indices of the whole test split.
        path: the PNG file.
    """
    columns = 10
    wrong = np.flatnonzero(predicted != dataset.test.labels)
    mistakes = wrong[: 2 * columns]
    rows = [range(columns), range(columns, 2 * columns), mistakes[:columns], mistakes[columns:]]
    rows = [row for row in rows if len(row)]

    figure = Figure(figsize=(1.25 * columns, 1.65 * len(rows) + 0.6), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row_of_axes, row in zip(grid, rows, strict=True):
        for axes, index in zip(row_of_axes, row, strict=False):  # the last row may be shorter
            image = dataset.test.images[index]
            axes.imshow(image, cmap="gray_r" if image.shape[-1] == 1 else None)
            truth = dataset.class_names[dataset.test.labels[index]]
            guess = dataset.class_names[predicted[index]]
            right = truth == guess
            axes.set_title(
                truth if right else f"{guess}\n(true: {truth})",
                color="black" if right else "tab:red",
                fontweight="normal" if right else "bold",
                fontsize=9,
            )
    figure.suptitle(
        f"{dataset.name}, AutomaticGainControl: the first {2 * columns} test images, then "
        f"{len(mistakes)} of the {len(wrong)} mistakes in {len(predicted)} images (red)"
    )
    figure.savefig(path)


def write_results(
    runs: list[Run], dataset: ImageDataset, recipe: Recipe, described: dict[str, str], path: pathlib.Path
) -> None:
    """Writes results.json; `described` is the machine when the runs began, as `machine.describe` gives it."""
    results = {
        "dataset": dataset.name,
        "images": {split: len(getattr(dataset, split).images) for split in ("train", "validation", "test")},
        "recipe": dataclasses.asdict(recipe),
        "gradient_norm": GRADIENT_NORM,
        "jit_compile": False,
        "machine": described | {name: importlib.metadata.version(name) for name in ("tensorflow-datasets", "numpy")},
        "results": [
            {
                "normalization": run.normalization,
                "converged": _converged(run),
                "test_accuracy": run.test_accuracy,
                "test_accuracy_standard_error": standard_error(run.test_accuracy, len(dataset.test.images)),
                "step_ms": run.step_ms,
                "parameters": run.parameters,
                # JSON has no NaN.
                "history": {
                    name: [value if math.isfinite(value) else None for value in values]
                    for name, values in run.history.items()
                },
            }
            for run in runs
        ],
    }
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _budget(recipe: Recipe) -> str:
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    return f"{epochs}, batch size {recipe.batch_size}, seed {recipe.seed}"


def _converged(run: Run) -> bool:
    return math.isfinite(run.history["loss"][-1])
