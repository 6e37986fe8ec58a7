"""Decoding images: orientation, 16 bits, and every way in which a file can be broken."""

import errno
import io

import numpy as np
import pytest
from PIL import Image

from gspn_core.runs.images import UnreadableImageError, find_images, read_image, subfolders

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)


def _bytes(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(format):
    read = read_image(_bytes(Image.fromarray(RAMP), format))
    assert read.mode == "L"
    assert np.array_equal(np.asarray(read).ravel(), np.arange(256))
    assert np.asarray(read).mean() == 127.5


def test_floating_point_values_lie_between_0_and_1():
    read = read_image(_bytes(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"))
    assert np.array_equal(np.asarray(read).ravel(), np.arange(256))
    with pytest.raises(UnreadableImageError, match=r"cannot read image 'x': values of mode F must lie in \[0, 1\]"):
        read_image(_bytes(Image.fromarray(np.full((2, 2), 254.0, np.float32)), "TIFF"), "x")


@pytest.mark.parametrize("mode, format", [("RGB", "JPEG"), ("I;16", "PNG"), ("I;16", "TIFF")])
def test_images_stand_upright(mode, format):
    wide = Image.new("RGB", (4, 2)) if mode == "RGB" else Image.fromarray(np.zeros((2, 4), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert read_image(_bytes(wide, format, exif=exif)).size == (2, 4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_images_of_8_bits_stay_as_they_are(mode):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert(mode)
    read = read_image(_bytes(image, "PNG"))
    assert read.mode == mode
    assert np.array_equal(np.asarray(read), np.asarray(image))


def _bomb():
    content = bytearray(_bytes(Image.new("L", (8, 8)), "BMP"))
    content[20] = 0xFF  # a width of 16.7 million
    content[21] = 0xFF
    return bytes(content)


@pytest.mark.parametrize(
    "error", [RuntimeError("bad AVIF"), NotImplementedError("DDS"), SyntaxError("x"), KeyError(1), OverflowError("y")]
)
def test_whatever_a_decoder_raises_is_an_unreadable_image(error, monkeypatch, tmp_path):
    def fail(*_):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(UnreadableImageError, match=r"cannot read image '.*x\.png': "):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("content", [b"", b"plain text", _bytes(Image.new("L", (64, 64)), "PNG")[:60], _bomb()])
def test_broken_content_is_an_unreadable_image(content):
    with pytest.raises(UnreadableImageError, match="cannot read image 'x': "):
        read_image(content, "x")


def test_missing_files_and_dangling_links_are_unreadable_images(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name in ("link.png", "none.png"):
        with pytest.raises(UnreadableImageError, match=f"{name}': there is no such file"):
            read_image(tmp_path / name)


def test_too_many_open_files_are_no_fault_of_an_image(monkeypatch):
    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        read_image(b"x")


def test_find_images(tmp_path, capsys):
    """Hidden files and folders are passed over, loops of links entered once, and links to nothing are found."""
    (tmp_path / "b" / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("b/1.PNG", "b/0.png", "b/.2.png", "b/.ipynb_checkpoints/0.png", "b/notes.pdf", "a.jpg", "png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to(tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path, (".png", ".jpg"))]
    assert found == ["a.jpg", "b/0.png", "b/1.PNG", "b/gone.png", "c/0.png", "c/1.PNG", "c/gone.png"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(line.startswith("left out: ") for line in said)
    assert any(str(tmp_path / "b" / "up") in line for line in said)
    assert subfolders(tmp_path / "b") == [] and subfolders(tmp_path) == [tmp_path / "b", tmp_path / "c"]
    with pytest.raises(UnreadableImageError, match=r"cannot read image '.*gone\.png': there is no such file"):
        read_image(tmp_path / "b" / "gone.png")


def test_folders_that_link_to_each_other(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"")
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path, (".png",))]
    assert found == ["a/0.png", "a/link/0.png", "b/0.png", "b/link/0.png"]
