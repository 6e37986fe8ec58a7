"""`evaluate`: FID, CLIP-FID and CLIP-T of images drawn for captions, or there already, by one process or several."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gspn_core.runs.errors import explaining_memory
from gspn_core.runs.files import write_json
from gspn_core.runs.options import to_dict

from .config import METRICS, EvaluateConfig, GenerateConfig
from .generate import Generation
from .metrics import Clip, Inception, Moments, frechet_distance, moments, read_statistics, save_statistics
from .pairs import choose_images, list_references, read_captions
from .pipelines import open_processes

_PACKAGES = ("torch", "torch-fidelity", "open-clip-torch", "pillow", "diffusers")


class Evaluation:
    """Images to draw or to measure, references and networks: all opened and checked, nothing computed yet.

    Raises:
        FileNotFoundError, ValueError: an option, a file, the pipeline or the adapter does not fit.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.captions: list[str] = []
        if config.captions is not None:
            self.captions = read_captions(config.captions, config.count, config.caption_seed)
        self.files: dict[int, Path] = {}
        self.missing = 0
        if config.samples is not None:
            self.files, self.missing = choose_images(config, len(self.captions))
        images, least = len(self.captions if config.samples is None else self.files), 2 if config.distances else 1
        if images < least:
            raise ValueError(f"{(config.distances or config.metrics)[0]} needs at least {least} images, got {images}")
        self.references = list_references(str(config.reference)) if config.distances else []
        self.state, self.device = open_processes(config.device)
        with self.state.local_main_process_first():  # which alone downloads
            self.networks = self._load_networks()
        # What statistics depend on, to be stored with them and compared.
        self.origin = {"fid_size": config.fid_size} if "fid" in config.distances else {}
        self.origin |= {"clip_model": config.clip_model} if "clip_fid" in config.distances else {}
        self.targets: dict[str, Moments] = {}
        if config.distances and not self.references:
            widths = {metric: self.networks[metric].width for metric in config.distances}
            self.targets = read_statistics(Path(str(config.reference)), widths, self.origin)
        self.generation = None if config.pipeline is None else Generation(self._generate_config(config.pipeline))

    def _load_networks(self) -> dict[str, Inception | Clip]:
        config = self.config
        networks: dict[str, Inception | Clip] = {}
        if "fid" in config.metrics:
            networks["fid"] = Inception(config.fid_size, config.inception_weights)
        if {"clip_fid", "clip_t"} & set(config.metrics):
            clip = Clip(config.clip_model, config.clip_pretrained, config.clip_config)
            networks |= {metric: clip for metric in config.metrics if metric != "fid"}
        return networks

    def _generate_config(self, pipeline: str) -> GenerateConfig:
        names = {field.name for field in dataclasses.fields(GenerateConfig)}
        shared = {name: value for name, value in vars(self.config).items() if name in names}
        return GenerateConfig(**shared | {"pipeline": pipeline, "prompts": self.captions})

    @torch.inference_mode()
    def _extract(self, embed: Callable[[slice], Tensor], count: int, title: str) -> Tensor:
        """Return rows (count, F) in float32 on the CPU, in order; each process computes a part."""
        share = -(-count // self.state.num_processes)
        # A process without a share computes the last row, for a shape to pad; only full shares stand before it.
        start = min(self.state.process_index * share, count - 1)
        stop = min(start + share, count)
        parts = []
        batch_size, show = self.config.metric_batch_size, self.config.progress and self.state.is_main_process
        with (
            explaining_memory({"--metric-batch-size 1": batch_size > 1}, "another device"),
            tqdm(total=stop - start, desc=title, leave=False, disable=not show) as bar,
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            for first in range(start, stop, batch_size):
                part = slice(first, min(first + batch_size, stop))
                parts.append(embed(part).float().cpu())
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
                features: Tensor = network(torch.stack(list(pool.map(network.prepare, files[part]))).to(self.device))
                return features

            return self._extract(embed, len(files), title)

    def _measure_references(self) -> None:
        for metric in self.config.distances:
            network = self.networks[metric].to(self.device)
            features = self._image_features(network, self.references, f"references, {metric}")
            network.cpu()
            if self.state.is_main_process:
                self.targets[metric] = moments(features)
        if self.config.save_reference is not None and self.state.is_main_process:
            origin = {"count": len(self.references), **self.origin}
            save_statistics(Path(self.config.save_reference), self.targets, origin)

    def _figures(self) -> dict[str, float]:
        """Return the figures on the main process, and nothing on others."""
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
        """Draw the missing images, measure, and write results.json.

        Returns:
            On the main process what results.json holds: the figures of `metrics`; the counts of `images` measured,
            images `missing`, `references` (None of statistics) and images `drawn` now; `settings`, `versions` and the
            `date`. On others, nothing.

        Raises:
            ValueError: the folder holds images of other settings, or an image cannot be read.
            MemoryError: the device's memory is not enough; the message says what saves some.
            WriteError: the disk is full or not writable.
        """
        if self.references:
            self._measure_references()  # before drawing, which takes long: one of them may not be readable
        result: dict[str, Any] = {}
        if self.generation is not None:
            result["drawn"] = self.generation.run()["drawn"]
            self.files = {index: self.generation.path(index) for index in range(self.generation.count)}
            self.generation = None  # and its memory
        result |= self._figures()
        if not self.state.is_main_process:
            return {}
        result |= {"images": len(self.files), "missing": self.missing, "references": len(self.references) or None}
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **result,
            "settings": to_dict(self.config),
            "versions": {name: version(name) for name in _PACKAGES},
        }
        write_json(Path(self.config.out) / "results.json", record)
        return record


def as_text(result: Mapping[str, Any]) -> str:
    """Lay the result of `evaluate` out: the figures, and what they were measured on."""
    lines = [f"{metric:8}  {result[metric]:.4f}" for metric in METRICS if metric in result]
    counts = [f"{result[name]} {name}" for name in ("images", "missing", "references") if result[name]]
    return "\n".join([*lines, f"{', '.join(counts)}; see {result['settings']['out']}/results.json"])


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Draw images as configured, or take those that are there, and measure them; see `Evaluation.run`."""
    return Evaluation(config).run()
