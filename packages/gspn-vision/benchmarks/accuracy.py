"""GSPN-1, GSPN-2, a ViT and a ConvNeXt of equal parameters on scikit-learn's digits: same recipe, three seeds.

    python packages/gspn-vision/benchmarks/accuracy.py --out runs/accuracy

Every run is that of the configuration gspn2_nano_digits but for the model. A finished run is not repeated. Prints a
Markdown table with mean and standard deviation of the last top-1 accuracy, and writes it beside the results as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch

from gspn_core.runs.files import write_json
from gspn_core.runs.options import make, read_config
from gspn_vision import __version__
from gspn_vision.config import CONFIGS, TrainConfig
from gspn_vision.train import train

# Constructor arguments that give each about 770,000 parameters for ten classes of grey 32x32 images. The patch and the
# stem leave 16x16 positions to the first stage of the hierarchical models and 8x8 tokens to the ViT.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GSPN-1": ("gspn_nano", {"stem_stride": 2, "widths": [24, 48, 96, 138]}),
    "GSPN-2": ("gspn2_nano", {"stem_stride": 2}),
    "ViT": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 7, "num_heads": 3, "class_token": False}
        | {"global_pool": "avg"},
    ),
    "ConvNeXt": ("convnext_tiny", {"patch_size": 2, "depths": [1, 1, 3, 1], "dims": [28, 56, 112, 184]}),
}


def parameters(name: str, kwargs: dict[str, Any]) -> int:
    """Count the parameters of a model for the digits."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10, in_chans=1, **kwargs)
    return sum(p.numel() for p in model.parameters())


def run(name: str, kwargs: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Train one model from one seed, or read what was found before."""
    options = {"model": name, "model_kwargs": kwargs, "seed": seed, "out": str(folder), "tensorboard": False}
    summary = train(make(TrainConfig, read_config("gspn2_nano_digits", CONFIGS) | options))
    seconds = folder / "seconds.json"
    if not seconds.exists():
        write_json(seconds, summary["seconds"])
    return {"seed": seed, "top1": summary["top1"], "seconds": json.loads(seconds.read_text())}


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    arguments = parser.parse_args()
    results = []
    for label, (name, kwargs) in MODELS.items():
        runs = [run(name, kwargs, s, arguments.out / f"{label}-{s}") for s in range(arguments.seeds)]
        results.append({"model": label, "timm": name, "parameters": parameters(name, kwargs), "runs": runs})
    about = {"torch": torch.__version__, "timm": timm.__version__, "gspn_vision": __version__}
    about |= {"threads": torch.get_num_threads(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    write_json(arguments.out / "results.json", {**about, "results": results})
    print("| model | parameters | top-1 (%), mean ± standard deviation | seeds |\n|---|---|---|---|")
    for result in results:
        top1 = [found["top1"] for found in result["runs"]]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        print(
            f"| {result['model']} | {result['parameters']:,} "
            f"| {statistics.mean(top1):.2f} ± {spread:.2f} | {len(top1)} |"
        )


if __name__ == "__main__":
    main()
