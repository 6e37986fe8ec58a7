"""Image backbones with GSPN, a command each: train, validate, predict, visualize, profile, benchmark, export,
convert, distill, features, probe, explore.

Options come from the command line and from YAML files (`--config`). Under `torchrun` or `accelerate launch` train,
validate, distill and features run in several processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gspn_core.runs.cli import Command, run

from . import __version__
from .config import CONFIGS


def _command(name: str, help: str) -> Command:
    module, options = f"gspn_vision.{name}", f"gspn_vision.config:{name.capitalize()}Config"
    return Command(options, f"{module}:run", help, text=f"{module}:as_text")


COMMANDS = {
    "train": Command(
        "gspn_vision.config:TrainConfig",
        "gspn_vision.train:train",
        "train a model, or continue a run",
        resumable=True,
        shipped=True,
    ),
    "validate": _command("validate", "measure a checkpoint on a data set"),
    "predict": Command(
        "gspn_vision.config:PredictConfig",
        "gspn_vision.predict:run",
        "name the likeliest classes of images",
        text="gspn_vision.predict:as_text",
        items="images",
    ),
    "visualize": _command("visualize", "draw where a pixel's information goes"),
    "profile": _command("profile", "count parameters and multiply-adds, beside the published ones"),
    "benchmark": _command("benchmark", "measure images per second, beside other timm models"),
    "export": _command("export", "write a model as ONNX or for torch.export, and check the file"),
    "convert": Command(
        "gspn_vision.config:ConvertConfig",
        "gspn_vision.foundation.command:run",
        "replace the attention of a vision transformer",
        text="gspn_vision.foundation.command:as_text",
    ),
    "distill": Command(
        "gspn_vision.config:DistillConfig",
        "gspn_vision.foundation.distill:distill",
        "teach a converted vision transformer by the one with attention",
        resumable=True,
    ),
    "features": Command(
        "gspn_vision.config:FeaturesConfig",
        "gspn_vision.features:run",
        "store what a model makes of images",
        resumable=True,
    ),
    "probe": _command("probe", "measure stored features by nearest neighbours and a linear classifier"),
    "explore": Command(
        "gspn_vision.config:ExploreConfig",
        "gspn_vision.explore:run",
        "show in a browser where the pixels of photographs go",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status, as `gspn_core.runs.cli` lists them."""
    return run("gspn-vision", __doc__, __version__, COMMANDS, shipped=CONFIGS, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
