"""The command `gspn-dit`: extract, train, sample, evaluate.

Each takes its options from the command line and from YAML files (`--config`); what comes later counts. Under
`torchrun` or `accelerate launch` all of them run in several processes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from . import __version__
from .config import SampleConfig, TrainConfig, find, parser_of


def _commands() -> dict[str, tuple[type[Any], str, str]]:
    from .evaluate import EvaluateConfig
    from .extract import ExtractConfig

    return {
        "extract": (ExtractConfig, "extract", "encode an image data set with a VAE, once"),
        "train": (TrainConfig, "train", "train a model, or continue a run"),
        "sample": (SampleConfig, "sample", "draw images, or continue drawing them"),
        "evaluate": (EvaluateConfig, "evaluate", "measure FID, sFID, Inception score, precision and recall"),
    }


def _parser(commands: dict[str, tuple[type[Any], str, str]]) -> ArgumentParser:
    parser = ArgumentParser(prog="gspn-dit", description=__doc__, exit_on_error=True)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subcommands = parser.add_subcommands(dest="command")
    for name, (kind, _, help) in commands.items():
        subcommands.add_subcommand(name, parser_of(kind, help), help=help)
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
    commands = _commands()
    try:
        arguments = _parser(commands).parse_args(_words(sys.argv[1:] if argv is None else argv))
        kind, module, _ = commands[arguments.command]
        values = arguments[arguments.command]
        config = kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
        run: Callable[[Any], dict[str, Any]] = getattr(__import__(f"gspn_dit.{module}", fromlist=[module]), module)
        summary = run(config)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        # An error in a loader process comes with its traceback; its own line is the last.
        print(f"gspn-dit: error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    from accelerate.state import PartialState

    if PartialState().is_main_process:
        print(json.dumps(summary))
    # The threads of a group that is left to the end of the interpreter may abort it.
    PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
