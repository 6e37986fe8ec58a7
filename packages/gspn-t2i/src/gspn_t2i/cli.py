"""The command `gspn-t2i`: distill, generate, upscale, evaluate, benchmark, tiny.

Each takes its options from the command line and from YAML files (`--config`); what comes later counts. Under
`torchrun` or `accelerate launch` distill, generate and evaluate run in several processes.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser

from . import __version__
from .config import find, parser_of


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


def tiny(config: TinyConfig) -> dict[str, Any]:
    """Build and save a pipeline."""
    from .tiny import write

    return {"folder": str(write(config.family, config.out, seed=config.seed))}


_COMMANDS = {
    "distill": "teach mixers to stand in for a UNet's self-attentions, or continue to",
    "generate": "draw images of prompts, or continue drawing them",
    "upscale": "enlarge an image step by step, by image-to-image",
    "evaluate": "draw images of captions and measure FID and CLIP-T",
    "benchmark": "measure and count a UNet's step with softmax attention, GSPN-1 and GSPN-2",
    "tiny": "build a complete tiny pipeline with random weights, without a download",
}


def _load(command: str) -> tuple[type[Any], Callable[[Any], Any]]:
    """Import a command, and none of the others: some need large libraries."""
    module = sys.modules[__name__] if command == "tiny" else importlib.import_module(f".{command}", __package__)
    return getattr(module, f"{command.capitalize()}Config"), getattr(module, command)


def _parser(words: Sequence[str]) -> ArgumentParser:
    parser = ArgumentParser(prog="gspn-t2i", description=__doc__, exit_on_error=True)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subcommands = parser.add_subcommands(dest="command")
    for name, help in _COMMANDS.items():
        # The options of the command that is given; the others are there for their names.
        own = parser_of(_load(name)[0], help) if name in words[:1] else ArgumentParser(description=help)
        subcommands.add_subcommand(name, own, help=help)
    return parser


def _words(argv: Sequence[str]) -> list[str]:
    """Let options be written with hyphens, and shipped configurations be named without their path."""
    words = [re.sub(r"^--[a-z][\w-]*", lambda match: "--" + match[0][2:].replace("-", "_"), word) for word in argv]
    for place, word in enumerate(words):
        if word == "--config" and place + 1 < len(words):
            words[place + 1] = find(words[place + 1])
        elif word.startswith("--config="):
            words[place] = f"--config={find(word.removeprefix('--config='))}"
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error of the user's, or 1 if the work itself went wrong."""
    try:
        words = _words(sys.argv[1:] if argv is None else argv)
        arguments = _parser(words).parse_args(words)
        kind, run = _load(arguments.command)
        values = arguments[arguments.command]
        summary = run(kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)}))
    except (ValueError, OSError, ImportError, ArithmeticError, MemoryError) as error:
        # An error in a loader process comes with its traceback; its own line is the last.
        print(f"gspn-t2i: error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1 if isinstance(error, (ArithmeticError, MemoryError)) else 2
    from accelerate.state import PartialState

    # The benchmark prints its table itself.
    if arguments.command != "benchmark" and PartialState().is_main_process:
        print(json.dumps(summary))
    # The threads of a group that is left to the end of the interpreter may abort it.
    PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
