"""Labelled images with random access: scikit-learn's digits, folders, and Hugging Face data sets."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from gspn_core.runs.errors import reason
from gspn_core.runs.images import UnreadableImageError, find_images, read_image, subfolders

_SYNONYMS = {"val": "validation", "validation": "val"}
_SPLITS = ("train", "val", "validation", "test")
# Suffixes of a metadata file, whose labels take precedence over folder names.
_METADATA = ("csv", "jsonl", "parquet")
# In order of preference.
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


class Images(Protocol):
    """Images with labels: `images[i]` is a Pillow image and the number of its class.

    The fingerprint tells one set of images from another, wherever it is stored.
    """

    class_names: list[str]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class _Skipping:
    """Images where the next readable one replaces an unreadable one, which is named once on stderr."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self._named: set[str] = set()
        self.class_names, self.fingerprint = images.class_names, images.fingerprint

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        for place in range(index, index + len(self)):
            try:
                return self._images[place % len(self)]
            except UnreadableImageError as error:
                message = str(error)
                if message not in self._named:
                    self._named.add(message)
                    tqdm.write(f"skipped: {message}", file=sys.stderr)
        raise UnreadableImageError(f"none of the {len(self)} images can be read, the last one: {message}")


class _Digits:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, grey."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.class_names = [str(digit) for digit in range(10)]
        self._pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        self._labels = digits.target
        self.fingerprint = hashlib.sha256(self._pixels.tobytes() + self._labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]), int(self._labels[index])


class _Table:
    """Images of a `datasets.Dataset`."""

    def __init__(self, dataset: Any, name: str, image_column: str | None, label_column: str | None) -> None:
        import datasets

        if not len(dataset):
            raise ValueError(f"there are no images in {name!r}")
        self._name = name
        self._image_column = _image_column(dataset.features, name, image_column)
        self._label_column = _label_column(dataset.features, name, label_column)
        columns = dataset.select_columns([self._image_column, self._label_column])
        # Kept encoded, so that an unreadable image can be named.
        self._dataset = columns.cast_column(self._image_column, datasets.Image(decode=False))
        labels, files = self._read_columns()
        names = getattr(dataset.features[self._label_column], "names", None)
        if names is None:
            names = range(1 + max((label for label in labels if label is not None), default=0))
        self.class_names = [str(name) for name in names]
        for index, label in enumerate(labels):
            if label is None or not 0 <= label < len(self.class_names):
                raise ValueError(
                    f"labels must be from 0 to {len(self.class_names) - 1}, got {label} for image {index} of {name!r}"
                )
        self.fingerprint = hashlib.sha256(json.dumps([self.class_names, labels, files]).encode()).hexdigest()

    def _read_columns(self) -> tuple[list[int | None], list[tuple[str, int | None]]]:
        """Return all labels, and of all images the file's name and the bytes stored in the table."""
        import pyarrow.compute as arrow  # type: ignore[import-untyped]

        labels: list[int | None] = []
        files: list[tuple[str, int | None]] = []
        for table in self._dataset.with_format("arrow").iter(10_000):
            labels += table[self._label_column].to_pylist()
            for images in table[self._image_column].chunks:
                paths = arrow.struct_field(images, "path").to_pylist()
                sizes = arrow.binary_length(arrow.struct_field(images, "bytes")).to_pylist()
                files += [(os.path.basename(path or ""), size) for path, size in zip(paths, sizes, strict=True)]
        return labels, files

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self._dataset[index]
        stored = row[self._image_column]
        if stored is None:
            raise UnreadableImageError(f"cannot read image {index} of {self._name!r}: there is none")
        name = stored["path"] or f"{self._name}:{index}"
        return read_image(stored["bytes"] or Path(stored["path"]), name), row[self._label_column]


def _choose(candidates: Sequence[str], given: str | None, preferred: Sequence[str], title: str, name: str) -> str:
    """Return the column given, or the only candidate, or one with a usual name."""
    usual = [column for column in preferred if column in candidates]
    if given is None and (usual or len(candidates) == 1):
        return (usual or list(candidates))[0]
    if given is None or given not in candidates:
        raise ValueError(f"{title} must be one of {', '.join(candidates)} for {name!r}, got {given!r}")
    return given


def _image_column(features: Any, name: str, given: str | None) -> str:
    import datasets

    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:
        raise ValueError(f"{name!r} has no column of images; its columns are {', '.join(features)}")
    return _choose(found, given, _IMAGE_COLUMNS, "image_column", name)


def _label_column(features: Any, name: str, given: str | None) -> str:
    import datasets

    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [column for column, feature in features.items() if "int" in str(getattr(feature, "dtype", ""))]
    # Any numeric column can be given; by default only columns with usual names count as labels.
    found = numbers if given else classes or [column for column in numbers if column in _LABEL_COLUMNS]
    if not found:
        raise ValueError(f"the images of {name!r} have no labels; its columns are {', '.join(features)}")
    return _choose(found, given, _LABEL_COLUMNS, "label_column", name)


