"""The options of training and sampling: dataclasses that become command lines, YAML files and records of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from accelerate.utils import parse_flag_from_env
from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Config = TypeVar("Config")


@dataclasses.dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """Every option of `gspn-dit train`.

    Args:
        preset: architecture, such as GSPN-XL/2, or GSPN2-XL/2 with GSPN-2 mixers
        model: constructor arguments that differ from the preset's, such as {hidden_size: 128}
        objective: predict noise and its variance, or the velocity of a straight path (flow matching)
        start_from: weights to begin with, a run, a checkpoint or a diffusers folder
        data: folder that `gspn-dit extract` wrote, or, to train on pixels, `digits` (scikit-learn's), a folder with a
            subfolder per class or any Hugging Face image data set
        split: of a data set of images
        image_size: height and width of pixels trained on (absent for digits, which are 8 x 8)
        mirror: mirror half of the images
        vae: diffusers VAE of the features, to decode samples during training; checked against the features
        out: folder of the run
        resume: continue from the newest checkpoint in `out`, or refuse to if there is one
        steps: updates of the weights
        batch_size: images per process and forward pass
        accumulate: forward passes per update
        lr: peak learning rate of AdamW
        min_lr: at the end of the cosine
        warmup_steps: updates of linear warm-up
        weight_decay: of AdamW
        clip_grad: largest norm of the gradient, or null
        ema_decay: of the averaged weights
        ema_warmup: raise the decay from 0 in the first updates
        label_dropout: share of labels replaced by the null class, which guidance needs
        precision: mixed precision
        compile: compile the blocks with torch.compile
        gradient_checkpointing: recompute activations to save memory
        device: auto takes the accelerator if any
        seed: everything random is a function of it and of counters
        workers: processes that load data, per training process
        checkpoint_every: updates between checkpoints
        keep_checkpoints: newest checkpoints kept
        log_every: updates between rows of the log
        sample_every: updates between grids of samples; 0 is never
        sample_count: images in a grid
        sample_steps: steps of its sampler
        sample_guidance: its guidance scale
        tensorboard: write TensorBoard logs
        progress: show progress bars
    """

    preset: str = "GSPN-B/2"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: Literal["noise", "flow"] = "noise"
    start_from: str | None = None
    data: str = "digits"
    split: str | None = None
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    mirror: bool = True
    vae: str | None = None
    out: str = "runs/gspn-dit"
    resume: Literal["auto", "never"] = "auto"
    steps: PositiveInt = 400_000
    batch_size: PositiveInt = 256
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    min_lr: NonNegativeFloat = 1e-6
    warmup_steps: NonNegativeInt = 6_250
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: PositiveFloat | None = 1.0
    ema_decay: ClosedUnitInterval = 0.9999
    ema_warmup: bool = False
    label_dropout: ClosedUnitInterval = 0.1
    precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu"] = "auto"
    seed: NonNegativeInt = 0
    workers: NonNegativeInt = 4
    checkpoint_every: PositiveInt = 10_000
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 100
    sample_every: NonNegativeInt = 10_000
    sample_count: PositiveInt = 16
    sample_steps: PositiveInt = 50
    sample_guidance: NonNegativeFloat = 4.0
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be below steps ({self.steps}), got {self.warmup_steps}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be at most lr ({self.lr}), got {self.min_lr}")


# What may differ between a run and its continuation without changing the weights that come out.
FREE_TO_CHANGE = frozenset(
    {"out", "resume", "workers", "vae", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard", "progress"}
    | {"sample_every", "sample_count", "sample_steps", "sample_guidance", "batch_size", "accumulate"}
)


@dataclasses.dataclass(kw_only=True, frozen=True)
class SampleConfig:
    """Every option of `gspn-dit sample`.

    Args:
        checkpoint: a run, a checkpoint or a diffusers folder
        weights: averaged weights or plain ones; auto takes the averaged if there are any
        vae: diffusers VAE that decodes the latents
        out: folder of the images; an unfinished one is continued
        count: images
        classes: numbers or names, which the images take in turn; absent: all classes in turn
        sampler: ancestral and ddim for noise, euler and heun for velocity; auto is ancestral or euler
        steps: of the sampler
        guidance: scale of classifier-free guidance; 1 is none
        guidance_channels: latent channels it applies to, 0 is all; published samples of DiT used the first 3
        size: height and width of the images in pixels; absent: what the model was trained at
        batch_size: images per forward pass; another one may change the last bits
        seed: image i depends on it, on i and on the class alone
        precision: of the forward passes
        device: auto takes the accelerator if any
        npz: write all images to samples.npz, as ADM's evaluation reads them
        grid: images in grid.png; 0 is none
        progress: show a progress bar
    """

    checkpoint: str
    weights: Literal["auto", "ema", "model"] = "auto"
    vae: str | None = None
    out: str = "samples"
    count: PositiveInt = 64
    classes: list[int | str] | None = None
    sampler: Literal["auto", "ancestral", "ddim", "euler", "heun"] = "auto"
    steps: PositiveInt = 250
    guidance: NonNegativeFloat = 1.0
    guidance_channels: NonNegativeInt = 0
    size: tuple[PositiveInt, PositiveInt] | None = None
    batch_size: PositiveInt = 32
    seed: NonNegativeInt = 0
    precision: Literal["no", "bf16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    npz: bool = False
    grid: NonNegativeInt = 64
    progress: bool = True


def parser_of(kind: type[Any], description: str | None = None) -> ArgumentParser:
    """Make a parser of the options of a dataclass, from the command line and from YAML files (`--config`)."""
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file, or the name of a shipped one; repeatable")
    parser.add_class_arguments(kind)
    return parser


def make(kind: type[Config], values: dict[str, Any]) -> Config:
    """Check a mapping of options and build the dataclass.

    Raises:
        ValueError: an option is unknown or does not fit; the message names it, what it must be and what it was.
    """
    parser = parser_of(kind)
    try:
        checked = parser.parse_object(values)
    except Exception as error:  # jsonargparse's own type, a plain Exception
        raise ValueError(" ".join(str(error).split())) from None
    return kind(**{field.name: checked[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def to_dict(config: Any) -> dict[str, Any]:
    """Return the options as plain YAML values."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    """Turn tuples into lists and jsonargparse's restricted numbers into numbers."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def to_yaml(config: Any) -> str:
    """Return the options as a YAML document, in their order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def use_cpu(device: str) -> bool:
    """Tell whether "auto" or "cpu" means the CPU, as accelerate has to be told: otherwise it takes each of several
    processes without an accelerator for the only one.
    """
    return device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def presets_folder() -> Path:
    """Return the folder of the shipped YAML files, in a wheel or in a source tree."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"


def find(name: str) -> str:
    """Return the path of a configuration: a file, or a shipped one by its name, with or without folder and suffix.

    Raises:
        FileNotFoundError: there is neither.
    """
    shipped = presets_folder() / f"{Path(name).stem}.yaml"
    if Path(name).is_file():
        return name
    if shipped.is_file() and Path(name).parent.name in ("", "configs"):
        return str(shipped)
    known = ", ".join(sorted(path.stem for path in presets_folder().glob("*.yaml")))
    raise FileNotFoundError(f"no configuration file {name!r}; shipped are {known}")
