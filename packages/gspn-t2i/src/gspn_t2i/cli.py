"""Text to image with GSPN mixers instead of a UNet's self-attentions.

Options come from the command line and from YAML files (`--config`); the later one counts. distill, generate and
evaluate run in several processes under `torchrun` or `accelerate launch`. `gspn-t2i COMMAND --help` lists the options
of a command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gspn_core.runs import cli
from gspn_core.runs.cli import Command
from gspn_core.runs.options import configs_folder

from . import __version__

COMMANDS = {
    "distill": Command(
        "gspn_t2i.config:DistillConfig",
        "gspn_t2i.distill:distill",
        "train mixers to replace a UNet's self-attentions, or continue a training",
        resumable=True,
        shipped=True,
    ),
    "generate": Command(
        "gspn_t2i.config:GenerateConfig",
        "gspn_t2i.generate:generate",
        "draw images of prompts, or continue drawing them",
        resumable=True,
    ),
    "upscale": Command(
        "gspn_t2i.scaling:UpscaleConfig",
        "gspn_t2i.upscale:upscale",
        "enlarge an image step by step, by image-to-image",
        text="gspn_t2i.scaling:as_text",
        resumable=True,
    ),
    "evaluate": Command(
        "gspn_t2i.config:EvaluateConfig",
        "gspn_t2i.evaluate:evaluate",
        "draw images of captions and measure FID and CLIP-T",
        text="gspn_t2i.evaluate:as_text",
        resumable=True,
    ),
    "benchmark": Command(
        "gspn_t2i.config:BenchmarkConfig",
        "gspn_t2i.benchmark:benchmark",
        "count and measure a UNet's step with softmax attention, GSPN-1 and GSPN-2",
        text="gspn_t2i.benchmark:as_text",
    ),
    "tiny": Command(
        "gspn_t2i.config:TinyConfig",
        "gspn_t2i.tiny:run_tiny",
        "build a complete tiny pipeline with random weights, without a download",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status; see `gspn_core.runs.cli`."""
    shipped = configs_folder(__file__)
    return cli.run("gspn-t2i", __doc__ or "", __version__, COMMANDS, shipped=shipped, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
