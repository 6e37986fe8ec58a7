"""Images and labels: sources with random access, transforms, and loaders."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .config import TrainConfig
from .sampling import AUGMENT, EpochBatches, seed_all

_SYNONYMS = {"validation": ("validation", "val"), "val": ("val", "validation")}


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


class Source(Protocol):
    """Images with labels: `source[i]` is an image and the number of its class."""

    class_names: list[str]

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

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number = self.numbers[index]
        return Image.fromarray(self.images[number]), int(self.targets[number])

    def name(self, index: int) -> str:
        """Return "digits:NUMBER", with the number in scikit-learn's order."""
        return f"digits:{self.numbers[index]}"


class Folder:
    """A folder with one folder of images per class.

    Args:
        root: the folder.
        class_names: classes in their order; those of the folder, sorted, if None. A class may be without images here,
            but a folder must be a known class.

    Raises:
        FileNotFoundError: there is no such folder, no class in it, or a class folder has no images.
        ValueError: a folder is none of class_names.
    """

    def __init__(self, root: Path, class_names: Sequence[str] | None = None) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {str(root)!r}")
        # timm finds classes by the innermost folder's name and passes over empty ones; torchvision, offered by timm
        # under this name, takes the outermost and refuses empty ones.
        self._folder = create_dataset("torch/image_folder", root=str(root), search_split=False)
        found: list[str] = self._folder.classes
        self.class_names = list(class_names or found)
        _check_count(str(root), found, self.class_names)
        unknown = sorted(set(found) - set(self.class_names))
        if unknown:
            raise ValueError(
                f"{root} has classes that the training data or the checkpoint has not: {', '.join(unknown[:5])}"
            )
        self._labels = [self.class_names.index(name) for name in found]

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self._folder.samples[index]
        return read_image(path), self._labels[label]

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self._folder.samples[index][0])


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

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self._reader is None:
            image, label = self._dataset[index]
            return image, int(label)
        # Past timm's own dataset, which replaces an unreadable image by the next without a word to the caller.
        file, label = self._reader[index]
        return read_image(file, self.name(index)), int(label)

    def name(self, index: int) -> str:
        """Return the name that the data set has for an image, or its number."""
        if self._reader is not None:
            return str(self._reader.filename(index))
        return f"{self._title}:{index}"


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


def read_image(file: Any, name: str | None = None) -> Image.Image:
    """Open and decode an image file.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableImageError: it is not an image, or a broken one.
    """
    name = name or str(file)
    if isinstance(file, (str, Path)):
        if not Path(file).is_file():
            raise FileNotFoundError(f"no image {name!r}")
        file = open(file, "rb")  # noqa: SIM115  (closed just below)
    try:
        with file:
            image = Image.open(file)
            image.load()
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImageError(f"cannot read image {name!r}: {reason}") from None
    return image


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
    if data == "digits":
        source: Source = Digits(split)
    elif Path(data).is_dir():
        return Folder(_split_folder(Path(data), split), class_names)
    elif data.split("/")[0].lower() in ("torch", "hfds", "hfids", "tfds", "wds"):
        try:
            dataset = create_dataset(data, root=root, split=split, download=download)
        except (AssertionError, ImportError, OSError, RuntimeError, TypeError) as error:
            raise ValueError(f"cannot open the data set {data!r}: {error}") from error
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


@dataclasses.dataclass(kw_only=True, frozen=True)
class Preprocessing:
    """What turns an image into the model's input; stored in every checkpoint."""

    in_chans: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Make it from what JSON gave."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    @property
    def mode(self) -> str:
        """Pillow's name for the colours."""
        return "L" if self.in_chans == 1 else "RGB"

    def transform(self) -> Any:
        """Return the transform for validation and prediction: a Pillow image to (in_chans, H, W)."""
        return create_transform(
            (self.in_chans, *self.size),
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )

    def training_transform(self, config: TrainConfig) -> Any:
        """Return the transform for training, with the augmentation of a configuration."""
        if not config.augment:
            return self.transform()
        return create_transform(
            (self.in_chans, *self.size),
            is_training=True,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            train_crop_mode=config.train_crop,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
        )


class Sample(NamedTuple):
    """One image, ready for the model; `unreadable` names what was passed over to get it."""

    image: Tensor | None
    target: int
    item: int
    unreadable: tuple[str, ...] = ()


class Batch(NamedTuple):
    """Images (N, in_chans, H, W), classes and numbers in the data set (N,), and which images were left out."""

    images: Tensor
    targets: Tensor
    items: Tensor
    unreadable: tuple[str, ...]


class Unreadable:
    """What to do with unreadable images: stop at the first, or skip them and remember their names."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.messages: dict[str, None] = {}

    def note(self, messages: Sequence[str]) -> None:
        """Take note of messages that name unreadable images.

        Raises:
            UnreadableImageError: there is one, and the policy is "stop".
        """
        for message in messages:
            if self.policy == "stop":
                raise UnreadableImageError(message)
            if message not in self.messages:
                tqdm.write(message, file=sys.stderr)
                self.messages[message] = None

    def report(self) -> None:
        """Say at the end how many images were skipped, if any."""
        if self.messages:
            print(f"skipped {len(self.messages)} unreadable image(s)", file=sys.stderr)


class Samples(Dataset[Sample]):
    """Transformed samples of a source.

    Keys are (epoch, index) for training, where the epoch and the index seed the augmentation and an unreadable image
    gives way to the next readable one, and plain indices otherwise, where it is left out.
    """

    def __init__(self, source: Source, transform: Any, mode: str, *, seed: int = 0) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        training = isinstance(key, tuple)
        epoch, index = key if isinstance(key, tuple) else (0, key)
        passed: list[str] = []
        for _ in range(len(self)):
            try:
                image, target = self.source[index]
                break
            except UnreadableImageError as error:
                passed.append(str(error))
            if not training:
                return Sample(None, -1, index, tuple(passed))
            index = (index + 1) % len(self)
        else:
            raise UnreadableImageError(f"none of the {len(self)} images can be read; the first: {passed[0]}")
        if training:
            seed_all(AUGMENT, self.seed, epoch, index)
        return Sample(self.transform(image.convert(self.mode)), target, index, tuple(passed))


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples, leaving out those without an image."""
    present = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in present if sample.image is not None]
    return Batch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([sample.target for sample in present], dtype=torch.long),
        torch.tensor([sample.item for sample in present], dtype=torch.long),
        tuple(name for sample in samples for name in sample.unreadable),
    )


def training_loader(samples: Samples, batches: EpochBatches, workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Return a loader of what `batches` asks for."""
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def validation_loader(
    samples: Samples,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Batch]:
    """Return a loader of this process's share: every world_size-th sample, each exactly once."""
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=range(rank, len(samples), world_size),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )
