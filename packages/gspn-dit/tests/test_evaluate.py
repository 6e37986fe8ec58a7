import csv
import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from gspn_dit import evaluate as module
from gspn_dit import sources
from gspn_dit.evaluate import COLUMNS, EvaluateConfig, evaluate, read_labels
from gspn_dit.extractors import Extractor, Features, build_extractor, convert_channels
from gspn_dit.metrics import frechet_distance, inception_score, moments, precision_recall
from gspn_dit.sources import open_batches


def images(count: int = 6, size: int = 9, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size + 1, channels), dtype=np.uint8)


def write_folder(folder: Path, pixels_NHWC: np.ndarray) -> Path:
    for index, image in enumerate(pixels_NHWC):
        path = folder / f"class{index // 4}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(path)
    return folder


def read_all(source: str | Path, start: int = 0, stop: int | None = None, size: int = 4) -> np.ndarray:
    opened = open_batches(str(source))
    return torch.cat(list(opened.chunks(start, stop or len(opened), size))).numpy()


@pytest.fixture
def samples(tmp_path: Path) -> str:
    np.savez(tmp_path / "samples.npz", arr_0=images(30))
    return str(tmp_path / "samples.npz")


@pytest.fixture
def classifier(tmp_path: Path) -> dict:
    """Options of a small classifier of grey images, with random weights in a file."""
    torch.manual_seed(0)
    options = {"num_classes": 10, "in_chans": 1}
    save_file(timm.create_model("test_resnet", **options).state_dict(), tmp_path / "model.safetensors")
    return {
        "extractor": "timm:test_resnet",
        "extractor_weights": str(tmp_path / "model.safetensors"),
        "extractor_kwargs": options,
        "extractor_size": 32,
        "device": "cpu",
        "progress": False,
    }


class Fake(Extractor):
    """Features that can be computed by hand: sums of rows, some pixels, and means of columns."""

    name, inception, classes = "inception", True, 5

    def forward(self, images: torch.Tensor) -> Features:
        x = images.float().mean(1) / 255
        return Features(x.sum(2)[:, :4], x[:, :3, :2].flatten(1), 10 * x.mean(1)[:, :5])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    extractor = Fake()
    monkeypatch.setattr(module, "build_extractor", lambda *args, **kwargs: extractor)
    monkeypatch.setattr(sources, "FEATURES", {"fid": 4, "sfid": 6})
    return extractor


def assert_figures(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() >= expected.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=tolerance) if isinstance(value, float) else value), key


def features_of(source: str) -> Features:
    return Fake()(torch.from_numpy(read_all(source)))


# Images


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(3,), (1,), ()])
def test_npz_is_read_in_pieces(tmp_path: Path, save, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 5, 6, *shape), dtype=np.uint8)
    save(tmp_path / "a.npz", other=np.ones(3), arr_0=pixels)
    expected = np.load(tmp_path / "a.npz")["arr_0"].reshape(11, 5, 6, -1).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(read_all(tmp_path / "a.npz"), expected)
    np.testing.assert_array_equal(read_all(tmp_path / "a.npz", 3, 10), expected[3:10])
    sizes = [len(chunk) for chunk in open_batches(str(tmp_path / "a.npz")).chunks(3, 10, 4)]
    assert sizes == [4, 3]


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_equals_npz(tmp_path: Path, channels: int) -> None:
    pixels = images(11, channels=channels)
    folder = write_folder(tmp_path / "folder", pixels)
    (folder / "notes.txt").write_text("no image")
    expected = np.broadcast_to(pixels.transpose(0, 3, 1, 2), (11, 3, 9, 10))
    np.testing.assert_array_equal(read_all(folder), expected)
    np.testing.assert_array_equal(read_all(folder, 3, 10), expected[3:10])


def test_digits() -> None:
    pixels = read_all("digits:5:25")
    assert pixels.shape == (20, 1, 8, 8) and pixels.dtype == np.uint8
    assert np.abs(pixels[:, 0] - load_digits().images[5:25] * 255 / 16).max() <= 0.5
    assert pixels.max() == 255 and len(open_batches("digits")) == 1797


