"""A demonstration: train on handwritten digits, draw digits asked for, and measure them with a classifier.

python demos/dit_digits.py --classifier RUN/model --out demo-dit-output

RUN is a run of `gspn-vision train --config gspn2_nano_digits`; its folder `model` is a timm model like any other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_core.runs.files import write_json
from gspn_core.runs.options import make, read_config
from gspn_dit.config import CONFIGS, EvaluateConfig, SampleConfig, TrainConfig
from gspn_dit.evaluate import evaluate
from gspn_dit.sample import sample
from gspn_dit.train import Trainer, train

GUIDANCE = 1.5  # more of it narrows the variety: 99% are right here, and recall is 0.7, at 4.0 it is 0.2


def run(
    out: str | Path, classifier: str | Path, *, steps: int | None = None, count: int = 500, sampler_steps: int = 50
) -> dict[str, Any]:
    """Train, sample and evaluate.

    Args:
        out: folder for everything; a run in it is continued.
        classifier: folder of a timm model of digits, as a run of gspn-vision leaves in `model`.
        steps: of training, other than the configuration's.
        count: of samples.
        sampler_steps: of the sampler.

    Returns:
        The figures that are printed.
    """
    out = Path(out)
    values = read_config("digits", CONFIGS) | {"out": str(out / "run")}
    if steps is not None:
        values |= {"steps": steps, "warmup_steps": min(values["warmup_steps"], steps - 1)}
    values["sampler_steps"] = min(values["sampler_steps"], sampler_steps)
    options = make(TrainConfig, values)
    # Before training, for a comparison: the same architecture with the weights it starts with.
    untrained = Trainer(make(TrainConfig, values | {"out": str(out / "untrained")})).bare_model
    untrained.save_pretrained(out / "untrained-model")
    summary = train(options)

    def draw(source: str | Path, name: str) -> Path:
        folder = out / name
        settings = {
            "checkpoint": str(source),
            "out": str(folder),
            "count": count,
            "sampler_steps": sampler_steps,
            "npz": True,
        }
        sample(make(SampleConfig, settings | {"guidance": GUIDANCE, "grid": 100, "batch_size": 100}))
        return folder

    drawn, noise = draw(summary["folder"], "samples"), draw(out / "untrained-model", "samples-untrained")
    extractor = {"extractor": f"timm:local-dir:{classifier}", "extractor_import": ["gspn_vision"]}

    def measure(samples: str | Path, reference: str, **more: Any) -> dict[str, Any]:
        metrics = ["fid", "inception_score", "precision", "recall"] + (["accuracy"] if more else [])
        values = {"samples": str(samples), "reference": reference, "metrics": metrics, **more, **extractor}
        return evaluate(make(EvaluateConfig, values))

    results = {
        "parameters": summary["parameters"],
        "training_seconds": summary["seconds"],
        "samples": measure(drawn / "samples.npz", "digits", labels=str(drawn / "labels.json")),
        "untrained": measure(noise / "samples.npz", "digits", labels=str(noise / "labels.json")),
        "halves of the real digits": measure("digits:0:898", "digits:898:1797"),
    }
    write_json(out / "results.json", results)
    share = 100 * results["samples"]["accuracy"]
    print(f"{options.model}, {summary['parameters']:,} parameters, trained in {summary['seconds']} s")
    print(f"{count} samples at guidance {GUIDANCE}: {share:.1f}% are classified as the digit asked for")
    for name in ("samples", "untrained", "halves of the real digits"):
        print(f"FID on the classifier's features, {name}: {results[name]['fid']:.2f}")
    print("see:", drawn / "grid.png", *sorted((out / "run" / "samples").glob("*.png"))[-1:], sep="\n  ")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="demo-dit-output", help="folder for everything (default: %(default)s)")
    parser.add_argument("--classifier", required=True, help="folder of a timm model of digits")
    parser.add_argument("--steps", type=int, help="of training, other than the configuration's")
    parser.add_argument("--count", type=int, default=500, help="samples to draw (default: %(default)s)")
    arguments = parser.parse_args(argv)
    run(arguments.out, arguments.classifier, steps=arguments.steps, count=arguments.count)


if __name__ == "__main__":
    main()
