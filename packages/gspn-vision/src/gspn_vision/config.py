"""The options of a training run: one dataclass, read from YAML, overridden on the command line, saved with the run."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml


def _option(default: Any, help: str, *, least: float | None = None, most: float | None = None) -> Any:
    metadata = {"help": help, "least": least, "most": most}
    if default is dict:
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """Every option of `gspn-vision train`.

    A field is an option of the command line, a key of the YAML presets and a key of the run's `config.yaml`.
    """

    model: str = _option("gspn2_nano", "timm model name; `gspn*` are this package's")
    model_kwargs: dict[str, Any] = _option(dict, "further constructor arguments, as a YAML mapping")
    in_chans: Literal[1, 3] = _option(3, "1 trains on grey images, 3 on colour")
    drop_rate: float = _option(0.0, "dropout before the classifier", least=0, most=1)
    drop_path_rate: float = _option(0.0, "stochastic depth, at the last block", least=0, most=1)
    grad_checkpointing: bool = _option(False, "recompute activations to save memory")
    compile: bool = _option(False, "compile the model with torch.compile")

    start_from: str | None = _option(
        None, "weights to fine-tune: a run, a checkpoint or a file; a head of other classes starts afresh"
    )
    freeze: tuple[str, ...] = _option((), "modules that are not trained, such as `stem` or `stages.0`")

    data: str = _option(
        "digits",
        "`digits`, a folder with train/ and val/ or validation/, or a timm data set such as "
        "`torch/cifar10` or `hfds/...`",
    )
    data_root: str | None = _option(None, "folder that a timm data set is stored in")
    train_split: str = _option("train", "split to train on")
    val_split: str = _option("validation", "split to validate on")
    download: bool = _option(False, "let the timm data set download itself")
    unreadable: Literal["skip", "stop"] = _option("stop", "what to do with an image that cannot be read")
    workers: int = _option(4, "processes that load images, per training process", least=0)

    image_size: int | tuple[int, int] = _option(224, "input size, one number or height and width", least=32)
    mean: tuple[float, ...] | None = _option(None, "mean per channel; the model's if absent")
    std: tuple[float, ...] | None = _option(None, "standard deviation per channel; the model's if absent", least=1e-6)
    interpolation: Literal["bilinear", "bicubic", "nearest"] = _option("bicubic", "resampling")
    crop_pct: float = _option(0.9, "share of the resized image validated on", least=0.1, most=1)
    augment: bool = _option(True, "augment the training images; the next options say how")
    train_crop: Literal["rrc", "rkrc", "rkrr"] = _option(
        "rrc", "random resized crop, or resize keeping the ratio then crop, or then crop or pad"
    )
    scale: tuple[float, float] = _option((0.08, 1.0), "area of the random crop", least=0)
    ratio: tuple[float, float] = _option((0.75, 1.3333), "aspect ratio of the random crop", least=0)
    hflip: float = _option(0.5, "probability of mirroring", least=0, most=1)
    color_jitter: float = _option(0.4, "strength; unused with auto_augment", least=0)
    auto_augment: str | None = _option(None, "timm policy such as rand-m9-mstd0.5-inc1")
    random_erasing: float = _option(0.0, "probability of erasing a rectangle", least=0, most=1)
    mixup: float = _option(0.0, "mixup alpha; 0 is off", least=0)
    cutmix: float = _option(0.0, "cutmix alpha; 0 is off", least=0)
    mix_probability: float = _option(1.0, "probability of mixup or cutmix per batch", least=0, most=1)
    label_smoothing: float = _option(0.0, "label smoothing", least=0, most=1)

    epochs: int = _option(300, "passes over the training data", least=1)
    batch_size: int = _option(128, "images per process and forward pass", least=1)
    accumulate: int = _option(1, "forward passes per update", least=1)
    optimizer: str = _option("adamw", "timm optimizer name")
    lr: float = _option(1e-3, "peak learning rate", least=0)
    lr_batch: int | None = _option(
        None,
        "batch that `lr` is for: scale it in proportion to images per update; absent: as it is",
        least=1,
    )
    weight_decay: float = _option(0.05, "weight decay of matrices and kernels", least=0)
    layer_decay: float | None = _option(
        None, "factor of the learning rate from each block to the one before it", least=1e-6, most=1
    )
    clip_grad: float | None = _option(None, "largest norm of the gradient", least=0)
    schedule: Literal["cosine", "poly", "tanh"] = _option("cosine", "learning rate after warm-up")
    warmup_epochs: float = _option(5.0, "epochs of linear warm-up", least=0)
    warmup_lr: float = _option(1e-6, "learning rate at its start", least=0)
    min_lr: float = _option(1e-6, "learning rate at the end", least=0)
    ema_decay: float = _option(0.0, "decay of the averaged weights; 0 is off", least=0, most=1)
    ema_warmup: bool = _option(True, "raise the decay from 0 in the first updates")

    mesa: float = _option(0.0, "weight of the self-distillation from the averaged weights (MESA); 0 is off", least=0)
    mesa_start: float = _option(0.25, "share of the epochs before it begins", least=0, most=1)

    precision: Literal["no", "bf16", "fp16"] = _option("no", "mixed precision")
    device: Literal["auto", "cpu"] = _option("auto", "device; auto takes the accelerator if any")
    deterministic: bool = _option(True, "only cuDNN kernels that repeat bit for bit")
    seed: int = _option(0, "everything random is a function of it and of counters", least=0)

    out: str | None = _option(None, "folder of the run; runs/MODEL if absent")
    resume: Literal["auto", "never"] = _option(
        "auto", "continue from the newest checkpoint in `out`, or refuse to if there is one"
    )
    checkpoint_every: int = _option(0, "updates between checkpoints; 0: end of epoch only", least=0)
    keep_checkpoints: int = _option(2, "newest checkpoints kept, besides the best", least=1)
    validate_every: int = _option(1, "epochs between validations", least=1)
    log_every: int = _option(50, "updates between rows of the log", least=1)
    tensorboard: bool = _option(True, "write TensorBoard logs")
    progress: bool = _option(True, "show progress bars")

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"{name} must have one value per channel ({self.in_chans}), got {list(values)}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be two rising numbers, got {[low, high]}")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise ValueError(f"batch_size must be even with mixup or cutmix, which pair images, got {self.batch_size}")
        if self.mesa > 0 and self.ema_decay == 0:
            raise ValueError(f"mesa distils from averaged weights and needs ema_decay above 0, got mesa {self.mesa}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be below epochs ({self.epochs}), got {self.warmup_epochs}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out or f"runs/{self.model}")


# What may differ between a run and its continuation without changing the weights that come out.
FREE_TO_CHANGE = frozenset(
    {
        "out",
        "resume",
        "workers",
        "keep_checkpoints",
        "log_every",
        "tensorboard",
        "progress",
        "data_root",
    }
    | {"checkpoint_every", "download"}
)

_TYPES = typing.get_type_hints(TrainConfig)
_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def _convert(value: Any, hint: Any, least: float | None, most: float | None) -> Any:
    """Return value as the type of a field, or raise ValueError saying what was expected."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        expected = []
        for option in typing.get_args(hint):
            try:
                return _convert(value, option, least, most)
            except ValueError as error:
                expected.append(str(error))
        raise ValueError(" or ".join(expected))
    if hint is type(None):
        if value is None or value == "none":
            return None
        raise ValueError("none")
    if origin is Literal:
        options = typing.get_args(hint)
        if value in options and not isinstance(value, bool):
            return value
        if value is False and "no" in options:  # YAML reads a bare no as false
            return "no"
        raise ValueError("one of " + ", ".join(map(str, options)))
    if origin is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            value = [value]
        if items[-1] is Ellipsis:
            items = (items[0],) * len(value)
        if len(value) != len(items):
            raise ValueError(f"{len(items)} values")
        return tuple(_convert(v, item, least, most) for v, item in zip(value, items, strict=True))
    if origin is dict:
        if isinstance(value, dict):
            return value
        raise ValueError("a mapping such as {stem_stride: 2}")
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if hint is str:
        if isinstance(value, str):
            return value
        raise ValueError("a string")
    return _number(value, hint, least, most)


