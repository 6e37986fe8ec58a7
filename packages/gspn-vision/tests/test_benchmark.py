import pytest
import torch

from gspn_core.runs.options import make
from gspn_vision import benchmark
from gspn_vision.config import BenchmarkConfig

NAMES = ["gspn2_nano", "resnet10t", "deit_tiny_patch16_224"]


def options(**changes):
    values = {"models": NAMES, "peers": False, "image_size": 64, "repeats": 2, "device": "cpu", "progress": False}
    return make(BenchmarkConfig, values | changes)


@pytest.fixture(scope="module")
def rows():
    return benchmark.measure(options(batch_sizes=[1, 2]))


def test_every_contestant_has_a_row(rows):
    assert [(row.mode, row.batch_size, row.model) for row in rows] == [
        (mode, batch, name) for mode in ("inference", "training") for batch in (1, 2) for name in NAMES
    ]
    for row in rows:
        if row.model.startswith("deit"):  # takes images of 224 alone
            assert row.images_per_second is None
            assert "224" in row.reason
        else:
            assert row.reason is None
            assert row.images_per_second == pytest.approx(1e3 * row.batch_size / row.milliseconds)


def test_the_table_and_the_report(rows):
    text = benchmark.table(rows)
    assert "gspn2_nano" in text and "batch 2" in text and "deit_tiny_patch16_224, inference, batch 1: " in text
    result = benchmark.report(options(), rows)
    assert result["rows"][0]["model"] == "gspn2_nano"
    assert result["torch"] == torch.__version__
    assert result["settings"]["image_size"] == "64x64"


def test_precision():
    changes = {"models": ["gspn2_nano"], "batch_sizes": [2], "modes": ["inference"], "precision": "bf16", "repeats": 1}
    (row,) = benchmark.measure(options(**changes))
    assert row.images_per_second > 0


@pytest.mark.parametrize(
    "changes,message", [({"models": ["resnet0"]}, "resnet0"), ({"batch_sizes": [0]}, "batch_sizes")]
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        benchmark.measure(options(**changes))
