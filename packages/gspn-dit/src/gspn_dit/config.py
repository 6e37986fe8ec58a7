"""The options of `gspn-dit`'s commands; their docstrings are the help."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gspn_core.runs.options import Device, ImageSize, Precision, TrainingOptions, Unreadable, configs_folder

CONFIGS = configs_folder(__file__)

Metric = Literal["fid", "sfid", "inception_score", "precision", "recall", "accuracy"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclasses.dataclass(kw_only=True, frozen=True)
class ExtractConfig:
    """Every option of `gspn-dit extract`.

    Args:
        data: `digits` (scikit-learn's), a folder with a subfolder per class, possibly in `train/` and `val/`, a folder
            written by `save_to_disk`, or any Hugging Face image data set
        vae: diffusers VAE, a folder or the name of one on the Hub
        out: folder of the features; an extraction that was interrupted is continued
        split: of the data; null is train, or the only one
        image_column: column of images; null is the only one, or `image`
        label_column: column of classes; null is the only one, or `label`
        image_size: height and width that images are resized and cropped to, as ADM does
        unreadable: stop at an image that cannot be read, or skip it, the next one taking its place
        batch_size: images per process and forward pass; another one may change the last bits
        shard_size: images in a file
        workers: processes that load data, per process
        store_precision: of the stored moments
        precision: of the forward passes
        device: auto takes the accelerator if any
        progress: show progress bars
    """

    data: str
    vae: str
    out: str
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: ImageSize = dataclasses.field(default_factory=lambda: ImageSize(256, 256))
    unreadable: Unreadable = "stop"
    batch_size: PositiveInt = 32
    shard_size: PositiveInt = 1024
    workers: NonNegativeInt = 4
    store_precision: Literal["fp32", "fp16"] = "fp32"
    precision: Precision = "fp32"
    device: Device = "auto"
    progress: bool = True


@dataclasses.dataclass(kw_only=True, frozen=True)
class TrainConfig(TrainingOptions):
    """Every option of `gspn-dit train`.

    Args:
        model: architecture, such as GSPN-XL/2, or GSPN2-XL/2 with GSPN-2 mixers
        model_kwargs: constructor arguments that differ from the architecture's, such as {hidden_size: 128}
        objective: predict noise and its variance, or the velocity of a straight path (flow matching)
        data: folder that `gspn-dit extract` wrote, or, to train on pixels, `digits` (scikit-learn's), a folder with a
            subfolder per class or any Hugging Face image data set
        split: of a data set of images; null is train, or the only one
        image_size: height and width of the pixels trained on; null for digits, which are 8x8, and for features
        vae: diffusers VAE of the features, to decode samples during training; checked against the features
        out: folder of the run
        steps: updates of the weights
        warmup_steps: updates of linear warm-up; a tenth of the steps where these are not more
        betas: of AdamW
        times: of the flow, uniform, or logit-normal as Stable Diffusion 3 has them
        time_shift: of the flow, shifts times towards noise, t' = s t / (1 + (s - 1) t); 1 does not
        label_dropout: share of labels replaced by the null class, for classifier-free guidance
        compile: compile the blocks with torch.compile
        average_every: updates between snapshots of two power-function averages of the weights, of which `average` makes
            one of any length; null keeps none
        sample_every: updates between grids of samples; null draws none
        sample_count: images in a grid
        sampler_steps: of the sampler
        guidance: scale of classifier-free guidance; 1 is none
        fid_every: updates between measurements of the FID of samples, drawn as for the grid; null measures none
        fid_count: samples to measure
        reference: real images for the FID, as of evaluate
        extractor: network whose features the FID compares, as of evaluate
        extractor_weights: local file of it
        extractor_kwargs: further arguments of a timm model
    """

    model: str = "GSPN-B/2"
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: Literal["noise", "flow"] = "noise"
    data: str
    split: str | None = None
    image_size: ImageSize | None = None
    vae: str | None = None
    out: str = "runs/gspn-dit"
    steps: PositiveInt = 400_000
    batch_size: PositiveInt = 256
    warmup_steps: NonNegativeInt = 6_250
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.999)
    times: Literal["uniform", "logit_normal"] = "uniform"
    time_shift: PositiveFloat = 1.0
    label_dropout: ClosedUnitInterval = 0.1
    compile: bool = False
    average_every: PositiveInt | None = None
    sample_every: PositiveInt | None = 1_000
    sample_count: PositiveInt = 16
    sampler_steps: PositiveInt = 50
    guidance: NonNegativeFloat = 4.0
    fid_every: PositiveInt | None = None
    fid_count: PositiveInt = 10_000
    reference: str | None = None
    extractor: str = "inception"
    extractor_weights: str | None = None
    extractor_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.objective == "noise" and (self.times, self.time_shift) != ("uniform", 1.0):
            raise ValueError(f"times and time_shift are of the objective flow, got {self.times}, {self.time_shift}")
        if self.fid_count < 2:
            raise ValueError(f"fid_count must be at least 2, got {self.fid_count}")
        super().__post_init__()


@dataclasses.dataclass(kw_only=True, frozen=True)
class AverageConfig:
    """Every option of `gspn-dit average`.

    Args:
        checkpoint: a run that was trained with average_every
        out: folder of the model
        length: deviation of the average's profile relative to the updates so far, above 0 and below 0.28
        step: updates after which; null is those of the last snapshot
        progress: show progress bars
    """

    checkpoint: str
    out: str
    length: PositiveFloat = 0.1
    step: PositiveInt | None = None
    progress: bool = True


@dataclasses.dataclass(kw_only=True, frozen=True)
class SampleConfig:
    """Every option of `gspn-dit sample`.

    Args:
        checkpoint: a run, a checkpoint or a diffusers folder
        weights: averaged weights or plain ones; auto takes the averaged if there are any
        vae: diffusers VAE that decodes the latents
        out: folder of the images; an unfinished one is continued
        count: images
        classes: numbers or names, which the images take in turn; null is all classes
        sampler: ancestral and ddim for noise; euler, heun, sde (stochastic) and dopri5 (adaptive steps) for velocity;
            auto is ancestral or euler
        sampler_steps: of the sampler
        guidance: scale of classifier-free guidance; 1 is none
        guidance_interval: times, from 0 (data) to 1 (noise), that guidance applies to
        time_shift: of the flow's sampler, as of train; null is the training's
        guidance_channels: latent channels it applies to, null is all; published samples of DiT used the first 3
        image_size: height and width of the images in pixels; null is what the model was trained at
        batch_size: images per process and forward pass; another one may change the last bits
        seed: image i is drawn with seed + i
        precision: of the forward passes
        device: auto takes the accelerator if any
        npz: write all images to samples.npz, as ADM's evaluation reads them
        grid: images in grid.png; null writes none
        progress: show progress bars
    """

    checkpoint: str
    weights: Literal["auto", "ema", "model"] = "auto"
    vae: str | None = None
    out: str = "samples"
    count: PositiveInt = 64
    classes: list[int | str] | None = None
    sampler: Literal["auto", "ancestral", "ddim", "euler", "heun", "sde", "dopri5"] = "auto"
    sampler_steps: PositiveInt = 250
    guidance: NonNegativeFloat = 4.0
    guidance_interval: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.0, 1.0)
    time_shift: PositiveFloat | None = None
    guidance_channels: PositiveInt | None = None
    image_size: ImageSize | None = None
    batch_size: PositiveInt = 32
    seed: NonNegativeInt = 0
    precision: Precision = "fp32"
    device: Device = "auto"
    npz: bool = False
    grid: PositiveInt | None = 64
    progress: bool = True


@dataclasses.dataclass(kw_only=True, frozen=True)
class EvaluateConfig:
    """Every option of `gspn-dit evaluate`.

    Args:
        samples: .npz with `arr_0`, uint8 (N, H, W, 1 or 3) or (N, H, W), or a folder of PNG and JPEG files, as
            OUT/images of sample
        reference: the same, `digits` or `digits:FIRST:END`; an .npz may hold the statistics mu, sigma, mu_s, sigma_s
            of Inception beside the images or in their place
        labels: classes that the samples were asked for, in their order (of a folder: of the sorted paths): a JSON
            list, an .npy, or an .npz with `labels`
        extractor: `inception`, or `timm:NAME` for any timm model; `timm:local-dir:FOLDER` for a saved one
        extractor_weights: local file; otherwise the extractor's own weights are read or downloaded
        extractor_kwargs: further arguments of a timm model, such as num_classes
        extractor_import: modules that register timm models, imported first
        extractor_mean: of a timm model, per channel of images from 0 to 1; null is its own
        extractor_std: of a timm model, likewise
        extractor_size: side that images are resized to for a timm model; null is its own, 0 leaves them as they are
        batch_size: images per process and forward pass
        metrics: what to compute
        precision_reference: references for precision and recall, the first ones
        neighbors: k of precision and recall
        inception_split: images in one consecutive split of the Inception score
        csv: table that a row is added to
        out: JSON file for the results and these options
        device: auto takes the accelerator if any
        progress: show progress bars
    """

    samples: str
    reference: str
    labels: str | None = None
    extractor: str = "inception"
    extractor_weights: str | None = None
    extractor_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    extractor_import: tuple[str, ...] = ()
    extractor_mean: tuple[float, ...] | None = None
    extractor_std: tuple[float, ...] | None = None
    extractor_size: NonNegativeInt | None = None
    batch_size: PositiveInt = 64
    metrics: tuple[Metric, ...] = METRICS
    precision_reference: PositiveInt = 10000
    neighbors: PositiveInt = 3
    inception_split: PositiveInt = 5000
    csv: str | None = None
    out: str | None = None
    device: Device = "auto"
    progress: bool = True