def _number(value: Any, kind: type, least: float | None, most: float | None) -> Any:
    limits = "" if least is None else f" of at least {least:g}"
    if most is not None:
        limits = f" from {least:g} to {most:g}"
    expected = ValueError(("an integer" if kind is int else "a number") + limits)
    if isinstance(value, bool):
        raise expected
    try:
        # YAML 1.1 reads 1e-3 as a string.
        number = kind(value) if isinstance(value, (str, kind)) else float(value)
    except (TypeError, ValueError):
        raise expected from None
    if kind is int and number != int(number):
        raise expected
    number = kind(number)
    if (least is not None and not number >= least) or (most is not None and not number <= most):
        raise expected
    return number


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Check and convert a mapping of options.

    Raises:
        ValueError: a key is unknown or a value does not fit; the message names it, what it must be and what it was.
    """
    checked = {}
    for key, value in values.items():
        if key not in _FIELDS:
            close = difflib.get_close_matches(str(key), _FIELDS, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown configuration key {key!r}{hint}")
        metadata = _FIELDS[key].metadata
        try:
            checked[key] = _convert(value, _TYPES[key], metadata["least"], metadata["most"])
        except ValueError as error:
            raise ValueError(f"{key} must be {error}, got {value!r}") from None
    return TrainConfig(**checked)


def presets_folder() -> Path:
    """Return the folder of the shipped YAML presets, in a wheel or in a source tree."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"


