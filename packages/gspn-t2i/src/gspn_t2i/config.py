"""Options as dataclasses: made from mappings, YAML files and command lines, written beside every run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Config = TypeVar("Config")


@dataclasses.dataclass(kw_only=True, frozen=True)
class DistillConfig:
    """Every option of `gspn-t2i distill`.

    Args:
        pipeline: teacher, a diffusers pipeline of Stable Diffusion 1.5, 2.x or SDXL: a folder or a name on the Hub
        adapter: GSPN adapter to begin with, a folder or a name on the Hub; absent: a new one
        mixer: of a new adapter, weights per channel (gspn) or shared in a proxy space (gspn2)
        proxy: scanned channels of gspn2 as a share of the attention's
        bottleneck: channels that weights are made from, as a share of the tokens'
        chunk_size: lines per independent chunk; null scans the whole image
        init: start from the attention's projections, or at random
        keep_attention: parts of names of self-attentions that stay, such as mid_block
        data: images with captions: a folder with metadata.jsonl, WebDataset shards (shards/*.tar), a Hugging Face data
            set, or a finished cache
        split: of the data set
        image_column: of the data set; absent: the only one, or one of the usual name
        text_column: likewise; json.caption is the entry caption of a column json
        size: height and width of training images in pixels
        cache: folder to encode all images and captions into first, and to train from
        mirror: mirror half of the images
        out: folder of the run
        resume: continue from the newest checkpoint in `out`, or refuse to if there is one
        noise_weight: of the error against the noise, or the velocity
        teacher_weight: of the error against the teacher's answer
        feature_weight: of the error against the outputs of the teacher's self-attentions
        snr_gamma: limit of min-SNR weights; null weighs all times alike
        caption_dropout: share of captions replaced by none, which guidance needs
        steps: updates of the weights
        batch_size: images per process and forward pass
        accumulate: forward passes per update
        lr: peak learning rate of AdamW
        lr_schedule: of the learning rate
        warmup_steps: updates of linear warm-up
        weight_decay: of AdamW
        clip_grad: largest norm of the gradient, or null
        ema_decay: of the averaged weights; null keeps none
        ema_warmup: raise the decay from 0 in the first updates
        precision: bf16 computes in bfloat16, the teacher's weights too
        gradient_checkpointing: recompute activations to save memory
        device: auto takes the accelerator if any
        seed: everything random is a function of it and of counters
        workers: processes that load data, per training process
        checkpoint_every: updates between checkpoints
        keep_checkpoints: newest checkpoints kept
        log_every: updates between rows of the log
        sample_every: updates between grids of samples; 0 is never
        sample_prompts: what is drawn in them
        sample_steps: steps of its sampler
        sample_guidance: its guidance scale
        tensorboard: write TensorBoard logs
        progress: show progress bars
    """

    pipeline: str
    adapter: str | None = None
    mixer: Literal["gspn", "gspn2"] = "gspn2"
    proxy: PositiveFloat = 0.125
    bottleneck: PositiveFloat = 0.125
    chunk_size: PositiveInt | None = 4
    init: Literal["qkv", "random"] = "qkv"
    keep_attention: list[str] = dataclasses.field(default_factory=list)
    data: str
    split: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 512
    cache: str | None = None
    mirror: bool = False
    out: str = "runs/gspn-t2i"
    resume: Literal["auto", "never"] = "auto"
    noise_weight: NonNegativeFloat = 1.0
    teacher_weight: NonNegativeFloat = 0.5
    feature_weight: NonNegativeFloat = 0.5
    snr_gamma: PositiveFloat | None = None
    caption_dropout: ClosedUnitInterval = 0.1
    steps: PositiveInt = 100_000
    batch_size: PositiveInt = 12
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 1_000
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: PositiveFloat | None = 1.0
    ema_decay: ClosedUnitInterval | None = 0.9999
    ema_warmup: bool = False
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu"] = "auto"
    seed: NonNegativeInt = 0
    workers: NonNegativeInt = 4
    checkpoint_every: PositiveInt = 1_000
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 50
    sample_every: NonNegativeInt = 1_000
    sample_prompts: list[str] = dataclasses.field(default_factory=list)
    sample_steps: PositiveInt = 30
    sample_guidance: NonNegativeFloat = 7.5
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be below steps ({self.steps}), got {self.warmup_steps}")
        if self.noise_weight == self.teacher_weight == self.feature_weight == 0:
            raise ValueError("one of noise_weight, teacher_weight and feature_weight must be above 0, all are 0")
        if any(side % 8 for side in self.height_width):
            raise ValueError(f"size must be multiples of 8, got {self.size}")

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of training images."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])


# What may differ between a run and its continuation. batch_size, accumulate and device are what a change of machine
# needs: an update has as many images as before, but other noise or roundings; the rest leaves the weights as they are.
FREE_TO_CHANGE = frozenset(
    {"out", "resume", "workers", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard", "progress"}
    | {"sample_every", "sample_prompts", "sample_steps", "sample_guidance", "batch_size", "accumulate", "device"}
)


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
