"""What gpu_check.py found: printed, and written as soon as it is known. Nothing is run or judged here."""

import csv
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured time.

    Attributes:
        shape: (N, H, W, C), whatever the layout.
        passes: "forward", "backward", "forward + backward".
        candidate: what was timed.
        ms: median milliseconds of one call.
        spread_ms: half the distance between the quartiles.
        copy_ms: a copy of the bytes that the passes read and write at least; None where that is not the question.
    """

    section: str
    shape: tuple[int, int, int, int]
    data_format: str
    dtype: str
    passes: str
    candidate: str
    ms: float
    spread_ms: float
    copy_ms: float | None = None

    def __str__(self) -> str:
        share = f"  {self.copy_ms / self.ms:5.0%} of the copy" if self.copy_ms else ""
        shape = "x".join(map(str, self.shape))
        return (
            f"  {shape:>16} {self.data_format:14} {self.dtype:8} {self.passes:18} {self.candidate:34} "
            f"{1e3 * self.ms:9.1f} us ± {1e3 * self.spread_ms:.1f}{share}"
        )


class Report:
    """What was found: printed, and in gpu.csv and gpu.json of a directory as soon as it is known."""

    def __init__(self, directory: pathlib.Path, machine: dict[str, str]) -> None:
        self._directory, self._machine = directory, machine
        self._sections: dict[str, dict] = {}
        self._section = ""
        self.failures: list[str] = []
        directory.mkdir(parents=True, exist_ok=True)
        self._csv = (directory / "gpu.csv").open("w", encoding="utf-8", newline="")
        for key, value in machine.items():
            self._csv.write(f"# {key}: {value}\n")
            print(f"{key + ':':20}{value}")
        self._writer = csv.writer(self._csv, lineterminator="\n")
        self._writer.writerow([field.name for field in dataclasses.fields(Row)])
        self._write()

    def run(self, name: str, section: Callable[["Report"], None]) -> None:
        """Runs a section; whatever it raises is its failure, and not that of the others."""
        self._section = name
        self._sections[name] = {"notes": []}
        print(f"\n{name}", flush=True)
        start = time.monotonic()
        try:
            section(self)
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
        self._sections[name]["seconds"] = round(time.monotonic() - start, 1)
        self._write()

    def row(self, row: Row) -> None:
        print(row, flush=True)
        values = dataclasses.asdict(row) | {"shape": "x".join(map(str, row.shape))}
        self._writer.writerow(f"{value:.4g}" if isinstance(value, float) else value for value in values.values())
        self._csv.flush()

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)
        self._sections[self._section]["notes"].append(text)
        self._write()

    def fail(self, text: str) -> None:
        self.failures.append(f"{self._section}: {text}")
        self.note(f"FAILED: {text}")

    def _write(self) -> None:
        content = {"machine": self._machine, "sections": self._sections, "failures": self.failures}
        written = self._directory / "gpu.json.new"
        written.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        written.replace(self._directory / "gpu.json")
