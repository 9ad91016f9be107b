"""The CSV file of `tf_agc.GainMonitor`: its columns, and how it is read and cut. Nothing is recorded or drawn here."""

import csv
import io
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

CSV_NAME = "gains.csv"

QUANTITIES = {
    "gain": "gain",
    "mean_scale": "mean scale",
    "output_std": "output standard deviation",
    "sparsity": "sparsity: fraction of zeros",
    "bias": "bias",
}
WEIGHTS = ("gain", "mean_scale", "bias")
OVER_CHANNELS: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "min": np.min, "max": np.max}
COUNTS = ["epoch", "step", "iterations"]
COLUMNS = [*COUNTS, "layer", *(f"{name}_{over}" for name in QUANTITIES for over in OVER_CHANNELS)]


def as_text(name: str, path: Any) -> str:
    """The path in an argument of this name."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path, as str or os.PathLike, got {path!r}")
    return text


def is_written(path: pathlib.Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def as_csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def cut(path: pathlib.Path, step: int) -> None:
    """Removes the records of a step and all behind it from a file that `read` takes."""
    header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    kept = [cells for cells in rows if int(cells[COLUMNS.index("step")]) < step]
    if len(kept) < len(rows):
        # In one step: a process that ends here leaves the old file or the new one.
        new = path.with_name(f"{path.name}.new")
        new.write_text(as_csv([header, *kept]), encoding="utf-8", newline="")
        new.replace(path)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file that GainMonitor wrote: counts as int, values as float, NaN where there is none."""
    text = path.read_text(encoding="utf-8", errors="replace")  # what is not text fails below
    header = ",".join(COLUMNS) + "\n"
    if not text.startswith(header):
        raise ValueError(f"{path} was not written by GainMonitor: its first line must be {header.rstrip()}")
    if text == header or not text.endswith("\n"):
        raise ValueError(f"{path} ends within a record: remove its last line")
    reader = csv.reader(io.StringIO(text))
    next(reader)
    rows = []
    for cells in reader:
        try:
            epoch, step, iterations, layer, *values = cells
            numbers = [float(value or "nan") for value in values]
            counts = [int(epoch), int(step), int(iterations)]
            row = dict(zip(COLUMNS, [*counts, layer, *numbers], strict=True))
        except ValueError:
            expected = f"{', '.join(COUNTS)}, layer and {len(COLUMNS) - 4} numbers"
            raise ValueError(f"{path}, line {reader.line_num} must have {expected}, got {cells}: remove it") from None
        rows.append(row)
    return rows
