"""The command line: its options, its results, and what it says of bad input."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from vision_cases import tiny_run

from gspn_core.runs.options import make
from gspn_vision import cli
from gspn_vision.config import TrainConfig
from gspn_vision.train import train


@pytest.fixture(scope="module")
def run(training_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    train(make(TrainConfig, tiny_run(training_folder) | {"out": str(folder)}))
    return folder


@pytest.fixture(scope="module")
def digits_run(training_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "digits"
    change = {"data": "digits", "in_chans": 1, "epochs": 1, "warmup_epochs": 0, "batch_size": 718, "ema_decay": None}
    train(make(TrainConfig, tiny_run(training_folder) | change | {"out": str(folder)}))
    return folder


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_lists_every_option(command, capsys):
    module, _, name = cli.COMMANDS[command].options.partition(":")
    fields = dataclasses.fields(getattr(importlib.import_module(module), name))
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert fields and all(f"--{field.name.replace('_', '-')}" in text for field in fields)


def test_the_installed_command():
    script = Path(sys.executable).with_name("gspn-vision")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "gspn-vision 0.1.0\n"


def test_train(training_folder, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(tiny_run(training_folder)))
    out = tmp_path / "run"
    options = [
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--crop-scale",
        "0.5",
        "1",
        "--no-augment",
        "--json",
        "--out",
        str(out),
    ]
    code, text, _ = call(capsys, "train", "--config", file, *options)
    assert code == 0
    assert json.loads(text)["steps"] == 4
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["epochs"], saved["crop_scale"], saved["augment"]) == (1, [0.5, 1.0], False)


def test_validate(run, tmp_path, capsys):
    predictions = tmp_path / "predictions.csv"
    code, out, _ = call(capsys, "validate", "--checkpoint", run, "--json", "--out", predictions)
    assert code == 0
    result = json.loads(out)
    confusion = torch.tensor(result["confusion"])
    assert result["images"] == confusion.sum() == 48
    assert result["top1"] == pytest.approx(100 * confusion.trace().item() / 48)
    assert result["top5"] == 100  # of three classes
    rows = [line.split(",") for line in predictions.read_text().splitlines()]
    assert rows[0] == ["image", "truth", "prediction", "probability"]
    assert len(rows) == 49
    assert sum(row[1] == row[2] for row in rows[1:]) == confusion.trace()
    assert all(f"/{row[1]}/" in row[0] for row in rows[1:])
    # The same as what the training measured of its best checkpoint.
    state = json.loads((run / "checkpoints" / _index(run)["best"] / "state.json").read_text())
    assert result["top1"] == pytest.approx(state["metrics"]["top1"])
    assert result["loss"] == pytest.approx(state["metrics"]["loss"], rel=1e-5)
    code, out, _ = call(capsys, "validate", "--checkpoint", run, "--weights", "model", "--which", "latest")
    assert code == 0
    assert re.match(r"top-1 \d+\.\d\d%, top-5 100\.00%, loss \d\.\d+, 48 images\n", out)


def _index(run: Path) -> dict:
    return json.loads((run / "checkpoints" / "index.json").read_text())


def test_predict(run, training_folder, capsys):
    image = training_folder / "val" / "green" / "3.png"
    code, out, _ = call(
        capsys, "predict", "--images", image, training_folder / "val" / "red", "--checkpoint", run, "--json"
    )
    assert code == 0
    result = json.loads(out)["images"]
    assert [Path(r["image"]).parent.name for r in result] == ["green"] + ["red"] * 16
    for r in result:
        assert set(r["classes"]) == {"blue", "green", "red"}
        assert r["probabilities"] == sorted(r["probabilities"], reverse=True)
        assert sum(r["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert r["truth"] is None
    code, out, _ = call(capsys, "predict", "--images", image, "--checkpoint", run, "--top", "2")
    assert re.fullmatch(r".*3\.png: (blue|green|red) \d+\.\d%, (blue|green|red) \d+\.\d%\n", out)


def test_predict_shows_what_it_has(run, training_folder, tmp_path, capsys):
    """A file that cannot be read stops it after those before, or is passed over; other files are no images."""
    shutil.copytree(training_folder / "val" / "red", tmp_path / "red")
    (tmp_path / "red" / "notes.pdf").write_bytes(b"%PDF-1.4 no image")
    (tmp_path / "red" / ".ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "red" / "1.png", tmp_path / "red" / ".ipynb_checkpoints")
    (tmp_path / "red" / "2.png").write_bytes(b"broken")
    words = ("predict", "--images", tmp_path / "red", "--checkpoint", run, "--top", 1, "--batch-size", 3)
    code, out, err = call(capsys, *words)
    before = sorted(path.name for path in (tmp_path / "red").glob("*.png"))
    before = before[: before.index("2.png")]
    assert (code, [Path(line.partition(":")[0]).name for line in out.splitlines()]) == (2, before)
    assert err == f"gspn-vision: error: cannot read image '{tmp_path}/red/2.png': not an image\n"
    code, out, err = call(capsys, *words, "--unreadable", "skip", "--image-size", "24", "--crop-pct", "1")
    assert (code, len(out.splitlines())) == (0, 15)
    assert err.endswith("skipped 1 unreadable image(s)\n")


def test_validate_at_another_size(run, capsys):
    code, out, _ = call(capsys, "validate", "--checkpoint", run, "--image-size", "40", "--crop-pct", "1", "--json")
    assert (code, json.loads(out)["images"]) == (0, 48)


def test_visualize_a_digit(digits_run, tmp_path, capsys):
    words = ("visualize", "--checkpoint", digits_run, "--image", "digits:3", "--out", tmp_path / "map.png")
    assert call(capsys, *words)[0] == 0
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.width > 500


def test_predict_digits(digits_run, capsys):
    code, out, _ = call(
        capsys, "predict", "--images", "digits:21", "digits:1796", "--checkpoint", digits_run, "--top", "1"
    )
    assert code == 0
    assert re.fullmatch(r"digits:21: \d \d+\.\d%   \(is 1\)\ndigits:1796: \d \d+\.\d%   \(is 8\)\n", out)
    code, _, err = call(capsys, "predict", "--images", "digits:1797", "--checkpoint", digits_run)
    assert (code, err) == (
        2,
        "gspn-vision: error: digits: must be followed by a number from 0 to 1796, got 'digits:1797'\n",
    )


def test_visualize(run, digits_run, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.effect_noise((90, 60), 60).convert("RGB").save(photo)
    output = tmp_path / "maps.png"
    code, out, _ = call(
        capsys, "visualize", "--image", photo, "--checkpoint", run, "--out", output, "--pixel", "10", "80"
    )
    assert (code, out) == (0, f"{output}\n")
    with Image.open(output) as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 400
    code, out, _ = call(capsys, "visualize", "--image", photo, "--checkpoint", run, "--list-layers")
    assert out.split() == [f"stages.{i}.blocks.0.mixer.propagation" for i in range(4)]
    options = ["--layer", out.split()[1], "--image-size", "48x64", "--out", output]
    assert call(capsys, "visualize", "--image", "digits:3", "--checkpoint", digits_run, *options)[0] == 0
    code, _, err = call(capsys, "visualize", "--image", photo, "--checkpoint", run, "--pixel", "60", "0")
    assert (code, err) == (2, "gspn-vision: error: pixel must lie inside 60 rows and 90 columns, got (60, 0)\n")
    code, _, err = call(capsys, "visualize", "--image", photo, "--checkpoint", run, "--layer", "head")
    assert code == 2
    assert "layer must be one of stages.0.blocks.0.mixer.propagation, " in err


def test_bad_input_is_one_line(run, training_folder, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"broken")
    config = tmp_path / "config.yaml"
    config.write_text("epoch: 3\n")
    run_, folder = ["--checkpoint", str(run)], str(training_folder)
    cases = {
        "no checkpoint in 'absent'": ["validate", "--checkpoint", "absent"],
        "no folder 'absent'; data must be": ["validate", *run_, "--data", "absent"],
        "no folder 'test' in": ["validate", *run_, "--data", folder, "--split", "test"],
        "digits has 10 classes, more than the 3 of the head": ["validate", *run_, "--data", "digits"],
        f"cannot read image '{tmp_path}/absent.png': there is no such file": [
            "predict",
            *run_,
            "--images",
            str(tmp_path / "absent.png"),
        ],
        "broken.png': not an image": ["predict", *run_, "--images", str(broken)],
        "unknown option 'epoch', did you mean 'epochs'?": ["train", "--config", str(config)],
        "no configuration file 'absent'; shipped are ": ["train", "--config", "absent"],
        "got 'resnet5'; perhaps one of": ["train", "--model", "resnet5", "--out", str(tmp_path / "x")],
        "lr must be a number above 0, got fast": ["train", "--lr", "fast"],
        "auto_augment must be a policy of timm": ["train", "--auto-augment", "foo", "--out", str(tmp_path / "y")],
        "pretrained: timm has no weights of gspn2_nano": ["train", "--pretrained", "--out", str(tmp_path / "y")],
        "model_kwargs must not hold 'pretrained'": [
            *("train", "--model-kwargs", "{pretrained: true}", "--out", str(tmp_path / "y"))
        ],
        "Invalid pool type: foo": ["train", "--model-kwargs", "{global_pool: foo}", "--out", str(tmp_path / "y")],
        "does not take images of 224x224": [
            *("train", "--model-kwargs", "{global_pool: ''}", "--out", str(tmp_path / "y"))
        ],
        "scores of the shape (1, 10), got list": [
            *("train", "--model-kwargs", "{features_only: true}", "--image-size", "32", "--out", str(tmp_path / "y"))
        ],
        "out must name a file, got the folder": ["validate", *run_, "--out", str(tmp_path)],
        f"out must name a file, got the folder '{tmp_path}'": ["benchmark", "--out", str(tmp_path)],
        f"file, got the folder '{tmp_path}'": ["visualize", "--image", "digits:1", *run_, "--out", str(tmp_path)],
        "out must name a folder, got the file": ["train", "--out", str(broken)],
        "cannot read image 'absent.png'": ["visualize", "--image", "absent.png", *run_],
    }
    for message, arguments in cases.items():
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("gspn-vision: error: ")
        assert message in err
        assert err.count("\n") == 1


def test_unreadable_images_are_skipped_on_request(run, training_folder, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"broken")
    image = training_folder / "val" / "red" / "0.png"
    code, out, err = call(capsys, "predict", "--images", broken, image, "--checkpoint", run, "--unreadable", "skip")
    assert code == 0
    assert out.count("\n") == 1
    assert "broken.png': not an image" in err
    assert err.endswith("skipped 1 unreadable image(s)\n")


def test_a_checkpoint_of_another_model(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / _index(run)["best"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["widths"] = [16, 8, 8, 8]
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = call(capsys, "validate", "--checkpoint", folder)
    assert code == 2
    assert "holds the weights of another model: " in err


def test_a_timm_folder(run, training_folder, capsys):
    """The run's folder `model`, which says nothing of the data."""
    code, _, err = call(capsys, "validate", "--checkpoint", run / "model")
    assert code == 2 and "data must be given: " in err
    code, out, _ = call(capsys, "validate", "--checkpoint", run / "model", "--data", training_folder, "--json")
    best = json.loads(call(capsys, "validate", "--checkpoint", run, "--json")[1])
    assert code == 0 and json.loads(out) == best


