import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from vision_cases import TINY, tiny_run, write_images

import gspn_vision  # noqa: F401  (registers the models)
from gspn_core.runs import checkpoints
from gspn_core.runs.errors import NonFiniteLossError
from gspn_core.runs.logs import read_table
from gspn_core.runs.options import ImageSize, make
from gspn_vision import checkpoint
from gspn_vision.config import TrainConfig
from gspn_vision.train import Trainer, train


class Killed(BaseException):
    """Stands for the process being killed."""


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs ended with the same bits and the same tables, but for speeds."""
    a, b = (checkpoint.locate(folder, "latest") for folder in (one, other))
    assert a.name == b.name
    for stem in ("model", "ema", "optimizer"):
        left, right = load_file(a / f"{stem}.safetensors"), load_file(b / f"{stem}.safetensors")
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{stem} {key}"
    states = [checkpoint.read_state(path) for path in (a, b)]
    for state in states:
        for key in ("out", "workers", "checkpoint_every"):
            del state["config"][key]
    assert states[0] == states[1]
    index = [checkpoints.read_index(folder / "checkpoints") for folder in (one, other)]
    assert index[0] == index[1]
    for table in ("train.csv", "validation.csv"):
        rows = [read_table(folder / table) for folder in (one, other)]
        for row in rows[0] + rows[1]:
            row.pop("images_per_second", None)
        assert rows[0] == rows[1]
        assert rows[0]


def test_a_run(tiny_options, tmp_path):
    summary = train(make(TrainConfig, {**tiny_options, "tensorboard": True}))
    run = tmp_path / "run"
    assert summary["steps"] == 8
    assert summary["folder"] == str(run)
    assert make(TrainConfig, yaml.safe_load((run / "config.yaml").read_text())).model_kwargs == TINY
    rows = read_table(run / "train.csv")
    assert [(row["step"], row["epoch"]) for row in rows] == [("3", "1"), ("6", "2"), ("8", "2")]
    # Linear warm-up over the 4 updates of the first epoch, then cosine over the other 4.
    assert float(rows[0]["lr"]) == pytest.approx(1e-3 * 3 / 4)
    assert float(rows[1]["lr"]) == pytest.approx(1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi / 4)))
    assert all(float(row["gradient_norm"]) > 0 for row in rows)
    epochs = read_table(run / "validation.csv")
    assert [row["step"] for row in epochs] == ["4", "8"]
    assert float(epochs[1]["top1"]) == summary["top1"]
    assert summary["best_top1"] == max(float(row["top1"]) for row in epochs)
    assert len(list((run / "tensorboard").iterdir())) == 1
    state = checkpoint.read_state(checkpoint.locate(run, "latest"))
    assert (state["step"], state["processes"]) == (8, 1)
    # The run's folder `model` is a timm model of the best weights, averaged ones where there are any.
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    best = checkpoint.read_weights(checkpoint.locate(run))
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    card = ModelCard.load(run / "model" / "README.md")
    values = [result.metric_value for result in card.data.eval_results]
    assert card.data.library_name == "timm" and values[0] == summary["best_top1"] and len(values) == 2
    assert "epochs: 2" in card.text and str(tmp_path) not in card.text
    config = model.pretrained_cfg
    assert (model.num_classes, config["input_size"], config["crop_pct"]) == (3, (3, 32, 32), 0.9)
    assert timm.data.resolve_model_data_config(model)["interpolation"] == "bilinear"
    # A finished run is not trained further.
    before = checkpoints.read_index(run / "checkpoints")
    assert train(make(TrainConfig, tiny_options))["steps"] == 8
    assert checkpoints.read_index(run / "checkpoints") == before


@pytest.fixture(scope="module")
def whole_run(training_folder, tmp_path_factory) -> tuple[dict, Path]:
    """A run of 8 updates without interruption, and its options."""
    folder = tmp_path_factory.mktemp("whole")
    deeper = {"model_kwargs": {**TINY, "depths": [1, 1, 2, 1]}, "batch_size": 6, "accumulate": 2}
    options = tiny_run(training_folder) | deeper
    train(make(TrainConfig, {**options, "out": str(folder / "run")}))
    return options, folder / "run"


@pytest.mark.parametrize("update", [1, 3, 4, 6])
def test_an_interrupted_run_ends_with_the_same_bits(whole_run, tmp_path, monkeypatch, update):
    """Stopped within an update, with checkpoints every 2, and continued with another number of loader processes."""
    options, whole = whole_run
    options = {**options, "out": str(tmp_path / "run"), "checkpoint_every": 2}
    trainer = Trainer(make(TrainConfig, options))
    step = Trainer._update

    def interrupted(self, batches):
        loss = step(self, batches)
        if self.step > update:
            raise Killed
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", interrupted)
        with pytest.raises(Killed):
            trainer.run()
    workers = 2 if update == 3 else 0
    continued = Trainer(make(TrainConfig, {**options, "workers": workers}))
    assert continued.step == update // 2 * 2
    torch.manual_seed(update)  # generators are in no particular state when a run is continued
    continued.run()
    assert_same_run(whole, tmp_path / "run")


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(whole_run, tmp_path):
    options, whole = whole_run
    options = {**options, "out": str(tmp_path / "run"), "checkpoint_every": 1, "workers": 1}
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m", "gspn_vision.cli", "train", "--config", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    delays = [random.uniform(0, 1.5) for _ in range(2)]
    print("killed after", delays, "seconds")  # shown if the test fails
    index = tmp_path / "run" / "checkpoints" / "index.json"
    for delay in delays:
        before = index.read_text() if index.exists() else ""
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None and (index.read_text() if index.exists() else "") == before:
            time.sleep(0.01)
        time.sleep(delay)
        # The whole session, or loader processes would outlive their parent for a while.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    assert_same_run(whole, tmp_path / "run")


def test_accumulation_equals_a_larger_batch(tiny_options, tmp_path):
    plain = {"mixup": 0, "cutmix": 0, "drop_rate": 0, "drop_path_rate": 0, "optimizer": "sgd", "lr": 1e-3}
    for name, sizes in {"one": (12, 1), "four": (3, 4)}.items():
        out = {"out": str(tmp_path / name), "batch_size": sizes[0], "accumulate": sizes[1]}
        train(make(TrainConfig, tiny_options | plain | out))
    one, four = (load_file(checkpoint.locate(tmp_path / n, "latest") / "model.safetensors") for n in ("one", "four"))
    torch.testing.assert_close(one, four, rtol=0, atol=2e-6)


def test_a_non_finite_loss_stops_the_run(tiny_options):
    options = make(TrainConfig, {**tiny_options, "checkpoint_every": 2, "epochs": 4})
    trainer = Trainer(options)
    step = Trainer._update

    def poisoned(batches):
        if trainer.step == 5:
            trainer.bare_model.head.fc.bias.data.fill_(float("nan"))
        return step(trainer, batches)

    trainer._update = poisoned
    expected = r"the loss is nan at step 6 with learning rate 0\.000\d+; last good checkpoint: .*step-00000004$"
    with pytest.raises(NonFiniteLossError, match=expected):
        trainer.run()
    assert checkpoint.read_state(checkpoint.locate(options.folder, "latest"))["step"] == 4


def test_a_diverging_run_is_stopped(tiny_options):
    wild = {"lr": 1e30, "optimizer": "sgd", "ema_decay": None, "warmup_epochs": 0, "clip_grad": None}
    with pytest.raises(NonFiniteLossError, match=r"at step [23] with learning rate \S+; last good checkpoint: none"):
        train(make(TrainConfig, tiny_options | wild))


def test_the_learning_rate_is_scaled(tiny_options):
    trainer = Trainer(make(TrainConfig, {**tiny_options, "lr": 1e-3, "lr_batch": 24}))
    assert trainer.lr.at(trainer.lr.warmup_steps) == pytest.approx(5e-4)


def test_a_continuation_with_other_options_is_refused(tiny_options):
    train(make(TrainConfig, {**tiny_options, "epochs": 2}))
    cases = {
        "lr must be 0.001 to continue the run in .*, got 0.002": {"lr": 2e-3},
        "model must be 'gspn2_nano' to continue the run in .*, got 'gspn_nano'": {"model": "gspn_nano"},
        "images per update .* must be 12 to continue .*, got 6": {"batch_size": 6},
        "resume is 'never' but .* already holds a run": {"resume": "never"},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            Trainer(make(TrainConfig, tiny_options | change))
    Trainer(make(TrainConfig, tiny_options | {"batch_size": 6, "accumulate": 2, "workers": 1}))


def test_unreadable_images_in_training(tiny_options, tmp_path, capsys):
    folder = write_images(tmp_path / "images", {"red": 8, "green": 8})
    (folder / "train" / "red" / "3.png").write_bytes(b"broken")
    change = {"data": str(folder), "batch_size": 8, "out": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"cannot read image '.*red/3\.png': not an image"):
        train(make(TrainConfig, tiny_options | change))
    summary = train(make(TrainConfig, tiny_options | change | {"unreadable": "skip"}))
    assert summary["steps"] == 4
    text = capsys.readouterr().err
    assert text.count("red/3.png") == 1
    assert "skipped 1 unreadable image(s)" in text


def test_bad_runs_write_nothing(tiny_options, tmp_path):
    cases = {
        "model must be a timm model .*, got 'gspn9'": {"model": "gspn9"},
        "optimizer 'adamx' cannot be made": {"optimizer": "adamx"},
        "optimizer_kwargs must not have lr: give the option lr instead": {"optimizer_kwargs": {"lr": 1}},
        "no folder 'absent'": {"data": "absent"},
        "model_kwargs do not suit gspn2_nano": {"model_kwargs": {"tokens": 3}},
    }
    for message, change in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(make(TrainConfig, tiny_options | change))
    assert not (tmp_path / "run").exists()


def test_files_in_the_folder_of_the_model_stay(tiny_options, tmp_path):
    """The run replaces that folder as a whole, so it must hold nothing else."""
    own = tmp_path / "run" / "model" / "model.py"
    own.parent.mkdir(parents=True)
    own.write_text("class Model: pass")
    with pytest.raises(ValueError, match=r"would be replaced and holds model\.py"):
        train(make(TrainConfig, tiny_options))
    assert own.read_text() == "class Model: pass" and not (tmp_path / "run" / "checkpoints").exists()


def test_any_timm_model_trains(tiny_options):
    options = {"model": "test_convnext", "model_kwargs": {}, "gradient_checkpointing": True}
    assert train(make(TrainConfig, tiny_options | options))["steps"] == 8


def test_data_smaller_than_an_update_train_too(tiny_options):
    """An epoch is one update then, of images that come up more than once."""
    assert train(make(TrainConfig, tiny_options | {"batch_size": 60, "workers": 0}))["steps"] == 2


def test_no_averages(tiny_options, tmp_path):
    summary = train(make(TrainConfig, tiny_options | {"ema_decay": None}))
    assert not list((tmp_path / "run").rglob("ema.safetensors"))
    model = timm.create_model(f"local-dir:{summary['model']}", pretrained=True)
    best = checkpoint.read_weights(checkpoint.locate(tmp_path / "run"), "model")
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_a_model_of_one_size_is_made_for_the_size_asked_for(training_folder, tmp_path):
    """A ViT of timm takes images of one size, 224 by default."""
    small = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    change = {"model": "vit_tiny_patch16_224", "model_kwargs": small, "image_size": [32, 48]}
    change["out"] = str(tmp_path / "run")
    summary = train(make(TrainConfig, tiny_run(training_folder) | change))
    loaded = checkpoint.load_model(summary["folder"])
    assert loaded.model.patch_embed.img_size == (32, 48)
    resized = loaded.resized(ImageSize(64, 80))
    assert resized.preprocessing.size == (64, 80) and resized.model(torch.zeros(1, 3, 64, 80)).isfinite().all()
    with pytest.raises(ValueError, match="image_size must be a multiple of the patches of 16x16, got 64x72"):
        resized.resized(ImageSize(64, 72))
    mixer = loaded._replace(model=timm.create_model("mixer_s32_224", num_classes=2))
    with pytest.raises(ValueError, match="image_size must be 32x48, the model's only one, got 64x64"):
        mixer.resized(ImageSize(64, 64))


def test_pretrained_weights(training_folder, tmp_path, monkeypatch):
    """Are timm's, adapted to classes and colours; a continuation does not ask for them again."""
    weights = timm.create_model("test_resnet", num_classes=1000).state_dict()
    monkeypatch.setattr("timm.models._builder._resolve_pretrained_source", lambda cfg: ("state_dict", weights))
    change = {"model": "test_resnet", "model_kwargs": {}, "pretrained": True, "in_chans": 1, "out": str(tmp_path / "r")}
    trainer = Trainer(make(TrainConfig, tiny_run(training_folder) | change))
    name = next(iter(weights))
    torch.testing.assert_close(trainer.bare_model.state_dict()[name], weights[name].sum(1, keepdim=True))


