import json

import pytest
import timm
import torch
from dit_digits import main, run
from timm.models._hub import save_for_hf


def test_the_demonstration(tmp_path, capsys):
    """Two updates, and a classifier that has learned nothing, as a timm folder."""
    torch.manual_seed(0)
    classifier = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    config = {"pretrained_cfg": {"input_size": (1, 32, 32), "mean": (0.3,), "std": (0.4,)}}
    save_for_hf(classifier, str(tmp_path / "classifier"), model_config=config, safe_serialization=True)
    results = run(tmp_path / "out", tmp_path / "classifier", steps=2, count=40, sampler_steps=2)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert 0 <= results["samples"]["accuracy"] <= 1 and results["samples"]["fid"] > 0
    assert results["samples"]["samples"] == 40 and results["halves of the real digits"]["samples"] == 898
    assert "are classified as the digit asked for" in capsys.readouterr().out
    assert (tmp_path / "out" / "samples" / "grid.png").is_file()


def test_its_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(option in text for option in ("--out", "--classifier", "--steps"))
