"""Class-conditional diffusion with GSPN, a command each: extract, train, average, sample, evaluate.

Options come from the command line and from YAML files (`--config`). Under `torchrun` or `accelerate launch` all
commands run in several processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gspn_core.runs.cli import Command, run

from . import __version__
from .config import CONFIGS

COMMANDS = {
    "extract": Command(
        "gspn_dit.config:ExtractConfig",
        "gspn_dit.extract:extract",
        "encode an image data set with a VAE, once",
        resumable=True,
    ),
    "train": Command(
        "gspn_dit.config:TrainConfig",
        "gspn_dit.train:train",
        "train a model, or continue a run",
        resumable=True,
        shipped=True,
    ),
    "average": Command(
        "gspn_dit.config:AverageConfig",
        "gspn_dit.averages:average",
        "average a run's weights over a length chosen now",
    ),
    "sample": Command(
        "gspn_dit.config:SampleConfig",
        "gspn_dit.sample:sample",
        "draw images, or continue drawing them",
        resumable=True,
    ),
    "evaluate": Command(
        "gspn_dit.config:EvaluateConfig",
        "gspn_dit.evaluate:evaluate",
        "measure FID, sFID, Inception score, precision and recall",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status, as `gspn_core.runs.cli` lists them."""
    return run("gspn-dit", __doc__, __version__, COMMANDS, shipped=CONFIGS, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