def preset_names() -> list[str]:
    """Return the names of the shipped presets."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def read_yaml(name: str | Path) -> dict[str, Any]:
    """Read a preset by name, or a YAML file by path, as a mapping.

    Raises:
        FileNotFoundError: there is neither such a preset nor such a file.
        ValueError: the file is not a YAML mapping.
    """
    path = Path(name)
    preset = presets_folder() / f"{name}.yaml"
    if preset.is_file() and not path.is_file():
        path = preset
    if not path.is_file():
        known = ", ".join(preset_names())
        raise FileNotFoundError(f"no configuration file or preset {str(name)!r}; presets: {known}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of options, got {type(values).__name__}")
    return values


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the options as plain YAML values."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def to_yaml(config: TrainConfig) -> str:
    """Return the options as YAML, in the order of the dataclass."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field; what is not given is absent from the parsed namespace."""
    for name, field in _FIELDS.items():
        hint = _TYPES[name]
        default = getattr(TrainConfig(), name)
        shown = list(default) if isinstance(default, tuple) else default
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": name}
        kwargs["help"] = f"{field.metadata['help']} (default: {shown})".replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **kwargs)
        elif "tuple" in str(hint):
            parser.add_argument(flag, nargs="+", metavar="X", **kwargs)
        else:
            parser.add_argument(flag, metavar=_metavar(hint), **kwargs)


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    return {int: "N", float: "X"}.get(hint, "X" if "int" in str(hint) or "float" in str(hint) else "S")


def from_arguments(config: str | None, arguments: Mapping[str, Any]) -> TrainConfig:
    """Return the options of a preset or file (or the defaults), overridden by the parsed command line."""
    values = read_yaml(config) if config else {}
    for name in _FIELDS.keys() & arguments.keys():
        values[name] = _parse(arguments[name], _TYPES[name])
    return make_config(values)


def _parse(text: Any, hint: Any) -> Any:
    """Turn the words of the command line into what YAML would have given."""
    if isinstance(text, list):
        words = [_parse(word, Any) for word in text]
        return words[0] if len(words) == 1 else words
    if hint is str or hint == (str | None) or not isinstance(text, str):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
