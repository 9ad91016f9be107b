"""Results as CSV and as Markdown. Dataclasses are the rows of CSV, comments above say what they were measured on.

What is in a row is not known here.
"""

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class ForeignFileError(Exception):
    """A file does not hold such rows; the message is one sentence."""


def write_csv(path: pathlib.Path, rows: Sequence, meta: dict[str, str], digits: int = 4) -> None:
    """Replaces the file at once: whoever reads it, and whenever this process dies, it is the old one or the new one.

    Args:
        path: the file.
        rows: dataclasses of one type, at least one.
        meta: one comment line each.
        digits: of the floats.
    """
    text = io.StringIO()
    text.writelines(f"# {key}: {value}\n" for key, value in meta.items())
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(rows[0]))
    writer.writerows([_cell(value, digits) for value in dataclasses.astuple(row)] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text.getvalue(), encoding="utf-8")
    os.replace(beside, path)


def _cell(value: object, digits: int) -> object:
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def read_csv(path: pathlib.Path, *row_types: type) -> tuple[list, dict[str, str]]:
    """Returns the rows and comments of a file that `write_csv` wrote, with rows of one of these types.

    Raises:
        ForeignFileError: its first line, or another one, is not that of such a row.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    reader = csv.reader(line for line in lines if not line.startswith("# "))
    header = next(reader, [])
    fields = {kind: [field.name for field in dataclasses.fields(kind)] for kind in row_types}
    row_type = next((kind for kind in row_types if fields[kind] == header), None)
    if row_type is None:
        expected = " or ".join(",".join(names) for names in fields.values())
        raise ForeignFileError(f"{path} must have the columns {expected}, got {','.join(header)}")
    read: dict[Any, Callable[[str], Any]] = {float: float, int: int, str: str, bool: "True".__eq__}
    rows = []
    for cells in reader:
        try:
            values = [
                read.get(field.type, _sizes)(cell)
                for field, cell in zip(dataclasses.fields(row_type), cells, strict=True)
            ]
        except ValueError:
            raise ForeignFileError(f"{path} has a line that is not a row of {','.join(header)}: {cells}") from None
        rows.append(row_type(*values))
    return rows, dict(comments)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _sizes(cell: str) -> tuple[int, ...]:
    return tuple(int(size) for size in cell.split("x"))
