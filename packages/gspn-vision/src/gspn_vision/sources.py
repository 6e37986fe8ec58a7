"""Images with labels: scikit-learn's digits, folders, and the data sets of timm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from gspn_core.runs.errors import reason
from gspn_core.runs.images import UnreadableImageError, find_images, read_image, subfolders

# What torchvision takes for an image, and two more that Pillow decodes itself.
SUFFIXES = (*IMG_EXTENSIONS, ".avif", ".gif")

_SYNONYMS = {"validation": ("validation", "val"), "val": ("val", "validation")}


class Source(Protocol):
    """Images with labels: `source[i]` is an image and the number of its class."""

    class_names: list[str]
    fingerprint: str  # of its images and labels, wherever they are stored

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...

    def name(self, index: int) -> str:
        """Return what to call an image in messages and tables."""


class Digits:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels, grey.

    One image in five of every class, chosen once for all by a fixed seed, is for validation.
    """

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in ("train", "validation", "val"):
            raise ValueError(f"digits has the splits 'train' and 'validation', got {split!r}")
        self.class_names = [str(digit) for digit in range(10)]
        digits = load_digits()
        numbers = np.arange(len(digits.target))
        parts = train_test_split(numbers, test_size=0.2, stratify=digits.target, random_state=0)
        self.numbers = np.sort(parts[0 if split == "train" else 1])
        self.images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        self.targets = digits.target
        self.fingerprint = _fingerprint(["digits", *self.numbers.tolist()])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number = self.numbers[index]
        return Image.fromarray(self.images[number]), int(self.targets[number])

    def name(self, index: int) -> str:
        """Return "digits:NUMBER", with the number in scikit-learn's order."""
        return f"digits:{self.numbers[index]}"


class Folder:
    """A folder with one folder of images per class, which may lie in folders of its own.

    Hidden folders are not classes, and a loop of links does not repeat images; see `find_images`.

    Args:
        root: the folder.
        class_names: classes in their order; those of the folder, sorted, if None. A class may be without images here,
            but a folder must be a known class.

    Raises:
        FileNotFoundError: there is no such folder, no class in it, or a class folder has no images.
        ValueError: a folder is not among class_names.
    """

    def __init__(self, root: Path, class_names: Sequence[str] | None = None) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {str(root)!r}")
        files = {folder.name: find_images(folder, SUFFIXES) for folder in subfolders(root)}
        found = list(files)
        if not found:
            raise FileNotFoundError(f"no folders of classes in {str(root)!r}")
        empty = [name for name in found if not files[name]]
        if empty:
            raise FileNotFoundError(f"no images for the classes {', '.join(empty[:5])} in {str(root)!r}")
        self.class_names = list(class_names or found)
        _check_count(str(root), found, self.class_names)
        unknown = sorted(set(found) - set(self.class_names))
        if unknown:
            raise ValueError(
                f"{root} has classes that the training data or the checkpoint has not: {', '.join(unknown[:5])}"
            )
        self._samples = [(str(file), self.class_names.index(name)) for name in found for file in files[name]]
        names = [(file.relative_to(root).as_posix(), name) for name in found for file in files[name]]
        self.fingerprint = _fingerprint(names)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self._samples[index]
        return read_image(path), label

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return self._samples[index][0]


class Unlabelled:
    """All images in a folder and the folders in it, each of class 0.

    Raises:
        FileNotFoundError: there is none.
    """

    def __init__(self, root: Path) -> None:
        self.files = find_images(root, SUFFIXES)
        if not self.files:
            raise FileNotFoundError(f"no images in {str(root)!r}")
        self.class_names = ["image"]
        names = "\n".join(file.relative_to(root).as_posix() for file in self.files)
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.files[index]), 0

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.files[index])


