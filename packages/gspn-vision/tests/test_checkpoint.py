"""What a checkpoint holds beside what every application's does: a timm model."""

import json

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from vision_cases import TINY

from gspn_core.runs import checkpoints
from gspn_core.runs.files import store_tensors
from gspn_vision import checkpoint
from gspn_vision.data import Preprocessing
from gspn_vision.models import build_model

GREY = Preprocessing(in_chans=1, size=(32, 48), mean=(0.3,), std=(0.4,), interpolation="bilinear", crop_pct=1.0)
ARGUMENTS = {**TINY, "in_chans": 1, "num_classes": 2}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = build_model("gspn2_nano", ARGUMENTS)
    config = checkpoint.timm_config(model, ARGUMENTS, ["cat", "dog"], GREY)
    checkpoint.write_model(tmp_path / "model", config, model.state_dict())
    return tmp_path / "model", model


def test_timm_loads_it(folder):
    path, model = folder
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    data = timm.data.resolve_model_data_config(loaded)
    assert (data["input_size"], *map(tuple, (data["mean"], data["std"]))) == ((1, 32, 48), (0.3,), (0.4,))
    assert (data["interpolation"], data["crop_pct"]) == ("bilinear", 1.0)
    assert json.loads((path / "config.json").read_text())["label_names"] == ["cat", "dog"]


def test_we_load_it(folder):
    path, model = folder
    loaded = checkpoint.load_model(path)
    assert (loaded.name, loaded.class_names, loaded.preprocessing) == ("gspn2_nano", ["cat", "dog"], GREY)
    assert loaded.state == {} and not loaded.model.training
    x = torch.randn(1, 1, 32, 48)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model.eval()(x))


def test_the_averaged_weights_come_first(folder):
    path, model = folder
    store_tensors(path / "ema.safetensors", {name: value + 1 for name, value in model.state_dict().items()})
    name = "head.fc.bias"
    for weights, more in (("auto", 1), ("ema", 1), ("model", 0)):
        found = checkpoint.load_model(path, weights=weights).model.state_dict()[name]
        assert torch.equal(found, model.state_dict()[name] + more)


def test_a_file_of_weights(folder, tmp_path):
    """Of a run or of another trainer, beside the config.json of the model."""
    path, model = folder
    moved = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({"state_dict": {f"module.{name}": value for name, value in moved.items()}}, path / "best.pth.tar")
    for file, weights in ((path / "model.safetensors", model.state_dict()), (path / "best.pth.tar", moved)):
        loaded = checkpoint.load_model(file)
        assert loaded.class_names == ["cat", "dog"]
        assert all(torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items())
    (tmp_path / "best.pth.tar").write_bytes((path / "best.pth.tar").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no config\.json beside '.*best\.pth\.tar'"):
        checkpoint.load_model(tmp_path / "best.pth.tar")


def test_what_is_not_a_model(folder, tmp_path):
    path, _ = folder
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no ema\.safetensors in"):
        checkpoint.load_model(path, weights="ema")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architecture": "gspn9"}))
    with pytest.raises(ValueError, match="does not hold a model that timm can build"):
        checkpoint.load_model(path)
    (path / "config.json").write_text(json.dumps(config | {"model_args": config["model_args"] | {"num_classes": 3}}))
    with pytest.raises(ValueError, match=r"holds the weights of another model: head\.fc\.bias must be \(3,\)"):
        checkpoint.load_model(path)
    (path / "model.safetensors").write_bytes(b"damage")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.load_model(path)


@pytest.mark.parametrize("name", ["adafactor", "lamb", "lion", "madgradw", "sgd"])
def test_optimizers_of_timm_go_on_as_if_nothing_had_happened(name, tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = build_model("gspn2_nano", ARGUMENTS)
        return model, create_optimizer_v2(model, name, lr=1e-2, weight_decay=0.1)

    def steps(model, optimizer, first):
        for step in range(first, first + 2):
            torch.manual_seed(step)
            model(torch.randn(2, 1, 32, 32)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = fresh()
    steps(model, optimizer, 0)
    tensors, values = checkpoints.optimizer_state(model, optimizer)
    checkpoints.save(tmp_path, 2, {checkpoints.OPTIMIZER: tensors}, {}, {"optimizer": values}, keep=1)
    other, continued = fresh()
    other.load_state_dict(model.state_dict())
    folder = checkpoints.latest(tmp_path)
    checkpoints.restore_optimizer(
        other, continued, folder, json.loads((folder / "state.json").read_text())["optimizer"]
    )
    steps(model, optimizer, 2)
    steps(other, continued, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_unknown_models_and_arguments():
    with pytest.raises(ValueError, match=r"got 'gspn3_nano'; perhaps one of .*gspn2?_nano"):
        build_model("gspn3_nano", {})
    with pytest.raises(ValueError, match=r"model_kwargs do not suit gspn_nano: .*windows"):
        build_model("gspn_nano", {"windows": 3})
