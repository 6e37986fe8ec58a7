"""Options of the commands; those of `upscale` are in `scaling`. Imports neither torch nor diffusers: help is quick."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gspn_core.runs.options import Device, ImageSize, Precision, TrainingOptions

Choice = Literal["auto", "always", "never"]
Metric = Literal["fid", "clip_fid", "clip_t"]
Mixer = Literal["softmax", "gspn", "gspn2"]
_DEFAULT_SIZE = ImageSize(512, 512)
METRICS: tuple[Metric, ...] = get_args(Metric)


def check_multiples(name: str, size: ImageSize | None) -> None:
    """Refuse an image size that the autoencoder cannot halve three times.

    Raises:
        ValueError: a side is not a multiple of 8.
    """
    if size is not None and any(side % 8 for side in size):
        raise ValueError(f"{name} must be multiples of 8, got {size}")


@dataclasses.dataclass(kw_only=True, frozen=True)
class PipelineOptions:
    """Which of a pipeline's weights are loaded.

    Args:
        variant: of the pipeline's weights, such as fp16
        revision: of a pipeline on the Hub
        pipeline_config: folder or name on the Hub of a pipeline like that in a .safetensors file; null is the usual one
    """

    variant: str | None = None
    revision: str | None = None
    pipeline_config: str | None = None


@dataclasses.dataclass(kw_only=True, frozen=True)
class DistillConfig(PipelineOptions, TrainingOptions):
    """Every option of `gspn-t2i distill`.

    Args:
        pipeline: teacher, a diffusers pipeline of Stable Diffusion 1.5, 2.x or SDXL: a folder, a name on the Hub, or a
            .safetensors file
        start_from: GSPN adapter to begin with, a folder or a name on the Hub; null is a new one
        mixer: of a new adapter, weights per channel (gspn) or shared in a proxy space (gspn2)
        proxy: scanned channels of gspn2 as a share of the attention's
        bottleneck: channels that weights are made from, as a share of the tokens'
        chunk_size: lines per independent chunk; null scans the whole image
        init: start from the attention's projections, or at random
        keep_attention: parts of names of self-attentions that stay, such as mid_block
        data: images with captions: a folder with metadata.jsonl, WebDataset shards (shards/*.tar), a Hugging Face data
            set, or a finished cache
        split: of the data set; null is train
        image_column: of the data set; null is the only one, or one of the usual names
        text_column: likewise; json.caption is the entry caption of a column json
        unreadable: stop at an image that cannot be read, or take the next readable one and its caption instead
        image_size: of all images
        random_crop: cut training images at random instead of at their centre
        buckets: sizes of training images instead of image_size, each image taking the one next to its shape, and each
            update images of one size
        val_data: images with captions for a validation loss; null is those of data, of which val_split names a part
        val_split: of the data set of val_data
        validate_every: updates between validations; null makes none
        cache: folder to encode all images and captions into first, and to train from
        out: folder of the run
        noise_weight: of the error against the noise, or the velocity
        teacher_weight: of the error against the teacher's prediction
        feature_weight: of the error against the outputs of the teacher's self-attentions
        snr_gamma: limit of min-SNR weights; null weights all times alike
        caption_dropout: share of captions dropped, for classifier-free guidance
        steps: updates of the weights
        warmup_steps: updates of linear warm-up; where the run is not longer, a tenth of it
        betas: of AdamW
        use_8bit_adam: keep AdamW's moments in 8 bits, by the package bitsandbytes
        precision: of computation, and of the frozen weights
        sample_every: updates between grids of samples; null draws none
        sample_prompts: prompts of the samples
        sampler_steps: of the samples
        guidance: of the samples, scale of classifier-free guidance
    """

    pipeline: str
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
    image_size: ImageSize = _DEFAULT_SIZE
    random_crop: bool = False
    buckets: list[ImageSize] = dataclasses.field(default_factory=list)
    val_data: str | None = None
    val_split: str | None = None
    validate_every: PositiveInt | None = None
    cache: str | None = None
    out: str = "runs/t2i"
    noise_weight: NonNegativeFloat = 1.0
    teacher_weight: NonNegativeFloat = 0.5
    feature_weight: NonNegativeFloat = 0.5
    snr_gamma: PositiveFloat | None = None
    caption_dropout: ClosedUnitInterval = 0.1
    steps: PositiveInt = 100_000
    batch_size: PositiveInt = 12
    warmup_steps: NonNegativeInt = 1_000
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.999)
    use_8bit_adam: bool = False
    sample_every: PositiveInt | None = 1_000
    sample_prompts: list[str] = dataclasses.field(default_factory=list)
    sampler_steps: PositiveInt = 30
    guidance: NonNegativeFloat = 7.5

    def __post_init__(self) -> None:
        if self.noise_weight == self.teacher_weight == self.feature_weight == 0:
            raise ValueError("one of noise_weight, teacher_weight and feature_weight must be above 0, all are 0")
        if max(self.betas) >= 1:
            raise ValueError(f"betas must be below 1, got {self.betas}")
        if self.cache is not None and (self.buckets or self.random_crop):
            raise ValueError(
                f"cache must be unset with buckets or random_crop, it has one cut of each image, got {self.cache!r}"
            )
        for name in ("val_data", "val_split"):
            if getattr(self, name) is not None and self.validate_every is None:
                raise ValueError(f"{name} is for a validation, set validate_every; got {getattr(self, name)!r} alone")
        if self.validate_every is not None and self.val_data is None and self.val_split is None:
            raise ValueError(f"validate_every needs val_data or val_split, got {self.validate_every} alone")
        check_multiples("image_size", self.image_size)
        for size in self.buckets:
            check_multiples("buckets", size)
        super().__post_init__()


@dataclasses.dataclass(kw_only=True, frozen=True)
class DrawingOptions(PipelineOptions):
    """How images are drawn.

    Args:
        adapter: GSPN adapter to mount on the pipeline's UNet, a folder or a name on the Hub
        lora: LoRAs to load, each a file, a folder, or a name or file on the Hub, as owner/name/file.safetensors
        lora_scales: of each LoRA; empty is 1
        scheduler: class of diffusers that samples, such as DPMSolverMultistepScheduler; null is the pipeline's
        scheduler_kwargs: arguments of the scheduler that differ from the pipeline's, such as {use_karras_sigmas: true}
        negative_prompt: what not to draw
        image_size: of drawn images, multiples of 8; null is the pipeline's own
        sampler_steps: of the sampler
        guidance: scale of classifier-free guidance
        seed: image i is drawn with seed + i
        precision: of weights and activations; null is fp16 on an accelerator and fp32 on the CPU
        vae_tiling: decode in tiles, to save memory; auto does above 1024x1024 pixels
        offload: keep on the accelerator only what computes, to save memory
        device: auto takes the accelerator if any
        progress: show progress bars
    """

    adapter: str | None = None
    lora: list[str] = dataclasses.field(default_factory=list)
    lora_scales: list[float] = dataclasses.field(default_factory=list)
    scheduler: str | None = None
    scheduler_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    negative_prompt: str | None = None
    image_size: ImageSize | None = None
    sampler_steps: PositiveInt = 50
    guidance: NonNegativeFloat = 7.5
    seed: NonNegativeInt = 0
    precision: Precision | None = None
    vae_tiling: Choice = "auto"
    offload: Literal["none", "model", "sequential", "group"] = "none"
    device: Device = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        check_multiples("image_size", self.image_size)
        if self.lora_scales and len(self.lora_scales) != len(self.lora):
            raise ValueError(f"lora_scales must be one of each LoRA, {len(self.lora)}, got {self.lora_scales}")


@dataclasses.dataclass(kw_only=True, frozen=True)
class GenerateConfig(DrawingOptions):
    """Every option of `gspn-t2i generate`.

    Args:
        pipeline: diffusers pipeline, a folder, a name on the Hub, or a .safetensors file
        prompts: what to draw
        prompt_file: text file of further prompts, one in a line
        controlnet: ControlNet to draw with, a folder or a name on the Hub
        control_image: image for the ControlNet, such as edges or depth; it is resized to image_size
        control_scale: of what the ControlNet adds
        out: folder of the images; those that are there are kept, and further prompts are drawn beside them
        images_per_prompt: images of each prompt
        batch_size: images per process and forward pass; another one may change the last bits
    """

    pipeline: str
    prompts: list[str] = dataclasses.field(default_factory=list)
    prompt_file: str | None = None
    controlnet: str | None = None
    control_image: str | None = None
    control_scale: NonNegativeFloat = 1.0
    out: str = "generated"
    images_per_prompt: PositiveInt = 1
    batch_size: PositiveInt = 1

    def __post_init__(self) -> None:
        if (self.controlnet is None) != (self.control_image is None):
            raise ValueError(
                f"controlnet and control_image need each other, got {self.controlnet!r} and {self.control_image!r}"
            )
        super().__post_init__()


@dataclasses.dataclass(kw_only=True, frozen=True)
class EvaluateConfig(DrawingOptions):
    """Every option of `gspn-t2i evaluate`.

    Args:
        pipeline: diffusers pipeline that draws an image of each caption, as of `generate`
        samples: folder of images to measure instead; their names are the indices of their captions, as 000123.png
        captions: text file with a caption in a line, COCO's JSON (the first caption of each image, in order of the
            images' ids), or metadata.jsonl of an image folder, or that folder
        count: number of captions; null is all
        caption_seed: draw that many without replacement; null is the first ones
        allow_missing: measure the images that are there though some are missing
        metrics: fid (InceptionV3), clip_fid (the same distance of CLIP's embeddings, not normalised), clip_t (mean
            cosine of the embeddings of image and caption)
        reference: folder of images for fid and clip_fid, or an .npz of their statistics: mu, sigma, clip_mu, clip_sigma
        save_reference: .npz to write the statistics of the reference to
        fid_size: for fid, all images are cropped to their centre and resized to this side first
        inception_weights: local file; null is torch-fidelity downloads it
        clip_model: name in open_clip
        clip_pretrained: open_clip's name of the weights, which are downloaded, or a local file
        clip_config: folder of JSON files that define further CLIP models
        prefix: comes before each caption for clip_t
        metric_batch_size: images per process and forward pass of a metric's network
        out: folder of results.json and of the drawn images
        batch_size: images per process and forward pass; another one may change the last bits
        precision: of the pipeline's weights and activations, null is fp16 on an accelerator and fp32 on the CPU;
            metrics are measured in fp32
    """

    pipeline: str | None = None
    samples: str | None = None
    captions: str | None = None
    count: PositiveInt | None = None
    caption_seed: NonNegativeInt | None = None
    allow_missing: bool = False
    metrics: tuple[Metric, ...] = ("fid", "clip_t")
    reference: str | None = None
    save_reference: str | None = None
    fid_size: PositiveInt = 256
    inception_weights: str | None = None
    clip_model: str = "ViT-g-14"
    clip_pretrained: str = "laion2b_s12b_b42k"
    clip_config: str | None = None
    prefix: str = "A photo depicts "
    metric_batch_size: PositiveInt = 32
    out: str = "evaluation"
    batch_size: PositiveInt = 1

    @property
    def distances(self) -> list[Metric]:
        """The metrics that compare with a reference."""
        return [metric for metric in ("fid", "clip_fid") if metric in self.metrics]

    def __post_init__(self) -> None:
        unknown = [metric for metric in self.metrics if metric not in METRICS]
        if unknown or not self.metrics:
            raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {unknown or 'none'}")
        if (self.pipeline is None) == (self.samples is None):
            number = "neither" if self.samples is None else "both"
            raise ValueError(f"either pipeline, to draw images, or samples, to measure them, must be set, got {number}")
        if self.adapter is not None and self.pipeline is None:
            raise ValueError(f"adapter is for a pipeline to draw with, got {self.adapter!r} and no pipeline")
        if self.captions is None and (self.pipeline is not None or "clip_t" in self.metrics):
            raise ValueError(f"captions must be set {'for clip_t' if self.pipeline is None else 'to draw images of'}")
        if self.distances and self.reference is None:
            raise ValueError(f"reference must be set for {self.distances[0]}")
        if self.save_reference is not None:
            if not self.save_reference.endswith(".npz"):
                raise ValueError(f"save_reference must be an .npz, got {self.save_reference!r}")
            if not self.distances or str(self.reference).endswith(".npz"):
                raise ValueError("save_reference needs fid or clip_fid among the metrics, and a folder as reference")
        super().__post_init__()


@dataclasses.dataclass(kw_only=True, frozen=True)
class BenchmarkConfig:
    """Every option of `gspn-t2i benchmark`.

    Args:
        family: architecture, at its true size
        image_sizes: multiples of 8
        mixers: to compare
        chunk_size: lines per independent chunk of the mixers; null scans the whole image
        batch_size: images; 2 is what guidance needs
        precision: of weights and activations
        measure_up_to: pixels of the largest image that is run; larger ones are only counted
        sampler_steps: steps of the sampler for a whole image
        generation: run whole images too
        repeats: timed steps, of which the median is shown, after one that is not timed
        device: auto takes the accelerator if any
        out: JSON file for the results
        plot: PNG file for a plot of them
        progress: show progress bars
    """

    family: Literal["sd15", "sdxl"] = "sdxl"
    image_sizes: tuple[ImageSize, ...] = (
        *(ImageSize(side, side) for side in (512, 1024, 2048, 4096, 8192)),
        ImageSize(16384, 8192),
    )
    mixers: tuple[Mixer, ...] = ("softmax", "gspn", "gspn2")
    chunk_size: PositiveInt | None = 4
    batch_size: PositiveInt = 1
    precision: Precision = "bf16"
    measure_up_to: NonNegativeInt = 1024 * 1024
    sampler_steps: PositiveInt = 30
    generation: bool = False
    repeats: PositiveInt = 10
    device: Device = "auto"
    out: str | None = None
    plot: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.image_sizes or not self.mixers:
            raise ValueError("image_sizes and mixers must not be empty")
        for size in self.image_sizes:
            check_multiples("image_sizes", size)


@dataclasses.dataclass(kw_only=True, frozen=True)
class TinyConfig:
    """Every option of `gspn-t2i tiny`.

    Args:
        family: layout of Stable Diffusion 1.5 or of SDXL
        out: folder of the pipeline, new or empty
        seed: of the random weights
    """

    family: Literal["sd15", "sdxl"]
    out: str
    seed: NonNegativeInt = 0
