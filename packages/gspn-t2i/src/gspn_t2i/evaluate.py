"""`evaluate`: FID, CLIP-FID and CLIP-T of images drawn for captions, or there already, by one process or several."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .files import write_text
from .generate import GenerateConfig, Generation, use_cpu
from .metrics import STATISTICS, Clip, Inception, Moments, frechet_distance, moments, read_statistics, save_statistics

Metric = Literal["fid", "clip_fid", "clip_t"]
METRICS: tuple[Metric, ...] = get_args(Metric)
SUFFIXES = (".png", ".jpg", ".jpeg")
# What captions are read from, by the suffix.
FORMS = {".json": "COCO's JSON of images and annotations", ".jsonl": "lines of JSON with file_name and text"}


@dataclasses.dataclass(kw_only=True, frozen=True)
class EvaluateConfig:
    """Every option of `gspn-t2i evaluate`.

    Args:
        pipeline: diffusers pipeline that draws an image of each caption, a folder or the name of one on the Hub
        adapter: GSPN adapter to mount on its UNet, a folder or the name of one on the Hub
        images: folder of images to measure instead; their names are the indices of their captions, as 000123.png
        captions: text file with a caption in a line, COCO's JSON (of each image the caption that comes first, in order
            of the images' ids), or metadata.jsonl of an image folder, or that folder
        count: how many captions; absent: all
        caption_seed: draw that many without replacement; absent: the first ones
        allow_missing: measure images though some are missing
        metrics: fid (InceptionV3), clip_fid (the same distance of CLIP's embeddings, not normalised), clip_t (mean
            cosine of the embeddings of image and caption)
        reference: folder of images for fid and clip_fid, or an .npz of their statistics: mu, sigma, clip_mu, clip_sigma
        save_reference: .npz to write the statistics of the reference to
        resolution: for fid, all images are cropped to their centre and resized to this side first
        inception_weights: local file; otherwise torch-fidelity downloads it
        clip_model: name in open_clip
        clip_pretrained: open_clip's name of the weights, which are downloaded, or a local file
        clip_config: folder of JSON files that define further CLIP models
        prefix: comes before each caption for clip_t
        metric_batch_size: images per process and forward pass of a metric's network
        out: folder of results.json, and of the images that are drawn
        negative_prompt: what not to draw
        height: in pixels; absent: the pipeline's own
        width: likewise
        steps: of the sampler
        guidance: scale of classifier-free guidance
        seed: image i is drawn with seed + i
        batch_size: images per forward pass; another one may change the last bits
        dtype: of weights and activations
        vae_tiling: decode in tiles, to save memory; auto does from 1024x1024 pixels on
        offload: keep on the accelerator only what computes, to save memory
        device: auto takes the accelerator if any
        progress: show progress bars
    """

    pipeline: str | None = None
    adapter: str | None = None
    images: str | None = None
    captions: str | None = None
    count: PositiveInt | None = None
    caption_seed: NonNegativeInt | None = None
    allow_missing: bool = False
    metrics: tuple[Metric, ...] = ("fid", "clip_t")
    reference: str | None = None
    save_reference: str | None = None
    resolution: PositiveInt = 256
    inception_weights: str | None = None
    clip_model: str = "ViT-g-14"
    clip_pretrained: str = "laion2b_s12b_b42k"
    clip_config: str | None = None
    prefix: str = "A photo depicts "
    metric_batch_size: PositiveInt = 32
    out: str = "evaluation"
    negative_prompt: str | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    steps: PositiveInt = 50
    guidance: NonNegativeFloat = 7.5
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    offload: Literal["none", "model", "sequential"] = "none"
    device: Literal["auto", "cpu"] = "auto"
    progress: bool = True


def _coco_captions(text: str) -> list[str]:
    data = json.loads(text)
    images = {image["id"] for image in data["images"]}
    first: dict[Any, str] = {}
    for annotation in data["annotations"]:
        if annotation["image_id"] not in images:
            raise ValueError(f"a caption is of image {annotation['image_id']!r}, which is not among its images")
        first.setdefault(annotation["image_id"], annotation["caption"])
    return [first[image] for image in sorted(first)]


def _folder_captions(text: str, folder: Path) -> list[str]:
    captions = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            entry = json.loads(line)
            if not (folder / entry["file_name"]).is_file():
                raise FileNotFoundError(f"line {number}: there is no image {entry['file_name']!r} in {folder}")
            captions.append(entry["text"])
    return captions


def read_captions(source: str, count: int | None = None, seed: int | None = None) -> list[str]:
    """Read captions; `EvaluateConfig` says from what, which and in what order.

    Raises:
        FileNotFoundError: there is no such file, or an image of metadata.jsonl does not exist.
        ValueError: it holds something else, an empty caption, no captions or fewer than `count`.
    """
    path = Path(source)
    if path.is_dir():
        path /= "metadata.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"captions: there is no file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            captions = _coco_captions(text)
        elif path.suffix == ".jsonl":
            captions = _folder_captions(text, path.parent)
        else:  # as `generate` reads prompts
            captions = [line for line in text.splitlines() if line.strip()]
        captions = [caption.strip() for caption in captions]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"captions: {path}, {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        form = FORMS.get(path.suffix, "text in UTF-8")
        reason = f"without {error}" if isinstance(error, LookupError) else error
        raise ValueError(f"captions: {path} must be {form} ({reason})") from error
    if not captions:
        raise ValueError(f"captions: {path} must hold captions, got none")
    if "" in captions:
        raise ValueError(f"captions: {path} must not hold empty ones, caption {captions.index('')} is")
    if count is not None and count > len(captions):
        raise ValueError(f"count must be at most the number of captions, {len(captions)}, got {count}")
    if seed is not None:  # RandomState's numbers do not change with numpy's version
        captions = [captions[place] for place in np.random.RandomState(seed).permutation(len(captions))]
    return captions[:count]


def numbered_images(folder: Path) -> dict[int, Path]:
    """Find the images whose names are numbers, by these.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are none, or two with one number.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"images: there is no folder {str(folder)!r}")
    found: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES and re.fullmatch("[0-9]+", file.stem):
            index = int(file.stem)
            if index in found:
                raise ValueError(f"images: {found[index].name} and {file.name} in {folder} have one index")
            found[index] = file
    if not found:
        raise ValueError(f"images: {folder} must hold images named by their index, as 000000.png, got none")
    return found


def choose_images(config: EvaluateConfig, captions: int) -> tuple[dict[int, Path], int]:
    """Find the images to measure, and how many are missing among them.

    Raises:
        FileNotFoundError: there is no such folder, or images are missing which must not.
        ValueError: there are none, or one of them has no caption.
    """
    found = numbered_images(Path(config.images or ""))
    highest = max(found)
    if config.captions is not None and config.count is None and highest >= captions:
        raise ValueError(f"images: {found[highest]} has no caption, {config.captions} holds {captions}")
    wanted = range(config.count or captions or highest + 1)
    missing = [index for index in wanted if index not in found]
    if missing and not config.allow_missing:
        raise FileNotFoundError(
            f"images: {len(missing)} of {len(wanted)} are missing in {config.images}, the first is "
            f"{missing[0]:06d}.png; allow_missing measures the others"
        )
    return {index: found[index] for index in wanted if index in found}, len(missing)


def check_options(config: EvaluateConfig) -> list[str]:
    """Return the metrics that compare with a reference; refuse options that do not go together.

    Raises:
        ValueError: it says which.
    """
    unknown = [metric for metric in config.metrics if metric not in METRICS]
    if unknown or not config.metrics:
        raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {unknown or 'none'}")
    if (config.pipeline is None) == (config.images is None):
        given = "neither" if config.images is None else "both"
        raise ValueError(f"either pipeline, to draw images, or images, to measure them, must be given, got {given}")
    if config.adapter is not None and config.pipeline is None:
        raise ValueError(f"adapter is for a pipeline to draw with, got {config.adapter!r} and no pipeline")
    if config.captions is None and (config.pipeline is not None or "clip_t" in config.metrics):
        raise ValueError(f"captions must be given {'for clip_t' if config.pipeline is None else 'to draw images of'}")
    distances: list[str] = [metric for metric in STATISTICS if metric in config.metrics]
    if distances and config.reference is None:
        raise ValueError(f"reference must be given for {distances[0]}")
    if config.save_reference is not None:
        if not config.save_reference.endswith(".npz"):
            raise ValueError(f"save_reference must be an .npz, got {config.save_reference!r}")
        if not distances or str(config.reference).endswith(".npz"):
            raise ValueError("save_reference needs fid or clip_fid among the metrics, and a folder as reference")
    return distances


def list_references(source: str) -> list[Path]:
    """List the images below a folder, in order; none of an .npz.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the folder holds fewer than two.
    """
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return []
    if not path.is_dir():
        raise FileNotFoundError(f"reference: there is no folder or .npz {source!r}")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise ValueError(f"reference: {source} must hold at least 2 PNG or JPEG files, got {len(files)}")
    return files


class Evaluation:
    """Images to draw or to measure, references and networks: all opened and checked, nothing computed yet.

    Raises:
        FileNotFoundError, ValueError: an option, a file, the pipeline or the adapter does not suit.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.distances = check_options(config)
        self.captions: list[str] = []
        if config.captions is not None:
            self.captions = read_captions(config.captions, config.count, config.caption_seed)
        self.files: dict[int, Path] = {}
        self.missing = 0
        if config.images is not None:
            self.files, self.missing = choose_images(config, len(self.captions))
        images, least = len(self.captions if config.images is None else self.files), 2 if self.distances else 1
        if images < least:
            raise ValueError(f"{(self.distances or config.metrics)[0]} needs at least {least} images, got {images}")
        self.references = list_references(str(config.reference)) if self.distances else []
        self.state = PartialState(cpu=use_cpu(config.device))
        self.device = self.state.device if config.device == "auto" else torch.device("cpu")
        self.networks: dict[str, Inception | Clip] = {}
        with self.state.local_main_process_first():  # which alone downloads
            if "fid" in config.metrics:
                self.networks["fid"] = Inception(config.resolution, config.inception_weights)
            if {"clip_fid", "clip_t"} & set(config.metrics):
                clip = Clip(config.clip_model, config.clip_pretrained, config.clip_config)
                self.networks |= {metric: clip for metric in config.metrics if metric != "fid"}
        self.made = {"resolution": config.resolution} if "fid" in self.distances else {}
        self.made |= {"clip_model": config.clip_model} if "clip_fid" in self.distances else {}
        self.targets: dict[str, Moments] = {}
        if self.distances and not self.references:
            widths = {metric: self.networks[metric].width for metric in self.distances}
            self.targets = read_statistics(Path(str(config.reference)), widths, self.made)
        self.generation = None if config.pipeline is None else Generation(self._generate_config(config.pipeline))

    def _generate_config(self, pipeline: str) -> GenerateConfig:
        names = {field.name for field in dataclasses.fields(GenerateConfig)}
        shared = {name: value for name, value in vars(self.config).items() if name in names}
        out = str(Path(self.config.out) / "images")
        return GenerateConfig(**shared | {"pipeline": pipeline, "prompt": self.captions, "out": out})

    @torch.inference_mode()
    def _extract(self, embed: Callable[[slice], Tensor], count: int, title: str) -> Tensor:
        """Rows (count, F) in float32 on the CPU, in order, of which each process computes a part."""
        share = -(-count // self.state.num_processes)
        # A process without a share computes the last row, for a shape to pad; only full shares stand before it.
        start = min(self.state.process_index * share, count - 1)
        stop = min(start + share, count)
        parts = []
        show = self.config.progress and self.state.is_main_process
        with (
            tqdm(total=stop - start, desc=title, leave=False, disable=not show) as bar,
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            for first in range(start, stop, self.config.metric_batch_size):
                part = slice(first, min(first + self.config.metric_batch_size, stop))
                try:
                    parts.append(embed(part).float().cpu())
                except torch.OutOfMemoryError as error:
                    raise MemoryError(f"out of memory; a smaller metric_batch_size saves some ({error})") from error
                bar.update(part.stop - part.start)
        own = torch.cat(parts)
        padded = F.pad(own, (0, 0, 0, share - len(own))).to(self.state.device)
        features: Tensor = gather(padded)[:count].cpu()
        if not features.isfinite().all():
            raise ValueError(f"features of {title} must be finite, got NaN or infinity; see the network's weights")
        return features

    def _image_features(self, network: Inception | Clip, files: Sequence[Path], title: str) -> Tensor:
        with ThreadPoolExecutor() as pool:

            def embed(part: slice) -> Tensor:
                images: Tensor = network(torch.stack(list(pool.map(network.prepare, files[part]))).to(self.device))
                return images

            return self._extract(embed, len(files), title)

    def _measure_references(self) -> None:
        for metric in self.distances:
            network = self.networks[metric].to(self.device)
            features = self._image_features(network, self.references, f"references, {metric}")
            network.cpu()
            if self.state.is_main_process:
                self.targets[metric] = moments(features)
        if self.config.save_reference is not None and self.state.is_main_process:
            made = {"count": len(self.references), **self.made}
            save_statistics(Path(self.config.save_reference), self.targets, made)

    def _figures(self) -> dict[str, float]:
        """The figures, on the main process; nothing on others."""
        features: dict[Inception | Clip, Tensor] = {}
        figures: dict[str, float] = {}
        files = list(self.files.values())
        for metric in METRICS:
            if metric not in self.config.metrics:
                continue
            network = self.networks[metric].to(self.device)
            if network not in features:
                features[network] = self._image_features(network, files, f"images, {metric}")
            if metric == "clip_t":
                figures[metric] = self._mean_cosine(features[network])
            elif self.state.is_main_process:
                rows = features[network]
                if len(rows) <= rows.shape[1]:
                    print(
                        f"evaluate: {metric} is biased, its covariance singular: {len(rows)} images, "
                        f"{rows.shape[1]} features",
                        file=sys.stderr,
                    )
                figures[metric] = frechet_distance(moments(rows), self.targets[metric])
        return figures

    def _mean_cosine(self, features: Tensor) -> float:
        network = self.networks["clip_t"]
        assert isinstance(network, Clip)
        texts = [self.config.prefix + self.captions[index] for index in self.files]
        embeddings = self._extract(lambda part: network.embed_texts(texts[part]), len(texts), "captions")
        return F.cosine_similarity(features.double(), embeddings.double()).mean().item()

    def run(self) -> dict[str, Any]:
        """Draw what is to be drawn, measure, write results.json; see `evaluate`.

        Raises:
            ValueError: the folder holds images of other settings, or an image cannot be read.
            MemoryError: the device's memory is not enough; the message says what saves some.
        """
        if self.references:
            self._measure_references()  # before drawing, which takes long: one of them may not be readable
        result: dict[str, Any] = {}
        if self.generation is not None:
            result["drawn"] = self.generation.run()["drawn"]
            self.files = {index: self.generation.out / f"{index:06d}.png" for index in range(self.generation.count)}
            self.generation = None  # and its memory
        figures = self._figures()
        if not self.state.is_main_process:
            return {}
        result |= figures
        result |= {"images": len(self.files), "missing": self.missing, "references": len(self.references) or None}
        packages = ("torch", "torch-fidelity", "open-clip-torch", "pillow", "diffusers")
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **result,
            "settings": dataclasses.asdict(self.config),
            "versions": {name: version(name) for name in packages},
        }
        out = Path(self.config.out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "results.json", json.dumps(record, indent=1) + "\n")
        return record


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Draw images as configured, or take those that are there, and measure them.

    Returns:
        On the main process what results.json holds: the figures of `metrics`; the counts of `images` measured, images
        `missing`, `references` (None of statistics) and images `drawn` now; `settings`, `versions` and the `date`. On
        others, nothing.

    Raises:
        FileNotFoundError, ValueError: an option, a file, the pipeline or the adapter does not suit.
        MemoryError: the device's memory is not enough.
    """
    return Evaluation(config).run()