@pytest.mark.parametrize(
    "change",
    [
        {"bce_loss": True, "label_smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0},
        {"clip_mode": "agc", "clip_grad": 0.01},
        {"clip_mode": "value", "clip_grad": 0.001, "channels_last": True},
        {"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.5}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_timms_script_offers(change, training_folder, tmp_path):
    """A run with it is extended to the same bits as one that was as long from the start."""
    options = tiny_run(training_folder) | {"warmup_epochs": 0, "lr_schedule": "constant"} | change
    train(make(TrainConfig, options | {"out": str(tmp_path / "whole")}))
    for epochs in (1, 2):
        train(make(TrainConfig, options | {"out": str(tmp_path / "parts"), "epochs": epochs}))
    weights = [load_file(checkpoint.locate(tmp_path / r, "latest") / "model.safetensors") for r in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_clipping_is_timms(training_folder, tmp_path):
    change = {"clip_mode": "value", "clip_grad": 0.001, "out": str(tmp_path / "run")}
    trainer = Trainer(make(TrainConfig, tiny_run(training_folder) | change))
    for parameter in trainer.bare_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = trainer._clip_gradients()
    assert norm.item() == pytest.approx(sum(p.numel() for p in trainer.bare_model.parameters()) ** 0.5, rel=1e-5)
    assert all(p.grad.max().item() == pytest.approx(0.001) for p in trainer.bare_model.parameters())