@pytest.mark.parametrize("name", ["digits:5", "digits:7:7", "digits:0:1798", "digits:a:b", "digits:0:5:2"])
def test_digits_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=f"digits:FIRST:END must be .* got {name}"):
        open_batches(name)


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=images(20))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"a\.npz: is no \.npz, or a damaged one"):
        open_batches(str(path))
    path.write_bytes(whole[:3000] + bytes(64) + whole[3064:])
    with pytest.raises(ValueError, match=r"a\.npz: is no \.npz, or a damaged one"):
        read_all(path)
    with zipfile.ZipFile(path, "w") as archive:  # the header promises more than there is
        archive.writestr("arr_0.npy", whole[whole.index(b"\x93NUMPY") :][:3000])
    with pytest.raises(ValueError, match=r"arr_0 ends before image \d+ of 20"):
        read_all(path)


def test_npz_without_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=images())
    with pytest.raises(ValueError, match=r"a\.npz: must hold arr_0, got \['images'\]"):
        open_batches(str(tmp_path / "a.npz"))
    for wrong in (images() / 255, np.asfortranarray(images()), images(channels=4), images()[:0], np.array([None])):
        np.savez(tmp_path / "a.npz", arr_0=wrong)
        with pytest.raises(ValueError, match="arr_0 must be uint8"):
            open_batches(str(tmp_path / "a.npz"))


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_batches(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="got none"):
        open_batches(str(tmp_path))
    folder = write_folder(tmp_path / "folder", images(3))
    Image.new("RGB", (4, 5)).save(folder / "z.png")
    with pytest.raises(ValueError, match=r"z\.png: must be 10 x 9 pixels as 000\.png, got 4 x 5"):
        read_all(folder)
    (folder / "z.png").write_bytes((folder / "class0" / "000.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read image '.*z\.png'"):
        read_all(folder)
    Image.fromarray(np.full((9, 10), 257 * 100, np.uint16)).save(folder / "z.png")  # 16 bits are scaled
    assert np.unique(read_all(folder)[-1]).tolist() == [100]


def test_labels(tmp_path: Path) -> None:
    values = [3, 1, 2]
    (tmp_path / "a.json").write_text(json.dumps(values))
    np.save(tmp_path / "a.npy", np.array(values, np.int32))
    np.savez(tmp_path / "a.npz", labels=np.array(values, np.uint8))
    for name in ("a.json", "a.npy", "a.npz"):
        assert read_labels(str(tmp_path / name), 3).tolist() == values
    with pytest.raises(ValueError, match=r"4 whole numbers, got int64 \(3,\)"):
        read_labels(str(tmp_path / "a.json"), 4)
    (tmp_path / "a.json").write_text("[0.5, 1]")
    with pytest.raises(ValueError, match="2 whole numbers, got float64"):
        read_labels(str(tmp_path / "a.json"), 2)
    (tmp_path / "a.json").write_text("[[1], 2")
    np.savez(tmp_path / "a.npz", classes=np.array(values))
    for name in ("a.json", "a.npz"):
        with pytest.raises(ValueError, match="must be a JSON list"):
            read_labels(str(tmp_path / name), 3)
    with pytest.raises(FileNotFoundError, match="labels: there is no file"):
        read_labels(str(tmp_path / "b.json"), 3)


# Extractors


def test_convert_channels_as_pillow() -> None:
    colour = torch.from_numpy(images(4).transpose(0, 3, 1, 2).copy())
    grey = convert_channels(colour, 1)
    expected = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in colour]
    np.testing.assert_array_equal(grey[:, 0].numpy(), expected)
    assert torch.equal(convert_channels(convert_channels(grey, 3), 1), grey)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for weight in network.parameters():
        if weight.ndim == 4:  # so that signals neither die nor grow
            torch.nn.init.kaiming_normal_(weight)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception(inception_weights: Path) -> None:
    extractor = build_extractor("inception", weights=inception_weights)
    network = extractor.network
    pixels = torch.from_numpy(images(2).transpose(0, 3, 1, 2).copy())
    pixels[1] = pixels[1, :1]
    seen = {}
    for name in ("Mixed_6d", "AvgPool"):
        getattr(network, name).register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    found = extractor(pixels)
    assert found.pool.shape == (2, 2048) and found.logits.shape == (2, 1008) and extractor.classes == 1008
    assert torch.equal(found.pool, seen["AvgPool"].flatten(1))
    torch.testing.assert_close(found.logits, found.pool @ network.fc.weight.T)  # without the bias
    # The first 7 of the concatenated 768 channels of the 17 x 17 map, channels last.
    spatial = seen["Mixed_6d"].numpy()
    expected = spatial.transpose(0, 2, 3, 1)[..., :7].reshape(2, 2023)
    assert spatial.shape == (2, 768, 17, 17) and (expected >= 0).all() and expected.std() > 0
    np.testing.assert_array_equal(found.spatial.numpy(), expected)
    torch.testing.assert_close(extractor(pixels[1:, :1]).pool, found.pool[1:], rtol=1e-4, atol=1e-4)


