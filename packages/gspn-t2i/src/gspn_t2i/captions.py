"""Images with captions, with random access: folders, WebDataset shards and Hugging Face data sets."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from gspn_core.runs.errors import WriteError
from gspn_core.runs.images import UnreadableImageError, read_image
from gspn_core.runs.options import ImageSize

from .pipelines import first_line

METADATA = "metadata.jsonl"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Taken in this order where several columns would do.
_TEXT_COLUMNS = ("text", "caption", "captions", "txt", "prompt", "json.caption", "json.text")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8 that are not blank, without white space around them.

    Lines end in line feeds alone: captions may hold Unicode's other separators, such as U+2028. A byte-order mark is
    left out.
    """
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n"))
    return [line for line in lines if line]


class Captioned:
    """Images with captions: `captioned[i]` is a Pillow image and its caption, the first where there are several.

    `fingerprint` identifies a data set by its captions and its files' names and sizes, wherever it is stored.

    Args:
        dataset: a `datasets.Dataset`.
        name: for messages.
        image_column, text_column: None takes the only one, or one of the usual names; `json.caption` is the entry
            `caption` of a column `json`.

    Raises:
        ValueError: there is no image, no such column, or an image without a caption.
    """

    def __init__(self, dataset: Any, name: str, image_column: str | None, text_column: str | None) -> None:
        import datasets

        if not len(dataset):
            raise ValueError(f"there are no images in {name!r}")
        self._name = name
        images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        self._image = _choose(images, image_column, _IMAGE_COLUMNS, "image_column", name)
        self._text = _choose(_text_columns(dataset.features), text_column, _TEXT_COLUMNS, "text_column", name)
        columns = dataset.select_columns([self._image, self._text.partition(".")[0]])
        # Left encoded, so that an image which cannot be read can be named.
        self._dataset = columns.cast_column(self._image, datasets.Image(decode=False))
        self.captions = [self._caption(index, value) for index, value in enumerate(self._texts())]
        self.fingerprint = hashlib.sha256(json.dumps([self.captions, self._files()]).encode()).hexdigest()

    def _texts(self) -> Iterator[Any]:
        column, _, entry = self._text.partition(".")
        for value in self._dataset[column]:
            yield (value or {}).get(entry) if entry else value

    def _files(self) -> list[tuple[str, int]]:
        """Return the name and the number of bytes of every image, without reading those that lie in files."""
        import pyarrow.compute as arrow  # type: ignore[import-untyped]

        files = []
        for table in self._dataset.with_format("arrow").iter(10_000):
            for images in table[self._image].chunks:
                paths = arrow.struct_field(images, "path").to_pylist()
                sizes = arrow.binary_length(arrow.struct_field(images, "bytes")).to_pylist()
                for path, size in zip(paths, sizes, strict=True):
                    stored = os.path.getsize(path) if size is None and path else size or 0
                    files.append((os.path.basename(path or ""), stored))
        return files

    def _caption(self, index: int, value: Any) -> str:
        caption = value[0] if isinstance(value, list) and value else value
        if not isinstance(caption, str):
            have = "none that is text" if value is None else repr(value)
            raise ValueError(f"every image must have a caption, image {index} of {self._name!r} has {have}")
        return caption

    def __len__(self) -> int:
        return len(self._dataset)

    def _stored(self, index: int) -> dict[str, Any]:
        stored: dict[str, Any] | None = self._dataset[index][self._image]
        if stored is None:
            raise UnreadableImageError(f"cannot read image {index} of {self._name!r}: there is none")
        return stored

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        stored = self._stored(index)
        name = stored["path"] or f"{self._name}:{index}"
        return read_image(stored["bytes"] or Path(stored["path"]), name), self.captions[index]

    def shape(self, index: int) -> tuple[int, int] | None:
        """Return height and width of an image, by its header alone; None if it cannot be read."""
        try:
            stored = self._stored(index)
            with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # as `read_image` turns it
                return image.size if turned else (image.height, image.width)
        except Exception:  # whatever a decoder raises; reading the image names it
            return None


def _text_columns(features: Any) -> list[str]:
    """Return columns of strings or lists of strings, entries of structures as `column.entry`."""
    columns = []
    for column, feature in features.items():
        entries = feature.items() if isinstance(feature, dict) else [("", feature)]
        for entry, kind in entries:
            kind = getattr(kind, "feature", kind)
            if getattr(kind, "dtype", None) == "string":
                columns.append(f"{column}.{entry}" if entry else column)
    return columns


def _choose(candidates: Sequence[str], wanted: str | None, preferred: Sequence[str], option: str, name: str) -> str:
    """Return the wanted column, or without a wish the first of the usual names or the only one."""
    usual = [column for column in preferred if column in candidates]
    if wanted is None and (usual or len(candidates) == 1):
        return (usual or list(candidates))[0]
    if not candidates:
        raise ValueError(f"{option} must name a column, but {name!r} has none of this kind")
    if wanted is None or wanted not in candidates:
        raise ValueError(f"{option} must be one of {', '.join(candidates)} for {name!r}, got {wanted!r}")
    return wanted


