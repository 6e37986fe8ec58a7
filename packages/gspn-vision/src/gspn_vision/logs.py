"""The run's logs: CSV tables and TensorBoard, both right after a continuation."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically


class Table:
    """A CSV file of numbers whose first column is the update.

    Opening it after an interruption drops the rows past the update that the run continues from, and a last row that
    was torn.
    """

    def __init__(self, path: Path, columns: list[str], step: int = 0) -> None:
        self.path = path
        self.columns = columns
        kept = [row for row in read_table(path) if int(row[columns[0]]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, text.getvalue())
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def add(self, **values: Any) -> None:
        """Append a row."""
        self._writer.writerow(values)
        self._file.flush()

    def sync(self) -> None:
        """Wait until all rows have reached the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a CSV file; none if it does not exist."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row.values()]


class Logs:
    """The tables `steps.csv` and `epochs.csv` of a run, and TensorBoard's files beside them."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.steps = Table(folder / "steps.csv", ["step", "epoch", "loss", "lr", "images_per_second"], step)
        self.epochs = Table(
            folder / "epochs.csv",
            ["step", "epoch", "train_loss", "validation_loss", "top1", "top5", "best_top1"],
            step,
        )
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, table: str, step: int, **values: Any) -> None:
        """Append a row to "steps" or "epochs", and its numbers to TensorBoard."""
        getattr(self, table).add(step=step, **values)
        if self._writer is not None:
            for name, value in values.items():
                if name != "epoch" and value is not None:
                    self._writer.add_scalar(f"{table}/{name}", value, step)

    def sync(self) -> None:
        """Wait until the tables have reached the disk."""
        self.steps.sync()
        self.epochs.sync()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close all files."""
        self.steps.close()
        self.epochs.close()
        if self._writer is not None:
            self._writer.close()
