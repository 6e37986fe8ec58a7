"""A demonstration: train on handwritten digits, draw digits asked for, and measure them with a classifier.

python -m gspn_dit.demo --classifier RUN --out demo-dit

RUN is a run of `gspn-vision train --config gspn2_nano_digits`, used through timm as any other classifier would be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .config import SampleConfig, TrainConfig, find, make
from .evaluate import EvaluateConfig, evaluate
from .sample import sample
from .train import Trainer, train

GUIDANCE = 1.5  # more of it narrows the variety: 99% are right here, and recall is 0.7, at 4.0 it is 0.2


def classifier_options(run: str | Path) -> dict[str, Any]:
    """Return what `evaluate` needs to know of a run of gspn-vision."""
    folder = Path(run) / "checkpoints"
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    best = folder / (index["best"] or index["latest"])
    state = json.loads((best / "state.json").read_text(encoding="utf-8"))
    averaged = best / "ema.safetensors"
    return {
        "extractor": f"timm:{state['model']['name']}",
        "extractor_import": ["gspn_vision"],
        "extractor_kwargs": state["model"]["kwargs"],
        "extractor_weights": str(averaged if averaged.is_file() else best / "model.safetensors"),
        "extractor_mean": state["preprocessing"]["mean"],
        "extractor_std": state["preprocessing"]["std"],
        "extractor_size": state["preprocessing"]["size"][0],
    }


def run(out: str | Path, classifier: str | Path, *, steps: int | None = None, count: int = 500) -> dict[str, Any]:
    """Train, sample and evaluate.

    Args:
        out: folder for everything; a run in it is continued.
        classifier: a run of gspn-vision on digits.
        steps: of training, other than the configuration's.
        count: of samples.

    Returns:
        The figures that are printed.
    """
    out = Path(out)
    values = yaml.safe_load(Path(find("digits")).read_text(encoding="utf-8")) | {"out": str(out / "run")}
    if steps is not None:
        values |= {"steps": steps, "warmup_steps": min(values["warmup_steps"], steps - 1)}
    options = make(TrainConfig, values)
    # Before training, for a comparison: the same architecture with the weights it starts with.
    untrained = Trainer(make(TrainConfig, values | {"out": str(out / "untrained")})).bare_model
    untrained.save_pretrained(out / "untrained-model")
    summary = train(options)

    def draw(source: str | Path, name: str) -> Path:
        folder = out / name
        settings = {"checkpoint": str(source), "out": str(folder), "count": count, "steps": 50, "npz": True}
        sample(make(SampleConfig, settings | {"guidance": GUIDANCE, "grid": 100, "batch_size": 100}))
        return folder

    drawn, noise = draw(summary["folder"], "samples"), draw(out / "untrained-model", "samples-untrained")
    extractor = classifier_options(classifier)

    def measure(samples: str | Path, reference: str, **more: Any) -> dict[str, Any]:
        chosen = ["fid", "inception_score", "precision", "recall"] + (["accuracy"] if more else [])
        values = {"samples": str(samples), "reference": reference, "metrics": chosen, **more, **extractor}
        return evaluate(make(EvaluateConfig, values))

    results = {
        "parameters": summary["parameters"],
        "training_seconds": summary["seconds"],
        "samples": measure(drawn / "samples.npz", "digits", labels=str(drawn / "labels.json")),
        "untrained": measure(noise / "samples.npz", "digits", labels=str(noise / "labels.json")),
        "halves of the real digits": measure("digits:0:898", "digits:898:1797"),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    share = 100 * results["samples"]["accuracy"]
    print(f"{options.preset}, {summary['parameters']:,} parameters, trained in {summary['seconds']} s")
    print(f"{count} samples at guidance {GUIDANCE}: {share:.1f}% are classified as the digit asked for")
    for name in ("samples", "untrained", "halves of the real digits"):
        print(f"FID on the classifier's features, {name}: {results[name]['fid']:.2f}")
    print("see:", drawn / "grid.png", *sorted((out / "run" / "samples").glob("*.png"))[-1:], sep="\n  ")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration from the command line."""
    parser = argparse.ArgumentParser(prog="python -m gspn_dit.demo", description=__doc__)
    parser.add_argument("--out", default="demo-dit", help="folder for everything (default: %(default)s)")
    parser.add_argument("--classifier", required=True, help="folder of a gspn-vision run on digits")
    parser.add_argument("--steps", type=int, help="of training, other than the configuration's")
    parser.add_argument("--count", type=int, default=500, help="samples to draw (default: %(default)s)")
    arguments = parser.parse_args(argv)
    run(arguments.out, arguments.classifier, steps=arguments.steps, count=arguments.count)


if __name__ == "__main__":
    main()
