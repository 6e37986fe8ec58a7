"""The options of `gspn-vision`'s commands; their docstrings are the help."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gspn_core.runs.options import Device, ImageSize, Precision, TrainingOptions, Unreadable, configs_folder

CONFIGS = configs_folder(__file__)


@dataclasses.dataclass(kw_only=True, frozen=True)
class ModelOptions:
    """Which trained model a command takes.

    Args:
        checkpoint: a run, a checkpoint, a timm folder, or a file of weights beside its config.json
        which: checkpoint of a run
        weights: averaged weights or plain ones; auto takes the averaged if there are any
    """

    checkpoint: str
    which: Literal["best", "latest"] = "best"
    weights: Literal["auto", "ema", "model"] = "auto"


@dataclasses.dataclass(kw_only=True, frozen=True)
class TrainConfig(TrainingOptions):
    """Every option of `gspn-vision train`.

    Args:
        model: timm model name; `gspn*` are this package's
        model_kwargs: constructor arguments that differ from the model's, such as {stem_stride: 2}
        in_chans: 1 trains on grey images, 3 on colour
        drop_rate: dropout before the classifier
        drop_path_rate: stochastic depth, at the last block
        compile: compile the model with torch.compile
        channels_last: keep images and weights in the memory order NHWC
        pretrained: begin with the pretrained weights of a timm model
        start_from: weights to begin with, a run, a checkpoint, a timm folder or a file of weights; a head of other
            classes starts afresh
        freeze: modules that are not trained, such as stem stages.0
        data: `digits` (scikit-learn's), a folder with train/ and val/ or validation/, or a timm data set such as
            torch/cifar10 or hfds/NAME
        data_root: folder that a timm data set is stored in
        train_split: split to train on
        val_split: split to validate on
        download: let the timm data set download itself
        image_size: height and width of the model's input
        mean: mean per channel; null is the model's own
        std: standard deviation per channel; null is the model's own
        interpolation: resampling
        crop_pct: share of the resized image validated on
        augment: augment the training images; the next options say how
        train_crop: random resized crop, or resize keeping the ratio then crop, or then crop or pad
        crop_scale: least and largest area of the random crop
        crop_ratio: least and largest aspect ratio of the random crop
        color_jitter: strength; unused with auto_augment
        auto_augment: timm policy such as rand-m9-mstd0.5-inc1
        random_erasing: probability of erasing a rectangle
        mixup: mixup alpha; 0 is off
        cutmix: cutmix alpha; 0 is off
        mix_probability: probability of mixup or cutmix per batch
        label_smoothing: label smoothing
        epochs: passes over the training data
        bce_loss: binary cross-entropy of every class instead of the softmax's cross-entropy
        optimizer: timm optimizer name
        optimizer_kwargs: its further arguments, such as {momentum: 0.8}
        clip_mode: clip_grad limits the norm, each value, or by adaptive gradient clipping (agc) each unit's norm
            relative to its weights'
        lr_batch: reference batch for linear scaling of lr by the images per update; null does not scale
        weight_decay: of matrices and kernels
        layer_decay: factor of the learning rate from each block to the one before it
        warmup_epochs: epochs of linear warm-up; a tenth of the epochs where these are not more
        mesa: weight of the self-distillation from the averaged weights (MESA); 0 is off
        mesa_start: share of the epochs before it begins
        deterministic: only cuDNN kernels that repeat bit for bit
        out: folder of the run; null is runs/MODEL
        checkpoint_every: updates between checkpoints, beside those at the ends of epochs
        keep_checkpoints: newest checkpoints kept, beside the best
        validate_every: epochs between validations
    """

    model: str = "gspn2_nano"
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    in_chans: Literal[1, 3] = 3
    drop_rate: ClosedUnitInterval = 0.0
    drop_path_rate: ClosedUnitInterval = 0.0
    compile: bool = False
    pretrained: bool = False
    freeze: list[str] = dataclasses.field(default_factory=list)
    data: str = "digits"
    data_root: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    download: bool = False
    image_size: ImageSize = dataclasses.field(default_factory=lambda: ImageSize(224, 224))
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    crop_pct: PositiveFloat = 0.9
    augment: bool = True
    train_crop: Literal["rrc", "rkrc", "rkrr"] = "rrc"
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333)
    color_jitter: NonNegativeFloat = 0.4
    auto_augment: str | None = None
    random_erasing: ClosedUnitInterval = 0.0
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    mix_probability: ClosedUnitInterval = 1.0
    label_smoothing: ClosedUnitInterval = 0.0
    epochs: PositiveInt = 300
    bce_loss: bool = False
    optimizer: str = "adamw"
    optimizer_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    channels_last: bool = False
    lr: PositiveFloat = 1e-3
    lr_batch: PositiveInt | None = None
    weight_decay: NonNegativeFloat = 0.05
    layer_decay: PositiveFloat | None = None
    warmup_epochs: NonNegativeFloat = 5.0
    mesa: NonNegativeFloat = 0.0
    mesa_start: ClosedUnitInterval = 0.25
    deterministic: bool = True
    out: str | None = None
    validate_every: PositiveInt = 1

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"{name} must have one value per channel ({self.in_chans}), got {list(values)}")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be two rising numbers, got {[low, high]}")
        for name in ("crop_pct", "layer_decay"):
            value = getattr(self, name)
            if value is not None and value > 1:
                raise ValueError(f"{name} must be at most 1, got {value}")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise ValueError(f"batch_size must be even with mixup or cutmix, which pair images, got {self.batch_size}")
        if self.mesa > 0 and self.ema_decay is None:
            raise ValueError(f"mesa distils from averaged weights and needs ema_decay, got mesa {self.mesa}")
        super().__post_init__()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out or f"runs/{self.model}")


@dataclasses.dataclass(kw_only=True, frozen=True)
class ValidateConfig(ModelOptions):
    """Every option of `gspn-vision validate`.

    Args:
        data: data set, as of train; null is the one it was trained with
        data_root: folder that a timm data set is stored in
        split: of the data; null is the validation split
        image_size: height and width of the input; null is that of the model's preprocessing
        crop_pct: share of the image's side that is kept; null is that of the model's preprocessing
        batch_size: images per process and forward pass
        workers: processes that load data, per process
        unreadable: stop at an image that cannot be read, or skip it
        device: auto takes the accelerator if any
        out: CSV file for every image's prediction
        progress: show progress bars
    """

    data: str | None = None
    data_root: str | None = None
    split: str | None = None
    image_size: ImageSize | None = None
    crop_pct: PositiveFloat | None = None
    batch_size: PositiveInt = 128
    workers: NonNegativeInt = 4
    unreadable: Unreadable = "stop"
    device: Device = "auto"
    out: str | None = None
    progress: bool = True


@dataclasses.dataclass(kw_only=True, frozen=True)
class PredictConfig(ModelOptions):
    """Every option of `gspn-vision predict`.

    Args:
        images: image files, folders of them, or digits:N for number N of scikit-learn's digits
        top: classes per image
        image_size: height and width of the input; null is that of the model's preprocessing
        crop_pct: share of the image's side that is kept; null is that of the model's preprocessing
        batch_size: images per forward pass
        unreadable: stop at an image that cannot be read, or skip it
        device: auto takes the accelerator if any
    """

    images: list[str]
    top: PositiveInt = 5
    image_size: ImageSize | None = None
    crop_pct: PositiveFloat | None = None
    batch_size: PositiveInt = 16
    unreadable: Unreadable = "stop"
    device: Device = "auto"


@dataclasses.dataclass(kw_only=True, frozen=True)
class VisualizeConfig(ModelOptions):
    """Every option of `gspn-vision visualize`.

    Args:
        image: a photograph, or digits:N for number N of scikit-learn's digits; not needed with list_layers
        out: PNG to write
        pixel: row and column in the photograph; null is its centre
        layer: layer to show; null is the first that scans the whole map
        all_layers: one page of all layers instead of one layer
        list_layers: list the layers and stop
        image_size: height and width that the photograph is resized to; null is its own, of which the longer side is at
            most 1024
    """

    image: str | None = None
    out: str = "propagation.png"
    pixel: tuple[NonNegativeInt, NonNegativeInt] | None = None
    layer: str | None = None
    all_layers: bool = False
    list_layers: bool = False
    image_size: ImageSize | None = None


@dataclasses.dataclass(kw_only=True, frozen=True)
class ProfileConfig:
    """Every option of `gspn-vision profile`.

    Args:
        models: timm models; none is all of this package
        image_size: height and width of the input; null is the model's own
    """

    models: list[str] = dataclasses.field(default_factory=list)
    image_size: ImageSize | None = None


@dataclasses.dataclass(kw_only=True, frozen=True)
class BenchmarkConfig:
    """Every option of `gspn-vision benchmark`.

    Args:
        models: timm models
        peers: measure Swin-T, ConvNeXt-T, MambaOut-T and DeiT-S beside them
        batch_sizes: images per step
        modes: inference, and training (forward, backward, an AdamW step)
        image_size: height and width of the input
        precision: of the forward passes
        compile: compile the models with torch.compile
        repeats: timed steps of each model, of which the median counts
        device: auto takes the accelerator if any
        out: JSON file for results, device and versions
        progress: show progress bars
    """

    models: list[str] = dataclasses.field(default_factory=lambda: ["gspn_tiny", "gspn2_tiny"])
    peers: bool = True
    batch_sizes: list[PositiveInt] = dataclasses.field(default_factory=lambda: [1, 16])
    modes: list[Literal["inference", "training"]] = dataclasses.field(default_factory=lambda: ["inference", "training"])
    image_size: ImageSize = dataclasses.field(default_factory=lambda: ImageSize(224, 224))
    precision: Precision = "fp32"
    compile: bool = False
    repeats: PositiveInt = 10
    device: Device = "auto"
    out: str | None = None
    progress: bool = True


@dataclasses.dataclass(kw_only=True, frozen=True)
class ExportConfig:
    """Every option of `gspn-vision export`.

    Args:
        model: timm model, with fresh weights; or give a checkpoint
        checkpoint: a run, a checkpoint, a timm folder, or a file of weights beside its config.json
        which: checkpoint of a run
        weights: averaged weights or plain ones; auto takes the averaged if there are any
        format: ONNX, or a program of torch.export
        out: file to write; null is model.onnx or model.pt2
        image_size: height and width of the input; null is the model's own
        batch_size: images at a time; null is any number
        dynamic_size: leave height and width open, too
    """

    model: str | None = None
    checkpoint: str | None = None
    which: Literal["best", "latest"] = "best"
    weights: Literal["auto", "ema", "model"] = "auto"
    format: Literal["onnx", "torch"] = "onnx"
    out: str | None = None
    image_size: ImageSize | None = None
    batch_size: PositiveInt | None = None
    dynamic_size: bool = False


@dataclasses.dataclass(kw_only=True, frozen=True)
class AnyModelOptions:
    """Which model a command takes: a timm model by name, or a trained one.

    Args:
        model: timm model; or give a checkpoint
        model_kwargs: constructor arguments that differ from the model's, such as {dynamic_img_size: true}
        pretrained: load the pretrained weights of a timm model
        checkpoint: a run, a checkpoint, a timm folder, or a file of weights beside its config.json
        which: checkpoint of a run
        weights: averaged weights or plain ones; auto takes the averaged if there are any
    """

    model: str | None = None
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    which: Literal["best", "latest"] = "best"
    weights: Literal["auto", "ema", "model"] = "auto"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.checkpoint is None):
            raise ValueError(f"give either model or checkpoint, got {'neither' if self.model is None else 'both'}")
        if self.checkpoint is not None and (self.model_kwargs or self.pretrained):
            given = "model_kwargs" if self.model_kwargs else "pretrained"
            raise ValueError(f"{given} must not be given with a checkpoint, which has its own")


@dataclasses.dataclass(kw_only=True, frozen=True)
class MixerOptions:
    """Which attention is replaced, and by which mixers.

    Args:
        keep: blocks that keep their attention: indices, negative ones from the end, such as --keep 5 -1; every n-th,
            such as --keep every 6; or a share of them, such as --keep 0.11
        mixer_kwargs: arguments of the mixers, such as {latent: 64}: latent, the channels that are scanned, or a share
            of the model's; weight_groups, groups of them that share scan weights; chunk_size, lines per independent
            chunk; prefix, attend, or drop to leave class and register tokens out
    """

    keep: list[int | float | str] = dataclasses.field(default_factory=list)
    mixer_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def kept(self) -> Sequence[Any] | float | str:
        """Return `keep` as `gspn_vision.convert` takes it: one share, and the words `every 6`, stand in no list."""
        if self.keep and isinstance(self.keep[0], str):
            return " ".join(map(str, self.keep))
        if len(self.keep) == 1 and isinstance(self.keep[0], float):
            return self.keep[0]
        return self.keep


@dataclasses.dataclass(kw_only=True, frozen=True)
class ConvertConfig(MixerOptions, AnyModelOptions):
    """Every option of `gspn-vision convert`.

    Args:
        out: folder for the converted model
    """

    out: str = "converted"


@dataclasses.dataclass(kw_only=True, frozen=True)
class DistillConfig(MixerOptions, TrainingOptions):
    """Every option of `gspn-vision distill`.

    Args:
        teacher: vision transformer to learn from, a timm model's name, a run, a checkpoint or a timm folder
        model_kwargs: constructor arguments of a teacher by name that differ from the model's
        pretrained: load the pretrained weights of a teacher by name
        start_from: converted model to begin with, a run, a checkpoint or a timm folder; null converts the teacher
        data: images, whose labels are not used: a folder of images, or as of train
        data_root: folder that a timm data set is stored in
        split: of the data; null is train, or all images of a folder without splits
        image_size: height and width of the student's input; null is the teacher's
        teacher_image_size: height and width of the teacher's input, whose features are enlarged to the student's grid;
            null is image_size
        curriculum: heights and widths to learn at one after the other, such as 378 518 756 1036: the first from the
            teacher, each further one from the student of the one before, frozen, whose features are enlarged; null is
            image_size alone
        augment: random crops and mirror images
        crop_scale: least and largest area of the random crop
        steps: updates of the weights, in both stages together; of a curriculum at its first size, and without
            align_steps at each further one
        align_steps: updates of stage 1, in which each mixer learns for itself what the teacher's attention makes of its
            input
        lr: peak learning rate of stage 2
        align_lr: peak learning rate of stage 1
        warmup_steps: updates of linear warm-up in each stage; a tenth of them where these are not more
        loss: of stage 2, taps compares features after every mixer and block, last those after the last block alone
        adapters: compare taps through small MLPs, which are thrown away afterwards
        mixer_weight: of taps, weight of the features after mixers
        block_weight: of taps, weight of the features after blocks
        kl_weight: weight of the divergence of their softmaxes, beside the mean squared difference
        out: folder of the run
    """

    teacher: str
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False
    data: str
    data_root: str | None = None
    split: str | None = None
    image_size: ImageSize | None = None
    teacher_image_size: ImageSize | None = None
    curriculum: list[ImageSize] | None = None
    augment: bool = True
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.25, 1.0)
    steps: PositiveInt = 10_000
    align_steps: NonNegativeInt = 2_000
    lr: PositiveFloat = 5e-4
    align_lr: PositiveFloat = 2e-3
    warmup_steps: NonNegativeInt = 500
    weight_decay: NonNegativeFloat = 0.01
    loss: Literal["taps", "last"] = "taps"
    adapters: bool = False
    mixer_weight: NonNegativeFloat = 1.0
    block_weight: NonNegativeFloat = 1.0
    kl_weight: NonNegativeFloat = 0.0
    out: str = "distilled"

    def __post_init__(self) -> None:
        if self.align_steps > self.steps:
            raise ValueError(f"align_steps must be at most steps ({self.steps}), got {self.align_steps}")
        if self.loss == "last" and self.adapters:
            raise ValueError("adapters must be off with loss 'last', which compares the last features as they are")
        if self.loss == "taps" and self.mixer_weight == self.block_weight == 0:
            raise ValueError("mixer_weight or block_weight must be above 0, got 0 and 0")
        if self.curriculum is not None:
            for name in ("image_size", "teacher_image_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} must not be given with curriculum, got {getattr(self, name)}")
            if len(set(self.curriculum)) != len(self.curriculum) or not self.curriculum:
                raise ValueError(f"curriculum must be different sizes, got {[str(size) for size in self.curriculum]}")
            if len(self.curriculum) > 1 and self.align_steps == self.steps:
                raise ValueError(f"align_steps must be less than steps ({self.steps}) with curriculum, got as many")
        low, high = self.crop_scale
        if low > high:
            raise ValueError(f"crop_scale must be two rising numbers, got {[low, high]}")
        super().__post_init__()


@dataclasses.dataclass(kw_only=True, frozen=True)
class FeaturesConfig(AnyModelOptions):
    """Every option of `gspn-vision features`.

    Args:
        data: data set, as of train; or a folder of images in any folders, which have no classes then
        data_root: folder that a timm data set is stored in
        split: part of the data set; null is all images of a folder without splits
        pool: what is stored of an image, head what the classifier gets, class the class token, mean the mean of the
            image tokens, map all of these; all after the model's last norm
        image_size: height and width of the input; null is that of the model's preprocessing
        crop_pct: share of the image's side that is kept; null is that of the model's preprocessing
        batch_size: images per process and forward pass
        precision: of the forward passes (mixed precision)
        store_precision: of the features in the files
        shard_size: images per file
        workers: processes that load data, per process
        unreadable: stop at an image that cannot be read, or skip it
        device: auto takes the accelerator if any
        out: folder for the features
        progress: show progress bars
    """

    data: str
    data_root: str | None = None
    split: str | None = None
    pool: Literal["head", "class", "mean", "map"] = "head"
    image_size: ImageSize | None = None
    crop_pct: PositiveFloat | None = None
    batch_size: PositiveInt = 128
    precision: Precision = "fp32"
    store_precision: Literal["fp32", "fp16"] = "fp32"
    shard_size: PositiveInt = 10_000
    workers: NonNegativeInt = 4
    unreadable: Unreadable = "stop"
    device: Device = "auto"
    out: str = "features"
    progress: bool = True


@dataclasses.dataclass(kw_only=True, frozen=True)
class ProbeConfig:
    """Every option of `gspn-vision probe`.

    Args:
        data: folder of features, of images with classes, to learn from
        val_data: folder of features to measure on
        neighbors: images that vote in the nearest-neighbour classifier
        temperature: of their votes, exp(cosine / temperature)
        inverse_penalties: values to try of C, the inverse of the penalty on the linear classifier's weights; the best
            in a cross-validation counts
        seed: of the cross-validation's parts
    """

    data: str
    val_data: str
    neighbors: PositiveInt = 20
    temperature: PositiveFloat = 0.07
    inverse_penalties: list[PositiveFloat] = dataclasses.field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0])
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if not self.inverse_penalties:
            raise ValueError("inverse_penalties must have at least one number, got none")


@dataclasses.dataclass(kw_only=True, frozen=True)
class ExploreConfig(AnyModelOptions):
    """Every option of `gspn-vision explore`.

    Args:
        image: photograph to begin with; null is one of scikit-learn's
        image_size: height and width that photographs are resized to; null as of visualize
        device: auto takes the accelerator if any
        port: of the page on 127.0.0.1
        browser: open the page in a browser
    """

    image: str | None = None
    image_size: ImageSize | None = None
    device: Device = "auto"
    port: PositiveInt = 7860
    browser: bool = False
