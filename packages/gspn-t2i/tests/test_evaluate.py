"""Captions, pairs of images and captions, the metrics against independent code, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits, load_sample_images
from t2i_cases import in_two_processes

from gspn_t2i import evaluate as module
from gspn_t2i import metrics
from gspn_t2i.config import EvaluateConfig
from gspn_t2i.evaluate import Evaluation, evaluate
from gspn_t2i.pairs import read_captions

CAPTIONS = ["a temple", "a flower", "a roof", "a petal", "the sky", "the leaves", "a gate", "a stem"]


def write_photos(folder, indices, *, first=0, form="{:06d}.png"):
    """Pieces of two photographs, and small grey digits in between."""
    folder.mkdir(parents=True, exist_ok=True)
    photos, digits = load_sample_images().images, load_digits().images
    for index in indices:
        place = first + 7 * index
        pixels = photos[index % 2][10 * place % 200 :, 13 * place % 300 :][: 96 + index % 3, : 120 - index % 5]
        if index % 4 == 3:
            pixels = np.kron(digits[place] * 15, np.ones((6, 8))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / form.format(index))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Options of a tiny CLIP model with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (folder / "tiny.json").write_text(json.dumps({"embed_dim": 6, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    with torch.no_grad():
        model.text_projection.mul_(50)  # so that captions differ
    save_file(model.state_dict(), folder / "tiny.safetensors")
    weights = str(folder / "tiny.safetensors")
    return {"clip_model": "tiny", "clip_pretrained": weights, "clip_config": str(folder)}


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """The file of an InceptionV3 with random weights, scaled so that signals neither die nor grow."""
    kind = fidelity.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda *arguments: None)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *arguments, **options: {})
        untrained = kind("untrained", ["2048"])
    torch.manual_seed(0)
    convolutions = [weight for weight in untrained.parameters() if weight.ndim == 4]
    for weight in convolutions:
        torch.nn.init.kaiming_normal_(weight)
    file = tmp_path_factory.mktemp("networks") / "inception.pth"
    torch.save(untrained.state_dict(), file)
    return str(file)


@pytest.fixture
def captions(tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return str(tmp_path / "captions.txt")


@pytest.fixture
def options(clip, captions, tmp_path):
    """Options that measure a folder of 8 images against one of 9."""
    reference = write_photos(tmp_path / "reference" / "below", range(9), first=3, form="photo {}.jpg").parent
    return {
        "samples": str(write_photos(tmp_path / "images", range(8))),
        "reference": str(reference),
        "captions": captions,
        "metrics": ("clip_fid", "clip_t"),
        "metric_batch_size": 3,
        "out": str(tmp_path / "out"),
        "progress": False,
        **clip,
    }


def embeddings(clip, files, texts=()):
    """Of images, and of texts, by open_clip itself."""
    model, transform = open_clip.create_model_from_pretrained("tiny", clip["clip_pretrained"])
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        features = model.eval().encode_image(images).numpy().astype(np.float64)
        return features, texts and model.encode_text(open_clip.get_tokenizer("tiny")(list(texts))).double().numpy()


def mean_cosine(images, texts):
    pairs = zip(images, texts, strict=True)
    return np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs])


def test_captions(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("  a one\n\na two\na three \n")
    assert read_captions(str(file)) == ["a one", "a two", "a three"]
    assert read_captions(str(file), 2) == ["a one", "a two"]
    drawn = [read_captions(str(file), 2, seed) for seed in range(8)]
    assert all(len(set(pair)) == 2 for pair in drawn) and len(set(map(tuple, drawn))) > 2
    assert read_captions(str(file), 3, 5)[:2] == drawn[5]
    # Of images 3, 7 and 20, the second has no caption and the third has two.
    annotations = [(20, "a third \n"), (3, "a first"), (20, "another third")]
    coco = {
        "images": [{"id": 20}, {"id": 3}, {"id": 7}],
        "annotations": [
            {"image_id": image, "id": 9 - place, "caption": text} for place, (image, text) in enumerate(annotations)
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert read_captions(str(tmp_path / "coco.json")) == ["a first", "a third"]
    write_photos(tmp_path, range(2))
    lines = [json.dumps({"file_name": f"00000{index}.png", "text": f"image {index}\u2028"}) for index in (1, 0)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    assert read_captions(str(tmp_path)) == ["image 1", "image 0"]


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.txt", None, r"captions: there is no file '.*a.txt'"),
        ("a.txt", b" \n\n", r"a\.txt must hold captions, got none"),
        ("a.txt", b"\xff\xfe", r"a\.txt must be text in UTF-8 \('utf-8' codec"),
        ("a.txt", b"one\ntwo", r"count must be at most the number of captions, 2, got 3"),
        ("a.json", b"[", r"a\.json must be COCO's JSON of images and annotations \(Expecting"),
        ("a.json", b'{"images": []}', r"must be COCO's JSON of images and annotations \(without 'annotations'\)"),
        ("a.json", b'{"images": [], "annotations": [{"image_id": 4}]}', "a caption is of image 4, which is not among"),
        ("a.json", b'{"images": [], "annotations": []}', r"a\.json must hold captions, got none"),
        ("a.jsonl", b'{"file_name": "a.jsonl", "text": " "}', "must not hold empty ones, caption 0 is"),
        ("a.jsonl", b'{"file_name": "a.jsonl"}', r"must be lines of JSON with file_name and text \(without 'text'\)"),
        ("a.jsonl", b'\n{"file_name": "b.png", "text": "b"}', r"a\.jsonl, line 2: there is no image 'b.png' in "),
    ],
)
def test_wrong_captions(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_captions(str(tmp_path / name), 3)


def test_figures_of_clip(options, clip, tmp_path):
    result = evaluate(EvaluateConfig(**options))
    images, texts = embeddings(
        clip, sorted(Path(options["samples"]).iterdir()), ["A photo depicts " + caption for caption in CAPTIONS]
    )
    assert result["clip_t"] == pytest.approx(mean_cosine(images, texts), abs=1e-5)
    references, _ = embeddings(clip, (tmp_path / "reference").rglob("*.jpg"))
    first, second = np.cov(images, rowvar=False), np.cov(references, rowvar=False)
    distance = np.square(images.mean(0) - references.mean(0)).sum() + np.trace(first + second)
    expected = distance - 2 * np.trace(scipy.linalg.sqrtm(first @ second)).real
    assert result["clip_fid"] == pytest.approx(expected, rel=1e-4)
    assert (result["images"], result["missing"], result["references"]) == (8, 0, 9)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert saved["settings"]["clip_model"] == "tiny" and "torch" in saved["versions"]
    text = module.as_text(result).splitlines()
    assert text[0] == f"clip_fid  {result['clip_fid']:.4f}" and text[2].startswith("8 images, 9 references; see ")


def test_pairs_are_made_by_index(options, clip, captions, tmp_path):
    folder = tmp_path / "images"
    (folder / "000002.png").unlink()
    (folder / "000004.png").rename(folder / "4.PNG")
    (folder / "notes.png").write_text("no image, and no number")
    measuring = options | {"metrics": ("clip_t",), "prefix": "", "reference": None}
    with pytest.raises(FileNotFoundError, match=r"samples: 1 of 8 are missing in .*, the first is 000002.png"):
        evaluate(EvaluateConfig(**measuring))
    result = evaluate(EvaluateConfig(**measuring, allow_missing=True))
    indices = [0, 1, 3, 4, 5, 6, 7]
    files = [folder / ("4.PNG" if index == 4 else f"{index:06d}.png") for index in indices]
    images, texts = embeddings(clip, files, [CAPTIONS[index] for index in indices])
    assert result["clip_t"] == pytest.approx(mean_cosine(images, texts), abs=1e-5)
    shifted = embeddings(clip, files, CAPTIONS[:7])[1]
    assert abs(result["clip_t"] - mean_cosine(images, shifted)) > 1e-3
    assert (result["images"], result["missing"]) == (7, 1)
    two = evaluate(EvaluateConfig(**measuring, count=2))
    assert (two["images"], two["clip_t"]) == (2, pytest.approx(mean_cosine(images[:2], texts[:2]), abs=1e-5))
    write_photos(folder, [2, 4, 9])
    with pytest.raises(ValueError, match=r"000004.png and 4.PNG in .* have one index"):
        evaluate(EvaluateConfig(**measuring))
    (folder / "4.PNG").unlink()
    with pytest.raises(ValueError, match=r"000009.png has no caption, .*captions.txt holds 8"):
        evaluate(EvaluateConfig(**measuring))


def test_statistics_of_a_reference(options, tmp_path):
    options |= {"metrics": ("clip_fid",), "captions": None}
    file = tmp_path / "new" / "reference.npz"
    result = evaluate(EvaluateConfig(**options, save_reference=str(file)))
    options["reference"] = str(file)
    again = evaluate(EvaluateConfig(**options))
    assert again["clip_fid"] == result["clip_fid"] and again["references"] is None
    with np.load(file) as archive:
        arrays = dict(archive)
    assert (arrays["count"], arrays["clip_model"]) == (9, "tiny")
    for changes, message in [
        ({"clip_model": "other"}, "is of clip_model other, not tiny"),
        ({"clip_mu": np.zeros(5)}, r"clip_mu in .* must be finite numbers of \(6,\), got float64 \(5,\)"),
        ({"clip_sigma": np.full((6, 6), np.nan)}, r"clip_sigma in .* must be finite numbers of \(6, 6\)"),
        ({"clip_sigma": None}, r"is no \.npz of numbers, or a damaged one \(Object arrays"),
    ]:
        np.savez(file, **arrays | changes)
        with pytest.raises(ValueError, match=message):
            evaluate(EvaluateConfig(**options))
    np.savez(file, mu=np.zeros(3))
    with pytest.raises(ValueError, match="must hold clip_mu for clip_fid, got mu"):
        evaluate(EvaluateConfig(**options))
    file.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"is no \.npz of numbers, or a damaged one"):
        evaluate(EvaluateConfig(**options))


def test_images_are_prepared_as_documented(inception_weights, tmp_path):
    network = metrics.Inception(256, inception_weights)
    # Of a digit, with its hard edges, the filter overshoots.
    for index, size, box in [(3, (64, 48), (8, 0, 56, 48)), (0, (120, 96), (12, 0, 108, 96))]:
        file = write_photos(tmp_path, [index]) / f"{index:06d}.png"
        with Image.open(file) as image:
            assert image.size == size
            cropped = image.convert("RGB").crop(box).resize((256, 256), Image.Resampling.LANCZOS)
        prepared, values = network.prepare(file), torch.from_numpy(np.array(cropped)).permute(2, 0, 1)[None].float()
        expected = torch.nn.functional.interpolate(values, (299, 299), mode="bicubic", antialias=True)[0]
        assert prepared.dtype == torch.float32 and (index != 3 or expected.min() < -0.5)
        torch.testing.assert_close(prepared, expected.clamp(0, 255), atol=0.01, rtol=0)
    assert (prepared != prepared.round()).float().mean() > 0.5
    # At 299 torch-fidelity's own resize changes nothing: of whole numbers the features are those of its network.
    whole = prepared.round().to(torch.uint8)[None]
    own = fidelity.FeatureExtractorInceptionV3("own", ["2048"], feature_extractor_weights_path=inception_weights)
    with torch.no_grad():
        assert torch.equal(network(whole.float()), own(whole)[0])


def test_fid(options, inception_weights, monkeypatch, tmp_path, capsys):
    forward, seen = metrics.Inception.forward, []

    def first_features(self, images):  # as an eigendecomposition of all of them takes long
        seen.append((images, forward(self, images)[:, :40]))
        return seen[-1][1]

    monkeypatch.setattr(metrics.Inception, "forward", first_features)
    options |= {"metrics": ("fid",), "captions": None, "fid_size": 64, "inception_weights": inception_weights}
    options["reference"] = str(write_photos(tmp_path / "few", range(4), first=5))
    result = evaluate(EvaluateConfig(**options, count=3))
    images, features = (torch.cat(parts) for parts in zip(*seen, strict=True))
    files = [*sorted(Path(options["reference"]).iterdir()), *sorted(Path(options["samples"]).iterdir())[:3]]
    prepare = metrics.Inception(64, inception_weights).prepare
    assert torch.equal(images, torch.stack([prepare(file) for file in files]))
    sets = [part.double().numpy() for part in (features[:4], features[4:])]
    means = [rows.mean(0) for rows in sets]
    factors = [(rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in sets]
    # With C1 = A'A and C2 = B'B, the trace of (C1 C2)^(1/2) is the sum of the singular values of AB'.
    cross = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    expected = np.square(means[0] - means[1]).sum() + sum(np.square(factor).sum() for factor in factors) - 2 * cross
    assert result["fid"] == pytest.approx(expected, rel=1e-4)
    assert "fid is biased, its covariance singular: 3 images, 40 features" in capsys.readouterr().err


def test_drawing(sd15, options, tmp_path):
    drawing = options | {"pipeline": str(sd15), "samples": None, "sampler_steps": 1, "count": 3, "batch_size": 2}
    result = evaluate(EvaluateConfig(**drawing))
    folder = tmp_path / "out" / "images"
    assert [path.name for path in sorted(folder.glob("*.png"))] == [f"{index:06d}.png" for index in range(3)]
    assert (result["drawn"], result["images"], result["missing"]) == (3, 3, 0)
    (folder / "000001.png").unlink()
    again = evaluate(EvaluateConfig(**drawing | {"batch_size": 1}))
    assert again["drawn"] == 1
    assert again["clip_t"] == pytest.approx(result["clip_t"], abs=1e-3)
    measured = options | {"samples": str(folder), "out": str(tmp_path / "other"), "count": 3}
    assert evaluate(EvaluateConfig(**measured))["clip_fid"] == again["clip_fid"]
    with pytest.raises(ValueError, match="results of other settings: seed was 0, is 5"):
        evaluate(EvaluateConfig(**drawing, seed=5))


PROGRAM = """
import json, sys
from accelerate import PartialState
from gspn_t2i.config import EvaluateConfig
from gspn_t2i.evaluate import evaluate
result = evaluate(EvaluateConfig(**json.loads(sys.argv[1])))
assert PartialState().num_processes == 2 and bool(result) == PartialState().is_main_process
PartialState().destroy_process_group()
"""


def test_two_processes_find_what_one_does(sd15, options, tmp_path):
    options |= {"save_reference": str(tmp_path / "two" / "reference.npz"), "out": str(tmp_path / "two"), "count": 5}
    options |= {"pipeline": str(sd15), "samples": None, "sampler_steps": 1, "batch_size": 2}
    (tmp_path / "program.py").write_text(PROGRAM)
    in_two_processes(tmp_path / "program.py", json.dumps(options))
    result = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (result["images"], result["references"]) == (5, 9) and (tmp_path / "two" / "reference.npz").is_file()
    options |= {"pipeline": None, "samples": str(tmp_path / "two" / "images"), "save_reference": None}
    expected = evaluate(EvaluateConfig(**options))
    for metric in ("clip_fid", "clip_t"):
        assert result[metric] == pytest.approx(expected[metric], rel=1e-4)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"metrics": ("kid",)}, r"metrics must be some of fid, clip_fid, clip_t, got \['kid'\]"),
        ({"metrics": ()}, "metrics must be some of fid, clip_fid, clip_t, got none"),
        ({"samples": None}, r"either pipeline, .* must be set, got neither"),
        ({"pipeline": "x"}, r"either pipeline, .* must be set, got both"),
        ({"adapter": "x"}, "adapter is for a pipeline to draw with, got 'x' and no pipeline"),
        ({"captions": None}, "captions must be set for clip_t"),
        ({"captions": None, "samples": None, "pipeline": "x"}, "captions must be set to draw images of"),
        ({"reference": None}, "reference must be set for clip_fid"),
        ({"reference": "nowhere"}, "reference: there is no folder or .npz 'nowhere'"),
        ({"reference": "nowhere.npz"}, "reference: there is no folder or .npz 'nowhere.npz'"),
        ({"save_reference": "a.npy"}, "save_reference must be an .npz, got 'a.npy'"),
        ({"save_reference": "a.npz", "metrics": ("clip_t",)}, "save_reference needs fid or clip_fid among the metrics"),
        ({"count": 1, "metrics": ("clip_t", "clip_fid")}, "clip_fid needs at least 2 images, got 1"),
        ({"count": 9}, "count must be at most the number of captions, 8, got 9"),
        ({"samples": "nowhere"}, "samples: there is no folder 'nowhere'"),
        ({"metrics": ("fid",), "inception_weights": "no.pth"}, "inception_weights: there is no file 'no.pth'"),
        ({"clip_model": "ViT-none"}, "clip_model: open_clip has no model 'ViT-none'; clip_config is a folder"),
        (
            {"clip_pretrained": "no.pt"},
            "clip_pretrained: 'no.pt' is neither a file nor one of open_clip's weights of t",
        ),
        ({"clip_config": "nowhere"}, "clip_config: there is no folder 'nowhere'"),
        (
            {"clip_model": "ViT-g-14", "clip_pretrained": "laion2b_s12b_b42k"},
            "get them from https://huggingface.co/laion/",
        ),
        ({"samples": None, "pipeline": "no/such/pipeline"}, "no pipeline 'no/such/pipeline'"),
    ],
)
def test_wrong_options(options, changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(EvaluateConfig(**options | changes))
    assert not (tmp_path / "out").exists()


def test_wrong_files(options, inception_weights, tmp_path, monkeypatch):
    measuring = EvaluateConfig(**options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"reference: .*empty must hold at least 2 PNG or JPEG files, got 0"):
        evaluate(dataclasses.replace(measuring, reference=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match=r"samples: .*empty must hold images named by their index"):
        evaluate(dataclasses.replace(measuring, samples=str(tmp_path / "empty")))
    (tmp_path / "empty" / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"clip_config: .*a\.json is not JSON"):
        evaluate(dataclasses.replace(measuring, clip_config=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match=r"^clip_pretrained: .*inception.pth is not of tiny \(Error.*\)$"):
        evaluate(dataclasses.replace(measuring, clip_pretrained=inception_weights))
    for file, message in [("captions.txt", "cannot be read as weights"), ("tiny.pt", "is not of this InceptionV3")]:
        torch.save({"a": torch.zeros(1)}, tmp_path / "tiny.pt")
        with pytest.raises(ValueError, match=rf"inception_weights: .*{file} {message}"):
            evaluate(dataclasses.replace(measuring, metrics=("fid",), inception_weights=str(tmp_path / file)))

    def fail(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", fail)
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(offline\): get https:.* as inception_weights"):
        evaluate(dataclasses.replace(measuring, metrics=("fid",)))
    (tmp_path / "reference" / "below" / "photo 4.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read image '.*photo 4\.jpg'"):
        evaluate(measuring)


def test_trouble_on_the_way(options, monkeypatch, capsys):
    measuring = EvaluateConfig(**options | {"metrics": ("clip_t",), "progress": True})
    evaluate(measuring)
    assert "images, clip_t" in (errors := capsys.readouterr().err) and "captions" in errors and "/8" in errors
    ready = Evaluation(measuring)
    assert not any(part.training for part in ready.networks["clip_t"].modules())
    with torch.no_grad():
        ready.networks["clip_t"].network.visual.proj.fill_(float("nan"))
    with pytest.raises(ValueError, match="features of images, clip_t must be finite"):
        ready.run()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(module.Clip, "embed_texts", fail)
    with pytest.raises(MemoryError, match="out of memory; what saves some: --metric-batch-size 1"):
        evaluate(measuring)
