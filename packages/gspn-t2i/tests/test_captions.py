"""Images with captions: where they come from, how they are cut, and what is stored of them."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from sklearn.datasets import load_sample_images

from gspn_core.runs.errors import WriteError
from gspn_core.runs.options import ImageSize
from gspn_t2i.captions import crop, open_captioned, read_lines
from gspn_t2i.conditions import INDEX, SETTINGS, Encoded, Frozen, Pixels, collate, encode
from gspn_t2i.config import GenerateConfig
from gspn_t2i.generate import read_prompts
from gspn_t2i.pairs import read_captions
from gspn_t2i.upscale import read_original

CAPTIONS = ["a temple", "a flower"]


@pytest.fixture(scope="module")
def photographs():
    """Two photographs, 427 x 640."""
    return [Image.fromarray(image) for image in load_sample_images().images]


def write_folder(folder, photographs, rows=None):
    folder.mkdir()
    for index, image in enumerate(photographs):
        image.save(folder / f"{index}.png")
    rows = rows or [{"file_name": f"{index}.png", "text": text} for index, text in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def write_shards(folder, photographs, *, as_json):
    folder.mkdir()
    for index, image in enumerate(photographs):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        with tarfile.open(folder / f"{index:03d}.tar", "w") as archive:
            add(archive, f"{index}.png", buffer.getvalue())
            if as_json:
                add(archive, f"{index}.json", json.dumps({"caption": CAPTIONS[index], "score": 1}).encode())
            else:
                add(archive, f"{index}.txt", CAPTIONS[index].encode())
    return folder


def read(captioned):
    return [(np.asarray(image), caption) for image, caption in (captioned[index] for index in range(len(captioned)))]


@pytest.mark.parametrize("kind", ["folder", "shards", "pattern", "shards with json", "saved", "parquet"])
def test_kinds(kind, photographs, tmp_path):
    options = {}
    if kind == "folder":
        name = write_folder(tmp_path / "data", photographs)
    elif kind in ("shards", "pattern", "shards with json"):
        name = write_shards(tmp_path / "data", photographs, as_json=kind == "shards with json")
        name = name / "*.tar" if kind == "pattern" else name
    else:
        columns = {"picture": photographs, "captions": [[text, "another"] for text in CAPTIONS]}
        table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
        (tmp_path / "data").mkdir()
        name = tmp_path / "data"
        if kind == "saved":
            table.save_to_disk(name)
        else:
            table.to_parquet(name / "train.parquet")
            options = {"text_column": "captions"}
    found = read(open_captioned(str(name), **options))
    assert [caption for _, caption in found] == CAPTIONS
    for (pixels, _), image in zip(found, photographs, strict=True):
        assert (pixels == np.asarray(image)).all()


def test_folder_without_images_or_captions(photographs, tmp_path):
    rows = [{"file_name": "0.png", "text": "a"}, {"file_name": "7.png", "text": "b"}]
    folder = write_folder(tmp_path / "data", photographs, rows)
    with pytest.raises(ValueError, match=r"line 2 of .* has a caption without an image: there is no '7.png'"):
        open_captioned(str(folder))
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "1.png", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"every image must have a caption, image 0 of .* has none that is text"):
        open_captioned(str(folder))
    (folder / "metadata.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* must be an object with file_name"):
        open_captioned(str(folder))
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="must have a line per image, is empty"):
        open_captioned(str(folder))


def test_captions_as_users_write_them(photographs, tmp_path):
    """Unicode's separators, a byte-order mark, other columns of any kind, and several captions here and there."""
    rows = [
        {"file_name": "0.png", "text": "a\u2028line\u0085and\u2029more", "image": "the first", "score": 1},
        {"file_name": "1.png", "text": ["two", "captions"], "image": 5, "score": "high", "more": {"a": 1}},
    ]
    folder = write_folder(tmp_path / "data", photographs)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\r\n".join(lines) + "\n", encoding="utf-8", newline="")
    captioned = open_captioned(str(folder))
    assert captioned.captions == ["a\u2028line\u0085and\u2029more", "two"]
    assert (np.asarray(captioned[1][0]) == np.asarray(photographs[1])).all()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffa\u2028line\r\n \nanother\u0085one\n", encoding="utf-8", newline="")
    assert read_lines(prompts) == read_captions(str(prompts)) == ["a\u2028line", "another\u0085one"]
    drawing = GenerateConfig(pipeline="p", prompt_file=str(prompts))
    assert read_prompts(drawing) == ["a\u2028line", "another\u0085one"]


@pytest.mark.parametrize(
    "row,message",
    [
        (
            {"file_name": 5, "text": "a"},
            r"line 2 of .* must be an object with file_name, a text, got '{\"file_name\": 5",
        ),
        ({"file_name": None}, "line 2 of .* must be an object with file_name, a text"),
        ([1, 2], "line 2 of .* must be an object with file_name, a text"),
        ({"file_name": "1.png", "text": 5}, "every image must have a caption, image 1 of .* has none that is text"),
        (
            {"file_name": "1.png", "text": {"a": "b"}},
            "every image must have a caption, image 1 of .* has none that is text",
        ),
        ({"file_name": "1.png", "text": []}, "every image must have a caption, image 1 of .* has"),
        ({"file_name": "1.png", "text": [[]]}, "every image must have a caption, image 1 of .* has"),
        ({"file_name": ""}, "line 2 of .* has a caption without an image: there is no ''"),
    ],
)
def test_rows_that_are_no_captions(photographs, tmp_path, row, message):
    folder = write_folder(tmp_path / "data", photographs, [{"file_name": "0.png", "text": "a"}, row])
    with pytest.raises(ValueError, match=message):
        open_captioned(str(folder))