def test_inception_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", fail)
    with pytest.raises(FileNotFoundError, match=r"no network.*weights-inception-.*pth as extractor_weights") as caught:
        build_extractor("inception")
    assert fidelity.URL_INCEPTION_V3 in str(caught.value)
    with pytest.raises(FileNotFoundError, match="extractor_weights: there is no file"):
        build_extractor("inception", weights=tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"a\.pth cannot be read as weights"):
        build_extractor("inception", weights=tmp_path / "a.pth")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is not of this InceptionV3"):
        build_extractor("inception", weights=tmp_path / "a.pth")


def test_weights_that_run_code_are_refused(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "made"),))

    torch.save({"fc.weight": Command()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        build_extractor("inception", weights=tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name, in_chans", [("test_resnet", 1), ("test_resnet", 3), ("test_vit", 3)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_extractor(tmp_path: Path, name: str, in_chans: int, suffix: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, in_chans=in_chans).eval()
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    options = {"num_classes": 7, "in_chans": in_chans}
    mean, std = ((0.4,), (0.3,)) if in_chans == 1 else ((0.4, 0.5, 0.6), (0.3, 0.2, 0.1))
    extractor = build_extractor(f"timm:{name}", weights=path, kwargs=options, mean=mean, std=std)
    side = model.pretrained_cfg["input_size"][-1]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, side, side), dtype=np.uint8))
    x = pixels if in_chans == 3 else convert_channels(pixels, 1)
    x = (x.float() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    with torch.no_grad():
        logits, found = model(x), extractor(pixels)
        pool = model.reset_classifier(0) or model(x)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.pool, pool)
    assert found.spatial is None and extractor.classes == 7 and pool.shape[1] != 7

    grey = pixels[:, :1]
    same = extractor(grey.repeat(1, 3, 1, 1))
    torch.testing.assert_close(extractor(grey).pool, same.pool)


def test_timm_extractor_resizes_and_normalises_as_told(tmp_path: Path) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "model.safetensors")
    # Faint, since Pillow clips overshoot between rows and columns.
    pixels = torch.from_numpy(images(2, size=20).transpose(0, 3, 1, 2) // 4 + 90)
    values: list[torch.Tensor] = []
    for size in (None, 24, 0):
        extractor = build_extractor("timm:test_resnet", weights=tmp_path / "model.safetensors", size=size)
        extractor.network.conv1.register_forward_pre_hook(lambda module, inputs: values.append(inputs[0]))
        extractor(pixels)
    assert [tuple(value.shape[2:]) for value in values] == [(160, 160), (24, 24), (20, 21)]
    config = timm.data.resolve_model_data_config(extractor.network)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(values[2] * std + mean, pixels.float() / 255)
    resized = [np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).resize((24, 24), Image.BICUBIC)) for p in pixels]
    found = (values[1] * std + mean).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(found - np.stack(resized)).max() < 1.5  # it rounds there, too


def test_timm_extractor_without_classifier(tmp_path: Path) -> None:
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "a.safetensors")
    extractor = build_extractor("timm:test_resnet", weights=tmp_path / "a.safetensors", kwargs={"num_classes": 0})
    assert extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).logits is None and extractor.classes == 0


