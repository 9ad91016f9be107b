"""`tf_agc.plot_gains` draws what `tf_agc.GainMonitor` recorded."""

import io
import math
import os
import pathlib
from typing import Any

import numpy as np

from tf_agc import gain_log

PNG_NAME = "gains.png"


def plot_gains(log: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Draws what `GainMonitor` recorded: each quantity against depth, one line for each of up to 8 moments of training.

    The lines are means over the channels, from light (the first record) to dark (the last); the grey bars go from the
    smallest to the largest channel of the last record. Layers stand in the order of execution, the first on top.

    Args:
        log: the `log_dir` of a GainMonitor, or the path of its `gains.csv`.
        path: the file to write, its name ending in .png; None means `gains.png` beside the CSV file. An earlier one is
            replaced.

    Returns:
        The path of the PNG file.

    Raises:
        ImportError: the package matplotlib is not installed (`pip install "tf-agc[plot]"` brings it).
        TypeError: log or path is no path.
        FileNotFoundError: there is no such log.
        ValueError: the file was not written by GainMonitor, or not to its end; path does not end in .png.
    """
    try:
        from matplotlib import colormaps, colors
        from matplotlib.cm import ScalarMappable
        from matplotlib.figure import Figure  # without pyplot, which would choose a window system
    except ImportError as error:
        raise ImportError('plot_gains needs the package matplotlib: pip install "tf-agc[plot]"') from error

    log = pathlib.Path(gain_log.as_text("log", log))
    log = log / gain_log.CSV_NAME if log.is_dir() else log
    if not log.is_file():
        raise FileNotFoundError(f"log must be a directory with {gain_log.CSV_NAME}, or that file, got {log}")
    path = log.with_name(PNG_NAME) if path is None else pathlib.Path(gain_log.as_text("path", path))
    if path.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {str(path)!r}")
    rows = gain_log.read(log)

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    records = {step: {row["layer"]: row for row in rows if row["step"] == step} for step in _moments(rows)}
    last = records[max(records)]
    depth = np.arange(len(layers))

    def values(record: dict[str, dict[str, Any]], column: str) -> list[float]:
        return [record[layer][column] if layer in record else np.nan for layer in layers]

    quantities = dict(gain_log.QUANTITIES)
    if all(math.isnan(row["bias_mean"]) for row in rows):
        del quantities["bias"]
    figure = Figure(figsize=(3.5 * len(quantities), 2 + 0.22 * max(len(layers), 8)), layout="constrained")
    panels = figure.subplots(1, len(quantities), sharey=True)
    light_to_dark = colormaps["viridis_r"]
    norm = colors.Normalize(min(records), max(max(records), min(records) + 1))
    for axes, (name, title) in zip(panels, quantities.items(), strict=True):
        axes.hlines(depth, values(last, f"{name}_min"), values(last, f"{name}_max"), color="0.88", linewidth=7)
        for step, record in records.items():
            color = light_to_dark(norm(step))
            axes.plot(values(record, f"{name}_mean"), depth, "o-", color=color, linewidth=1, markersize=4)
        axes.set_xlabel(title)
        if name == "sparsity":
            axes.set_xlim(-0.02, 1.02)
        # Few and small: a quantity that has hardly moved has long labels.
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="0.85", linewidth=0.5)
    panels[0].set_yticks(depth, [layer if len(layer) <= 40 else "..." + layer[-37:] for layer in layers], fontsize=8)
    panels[0].set_ylabel("layer, in the order of execution")
    panels[0].set_ylim(len(layers) - 0.5, -0.5)
    figure.colorbar(
        ScalarMappable(norm, light_to_dark), ax=panels, label="training step", ticks=list(records), pad=0.01
    )
    figure.suptitle("Means over channels; grey: from the smallest to the largest channel at the last step", fontsize=10)

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    path.write_bytes(image.getvalue())
    return path


def _moments(rows: list[dict[str, Any]]) -> list[int]:
    """Up to 8 of the recorded steps, evenly spread, the first and the last among them."""
    steps = sorted({row["step"] for row in rows})
    chosen = np.linspace(0, len(steps) - 1, min(len(steps), 8)).round().astype(int)
    return [steps[index] for index in chosen]