def test_divergence_has_a_code_of_its_own(training_folder, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    wild = {"lr": 1e30, "optimizer": "sgd", "warmup_epochs": 0, "out": str(tmp_path / "run")}
    file.write_text(yaml.safe_dump(tiny_run(training_folder) | wild | {"clip_grad": None}))
    code, _, err = call(capsys, "train", "--config", file)
    assert code == 1
    assert "gspn-vision: error: the loss is " in err


# ---- counting and timing


def test_profile(capsys):
    code, out, _ = call(capsys, "profile", "--models", "gspn2_tiny", "--image-size", 224, "--json")
    assert code == 0
    (counted,) = json.loads(out)["models"]
    assert counted["published"]["macs"] == 4.2
    assert counted["params"] / 1e6 == pytest.approx(24, rel=0.03)
    code, out, _ = call(capsys, "profile", "--models", "gspn_nano")
    assert code == 0
    assert "224x224" in out
    code, _, err = call(capsys, "profile", "--models", "gspn_nanoo")
    assert code == 2
    assert "gspn_nanoo" in err


def test_benchmark(capsys, tmp_path):
    file = tmp_path / "speed.json"
    options = ("--no-peers", "--batch-sizes", 2, "--modes", "inference", "--image-size", 32, "--repeats", 2)
    code, out, _ = call(capsys, "benchmark", "--models", "gspn_nano", *options, "--device", "cpu", "--out", file)
    assert code == 0
    assert "batch 2" in out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["images_per_second"] > 0


def test_a_script_of_timms_knows_the_models(tmp_path):
    (tmp_path / "neighbour.py").write_text("NAME = 'gspn2_nano'\n")
    (tmp_path / "script.py").write_text(
        "import sys, timm, neighbour\n"
        "if __name__ == '__main__':\n"
        "    print(timm.is_model(neighbour.NAME), sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "gspn_vision.timm", str(tmp_path / "script.py"), "DATA", "--model", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "True ['DATA', '--model', 'x']\n"
    done = subprocess.run([*command[:3], "absent.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "gspn_vision.timm: error: no script 'absent.py'\n")
