"""The `main` of every command: finds the command, reads its options, prints its result, turns errors into a status.

0    done
1    the work failed: a loss that is not finite, memory, the disk, results that disagree
2    the call was wrong: an option, a file, data that do not fit
130  interrupted by Ctrl-C; training saves a checkpoint first
143  training was ended by SIGTERM, and has saved a checkpoint
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._command import check_output
from .errors import WriteError, is_out_of_memory, is_unreachable


@dataclass(frozen=True)
class Command:
    """One subcommand; `module:name` is imported when the command is called, and not before.

    Args:
        options: dataclass of its options.
        run: function that takes them and returns the result: plain JSON values, by name.
        help: one line.
        text: function that turns the result into what people read; by default a line for each value.
        items: name of the results where `run` yields them one by one; `text` is of each then, and shown at once.
        resumable: the same command continues after an interruption.
        shipped: the shipped configurations are of this command.
    """

    options: str
    run: str
    help: str
    text: str | None = None
    items: str | None = None
    resumable: bool = False
    shipped: bool = False


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by null."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_lines(result: Mapping[str, Any]) -> str:
    """Lay a result out, a line for each value that is there."""
    there = {key: value for key, value in result.items() if value is not None}
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in there.items()}
    width = max(map(len, shown), default=0)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in shown.items())


def _run(
    program: str,
    description: str,
    version: str,
    commands: Mapping[str, Command],
    shipped: Path | None,
    words: list[str],
) -> None:
    if not words or words[0] not in commands:
        parser = argparse.ArgumentParser(
            prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--version", action="version", version=f"{program} {version}")
        listed = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
        for name, command in commands.items():
            listed.add_parser(name, help=command.help)
        parser.parse_args(words)  # exits
    from .options import parse

    name, command = words[0], commands[words[0]]
    config = parse(
        _load(command.options),
        words[1:],
        prog=f"{program} {name}",
        description=command.help,
        shipped=shipped if command.shipped else None,
    )
    result = _load(command.run)(config)
    render: Callable[[Any], str] = _load(command.text) if command.text else as_lines
    shown, as_json = int(os.environ.get("RANK", "0")) == 0, "--json" in words
    if command.items is not None:
        found = []
        for item in result:
            found.append(item)
            if shown and not as_json:
                print(render(item), flush=True)
        result = {command.items: found}
    if shown and (as_json or command.items is None):
        print(json.dumps(_finite(result)) if as_json else render(result), flush=True)


def _status(error: BaseException, program: str, resumable: bool) -> int:
    """Say on one line what went wrong, and return the exit status."""
    if isinstance(error, KeyboardInterrupt):
        # What the run held goes now, its loaders' processes too: at exit torch would wait five seconds for each.
        error.__traceback__ = None
        gc.collect()
        advice = "; run the same command again to continue" if resumable else ""
        line, status = f"{str(error) or 'interrupted'}{advice}", getattr(error, "status", 130)
    else:
        # An error in a loader process comes with its traceback; its own line is the last.
        line = f"error: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
        status = 1 if isinstance(error, (ArithmeticError, WriteError)) or is_out_of_memory(error) else 2
    if status < 128 or int(os.environ.get("RANK", "0")) == 0:
        print(f"{program}: {line}", file=sys.stderr)
    return status


def _end_process_group() -> None:
    """Destroy the group: its threads can abort interpreter exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def run(
    program: str,
    description: str,
    version: str,
    commands: Mapping[str, Command],
    *,
    shipped: Path | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run the command that the words of a command line name; return the exit status.

    Args:
        program: its name.
        description: for `--help`.
        version: for `--version`.
        commands: by name.
        shipped: folder of configurations that `--config` of some commands knows by name.
        argv: the words; those of this process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    resumable = bool(words) and words[0] in commands and commands[words[0]].resumable
    try:
        check_output()
        _run(program, description, version, commands, shipped, words)
        return 0
    except BrokenPipeError:
        # Who read the output has closed it, as `head` does; the interpreter would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, ValueError, OSError, ImportError, ArithmeticError, MemoryError) as error:
        return _status(error, program, resumable)
    except Exception as error:
        if not is_out_of_memory(error) and not is_unreachable(error):
            raise
        return _status(error, program, resumable)
    finally:
        _end_process_group()
