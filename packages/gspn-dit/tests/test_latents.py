"""From photographs to latents to samples: the way of ImageNet, small."""

import json

import pytest
import torch
from dit_cases import tiny_run
from feature_cases import LATENT, options, save_vae, write_photographs

from gspn_core.runs.options import ImageSize, make
from gspn_dit import checkpoint, train
from gspn_dit.config import SampleConfig, TrainConfig
from gspn_dit.extract import extract
from gspn_dit.sample import read_png, sample


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Features of 12 pieces of photographs, of 2 classes, 48 x 32 pixels, and a run on them."""
    root = tmp_path_factory.mktemp("latents")
    vae = save_vae(root / "vae")
    extract(options(write_photographs(root / "images"), vae, root / "features", image_size=ImageSize(48, 32)))
    run = tiny_run(str(root / "run"), data=str(root / "features"), vae=vae, batch_size=4, sample_count=2)
    train.train(make(TrainConfig, run))
    return root, run


def test_a_run_on_latents(made):
    root, _ = made
    model, state = checkpoint.load_model(root / "run")
    assert (model.config.in_channels, model.out_channels, model.config.num_classes) == (4, 8, 2)
    assert (state["latent_size"], state["class_names"]) == ([6, LATENT], ["china", "flower"])
    assert read_png(root / "run" / "samples" / "step-00000006.png").shape == (96, 130, 3)


@pytest.mark.parametrize("size", [None, (64, 80)])
def test_samples_are_decoded(made, size, tmp_path):
    """At the size trained at, not square, and at another one."""
    root, _ = made
    values = {
        "checkpoint": str(root / "run"),
        "vae": str(root / "vae"),
        "out": str(tmp_path),
        "count": 3,
        "sampler_steps": 2,
    }
    sample(make(SampleConfig, values | {"image_size": size, "classes": ["flower"], "guidance": 2.0, "progress": False}))
    assert read_png(tmp_path / "images" / "000002.png").shape == (*(size or (48, 32)), 3)
    assert json.loads((tmp_path / "labels.json").read_text()) == [1, 1, 1]


def test_posteriors_are_sampled_and_mirrored(made):
    root, run = made
    source = train.Trainer(make(TrainConfig, run | {"out": str(root / "other")})).source
    row, _ = source[3]
    rows = torch.stack([row, row])
    mirrored = torch.tensor([False, True])
    means = source.clean(rows, mirrored, torch.zeros(2, 4, 6, LATENT))
    torch.testing.assert_close(means, row[:, :4] * 0.18215)
    noise = torch.randn(2, 4, 6, LATENT)
    deviation = (0.5 * row[:, 4:].clamp(-30, 20)).exp() * 0.18215
    torch.testing.assert_close(source.clean(rows, mirrored, noise), means + deviation * noise)


def test_another_vae(made, tmp_path):
    root, run = made
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"vae must be the one that the features in .* were made with"):
        train.Trainer(make(TrainConfig, run | {"vae": other, "out": str(tmp_path / "run")}))
    values = {"checkpoint": str(root / "run"), "out": str(tmp_path / "samples"), "progress": False}
    with pytest.raises(ValueError, match="vae must be the one the features were made with, got another in"):
        sample(make(SampleConfig, values | {"vae": other}))
    with pytest.raises(ValueError, match="vae must be given: the model makes latents; got none"):
        sample(make(SampleConfig, values))


def test_wrong_options(made, tmp_path):
    _, run = made
    for change, message in (
        ({"image_size": 32}, "image_size must be absent with features, whose size is fixed, got 32x32"),
        ({"model": "GSPN2-S/4", "model_kwargs": {}}, "the patch of GSPN2-S/4 must divide 6 x 4, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            train.Trainer(make(TrainConfig, run | change | {"out": str(tmp_path / "run")}))
