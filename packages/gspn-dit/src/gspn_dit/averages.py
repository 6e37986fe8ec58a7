"""`gspn-dit average`: averages of weights of a length that is chosen after training.

A power-function average after t updates is

    a_g(t) = (g + 1) / t^(g + 1)  integral of s^g w(s) ds from 0 to t
    a_g <- b a_g + (1 - b) w,  b = (1 - 1/t)^(g + 1)

and its length, the deviation of its profile relative to t, is  sqrt(g + 1) / ((g + 2) sqrt(g + 3)).  Training keeps two
of them and stores snapshots of both. An average of another length is the sum of snapshots whose profile is nearest to
its own in the least-squares sense.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, arXiv 2312.02696,
section 3 and appendix C.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from gspn_core.runs import checkpoints
from gspn_core.runs.files import (
    make_folder,
    read_json,
    read_tensors,
    replacing_folder,
    store_tensors,
    write_tensors,
)

from .checkpoint import CONFIG, FORMAT, WEIGHTS, locate
from .config import AverageConfig

LENGTHS = (0.05, 0.10)  # of the averages that training keeps
FOLDER = "averages"


class Profile(NamedTuple):
    """How an average weighs the past: t updates and exponent g."""

    step: int
    exponent: float


def exponent(length: float) -> float:
    """Return the exponent g of a length.

    Raises:
        ValueError: it is not above 0 and below 0.28, that of a uniform average.
    """
    if not 0 < length < 0.28:
        raise ValueError(f"length must be above 0 and below 0.28, got {length}")
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots[np.isreal(roots)].real.max())


def power_average(model: nn.Module, length: float) -> AveragedModel:
    """Make the power-function average of a model's weights; `update_parameters(model)` takes an update in."""
    power = exponent(length) + 1

    def average(means: Any, values: Any, count: Tensor | int) -> None:
        if means[0].is_floating_point():
            torch._foreach_lerp_(means, values, 1 - (1 - 1 / (int(count) + 1)) ** power)
        else:
            for mean, value in zip(means, values, strict=True):
                mean.copy_(value)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True).requires_grad_(False).eval()


def _products(ours: Sequence[Profile], others: Sequence[Profile]) -> np.ndarray[Any, Any]:
    """Integrals of the products of profiles, (len(ours), len(others)) float64."""
    (t, g), (s, h) = ([np.array(part, float) for part in zip(*profiles, strict=True)] for profiles in (ours, others))
    t, g = t[:, None], g[:, None]
    both = np.minimum(t, s)  # where both are above zero
    scale: np.ndarray[Any, Any] = (g + 1) * (h + 1) / (g + h + 1) / both
    return scale * (both / t) ** (g + 1) * (both / s) ** (h + 1)


def combine(snapshots: Sequence[Profile], target: Profile) -> np.ndarray[Any, Any]:
    """Return the factor of each snapshot in the sum that is nearest to a profile, (len(snapshots),) float64."""
    matrix, aim = _products(snapshots, snapshots), _products(snapshots, [target])[:, 0]
    factors: np.ndarray[Any, Any] = np.linalg.lstsq(matrix, aim, rcond=None)[0]
    return factors / factors.sum()  # weights that do not change stay as they are


class PowerAverages:
    """The averages that a run keeps.

    Args:
        model: whose weights they are of.
    """

    def __init__(self, model: nn.Module) -> None:
        self._averages = {length: power_average(model, length) for length in LENGTHS}

    def update(self, model: nn.Module) -> None:
        """Take an update of the weights in."""
        for average in self._averages.values():
            average.update_parameters(model)

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The weights of each, by the name of its file in a checkpoint."""
        return {f"average-{length}.safetensors": a.module.state_dict() for length, a in self._averages.items()}

    def restore(self, checkpoint: Path, step: int) -> None:
        """Read the averages from a checkpoint after `step` updates."""
        for name, average in zip(self.tensors, self._averages.values(), strict=True):
            checkpoints.load_weights(average.module, read_tensors(checkpoint / name), checkpoint)
            average.n_averaged.fill_(step)

    def store(self, run: Path, step: int) -> None:
        """Write a snapshot."""
        make_folder(run / FOLDER)
        for name, weights in self.tensors.items():
            write_tensors(run / FOLDER / f"{checkpoints.name_of(step)}-{name}", weights)


def find_snapshots(run: Path) -> dict[Path, Profile]:
    """Return the snapshots of a run, each with its profile."""
    pattern = re.compile(r"step-(\d+)-average-([\d.]+)\.safetensors")
    names = ((path, pattern.fullmatch(path.name)) for path in sorted((run / FOLDER).glob("step-*.safetensors")))
    return {path: Profile(int(name[1]), exponent(float(name[2]))) for path, name in names if name}


def _sum(files: Sequence[Path], factors: Sequence[float], *, progress: bool) -> dict[str, Tensor]:
    """Add tensors of files, each times a factor, in float64, one file at a time."""
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}

    def parts() -> Iterator[tuple[Path, float]]:
        yield from tqdm(list(zip(files, factors, strict=True)), desc="snapshots", unit="file", disable=not progress)

    for file, factor in parts():
        for name, tensor in read_tensors(file).items():
            kinds[name] = tensor.dtype
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + factor * tensor.double()
    return {name: tensor.to(kinds[name]) for name, tensor in total.items()}


def average(config: AverageConfig) -> dict[str, Any]:
    """Make an average of a run's weights and write it as the folder of a diffusers model, which `sample` takes.

    Raises:
        FileNotFoundError: there is no run, or it has no snapshots.
        ValueError: the length is out of range, or the run has not come to that step.
    """
    run, out = Path(config.checkpoint), Path(config.out)
    if out.exists() and not (out / CONFIG).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out must be a new folder or that of a model, got {config.out!r}")
    newest = locate(run)
    found = find_snapshots(run)
    if not found:
        raise FileNotFoundError(f"no averages in {str(run / FOLDER)!r}; train with average_every")
    last = max(profile.step for profile in found.values())
    step = config.step or last
    if step > last:
        raise ValueError(f"step must be at most {last}, that of the last snapshot, got {step}")
    files = [file for file, profile in found.items() if profile.step <= step]
    if not files:
        raise ValueError(f"step must be at least {min(p.step for p in found.values())}, got {step}")
    factors = combine([found[file] for file in files], Profile(step, exponent(config.length)))
    weights = _sum(files, factors.tolist(), progress=config.progress)
    state = {key: value for key, value in checkpoints.read_state(newest, FORMAT).items() if key not in _OF_TRAINING}
    with replacing_folder(out) as temporary:
        store_tensors(temporary / WEIGHTS["model"], weights)
        (temporary / CONFIG).write_text(json.dumps(read_json(newest / CONFIG), indent=2) + "\n", encoding="utf-8")
        state |= {"step": step, "average_length": config.length}
        (temporary / checkpoints.STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    return {"folder": str(out), "step": step, "length": config.length, "snapshots": len(files)}


_OF_TRAINING = {"optimizer", "averaged", "scaler", "pending", "processes", "facts", "config"}
