"""CSV tables and TensorBoard's files, right after a continuation."""

from typing import ClassVar

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
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


class Tracker(GeneralTracker):
    """What a tracker of accelerate is told."""

    name, requires_logging_directory, tracker = "wandb", False, None
    told: ClassVar[list] = []

    def __init__(self, run_name, **options):
        super().__init__()
        self.told.append((run_name, options))

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step):
        self.told.append((step, values))

    def log_images(self, values, step):
        self.told.append((step, {name: images.shape for name, images in values.items()}))

    def finish(self):
        self.told.append("finished")


def test_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    for step in (0, 4):
        log = Log(tmp_path, TABLES, step, tensorboard=False, trackers=["wandb"], options={"lr": 0.5, "vae": None})
        log.add("validation", step + 2, top1=50.0)
        log.add_image("samples", step + 2, np.zeros((4, 5, 3), np.uint8))
        log.close()
    begun, again = Tracker.told[:5], Tracker.told[5:]
    assert begun[0] == again[0] and begun[0][0] == "gspn"
    assert begun[0][1].items() > {"resume": "allow", "name": tmp_path.name}.items()
    images = {"samples": (1, 4, 5, 3)}
    assert begun[1:] == [{"lr": 0.5}, (2, {"validation/top1": 50.0}), (2, images), "finished"]
    assert again[2:] == [(6, {"validation/top1": 50.0}), (6, images), "finished"]
    with pytest.raises(ValueError, match="trackers must be installed: pip install comet-ml"):
        Log(tmp_path, TABLES, 0, tensorboard=False, trackers=["wandb", "comet_ml"])
