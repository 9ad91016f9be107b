"""What the study knows: its finished runs, their curves and gains, in CSV files that are never half-written.

Files and rows only; what is run is study.py's, what is shown study_report.py's.
"""

import dataclasses
import math
import pathlib

from benchmarks import result_files


class StudyError(Exception):
    """The study cannot go on; the message is one sentence that says what to do."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run, before it is run.

    Attributes:
        dataset: as in image_datasets.load.
        split: of the final accuracy: "validation" in the search for learning rates, "test" in the comparison.
        network, normalization, precision, batch_size, seed, learning_rate, epochs: as in study_training.Job.
    """

    dataset: str
    split: str
    network: str
    normalization: str
    precision: str
    batch_size: int
    seed: int
    learning_rate: float
    epochs: int

    @property
    def cell(self) -> "Cell":
        return Cell(*(getattr(self, field.name) for field in dataclasses.fields(Cell)))

    def __str__(self) -> str:
        return f"{self.network}, {self.normalization}, batch {self.batch_size}, seed {self.seed}"

    def file_name(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self.cell))


@dataclasses.dataclass(frozen=True)
class Run(Cell):
    """A finished run.

    Attributes:
        accuracy, loss: at the end, on the split.
        seconds_per_step: median, input pipeline included.
        peak_mib: largest resident memory while training.
        mean_gain, sparsity: means over layers and channels at the end; NaN without AGC.
        machine: what times and memory were measured on.
        commit: of the sources.
    """

    accuracy: float
    loss: float
    seconds_per_step: float
    peak_mib: float
    mean_gain: float
    sparsity: float
    machine: str
    commit: str


@dataclasses.dataclass(frozen=True)
class CurvePoint(Cell):
    """A moment of a run; loss and accuracy are means since the last one, validation_accuracy is NaN within epochs."""

    epoch: float
    loss: float
    accuracy: float
    validation_accuracy: float


@dataclasses.dataclass(frozen=True)
class LayerRecord(Cell):
    """An AGC layer at a moment of a run; means over its channels, as GainMonitor's."""

    epoch: float
    layer: str
    gain: float
    output_std: float
    sparsity: float


_FILES = {"runs": Run, "curves": CurvePoint, "gains": LayerRecord}


def read_rows(path: pathlib.Path, row_type: type) -> tuple[list, dict[str, str]]:
    """`result_files.read_csv`, with an error that says what to do."""
    try:
        return result_files.read_csv(path, row_type)
    except result_files.ForeignFileError as error:
        raise StudyError(f"{error}: pass another --results_dir") from error


class Results:
    """The files of a directory: runs.csv, curves.csv, gains.csv."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.meta: dict[str, str] = {}
        self.runs: list[Run] = []
        self.curves: list[CurvePoint] = []
        self.gains: list[LayerRecord] = []
        for name, row_type in _FILES.items():
            path = directory / f"{name}.csv"
            if path.exists():
                rows, self.meta = read_rows(path, row_type)
                setattr(self, name, rows)

    def check_versions(self, versions: dict[str, str]) -> None:
        """Rows of one table come from one version of everything that trains, and from the same images."""
        for name in ("tensorflow", "keras", *(name for name in versions if name.endswith(" images"))):
            if self.meta.get(name, versions[name]) != versions[name]:
                raise StudyError(
                    f"{self.directory} has results of {name} {self.meta[name]}, and this is {versions[name]}: "
                    "pass another --results_dir"
                )

    def finished(self) -> set[Cell]:
        return {run.cell for run in self.runs}

    def add(self, run: Run, curve: list[CurvePoint], gains: list[LayerRecord], versions: dict[str, str]) -> None:
        """Adds a finished run, which is finished once the last file is written; adding it again is harmless."""
        self.meta = self.meta | versions
        for name, rows in (("curves", curve), ("gains", gains), ("runs", [run])):
            kept = [row for row in getattr(self, name) if row.cell != run.cell]
            setattr(self, name, [*kept, *rows])
            if rows:
                path = self.directory / f"{name}.csv"
                result_files.write_csv(path, getattr(self, name), versions, digits=6)

    def best_learning_rate(self, wanted: Cell) -> float:
        """The search's winner by validation accuracy, among runs like `wanted` at any rate; of equals the smaller."""
        found = [
            run for run in self.runs if dataclasses.replace(run.cell, learning_rate=wanted.learning_rate) == wanted
        ]
        if not found:
            raise StudyError(
                f"no learning rate was searched for {wanted} on {wanted.dataset} in {wanted.precision}: "
                "run the same command with --search first"
            )
        finite = [run for run in found if math.isfinite(run.loss)] or found
        return max(finite, key=lambda run: (run.accuracy, -run.learning_rate)).learning_rate
