import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from vision_foundation import ABLATIONS, MAIN, _spread, main, run

TEACHER = {"epochs": 2, "model_kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2, "mlp_ratio": 2}}
TEACHER |= {"image_size": 8, "validate_every": 1, "warmup_epochs": 1, "progress": False}
STUDENT = {"steps": 4, "align_steps": 2, "warmup_steps": 1, "progress": False}


@pytest.fixture
def data(tmp_path: Path) -> str:
    """200 of scikit-learn's digits as folders."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:200], digits.target[:200], strict=True)):
        file = tmp_path / "data" / ("train" if number % 5 else "val") / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(file)
    return str(tmp_path / "data")


def test_teachers_students_and_their_table(data, tmp_path, capsys):
    record = run(tmp_path / "out", table=True, data=data, teacher=TEACHER, student=STUDENT)
    assert list(record["results"]) == ["teacher", *MAIN, *ABLATIONS]
    assert all([found["seed"] for found in runs] == [0] for runs in record["results"].values())
    sizes = [record["results"][name][0]["parameters"] for name in MAIN]
    assert len(set(sizes)) == 3  # with attention in 0, 1 and 2 blocks
    for name in (*MAIN, *ABLATIONS):
        for found, taught in zip(record["results"][name], record["results"]["teacher"], strict=True):
            assert found["difference"] == found["top1"] - taught["top1"]
    table = capsys.readouterr().out
    assert table.count("\n") == 12 and " ± " not in table
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == record
    again = run(tmp_path / "out", table=True, data=data, teacher=TEACHER, student=STUDENT)
    assert again["results"] == record["results"]  # seconds too: nothing was done again


def test_several_seeds_have_a_mean_and_a_deviation():
    assert _spread([98.0, 99.0, 97.0]) == "98.00 ± 1.00"
    assert _spread([]) == ""


def test_its_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--table" in capsys.readouterr().out
