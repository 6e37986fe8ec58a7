"""The run's log: a CSV table and TensorBoard's files, both right after a continuation."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from .files import write_text


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a CSV file, without one that was torn; none if it does not exist."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row.values()]


class Log:
    """`log.csv` of a run, one row of numbers per entry, and the same numbers in `tensorboard/`.

    Opening it after an interruption drops the rows past the step that the run continues from.
    """

    def __init__(self, folder: Path, columns: list[str], step: int, *, tensorboard: bool) -> None:
        path = folder / "log.csv"
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in read_table(path) if int(row["step"]) <= step)
        write_text(path, text.getvalue())
        self._file = path.open("a", encoding="utf-8", newline="")
        self._rows = csv.DictWriter(self._file, ["step", *columns], lineterminator="\n")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        """Append a row."""
        self._rows.writerow({"step": step, **values})
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def add_image(self, step: int, image: Any) -> None:
        """Put an image, (H, W, 3) uint8, on TensorBoard."""
        if self._board is not None:
            self._board.add_image("samples", image, step, dataformats="HWC")

    def sync(self) -> None:
        """Wait until the rows have reached the disk."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()