def test_objects_of_several_kinds(photographs, tmp_path):
    rows = [{"file_name": f"{n}.png", "text": "a", "more": {"b": value}} for n, value in enumerate((1, [2]))]
    with pytest.raises(ValueError, match=r"metadata.jsonl must have one kind of value under each name: "):
        open_captioned(str(write_folder(tmp_path / "data", photographs, rows)))


def test_a_full_disk_where_a_data_set_is_stored(tmp_path, monkeypatch):
    def full(*arguments, **options):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("while generating the dataset") from error

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(WriteError, match=r"cannot store the data set .*: .*No space left on device"):
        open_captioned(str(tmp_path))


def test_images_of_16_bits_are_scaled(tmp_path):
    """In training and in upscaling; Pillow clips them to white."""
    folder = tmp_path / "data"
    folder.mkdir()
    levels = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(levels).save(folder / "0.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    pixels = Pixels(open_captioned(str(folder)), ImageSize(8, 8))[0].image
    original = read_original(str(folder / "0.png"))[0]
    for image in (pixels.permute(1, 2, 0).numpy(), np.asarray(original)):
        assert (image == np.round(levels / 257)[..., None]).all()


def test_missing_and_unreadable_data(photographs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no WebDataset shards '.*\*.tar'"):
        open_captioned(str(tmp_path / "*.tar"))
    with pytest.raises(FileNotFoundError, match=r"cannot download|no data set 'no-such/set'"):
        open_captioned("no-such/set")
    folder = write_folder(tmp_path / "data", photographs)
    (folder / "1.png").write_bytes(b"no image")
    captioned = open_captioned(str(folder))
    with pytest.raises(ValueError, match=r"cannot read image '.*1.png': not an image"):
        captioned[1]
    with pytest.raises(ValueError, match=r"image_column must be one of image for .*, got 'photo'"):
        open_captioned(str(folder), image_column="photo")
    pixels = Pixels(captioned, ImageSize(16, 16), skip_unreadable=True)
    assert [pixels[index].caption for index in (0, 1)] == ["a temple", "a temple"]
    (folder / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        pixels[0]


@pytest.mark.parametrize("size,expected", [((32, 32), (427, 640, 0, 8, 32, 32)), ((48, 96), (427, 640, 8, 0, 48, 96))])
def test_crop(photographs, size, expected):
    cut, sizes = crop(photographs[0], ImageSize(*size))
    assert (cut.height, cut.width) == size
    assert sizes == expected
    # The centre of the cut is that of the photograph.
    scale = max(size[0] / 427, size[1] / 640)
    whole = photographs[0].resize((round(640 * scale), round(427 * scale)), Image.Resampling.LANCZOS)
    top, left = expected[2:4]
    assert (np.asarray(cut) == np.asarray(whole)[top : top + size[0], left : left + size[1]]).all()


@pytest.fixture
def frozen(pipeline_folder):
    return Frozen(DiffusionPipeline.from_pretrained(pipeline_folder), torch.device("cpu"))


def test_cache(frozen, photographs, tmp_path):
    """What is stored is what would be computed; what is missing is encoded again, what is there is not."""
    pixels = Pixels(open_captioned(str(write_folder(tmp_path / "data", photographs))), ImageSize(48, 64))
    options = {"mirrored": True, "batch_size": 2, "progress": False}
    stored = encode(pixels, frozen, tmp_path / "cache", **options)
    mirrored, noise = torch.tensor([False, True]), torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    now = pixels.encode(collate([pixels[0], pixels[1]]), frozen, mirrored, noise)
    then = stored.encode(collate([stored[0], stored[1]]), frozen, mirrored, noise)
    torch.testing.assert_close(then.latents, now.latents)
    torch.testing.assert_close(then.embeddings.states, now.embeddings.states)
    assert then.sizes.tolist() == now.sizes.tolist()
    if frozen.two_encoders:
        torch.testing.assert_close(then.embeddings.pooled, now.embeddings.pooled)
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    written = shard.stat().st_mtime_ns
    encode(pixels, frozen, tmp_path / "cache", **options)
    assert shard.stat().st_mtime_ns == written
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00000.safetensors is missing"):
        Encoded(tmp_path / "cache")
    encode(pixels, frozen, tmp_path / "cache", **options)
    other = write_folder(tmp_path / "other", photographs[::-1])  # other images of the same captions
    with pytest.raises(ValueError, match="holds results of other settings: data was"):
        encode(Pixels(open_captioned(str(other)), ImageSize(48, 64)), frozen, tmp_path / "cache", **options)
    with pytest.raises(ValueError, match="other settings: image_size was '48x64', is '64x64'"):
        encode(Pixels(pixels.captioned, ImageSize(64, 64)), frozen, tmp_path / "cache", **options)
    shard.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        Encoded(tmp_path / "cache")
    settings = tmp_path / "cache" / SETTINGS
    settings.write_text(settings.read_text().replace("cache 2", "cache 1"))
    with pytest.raises(ValueError, match="must be a cache of the format 'gspn-t2i cache 2', got 'gspn-t2i cache 1'"):
        Encoded(tmp_path / "cache")
    (tmp_path / "cache" / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        Encoded(tmp_path / "cache")
