"""Compare the options of all commands with the glossary in CONTRIBUTING.md: one name, type and default for one thing.

    python tools/check_options.py                   check, exit status 1 with a line per fault

It needs the packages installed. Every option is in the glossary: in its table, where its type and default count and
"varies" allows any, or, if one command alone has it, in the list below the table. The table's last column are
names that no command may use for that thing.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_NAMES = {
    "str": "text",
    "bool": "switch",
    "int": "integer",
    "float": "number",
    "ImageSize": "size",
    "PositiveInt": "integer from 1",
    "NonNegativeInt": "integer from 0",
    "PositiveFloat": "number above 0",
    "NonNegativeFloat": "number from 0",
    "ClosedUnitInterval": "number from 0 to 1",
}


class Option(NamedTuple):
    """One option of one command."""

    command: str
    name: str
    kind: str
    default: str


class Entry(NamedTuple):
    """One line of the glossary's table."""

    kind: str
    default: str
    banned: tuple[str, ...]


def describe(hint: Any) -> str:
    """Name a type in the glossary's words; that it may be null is part of the default."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in parts if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, parts))
    if typing.get_origin(hint) in (list, tuple):
        return f"list of {describe(parts[0])}"
    if typing.get_origin(hint) is dict:
        return "mapping"
    return _NAMES[hint.__name__]


def show(value: Any) -> str:
    """Write a default as YAML does."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value == {} else str(value)


def options_of(package: str) -> list[Option]:
    """Return the options of an application's commands."""
    found = []
    for name, command in importlib.import_module(f"{package}.cli").COMMANDS.items():
        module, _, attribute = command.options.partition(":")
        kind = getattr(importlib.import_module(module), attribute)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            shown = "required" if default is dataclasses.MISSING else show(default)
            title = f"{package.replace('_', '-')} {name}"
            found.append(Option(title, field.name, describe(hints[field.name]), shown))
    return found


def core_options() -> list[Option]:
    """Return the options of `gspn-core`, whose parser is argparse's; of types it knows switches alone."""
    from gspn_core.cli import _parser

    found = []
    parsers: Any = next(action for action in _parser()._actions if action.dest == "command").choices
    for name, parser in parsers.items():
        for action in parser._actions:
            if action.option_strings and action.dest != "help":
                kind = "switch" if action.nargs == 0 else ""
                found.append(Option(f"gspn-core {name}", action.dest, kind, "" if kind == "" else show(action.default)))
    return found


def read_glossary(text: str) -> tuple[dict[str, Entry], set[str]]:
    """Return the entries of the table by name, and the names of the list below it."""
    section = text.partition("## Glossary of options")[2].partition("\n## ")[0]
    entries = {}
    for row in re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE):
        kind, default, _, banned = (cell.strip() for cell in row[1].split("|"))
        names = tuple(re.findall(r"`(\w+)`", banned))
        entries[row[0]] = Entry(kind.replace("`", ""), default.replace("`", ""), names)
    single = section.partition("Options of one command alone:")[2]
    return entries, set(re.findall(r"`(\w+)`", single))


def check(options: list[Option], entries: dict[str, Entry], single: set[str]) -> list[str]:
    """Return a line for each fault."""
    faults = []
    banned = {name: entry for entry, values in entries.items() for name in values.banned}
    for command, name, kind, default in options:
        if name in entries:
            entry = entries[name]
            if kind and entry.kind not in ("varies", kind):
                faults.append(f"{command}: {name} must be of type {entry.kind!r}, is {kind!r}")
            if default and entry.default not in ("varies", default):
                faults.append(f"{command}: the default of {name} must be {entry.default}, is {default}")
        elif name in banned:
            faults.append(f"{command}: {name} must be called {banned[name]}")
        elif name not in single:
            faults.append(f"{command}: {name} is not in the glossary")
    used = [option.name for option in options]
    faults += [f"glossary: no command has {name}" for name in sorted((entries.keys() | single) - set(used))]
    faults += [f"glossary: {name} is in several commands: give it a row" for name in single if used.count(name) > 1]
    return faults


def main() -> int:
    """Print the faults; return 1 if there are any."""
    options = core_options()
    for package in ("gspn_vision", "gspn_dit", "gspn_t2i"):
        options += options_of(package)
    faults = check(options, *read_glossary((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    print("\n".join(faults) or f"{len(options)} options agree with the glossary")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
