import dataclasses
import re

import pytest
import timm
import yaml

from gspn_vision import config
from gspn_vision.config import TrainConfig, from_arguments, make_config


def test_every_field_has_a_help_text():
    for field in dataclasses.fields(TrainConfig):
        assert len(field.metadata["help"]) > 5, field.name


@pytest.mark.parametrize("name", config.preset_names())
def test_presets_are_valid(name):
    options = from_arguments(name, {})
    assert timm.is_model(options.model)
    assert name.startswith(options.model)


def test_presets_of_all_models_are_there():
    expected = {f"{m}_{d}" for m in ("gspn_nano", "gspn2_nano") for d in ("digits", "imagenet")}
    expected |= {
        f"{generation}_{size}_imagenet" for generation in ("gspn", "gspn2") for size in ("tiny", "small", "base")
    }
    assert expected <= set(config.preset_names())


def test_yaml_round_trip():
    options = make_config({"model_kwargs": {"stem_stride": 2}, "image_size": [64, 96], "mean": [0.1, 0.2, 0.3]})
    assert make_config(yaml.safe_load(config.to_yaml(options))) == options
    assert options.size == (64, 96)


def test_values_are_converted():
    options = make_config({"lr": "1e-3", "clip_grad": 1, "precision": False, "image_size": "64", "scale": (0.5, 1)})
    assert (options.lr, options.clip_grad, options.precision, options.image_size) == (1e-3, 1.0, "no", 64)
    assert options.scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown configuration key 'epoch', did you mean 'epochs'?"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"epochs": 2.5}, "epochs must be an integer of at least 1, got 2.5"),
        ({"epochs": True}, "epochs must be an integer of at least 1, got True"),
        ({"lr": "fast"}, "lr must be a number of at least 0, got 'fast'"),
        ({"lr": float("nan")}, "lr must be a number of at least 0, got nan"),
        ({"hflip": 1.5}, "hflip must be a number from 0 to 1, got 1.5"),
        ({"precision": "fp8"}, "precision must be one of no, bf16, fp16, got 'fp8'"),
        ({"in_chans": 2}, "in_chans must be one of 1, 3, got 2"),
        ({"scale": [0.1]}, "scale must be 2 values, got [0.1]"),
        ({"scale": [0.9, 0.1]}, "scale must be two rising numbers, got [0.9, 0.1]"),
        ({"mean": [0.5]}, "mean must have one value per channel (3), got [0.5]"),
        ({"image_size": 16}, "image_size must be an integer of at least 32 or 2 values, got 16"),
        ({"progress": "yes"}, "progress must be true or false, got 'yes'"),
        ({"model_kwargs": 3}, "model_kwargs must be a mapping such as {stem_stride: 2}, got 3"),
        ({"clip_grad": "x"}, "clip_grad must be a number of at least 0 or none, got 'x'"),
        ({"mixup": 0.8, "batch_size": 3}, "batch_size must be even with mixup or cutmix, which pair images, got 3"),
        ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs must be below epochs (5), got 5.0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_config(values)


def test_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no configuration file or preset 'absent'; presets: .*gspn2_nano_digits"
    ):
        config.read_yaml("absent")
    bad = tmp_path / "bad.yaml"
    bad.write_text("- 1\n")
    with pytest.raises(ValueError, match="must be a mapping of options, got list"):
        config.read_yaml(bad)
    bad.write_text("a: [1\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        config.read_yaml(bad)


def test_the_command_line_wins():
    words = {"epochs": "7", "model_kwargs": "{stem_stride: 1}", "scale": ["0.5", "1"], "mean": ["0.4"], "out": "12"}
    options = from_arguments("gspn2_nano_digits", words)
    assert (options.epochs, options.model_kwargs, options.scale) == (7, {"stem_stride": 1}, (0.5, 1.0))
    assert (options.mean, options.out, options.in_chans) == ((0.4,), "12", 1)
