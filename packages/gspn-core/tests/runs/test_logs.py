"""CSV tables and TensorBoard's files, right after a continuation."""

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gspn_core.runs.logs import Log, last_value, read_table

TABLES = {"train": ["loss", "lr"], "validation": ["top1"]}


def steps(folder, name="train"):
    return [int(row["step"]) for row in read_table(folder / f"{name}.csv")]


def test_rows_past_the_continuation_are_dropped_and_torn_ones_too(tmp_path):
    log = Log(tmp_path, TABLES, 0, tensorboard=True)
    for step in (2, 4, 6):
        log.add("train", step, loss=1.0 / step, lr=0.5)
    log.add("validation", 4, top1=None)
    log.add_image("samples", 4, np.zeros((4, 5, 3), np.uint8))
    log.sync()
    log.close()
    with (tmp_path / "train.csv").open("a") as file:
        file.write("8,0.1")
    assert steps(tmp_path) == [2, 4, 6]
    log = Log(tmp_path, TABLES, 4, tensorboard=True)
    assert (steps(tmp_path), steps(tmp_path, "validation")) == ([2, 4], [4])
    log.add("train", 6, loss=9.0, lr=0.25)
    log.close()
    assert [row["loss"] for row in read_table(tmp_path / "train.csv")] == ["0.5", "0.25", "9.0"]
    assert read_table(tmp_path / "validation.csv") == [{"step": "4", "top1": ""}]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(2, 0.5), (4, 0.25), (6, 9.0)]
    assert "validation/top1" not in board.Tags()["scalars"]
    assert board.Tags()["images"] == ["samples"]


def test_a_foreign_table_is_not_touched(tmp_path):
    (tmp_path / "train.csv").write_text("file,label\na.png,3\n")
    with pytest.raises(ValueError, match=r"train\.csv is not the log of a run; give another folder as `out`"):
        Log(tmp_path, TABLES, 0, tensorboard=False)
    assert (tmp_path / "train.csv").read_text() == "file,label\na.png,3\n"


def test_without_tensorboard(tmp_path):
    log = Log(tmp_path, TABLES, 0, tensorboard=False)
    log.add("train", 1, loss=1.0, lr=0.5)
    log.add_image("samples", 1, None)
    log.sync()
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.csv", "validation.csv"]
    assert read_table(tmp_path / "absent.csv") == []


def test_last_value(tmp_path):
    (tmp_path / "train.csv").write_text("step,loss,top1\n1,2.5,\n2,1.5,\n")
    assert last_value(tmp_path / "train.csv", "loss") == 1.5
    assert last_value(tmp_path / "train.csv", "top1") is None
    assert last_value(tmp_path / "none.csv", "loss") is None
