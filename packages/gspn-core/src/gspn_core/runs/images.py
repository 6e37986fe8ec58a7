"""One way to find and to decode image files: upright, 8 bits per channel, one error for whatever a decoder raises."""

from __future__ import annotations

import errno
import functools
import io
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import reason


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


@functools.cache
def _say_left_out(link: str) -> None:
    print(f"left out: {link!r} is a link to a folder that it lies in, or that led to it", file=sys.stderr)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted: classes, say. Hidden ones are none.

    A link to a folder that it lies in would hold all of them again: it is left out, with a line on standard error.
    """
    found, here = [], (folder.resolve(), *folder.resolve().parents)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            if path.resolve() in here:
                _say_left_out(str(path))
            else:
                found.append(path)
    return found


def find_images(folder: str | Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files below a folder whose names end in one of `suffixes`, such as ".png", sorted by path.

    Hidden files and folders, such as `.ipynb_checkpoints`, are passed over. Links are followed, but for those to a
    folder that they lie in or that led to them, which would repeat it without end; a line on standard error names
    them. A link to nothing is among the files; reading it names it.
    """
    found = []
    led = {os.fspath(folder): {os.path.realpath(folder)}}  # of each place, the folders on the way there
    for place, folders, names in os.walk(folder, followlinks=True):
        here, way = os.path.realpath(place), led.pop(place)
        inner = {name: os.path.realpath(os.path.join(place, name)) for name in folders if name[0] != "."}
        new = {name for name, real in inner.items() if real not in way and os.path.commonpath((real, here)) != real}
        for name in inner.keys() - new:
            _say_left_out(os.path.join(place, name))
        folders[:] = sorted(new)
        led |= {os.path.join(place, name): way | {inner[name]} for name in new}
        found += [Path(place, name) for name in names if name[0] != "." and name.lower().endswith(tuple(suffixes))]
    return sorted(found)


def read_image(file: str | Path | bytes | IO[bytes], name: str | None = None) -> Image.Image:
    """Decode an image: turned as its EXIF orientation says, and with 8 bits per channel.

    16-bit values v become round(v / 257), where Pillow would clip them at 255; floating-point ones must lie in [0, 1].

    Args:
        file: path, content, or open binary file, which is closed.
        name: for messages; by default the path.

    Returns:
        The decoded image, in a mode of 8 bits or less per channel, such as L, RGB, RGBA, P, 1 or CMYK.

    Raises:
        UnreadableImageError: there is no such file, or it cannot be decoded, whatever the decoder raised.
    """
    name = name or (str(file) if isinstance(file, (str, Path)) else "an image")
    try:
        if isinstance(file, bytes):
            file = io.BytesIO(file)
        elif isinstance(file, (str, Path)):
            file = open(file, "rb")  # noqa: SIM115  (closed just below; Pillow leaves files of broken images open)
        with file, Image.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(_in_8_bits(image))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, RuntimeError, NotImplementedError, ...
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # too many open files: no fault of the image
        if isinstance(error, FileNotFoundError):
            why = "there is no such file"
        else:
            why = "not an image" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UnreadableImageError(f"cannot read image {name!r}: {why}") from None


def _in_8_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        values = values * 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 65535):
        limits = "[0, 1]" if image.mode == "F" else "0 to 65535"
        raise ValueError(f"values of mode {image.mode} must lie in {limits}")
    scaled = Image.fromarray(np.round(values / 257).astype(np.uint8))
    scaled.info = image.info
    if image.getexif():
        scaled.info["exif"] = image.getexif().tobytes()
    return scaled
