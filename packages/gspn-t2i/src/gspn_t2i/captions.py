"""Images with captions, with random access: folders, WebDataset shards and Hugging Face data sets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from gspn_core.runs.images import UnreadableImageError, read_image
from gspn_core.runs.options import ImageSize

METADATA = "metadata.jsonl"
# Taken in this order where several columns would do.
_TEXT_COLUMNS = ("text", "caption", "captions", "txt", "prompt", "json.caption", "json.text")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


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
            raise ValueError(f"every image must have a caption, image {index} of {self._name!r} has {value!r}")
        return caption

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        stored = self._dataset[index][self._image]
        if stored is None:
            raise UnreadableImageError(f"cannot read image {index} of {self._name!r}: there is none")
        name = stored["path"] or f"{self._name}:{index}"
        return read_image(stored["bytes"] or Path(stored["path"]), name), self.captions[index]


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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = row.pop("file_name")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"line {number} of {path} must be an object with file_name, got {line[:80]!r}") from None
        if not (folder / file).is_file():
            raise ValueError(f"line {number} of {path} has a caption without an image: there is no {file!r}")
        rows.append({"image": str(folder / file), **row})
    if not rows:
        raise ValueError(f"{path} must have a line per image, is empty")
    keys = set().union(*rows)
    table = datasets.Dataset.from_list([{key: row.get(key) for key in sorted(keys)} for row in rows])
    return table.cast_column("image", datasets.Image())


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
    """
    from datasets.exceptions import DatasetBuildError

    try:
        with _without_bars():
            dataset = _load(name, split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no data set {name!r}: {str(error).splitlines()[0]}") from error
    except (ConnectionError, OSError) as error:
        raise FileNotFoundError(f"cannot download the data set {name!r}: {str(error).splitlines()[0]}") from error
    except (RuntimeError, DatasetBuildError) as error:
        raise ValueError(f"cannot open the data set {name!r}: {str(error).splitlines()[0]}") from error
    return Captioned(dataset, name, image_column, text_column)


def crop(image: Image.Image, size: ImageSize) -> tuple[Image.Image, tuple[int, int, int, int, int, int]]:
    """Resize an image so that it just covers a size, and crop its centre.

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
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)), (*original, top, left, height, width)
