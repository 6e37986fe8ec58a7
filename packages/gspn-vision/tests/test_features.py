"""`gspn-vision features` and `probe`: what is stored of images, and how well it tells classes apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity
from vision_cases import TINY

from gspn_core.runs.options import make
from gspn_vision import features, probe
from gspn_vision.checkpoint import write_model
from gspn_vision.cli import main
from gspn_vision.config import FeaturesConfig, ProbeConfig
from gspn_vision.data import Preprocessing, Samples
from gspn_vision.features import Extraction, read_features
from gspn_vision.foundation.vision import from_name
from gspn_vision.sources import open_source

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "img_size": 32, "patch_size": 8}


@pytest.fixture
def options(training_folder: Path, tmp_path: Path) -> dict:
    options = {"model": "vit_tiny_patch16_224", "model_kwargs": VIT, "data": str(training_folder), "split": "val"}
    return options | {"out": str(tmp_path / "features"), "batch_size": 7, "shard_size": 20, "workers": 0}


def run(options: dict, **changed: object) -> dict:
    torch.manual_seed(0)  # of fresh weights
    return features.run(make(FeaturesConfig, {**options, "progress": False, **changed}))


@pytest.mark.parametrize("pool", ["head", "class", "mean", "map"])
def test_features_are_the_models(options: dict, pool: str) -> None:
    result = run(options, pool=pool, workers=1)
    assert (result["images"], result["shards"], result["written"]) == (48, 3, 3)
    stored, labels, settings = read_features(options["out"])
    source = open_source(options["data"], "val")
    torch.manual_seed(0)
    vision = from_name(options["model"], VIT)
    model = vision.model.eval()
    samples = Samples(source, vision.preprocessing.transform(), "RGB")
    x = torch.stack([samples[i].image for i in range(48)])
    with torch.inference_mode():
        tokens = model.forward_features(x)
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        expected = {"head": tokens[:, 0], "class": tokens[:, 0], "mean": grid.mean((2, 3)), "map": grid}[pool]
    torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [source[i][1] for i in range(48)] and settings["class_names"] == source.class_names


@pytest.mark.parametrize("name", ["test_resnet", "gspn2_nano"])
def test_models_without_tokens(options: dict, name: str) -> None:
    kwargs = {**TINY, "num_classes": 2} if name == "gspn2_nano" else {}
    run(options, model=name, model_kwargs=kwargs, pool="map", image_size=32, store_precision="fp16")
    maps = read_features(options["out"])[0]
    assert maps.ndim == 4 and maps.dtype == torch.float16
    with pytest.raises(ValueError, match="no class token"):
        run(options, model=name, model_kwargs=kwargs, pool="class", out=options["out"] + "2")


def test_a_killed_extraction_goes_on(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(options, out=str(tmp_path / "whole"))
    written = features.write_tensors

    def stops(path: Path, *rest: object) -> None:
        if path.name == "00001.safetensors":
            raise KeyboardInterrupt
        written(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_tensors", stops)
        with pytest.raises(KeyboardInterrupt):
            run(options)
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        read_features(options["out"])
    assert run(options, batch_size=9)["written"] == 2
    # Batches are a speed, not a setting; so rounding alone may differ.
    torch.testing.assert_close(read_features(options["out"])[0], read_features(tmp_path / "whole")[0])
    shard = Path(options["out"]) / "00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        read_features(options["out"])
    assert run(options)["written"] == 1 and run(options)["written"] == 0
    with pytest.raises(ValueError, match="pool was 'head', is 'mean'"):
        run(options, pool="mean")
    other = make(FeaturesConfig, {**options, "progress": False})
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="weights was"):
        features.run(other)


def test_images_that_cannot_be_read(options: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images" / "some"
    folder.mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no image")
    options |= {"data": str(tmp_path / "images"), "split": None}
    words = ["features", "--model", "vit_tiny_patch16_224", f"--model-kwargs={json.dumps(VIT)}", "--no-progress"]
    words += ["--data", options["data"], "--out", options["out"], "--workers", "0"]
    assert main(words) == 2
    assert "cannot read image" in capsys.readouterr().err
    run(options, unreadable="skip", out=str(tmp_path / "skipped"))
    stored, _, settings = read_features(tmp_path / "skipped")
    assert len(stored) == 4 and not settings["labelled"]
    with pytest.raises(ValueError, match="must hold features of images with classes"):
        probe.run(make(ProbeConfig, {"data": str(tmp_path / "skipped"), "val_data": str(tmp_path / "skipped")}))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"split": None}, ValueError, "split must be given"),
        ({"split": None, "data": "digits"}, ValueError, "split must be given"),
        ({"data": "nowhere"}, FileNotFoundError, "no folder 'nowhere'"),
        ({"image_size": 36}, ValueError, "multiple of the patches of 8x8"),
        ({"model": None}, ValueError, "either model or checkpoint"),
        ({"model": None, "checkpoint": "nowhere"}, ValueError, "model_kwargs must not be given with a checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, changed: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(options, **changed)
    assert not Path(options["out"]).exists()


def test_another_size_resamples_position_embeddings(options: dict) -> None:
    run(options, image_size="48x64", pool="map")
    assert read_features(options["out"])[0].shape == (48, 16, 6, 8)


def test_probe_measures_features(options: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes are colours, which the features of fresh weights do tell apart."""
    run(options, split="train", out=str(tmp_path / "train"))
    run(options)
    words = ["probe", "--data", str(tmp_path / "train"), "--val-data", options["out"], "--neighbors", "5", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["train_images"], result["val_images"], result["channels"]) == (48, 48, 16)
    assert result["knn_top1"] > 90 and result["linear_top1"] > 90
    assert main(words[:-1]) == 0 and "nearest neighbours" in capsys.readouterr().out
    run(options, pool="mean", out=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="val_data must have the same pool as data, got 'mean' and 'head'"):
        probe.run(make(ProbeConfig, {"data": options["out"], "val_data": str(tmp_path / "other")}))
    run(options, pool="map", out=str(tmp_path / "maps"))
    with pytest.raises(ValueError, match=r"one vector per image, got maps of \[16, 4, 4\]"):
        probe.run(make(ProbeConfig, {"data": str(tmp_path / "maps"), "val_data": str(tmp_path / "maps")}))


