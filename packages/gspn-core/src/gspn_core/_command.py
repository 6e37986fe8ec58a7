"""What the command lines of this package share: a parser, exit statuses, errors on one line. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """A call that its user can correct; shown on one line."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, and that suggests an option for one it does not know."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Print the message on one line and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, or exit with 2 and, for an unknown option, the closest known one."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return namespace
        known = [option for parser in self._used(namespace) for option in parser._option_string_actions]
        message = f"unrecognized arguments: {' '.join(unknown)}"
        for option in unknown:
            close = (
                difflib.get_close_matches(option.partition("=")[0], known, n=1, cutoff=0.7) if option[:1] == "-" else []
            )
            message += f"; did you mean {close[0]}?" if close else ""
        self.error(message)

    def _used(self, namespace: argparse.Namespace) -> Iterator[argparse.ArgumentParser]:
        yield self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield action.choices[getattr(namespace, action.dest)]


def guarded(program: str, run: Callable[[], int]) -> int:
    """Return the exit status of `run`, with a line instead of a traceback for what is no fault of the program."""
    try:
        check_output()
        status = run()
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads any further
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        print(f"{program}: error: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def check_output() -> None:
    """Raise UserError if standard output was closed before the start: `print` would lose every result in silence."""
    if sys.stdout is None:
        raise UserError("standard output is closed; results need one, or /dev/null")


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def positive_integer(text: str) -> int:
    """Parse an option that is an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return number


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every benchmark."""
    add = parser.add_argument
    add("--quick", action="store_true", help="a trial run: tiny shapes, few repeats, no targets")
    add("--repeats", type=positive_integer, metavar="N", help="most repeats of a timing")
    about_filter = "only the cases whose 'group: name' contains one of these"
    add("--filter", nargs="+", metavar="SUBSTRING", help=about_filter)
    add("--list", action="store_true", help="show the cases and end")
    add("--json", action="store_true", help="print the results as JSON instead of a table")
    about_out = "files to write the results to, as JSON; in a folder, a file named by device, torch and date"
    add("--out", nargs="+", type=Path, metavar="FILE", help=about_out)
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show progress bars")