class TimmSource:
    """Any data set with random access that `timm.data.create_dataset` makes."""

    def __init__(self, dataset: Any, title: str, class_names: Sequence[str] | None = None) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"data must have random access, so that a run can be continued exactly; {title!r} is a stream"
            )
        self._dataset = dataset
        self._title = title
        self._reader = getattr(dataset, "reader", None)
        names = class_names or _class_names(dataset)
        if not names:
            raise ValueError(f"the data set {title!r} does not say what its classes are")
        self.class_names = list(names)
        # Of a reader of files their names; other data sets are told apart by their name, size and classes.
        files = [Path(str(sample[0])).name for sample in getattr(self._reader, "samples", None) or ()]
        self.fingerprint = _fingerprint([title, len(dataset), self.class_names, files])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self._reader is None:
            return self._decoded(index)
        # Bypass timm's dataset, which silently replaces an unreadable image by the next.
        try:
            file, label = self._reader[index]
        except FileNotFoundError:
            raise UnreadableImageError(f"cannot read image {self.name(index)!r}: there is no such file") from None
        return read_image(file, self.name(index)), int(label)

    def _decoded(self, index: int) -> tuple[Image.Image, int]:
        """Return an image of a data set that decodes itself, such as torchvision's."""
        try:
            image, label = self._dataset[index]
            return image, int(label)
        except Exception as error:
            raise UnreadableImageError(f"cannot read image {self.name(index)!r}: {reason(error)}") from None

    def name(self, index: int) -> str:
        """Return the name that the data set has for an image, or its number."""
        if self._reader is not None:
            return str(self._reader.filename(index))
        return f"{self._title}:{index}"


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _class_names(dataset: Any) -> list[str]:
    if hasattr(dataset, "classes"):
        return [str(name) for name in dataset.classes]
    reader = getattr(dataset, "reader", None)
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}
    for feature in features.values():
        if hasattr(feature, "names"):
            return list(feature.names)
    mapping = getattr(reader, "class_to_idx", None) or {}
    return sorted(mapping, key=lambda name: mapping[name])


def open_source(
    data: str,
    split: str,
    *,
    root: str | None = None,
    download: bool = False,
    class_names: Sequence[str] | None = None,
) -> Source:
    """Open one split of a data set.

    Args:
        data: "digits", a folder with a folder per split, or a name for `timm.data.create_dataset`.
        split: "train", "validation", or another that the data set has.
        root: folder that a timm data set is stored in.
        download: let a timm data set download itself.
        class_names: classes in their order, from the training data or a checkpoint.

    Raises:
        FileNotFoundError: a folder is missing, or a class folder is empty.
        ValueError: the split or data set is unknown, or has a class that class_names has not.
    """
    if data.lower() in ("torch/image_folder", "torch/folder") and root is not None:
        data = root  # timm's name for it; torchvision takes hidden folders for classes, and follows loops of links
    if data == "digits":
        source: Source = Digits(split)
    elif Path(data).is_dir():
        return Folder(_split_folder(Path(data), split), class_names)
    elif data.split("/")[0].lower() in ("torch", "hfds", "hfids", "tfds", "wds"):
        try:
            dataset = create_dataset(data, root=root, split=split, download=download)
        except (AssertionError, ImportError, OSError, RuntimeError, TypeError) as error:
            raise ValueError(f"cannot open the data set {data!r}: {reason(error)}") from error
        source = TimmSource(dataset, data, class_names)
    else:
        raise FileNotFoundError(
            f"no folder {data!r}; data must be 'digits', a folder with train/ and val/, or the name of "
            "a timm data set such as 'torch/cifar10'"
        )
    _check_count(data, source.class_names, class_names)
    return source


def _check_count(data: str, found: Sequence[str], head: Sequence[str] | None) -> None:
    if head is not None and len(found) > len(head):
        raise ValueError(f"{data} has {len(found)} classes, more than the {len(head)} of the head")


def _split_folder(root: Path, split: str) -> Path:
    names = _SYNONYMS.get(split, (split,))
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"no folder {' or '.join(repr(name) for name in names)} in {str(root)!r}")
