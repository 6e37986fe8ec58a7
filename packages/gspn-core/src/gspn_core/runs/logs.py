"""A run's logs: CSV tables and TensorBoard's files, both right after a continuation, and the trackers of accelerate."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_text


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a CSV file, without a last one that was torn; none if there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row.values()]


def last_value(path: Path, column: str) -> float | None:
    """Return the last value in a column of a table; None if there is none."""
    values = [row[column] for row in read_table(path) if row[column]]
    return float(values[-1]) if values else None


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        ValueError: one is not.
    """
    if names:
        from accelerate.tracking import get_available_trackers

        missing = [name for name in names if name not in list(map(str, get_available_trackers()))]
        if missing:
            raise ValueError(f"trackers must be installed: pip install {missing[0].replace('_', '-')}")


def _open_tracker(name: str, folder: Path, options: Mapping[str, Any]) -> Any:
    """Start a tracker of accelerate for the run in a folder, or go on with it."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    words: dict[str, Any] = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
    if name == "wandb":  # the same run after a continuation
        run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        words |= {"name": folder.name, "dir": str(folder), "id": run, "resume": "allow"}
    tracker = kind(os.environ.get("WANDB_PROJECT", "gspn"), **words)
    tracker.start()
    tracker.store_init_configuration({key: value for key, value in options.items() if value is not None})
    return tracker


class Log:
    """The tables of a run, such as `train.csv`, and the same numbers in `tensorboard/` as `train/loss` and so on.

    Opening it after an interruption drops the rows past the step that the run continues from.

    Args:
        folder: of the run.
        tables: the columns of each table, by its name; a first column `step` is added.
        step: updates so far.
        tensorboard: write TensorBoard's files too.
        trackers: of accelerate, by name, that get the same numbers.
        options: of the run, which trackers show.

    Raises:
        ValueError: the folder holds a table of that name which is not a log, or a tracker's package is missing.
    """

    def __init__(
        self,
        folder: Path,
        tables: Mapping[str, Sequence[str]],
        step: int,
        *,
        tensorboard: bool,
        trackers: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_trackers(trackers)
        self._files: dict[str, Any] = {}
        self._rows: dict[str, csv.DictWriter[str]] = {}
        for name, columns in tables.items():
            path, names = folder / f"{name}.csv", ["step", *columns]
            rows = read_table(path)
            if rows and "step" not in rows[0]:
                raise ValueError(f"{path} is not the log of a run; give another folder as `out`")
            text = io.StringIO()
            writer = csv.DictWriter(text, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= step)
            write_text(path, text.getvalue())
            self._files[name] = path.open("a", encoding="utf-8", newline="")
            self._rows[name] = csv.DictWriter(self._files[name], names, lineterminator="\n")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._trackers = [_open_tracker(name, folder, options or {}) for name in trackers]

    def add(self, table: str, step: int, **values: float | None) -> None:
        """Append a row to a table; None leaves a field empty."""
        self._rows[table].writerow({"step": step, **values})
        self._files[table].flush()
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(f"{table}/{name}", value, step)
        for tracker in self._trackers:
            tracker.log({f"{table}/{name}": value for name, value in values.items() if value is not None}, step=step)

    def add_image(self, name: str, step: int, image: Any) -> None:
        """Put an image, (H, W, 3) uint8, on TensorBoard and on the trackers that take images."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")
        for tracker in self._trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({name: image[None]}, step=step)

    def sync(self) -> None:
        """Wait until the rows have reached the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        for tracker in self._trackers:
            tracker.finish()
