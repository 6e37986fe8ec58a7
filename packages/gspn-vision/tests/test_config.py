import pytest
import timm
import yaml

from gspn_core.runs.options import make, parser_of, read_config, shipped_names, to_yaml
from gspn_vision import config
from gspn_vision.config import CONFIGS, TrainConfig


@pytest.mark.parametrize("name", shipped_names(CONFIGS))
def test_presets_are_valid(name):
    options = make(TrainConfig, read_config(name, CONFIGS))
    assert timm.is_model(options.model)
    assert name.startswith(options.model)
    assert make(TrainConfig, yaml.safe_load(to_yaml(options))) == options


def test_presets_of_all_models_are_there():
    expected = {f"{m}_{d}" for m in ("gspn_nano", "gspn2_nano") for d in ("digits", "imagenet")}
    expected |= {
        f"{generation}_{size}_imagenet" for generation in ("gspn", "gspn2") for size in ("tiny", "small", "base")
    }
    assert expected == set(shipped_names(CONFIGS))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch', did you mean 'epochs'?"),
        ({"epochs": 0}, "epochs must be an integer from 1, got 0"),
        ({"lr": "fast"}, "lr must be a number above 0, got fast"),
        ({"hflip": 1.5}, "hflip must be a number from 0 to 1, got 1.5"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got fp8"),
        ({"in_chans": 2}, "in_chans must be one of 1, 3, got 2"),
        ({"crop_scale": [0.9, 0.1]}, "crop_scale must be two rising numbers, got [0.9, 0.1]"),
        ({"mean": [0.5]}, "mean must have one value per channel (3), got [0.5]"),
        ({"std": [0.5, 0.5, 0.0]}, "std element 3 must be a number above 0, got 0.0"),
        ({"image_size": 0}, "image_size: "),
        ({"model_kwargs": 3}, "model_kwargs must be a mapping, such as '{name: 1}', got 3"),
        ({"mixup": 0.8, "batch_size": 3}, "batch_size must be even with mixup or cutmix, which pair images, got 3"),
        ({"mesa": 1.0, "ema_decay": None}, "mesa distils from averaged weights and needs ema_decay, got mesa 1.0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError) as raised:
        make(TrainConfig, values)
    assert str(raised.value).startswith(message)


def test_every_option_has_a_line_of_help():
    """Or no parser can be made."""
    kinds = [kind for name, kind in vars(config).items() if name.endswith("Config")]
    assert len(kinds) >= 8
    for kind in kinds:
        assert "--out" in parser_of(kind).format_help() or kind in (
            config.ExploreConfig,
            config.PredictConfig,
            config.ProbeConfig,
            config.ProfileConfig,
        )
