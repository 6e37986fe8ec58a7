"""The command `gspn-t2i`: generate, benchmark, tiny.

Each takes its options from the command line and from YAML files (`--config`); what comes later counts. Under
`torchrun` or `accelerate launch` generate runs in several processes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser

from . import __version__
from .benchmark import BenchmarkConfig, benchmark
from .generate import GenerateConfig, generate
from .tiny import write


@dataclasses.dataclass(kw_only=True, frozen=True)
class TinyConfig:
    """Every option of `gspn-t2i tiny`.

    Args:
        family: layout of Stable Diffusion 1.5 or of SDXL
        out: folder of the pipeline
        seed: of the random weights
    """

    family: Literal["sd15", "sdxl"]
    out: str
    seed: int = 0


_COMMANDS: dict[str, tuple[type[Any], str]] = {
    "generate": (GenerateConfig, "draw images of prompts, or continue drawing them"),
    "benchmark": (BenchmarkConfig, "measure and count a UNet's step with softmax attention, GSPN-1 and GSPN-2"),
    "tiny": (TinyConfig, "build a complete tiny pipeline with random weights, without a download"),
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="gspn-t2i", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subcommands = parser.add_subcommands(dest="command")
    for name, (kind, help) in _COMMANDS.items():
        command = ArgumentParser(description=help)
        command.add_argument("--config", action="config", help="YAML file of options; repeatable")
        command.add_class_arguments(kind)
        subcommands.add_subcommand(name, command, help=help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error of the user's, or 1 if the work itself went wrong."""
    # Options may be written with hyphens.
    words = [
        re.sub(r"^--[a-z][\w-]*", lambda match: "--" + match[0][2:].replace("-", "_"), word)
        for word in (sys.argv[1:] if argv is None else argv)
    ]
    try:
        arguments = _parser().parse_args(words)
        kind, _ = _COMMANDS[arguments.command]
        values = arguments[arguments.command]
        config = kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
        if isinstance(config, BenchmarkConfig):
            benchmark(config)
        elif isinstance(config, TinyConfig):
            print(write(config.family, config.out, seed=config.seed))
        else:
            from accelerate import PartialState

            summary = generate(config)
            if PartialState().is_main_process:
                print(json.dumps(summary))
    except (ValueError, OSError, ImportError, ArithmeticError, MemoryError) as error:
        print(f"gspn-t2i: error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1 if isinstance(error, (ArithmeticError, MemoryError)) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
