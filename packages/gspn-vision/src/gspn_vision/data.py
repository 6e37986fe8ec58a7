"""What feeds models: preprocessing, augmentation, batches."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gspn_core.runs.errors import reason
from gspn_core.runs.images import UnreadableImageError
from gspn_core.runs.order import AUGMENT, Order, seed_all
from gspn_core.runs.training import leave_signals, loader_workers

from .config import TrainConfig
from .sources import Source


@dataclasses.dataclass(kw_only=True, frozen=True)
class Preprocessing:
    """What turns an image into the model's input; part of the `config.json` of every checkpoint."""

    in_chans: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"

    @classmethod
    def from_timm(cls, values: dict[str, Any]) -> Preprocessing:
        """Make it from the `pretrained_cfg` of a timm folder."""
        channels, height, width = values["input_size"]
        mean, std = (tuple(values[name]) for name in ("mean", "std"))
        # For a model of grey images timm still lists the mean of every colour.
        mean, std = (v if len(v) == channels else (sum(v) / len(v),) * channels for v in (mean, std))
        return cls(
            in_chans=channels,
            size=(height, width),
            mean=mean,
            std=std,
            interpolation=values["interpolation"],
            crop_pct=values["crop_pct"],
            crop_mode=values.get("crop_mode") or "center",
        )

    def to_timm(self) -> dict[str, Any]:
        """Return it as `pretrained_cfg` holds it."""
        values = dataclasses.asdict(self)
        return {"input_size": (values.pop("in_chans"), *values.pop("size")), **values}

    def cropped(self, crop_pct: float | None) -> Preprocessing:
        """Return the same for another crop; None leaves it as it is."""
        return self if crop_pct is None else dataclasses.replace(self, crop_pct=crop_pct)

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
            crop_mode=self.crop_mode,
        )

    def training_transform(self, config: TrainConfig) -> Any:
        """Return the transform for training, with the augmentation of a configuration."""
        if not config.augment:
            return self.transform()
        try:
            return self._augmented(config)
        except AssertionError as error:  # timm's, of a policy that it does not know
            policy = config.auto_augment
            raise ValueError(f"auto_augment must be a policy of timm, got {policy!r}: {reason(error)}") from None

    def _augmented(self, config: TrainConfig) -> Any:
        transform = create_transform(
            (self.in_chans, *self.size),
            is_training=True,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            train_crop_mode=config.train_crop,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
        )
        _keep_one_bit(transform)
        return transform


def _keep_one_bit(transform: Any) -> None:
    """Let posterisation by a policy of timm keep a bit: of some levels timm makes 0, which Pillow 13 refuses."""
    for step in transform.transforms:
        for op in itertools.chain(*getattr(step, "policy", ()), getattr(step, "ops", ())):
            if op.name.startswith("Posterize"):
                op.level_fn = functools.partial(_bits, op.level_fn)


def _bits(level_fn: Any, level: float, hparams: Any) -> tuple[int]:
    return (max(1, level_fn(level, hparams)[0]),)


class Sample(NamedTuple):
    """One image, ready for the model; `unreadable` are messages about the images that were skipped to get it."""

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


def convert(image: Image.Image, mode: str, name: str) -> Image.Image:
    """Convert an image to the colours of a mode of Pillow.

    Raises:
        UnreadableImageError: Pillow cannot; the message has its name.
    """
    try:
        return image.convert(mode)
    except ValueError as error:
        raise UnreadableImageError(f"cannot read image {name!r}: {reason(error)}") from None


class Samples(Dataset[Sample]):
    """Transformed samples of a source.

    Keys are (epoch, index) for training: both seed the augmentation, and the next readable image replaces an unreadable
    one. Otherwise keys are indices, and an unreadable image is left out.
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
                image = convert(image, self.mode, self.source.name(index))
                break
            except UnreadableImageError as error:
                passed.append(str(error))
            if not training:
                return Sample(None, -1, index, tuple(passed))
            index = (index + 1) % len(self)
        else:
            raise UnreadableImageError(f"none of the {len(self)} images can be read; the first: {passed[0]}")
        if training:
            seed_all(AUGMENT, self.seed, epoch, index, accelerators=False)
        return Sample(self.transform(image), target, index, tuple(passed))


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


def _loader(samples: Samples, workers: int, pin_memory: bool, **order: Any) -> DataLoader[Batch]:
    processes = loader_workers(workers)
    options = {"num_workers": processes, "persistent_workers": processes > 0, "pin_memory": pin_memory, **order}
    options["worker_init_fn"] = leave_signals
    return DataLoader(samples, collate_fn=collate, **options)  # type: ignore[arg-type]


def batch_loader(
    samples: Samples, batches: Order | Sequence[Sequence[int]], workers: int, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Return a loader of the batches in `batches`: of keys (epoch, index) for training, else of indices."""
    return _loader(samples, workers, pin_memory, batch_sampler=batches)


def validation_loader(
    samples: Samples, batch_size: int, workers: int, pin_memory: bool = False, *, rank: int = 0, world_size: int = 1
) -> DataLoader[Batch]:
    """Return a loader of this process's share: every world_size-th sample, each exactly once."""
    share = range(rank, len(samples), world_size)
    return _loader(samples, workers, pin_memory, batch_size=batch_size, sampler=share)