def test_timm_extractor_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="extractor must be inception or timm:NAME, got 'clip'"):
        build_extractor("clip")
    with pytest.raises(ValueError, match="timm has no model 'nonesuch'; extractor_import"):
        build_extractor("timm:nonesuch")
    with pytest.raises(ValueError, match="extractor_import: cannot import 'nonesuch_module'"):
        build_extractor("timm:test_resnet", modules=["nonesuch_module"])
    with pytest.raises(ValueError, match=r"a\.safetensors is not of test_resnet made with {'num_classes': 3}"):
        build_extractor("timm:test_resnet", weights=path, kwargs={"num_classes": 3})
    with pytest.raises(ValueError, match=r"extractor_mean must be 1 or 3 numbers, got \[0.5, 0.5\]"):
        build_extractor("timm:test_resnet", weights=path, mean=(0.5, 0.5))
    with pytest.raises(ValueError, match="extractor_std must be 1 or 3 positive numbers"):
        build_extractor("timm:test_resnet", weights=path, std=(0.5, 0.5, 0))
    with pytest.raises(ValueError, match="extractor_size is for timm extractors, not for inception; got 32"):
        build_extractor("inception", size=32)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("offline")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(FileNotFoundError, match=r"no pretrained weights of 'test_resnet'.*offline.*extractor_weights"):
        build_extractor("timm:test_resnet")


def test_extractor_import_registers_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "import timm\n"
        "@timm.models.register_model\n"
        "def my_tiny(pretrained=False, **kwargs):\n"
        "    return timm.create_model('test_resnet', **{k: v for k, v in kwargs.items() if k == 'num_classes'})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "a.safetensors")
    extractor = build_extractor(
        "timm:my_tiny", weights=tmp_path / "a.safetensors", kwargs={"num_classes": 3}, modules=["my_models"]
    )
    assert extractor.classes == 3 and extractor.name == "timm:my_tiny"


# The whole


def test_figures_of_inception(fake: Fake, samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "reference", images(40, seed=1))
    options = {"precision_reference": 25, "inception_split": 10, "batch_size": 7, "device": "cpu", "progress": False}
    found = evaluate(EvaluateConfig(samples=samples, reference=str(folder), neighbors=2, **options))
    a, b = features_of(samples), features_of(str(folder))
    score = inception_score(a.logits, 10)
    near = precision_recall(a.pool, b.pool[:25], 2)
    assert near != precision_recall(a.pool, b.pool, 2)
    assert_figures(
        found,
        {
            "fid": frechet_distance(moments(a.pool), moments(b.pool)),
            "sfid": frechet_distance(moments(a.spatial), moments(b.spatial)),
            "inception_score": score.mean,
            "inception_score_std": score.std,
            "precision": near.precision,
            "recall": near.recall,
            "accuracy": None,
            "samples": 30,
            "references": 40,
            "extractor": "inception",
        },
        1e-6,
    )
    assert capsys.readouterr().err == "evaluate: accuracy is left out: no labels are given\n"


@pytest.mark.parametrize("keep", ["statistics", "both", "fid statistics"])
def test_adm_reference(fake: Fake, samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: str) -> None:
    """Statistics of a reference, here of many more images than it holds, are used; what it lacks is left out."""
    np.savez(tmp_path / "many.npz", arr_0=images(200, seed=2))
    many, few = features_of(str(tmp_path / "many.npz")), images(20, seed=1)
    pool, spatial = (np.float64(f) for f in (many.pool, many.spatial))
    arrays = {"mu": pool.mean(0), "sigma": np.cov(pool, rowvar=False).astype(np.float32)}
    if keep != "fid statistics":
        arrays |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    if keep == "both":
        arrays["arr_0"] = few
    np.savez(tmp_path / "reference.npz", **arrays)
    config = EvaluateConfig(
        samples=samples, reference=str(tmp_path / "reference.npz"), device="cpu", progress=False, precision_reference=9
    )
    found = evaluate(config)
    a = features_of(samples)
    assert found["fid"] == pytest.approx(frechet_distance(moments(a.pool), moments(many.pool)), rel=1e-5)
    errors = capsys.readouterr().err
    if keep == "fid statistics":
        assert found["sfid"] is None and "sfid is left out: the reference holds statistics, but no images" in errors
    else:
        assert found["sfid"] == pytest.approx(frechet_distance(moments(a.spatial), moments(many.spatial)), rel=1e-5)
    if keep == "both":
        first = fake(torch.from_numpy(few[:9].transpose(0, 3, 1, 2).copy())).pool
        assert (found["precision"], found["recall"]) == precision_recall(a.pool, first)
        assert found["references"] == 20
    else:
        assert found["precision"] is found["recall"] is found["references"] is None
        assert "precision is left out: the reference holds statistics, but no images (arr_0)" in errors
    assert found["inception_score"] > 1
    with pytest.raises(ValueError, match="none can be computed; accuracy: no labels"):
        evaluate(dataclasses.replace(config, metrics=("accuracy",)))
    np.save(tmp_path / "labels.npy", np.zeros(30, np.int64))
    labelled = dataclasses.replace(config, metrics=("fid", "accuracy"), labels=str(tmp_path / "labels.npy"))
    assert evaluate(labelled)["accuracy"] is None
    assert "accuracy is left out: Inception's classes are in an order of its own" in capsys.readouterr().err


def test_statistics_of_other_features(fake: Fake, samples: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.zeros(5), sigma=np.eye(5))
    config = EvaluateConfig(
        samples=samples, reference=str(tmp_path / "reference.npz"), device="cpu", progress=False, metrics=("fid",)
    )
    with pytest.raises(ValueError, match=r"reference\.npz: mu must be floating-point \(4,\), got float64 \(5,\)"):
        evaluate(config)


def test_timm_figures_and_accuracy(
    classifier: dict, samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trained-elsewhere classifier: no sFID, statistics of Inception not used, accuracy against labels."""
    extractor = build_extractor(
        "timm:test_resnet",
        weights=classifier["extractor_weights"],
        kwargs=classifier["extractor_kwargs"],
        size=32,
    )
    with torch.no_grad():
        a, b = (extractor(torch.from_numpy(read_all(source))) for source in (samples, "digits:0:40"))
    labels = a.logits.argmax(1)
    labels[:6] = (labels[:6] + 1) % 10
    (tmp_path / "labels.json").write_text(json.dumps(labels.tolist()))
    digits = read_all("digits:0:40").transpose(0, 2, 3, 1)
    np.savez(tmp_path / "reference.npz", arr_0=digits, mu=np.zeros(2048), sigma=np.eye(2048))
    options = {"labels": str(tmp_path / "labels.json"), "samples": samples, **classifier}
    found = evaluate(EvaluateConfig(reference="digits:0:40", **options))
    assert found["accuracy"] == pytest.approx(24 / 30) and found["sfid"] is None
    assert found["fid"] == pytest.approx(frechet_distance(moments(a.pool), moments(b.pool)), rel=1e-4)
    errors = capsys.readouterr().err
    assert "sfid is left out: timm:test_resnet has no spatial features" in errors
    assert f"fid is biased, its covariance singular: 30 samples, {a.pool.shape[1]} features" in errors
    assert evaluate(EvaluateConfig(reference=str(tmp_path / "reference.npz"), **options)) == found

    (tmp_path / "labels.json").write_text(json.dumps([10] * 30))
    with pytest.raises(ValueError, match="labels must be from 0 to 9, got 10 to 10"):
        evaluate(EvaluateConfig(reference="digits:0:40", **options))


def test_folder_and_npz_give_the_same_figures(classifier: dict, tmp_path: Path) -> None:
    pixels = images(10, channels=1)
    np.savez(tmp_path / "samples.npz", arr_0=pixels[..., 0])
    folder = write_folder(tmp_path / "folder", pixels)
    found = [
        evaluate(EvaluateConfig(samples=str(source), reference="digits:0:12", **classifier))
        for source in (tmp_path / "samples.npz", folder)
    ]
    assert found[0] == found[1]


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_record(fake: Fake, samples: str, tmp_path: Path) -> None:
    table, record = tmp_path / "new" / "table.csv", tmp_path / "new" / "record.json"
    config = EvaluateConfig(
        samples=samples,
        reference=samples,
        metrics=("fid", "precision"),
        device="cpu",
        progress=False,
        csv=str(table),
        out=str(record),
    )
    found = evaluate(config)
    evaluate(dataclasses.replace(config, metrics=("inception_score",)))
    first, second = rows_of(table)
    assert tuple(first) == COLUMNS
    assert first["date"].endswith("+00:00") and first["samples"] == first["reference"] == samples
    assert (float(first["fid"]), float(first["precision"])) == (found["fid"], 1.0)
    assert (first["sample_count"], first["reference_count"], first["extractor"]) == ("30", "30", "inception")
    assert first["recall"] == first["sfid"] == first["inception_score"] == second["fid"] == ""
    assert float(second["inception_score"]) > 1
    saved = json.loads(record.read_text())
    assert saved["config"]["metrics"] == ["inception_score"] and saved["samples"] == 30

    before = table.read_text()
    monkey = "date,fid\n2020,1\n"
    table.write_text(monkey)
    with pytest.raises(ValueError, match=r"table\.csv must have the columns date, samples.*got date, fid"):
        evaluate(config)
    assert table.read_text() == monkey
    table.write_text(before.rstrip("\n"))  # as an editor may leave it
    evaluate(config)
    assert len(rows_of(table)) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"metrics": ("fid", "kid")}, r"metrics must be some of fid, .* got \['kid'\]"),
        ({"metrics": ()}, "metrics must be some of .* got none"),
        ({"samples": "digits:0:1"}, "samples: digits:0:1 must hold at least 2 images, got 1"),
        ({"neighbors": 6}, "neighbors must be at least 1 and below the number of references, 6, got 6"),
        ({"neighbors": 30, "precision_reference": 40, "reference": "digits"}, "number of samples, 30, got 30"),
        ({"reference": "digits:0:1", "metrics": ("fid",)}, "N of at least 2"),
    ],
)
def test_evaluate_refuses(fake: Fake, samples: str, options: dict, message: str) -> None:
    defaults = {"samples": samples, "reference": "digits:0:6", "device": "cpu", "progress": False}
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateConfig(**{**defaults, **options}))


def test_progress_bar(fake: Fake, samples: str, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(EvaluateConfig(samples=samples, reference=samples, metrics=("fid",), device="cpu", progress=True))
    errors = capsys.readouterr().err
    assert "samples" in errors and "references" in errors and "/30" in errors


SCRIPT = """
import json
import sys

import torch
from accelerate import PartialState
from gspn_dit.evaluate import EvaluateConfig, evaluate
from gspn_dit.extractors import Extractor, Features, extract
from gspn_dit.sources import open_batches

class Sums(Extractor):
    def forward(self, images):
        return Features(images.float().sum((2, 3)), None, None)

found = evaluate(EvaluateConfig(**json.loads(sys.argv[1])))
state = PartialState()
assert state.num_processes == 2
assert bool(found) == state.is_main_process

samples = open_batches(sys.argv[2])
(pixels,) = samples.chunks(0, 5, 5)
for count in (1, 2, 3, 5):  # of one image, the second process has none
    found = extract(Sums(), samples, count, {"pool"}, 2, state, state.device)
    if state.is_main_process:
        assert torch.equal(found["pool"], pixels[:count].float().sum((2, 3)))
state.destroy_process_group()
"""


def test_two_processes_give_the_figures_of_one(classifier: dict, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=images(37, channels=1))
    (tmp_path / "labels.json").write_text(json.dumps([index % 10 for index in range(37)]))
    options = {
        "samples": str(tmp_path / "samples.npz"),
        "reference": "digits:0:41",
        "labels": str(tmp_path / "labels.json"),
        "batch_size": 8,
        "inception_split": 10,
        **classifier,
    }
    expected = evaluate(EvaluateConfig(**options))
    options |= {"out": str(tmp_path / "record.json"), "csv": str(tmp_path / "table.csv")}
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), json.dumps(options), options["samples"]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_figures(json.loads((tmp_path / "record.json").read_text()), expected, 1e-4)
    assert done.stderr.count("sfid is left out") == 1
    assert len(rows_of(tmp_path / "table.csv")) == 1