def _read_metadata(folder: Path) -> Any:
    """Open a folder of images with `metadata.jsonl`: objects with `file_name`, a caption and whatever else.

    Raises:
        ValueError: a line is no such object, or names an image that is not there.
    """
    import datasets

    rows = []
    path = folder / METADATA
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = row.pop("file_name")
        except (ValueError, KeyError, AttributeError, TypeError):
            file = None
        if not isinstance(file, str):
            raise ValueError(f"line {number} of {path} must be an object with file_name, a text, got {line[:80]!r}")
        if not (folder / file).is_file():
            raise ValueError(f"line {number} of {path} has a caption without an image: there is no {file!r}")
        rows.append({**row, "image": str(folder / file)})
    if not rows:
        raise ValueError(f"{path} must have a line per image, is empty")
    columns = {key: _texts_alone([row.get(key) for row in rows]) for key in sorted(set().union(*rows))}
    try:
        table = datasets.Dataset.from_dict(columns)
    except (ValueError, TypeError, OverflowError) as error:  # of Arrow, which needs one type in a column
        raise ValueError(f"{path} must have one kind of value under each name: {first_line(error)}") from None
    return table.cast_column("image", datasets.Image())


def _texts_alone(values: list[Any]) -> list[Any]:
    """Return the texts of a column of JSON values as one type that Arrow has, others as None.

    Lists where some are lists, as of several captions; a column of objects is returned as it is.
    """
    if all(value is None or isinstance(value, dict) for value in values):
        return values
    texts = [
        [value]
        if isinstance(value, str)
        else [part for part in value if isinstance(part, str)]
        if isinstance(value, list)
        else None
        for value in values
    ]
    if any(isinstance(value, list) for value in values):
        return texts
    return [text[0] if text else None for text in texts]


def _load(name: str, split: str | None) -> Any:
    import datasets

    folder = Path(name)
    shards = sorted(map(str, folder.parent.glob(folder.name) if name.endswith(".tar") else folder.glob("*.tar")))
    if name.endswith(".tar") and not shards:
        raise FileNotFoundError(f"no WebDataset shards {name!r}")
    if shards:
        return datasets.load_dataset("webdataset", data_files={"train": shards}, split=split or "train")
    if (folder / METADATA).is_file():
        return _read_metadata(folder)
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        stored = datasets.load_from_disk(str(folder))
        if not isinstance(stored, datasets.DatasetDict):
            return stored
        if (split or "train") not in stored:
            raise ValueError(f"split must be one of {', '.join(stored)}, got {split!r}")
        return stored[split or "train"]
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"no folder {name!r}")
    return datasets.load_dataset(name, split=split or "train")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the bars of reading files, of which `datasets` shows several for a folder."""
    from datasets import utils

    shown = not utils.are_progress_bars_disabled()
    if shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


def open_captioned(
    name: str, split: str | None = None, *, image_column: str | None = None, text_column: str | None = None
) -> Captioned:
    """Open images with captions.

    Args:
        name: a folder of images with `metadata.jsonl`, WebDataset shards (a folder of `.tar` files, or a pattern such
            as `shards/*.tar`), a folder written by `datasets.Dataset.save_to_disk`, or whatever `datasets.load_dataset`
            opens, as a data set of the Hub.
        split: None is train; of the Hub also parts, as "train[:1000]".
        image_column, text_column: as of `Captioned`.

    Raises:
        FileNotFoundError: there is no such folder or data set.
        ValueError: there are no images or captions, a caption has no image, or a column or split does not exist.
        WriteError: the disk that `datasets` stores data on is full or not writable.
    """
    from datasets.exceptions import DatasetBuildError

    try:
        with _without_bars():
            dataset = _load(name, split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no data set {name!r}: {first_line(error)}") from error
    except (OSError, RuntimeError, DatasetBuildError) as error:
        # Arrow's files of the data are written to the cache of `datasets`, which reports a full disk as a cause.
        causes = (error, error.__cause__, error.__context__)
        full = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in _FULL), None)
        if full is not None:
            raise WriteError(f"cannot store the data set {name!r}: {first_line(full)}") from error
        if isinstance(error, OSError):
            raise FileNotFoundError(f"cannot download the data set {name!r}: {first_line(error)}") from error
        raise ValueError(f"cannot open the data set {name!r}: {first_line(error)}") from error
    return Captioned(dataset, name, image_column, text_column)


def crop(
    image: Image.Image, size: ImageSize, at: tuple[float, float] = (0.5, 0.5)
) -> tuple[Image.Image, tuple[int, int, int, int, int, int]]:
    """Resize an image so that it just covers a size, and crop it.

    Args:
        image: of any mode.
        size: of the result.
        at: where the crop lies, from 0 (top, left) to 1 (bottom, right).

    Returns:
        The RGB image, and the size conditions of SDXL: original height and width, top and left of the crop in the
        resized image, height and width of the crop.
    """
    height, width = size
    image = image.convert("RGB")
    original = (image.height, image.width)
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(covering, Image.Resampling.LANCZOS)
    top, left = int((image.height - height) * at[0]), int((image.width - width) * at[1])
    return image.crop((left, top, left + width, top + height)), (*original, top, left, height, width)