def test_neighbours_vote_by_their_cosine() -> None:
    rng = np.random.default_rng(0)
    train, val = (rng.normal(size=(n, 6)).astype(np.float32) for n in (60, 40))
    truth = (train[:, 0] > 0).astype(int), (val[:, 0] > 0).astype(int)
    near = cosine_similarity(val, train)
    right = 0
    for row, label in zip(near, truth[1], strict=True):
        nearest = np.argsort(-row)[:7]
        votes = [np.exp(row[nearest][truth[0][nearest] == c] / 0.5).sum() for c in (0, 1)]
        right += int(np.argmax(votes) == label)
    found = probe.nearest_neighbours((train, truth[0]), (val, truth[1]), neighbors=7, temperature=0.5)
    assert found == pytest.approx(100 * right / 40) and 50 < found < 100


def test_the_linear_classifier_chooses_its_penalty() -> None:
    """With a quarter of the labels wrong, and many channels, a strong penalty is better."""
    rng = np.random.default_rng(1)
    y = np.arange(900) % 2
    x = (rng.normal(size=(900, 100)) + 0.3 * y[:, None]).astype(np.float32) * 10 ** np.linspace(-2, 2, 100)
    y = np.where(rng.random(900) < 0.25, 1 - y, y)
    pair = ((x[:300], y[:300]), (x[300:], y[300:]))
    weak, _ = probe.linear_probe(*pair, inverse_penalties=[1e4])
    accuracy, best = probe.linear_probe(*pair, inverse_penalties=[1e4, 1e-3])
    assert best == 1e-3 and accuracy > weak + 4
    with pytest.raises(ValueError, match="inverse_penalties must be one number"):
        probe.linear_probe((x[:4], np.array([0, 0, 0, 1])), pair[1], inverse_penalties=[1.0, 2.0])


def test_features_of_a_checkpoint(options: dict, tmp_path: Path) -> None:
    vision = from_name("vit_tiny_patch16_224", VIT)
    write_model(tmp_path / "model", vision.config(), vision.model.state_dict())
    extraction = Extraction(
        make(FeaturesConfig, {**options, "model": None, "model_kwargs": {}, "checkpoint": str(tmp_path / "model")})
    )
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in extraction.model.state_dict().items())


def test_a_shard_of_unreadable_images_does_not_stop_the_others(options: dict, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"no image")
    changed = {"data": str(folder), "split": None, "shard_size": 1, "unreadable": "skip"}
    assert run(options, **changed)["written"] == 3
    assert read_features(options["out"])[0].shape == (2, 16)
    assert run(options, **changed)["written"] == 0
    (Path(options["out"]) / "features.json").write_text("[]")
    with pytest.raises(ValueError, match="must be of format"):
        read_features(options["out"])
    with pytest.raises(ValueError, match="holds no settings"):
        run(options, **changed)


def test_a_low_temperature_counts_the_nearest() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)).astype(np.float32), rng.integers(0, 3, 30)
    assert probe.nearest_neighbours((x, y), (x, y), temperature=1e-6) == 100


def test_the_crop_of_the_model_is_kept() -> None:
    """Some of timm's models squash images to a square."""
    vision = from_name("eva02_tiny_patch14_336", {"depth": 1, "embed_dim": 48, "num_heads": 2, "img_size": 28})
    image = Image.effect_noise((90, 50), 80).convert("RGB")
    for mode in ("squash", "center"):
        own = timm.data.create_transform(input_size=28, crop_mode=mode, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
        about = {**vision.preprocessing.to_timm(), "input_size": (3, 28, 28), "crop_mode": mode, "crop_pct": 1.0}
        about |= {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear"}
        assert torch.equal(Preprocessing.from_timm(about).transform()(image), own(image))
