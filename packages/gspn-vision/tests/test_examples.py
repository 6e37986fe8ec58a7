import importlib.util
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_segmentation_learns_and_draws(tmp_path, capsys):
    example = load("segmentation")
    accuracy, iou = example.main(["--steps", "12", "--crop", "96", "160", "--out", str(tmp_path / "sheet.png")])
    assert accuracy > 100 / example.CLASSES  # better than chance after a few updates
    assert 0 < iou <= 100
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 640, 2 * 427)
    assert "427x640" in capsys.readouterr().out


def test_segmentation_refuses_a_crop_of_the_held_out_part(capsys):
    with pytest.raises(SystemExit):
        load("segmentation").main(["--crop", "64", "640"])
    assert "427 480" in capsys.readouterr().err