def _choose_split(splits: Sequence[str], split: str | None, name: str) -> str:
    wanted = (split, _SYNONYMS.get(split)) if split else ("train", splits[0] if len(splits) == 1 else None)
    for candidate in wanted:
        if candidate in splits:
            return str(candidate)
    raise ValueError(f"split must be one of {', '.join(splits)} for {name!r}, got {split!r}")


def _class_folder(folder: Path, split: str | None) -> Any:
    """Open a folder with a folder per class, possibly in folders for splits; None if it is of another kind.

    `datasets` could open these too, but takes a class named "train" for a split, and the files of an unsorted `val/`
    for a class of that name.
    """
    import datasets
    from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

    inner = subfolders(folder)
    if any((place / f"metadata.{kind}").is_file() for place in (folder, *inner) for kind in _METADATA):
        return None
    splits = {path.name: path for path in inner if path.name in _SPLITS and subfolders(path)}
    if not splits and all(path.name in _SPLITS for path in inner):
        if any(is_image_file(path.name) for place in (folder, *inner) for path in place.iterdir()):
            raise ValueError(f"the images of {str(folder)!r} have no labels: there must be a folder per class")
        return None
    root = splits[_choose_split(list(splits), split, str(folder))] if splits else folder
    numbers = {path.name: number for number, path in enumerate(subfolders(root))}
    samples = [(str(file), n) for name, n in numbers.items() for file in find_images(root / name, IMG_EXTENSIONS)]
    if not samples:
        return None
    if not splits:
        _choose_split(["train"], split, str(folder))
    files, labels = zip(*samples, strict=True)
    empty = sorted(set(range(len(numbers))) - set(labels))
    if empty:
        raise ValueError(f"every class folder in {str(root)!r} must have images, got none in {list(numbers)[empty[0]]}")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(numbers))})
    return datasets.Dataset.from_dict({"image": list(files), "label": list(labels)}, features=features)


def _from_disk(folder: Path, split: str | None) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets and pyarrow raise many exceptions of their own
        raise ValueError(f"the data set in {str(folder)!r} is damaged: {reason(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        return found[_choose_split(list(found), split, str(folder))]
    _choose_split([str(found.split or "train")], split, str(folder))
    return found


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    from datasets.exceptions import DatasetBuildError

    try:
        yield
    except OSError as error:
        hint = (
            "" if Path(name).is_dir() else ": it is no folder, and the Hub has none of this name or cannot be reached"
        )
        raise FileNotFoundError(f"no data set {name!r}{hint} ({reason(error)})") from error
    except (ValueError, RuntimeError, DatasetBuildError) as error:
        raise ValueError(f"cannot open the data set {name!r}: {reason(error)}") from error


def _load(name: str, split: str | None) -> Any:
    """Open what `datasets.load_dataset` knows: a name on the Hub, or a folder of Parquet files and the like."""
    import datasets

    if split is None or "[" not in split:
        with _explaining(name):
            splits = datasets.get_dataset_split_names(name)
        split = _choose_split(splits, split, name)
    with _explaining(name):
        return datasets.load_dataset(name, split=split)


@contextmanager
def _no_bars() -> Iterator[None]:
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


def open_images(
    name: str,
    split: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    unreadable: str = "stop",
) -> Images:
    """Open labelled images.

    Args:
        name: "digits"; a folder with a folder per class, or with `train/` and others that have these; a folder written
            by `datasets.Dataset.save_to_disk`; or whatever `datasets.load_dataset` opens, as a data set of the Hub.
        split: such as train or validation; None takes train, or the only one. Of the Hub also parts, as "train[:1000]".
        image_column: column of images; None takes the only one, or `image`.
        label_column: column of class numbers; None takes the only one, or `label`.
        unreadable: "stop" raises UnreadableImageError for an image that cannot be decoded, "skip" gives the next one.

    Raises:
        FileNotFoundError: there is no such folder or data set.
        ValueError: there is no such split or column, there are no images or labels, or a label is out of range.
    """
    folder = Path(name)
    if name == "digits":
        _choose_split(["train"], split, name)
        return _Digits()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"no folder {name!r}")
    with _no_bars():
        if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            dataset = _from_disk(folder, split)
        else:
            dataset = _class_folder(folder, split) if folder.is_dir() else None
            dataset = _load(name, split) if dataset is None else dataset
        images = _Table(dataset, name, image_column, label_column)
    return _Skipping(images) if unreadable == "skip" else images


def adm_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize so that an image just covers a size, and cut its centre out, as ADM does (Dhariwal & Nichol, 2021).

    It is halved by averaging while it stays at least as large as the size, then resized bicubically.

    Args:
        image: of any size and mode.
        height, width: of the result.

    Returns:
        RGB image of that size.
    """
    image = image.convert("RGB")
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
