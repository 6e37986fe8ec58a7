"""Options: a keyword-only dataclass becomes a command line, YAML files and the record of a run.

Every field is an option: `image_size` is written `--image-size`. Its type is checked, its line in the docstring's
Args is the help, and its default the default. A switch is `--npz` or `--no-npz`; a list is written as words,
`--classes 3 5`, and in YAML as a list; `null` turns off what can be off. `--config` reads YAML files of these names:
later ones override earlier ones, and the command line all of them. The command line also takes names of timm's and
diffusers' scripts for the same, such as `--opt` and `--guidance-scale`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    register_type,
)

from .aliases import INSTEAD, OURS, translate
from .sizes import ImageSize as ImageSize

Config = TypeVar("Config")

Device = Literal["auto", "cpu"]
Precision = Literal["fp32", "bf16", "fp16"]
Resume = Literal["auto", "never"]
Unreadable = Literal["stop", "skip"]
Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb"]
LRSchedule = Literal["cosine", "linear", "constant", "poly", "tanh"]


register_type(ImageSize, serializer=str, deserializer=ImageSize.parse)


@dataclasses.dataclass(kw_only=True, frozen=True)
class TrainingOptions:
    """What every training run can be told; an application's own options come on top.

    Args:
        start_from: weights to begin with, a run, a checkpoint or the folder of a model
        unreadable: stop at an image that cannot be read, or skip it, the next one taking its place
        hflip: probability of mirroring a training image
        workers: processes that load data, per process
        batch_size: images per process and forward pass
        accumulate: forward passes per update
        lr: peak learning rate
        min_lr: learning rate at the end
        lr_schedule: course of the learning rate after the warm-up
        weight_decay: of AdamW
        clip_grad: largest norm of the gradient; null does not clip
        ema_decay: decay of the averaged weights; null keeps none
        ema_warmup: raise the decay in the first updates
        precision: of the forward passes (mixed precision)
        tf32: let matrix products in float32 round their factors to TensorFloat-32, on GPUs that have it
        gradient_checkpointing: recompute activations to save memory
        device: auto takes the accelerator if any
        seed: everything random is a function of it and of counters
        resume: continue from the newest checkpoint in `out`, or refuse to if there is one
        checkpoint_every: updates between checkpoints
        keep_checkpoints: newest checkpoints kept
        log_every: updates between rows of the log
        tensorboard: write TensorBoard logs
        trackers: log through accelerate to these too, each of which is a package to install
        progress: show progress bars
    """

    start_from: str | None = None
    unreadable: Unreadable = "stop"
    hflip: ClosedUnitInterval = 0.5
    workers: NonNegativeInt = 4
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    min_lr: NonNegativeFloat = 1e-6
    lr_schedule: LRSchedule = "cosine"
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: PositiveFloat | None = 1.0
    ema_decay: ClosedUnitInterval | None = 0.9999
    ema_warmup: bool = True
    precision: Precision = "fp32"
    tf32: bool = False
    gradient_checkpointing: bool = False
    device: Device = "auto"
    seed: NonNegativeInt = 0
    resume: Resume = "auto"
    checkpoint_every: PositiveInt = 1_000
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 50
    tensorboard: bool = True
    trackers: list[Tracker] = dataclasses.field(default_factory=list)
    progress: bool = True

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            default = ", its default: give both" if self.min_lr == type(self).min_lr else ""
            raise ValueError(f"min_lr must be at most lr ({self.lr}), got {self.min_lr}{default}")


def warmup_of(warmup: float, total: float) -> float:
    """Return a warm-up, or a tenth of the whole run where that is not longer, as in a trial of a few updates."""
    return warmup if warmup < total else total / 10


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass, its own before the inherited ones."""
    own = vars(kind).get("__annotations__", {})
    return sorted(dataclasses.fields(kind), key=lambda field: field.name not in own)


def _words_of(hint: Any) -> tuple[Any, int | str | None]:
    """Return the type of one word of an option, and how many words it takes; None: one word that is the value."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        lists = [part for part in typing.get_args(hint) if _words_of(part)[1] is not None]
        if lists and set(typing.get_args(hint)) <= {lists[0], type(None)}:
            return _words_of(lists[0])
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], "+"
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return items[0], "+" if items[-1] is Ellipsis else len(items)
    return hint, None


def _help_of(kind: type[Any]) -> dict[str, str]:
    from docstring_parser import parse

    entries = [entry for base in reversed(kind.__mro__) for entry in parse(base.__doc__ or "").params]
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}


_KINDS = {
    "PositiveInt": "an integer from 1",
    "NonNegativeInt": "an integer from 0",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number from 0",
    "ClosedUnitInterval": "a number from 0 to 1",
    "<class 'dict'>": "a mapping, such as '{name: 1}'",
    "<class 'float'>": "a number",
    "<class 'int'>": "an integer",
    "<class 'bool'>": "true or false",
}


def _mended(message: str, names: Sequence[str]) -> str:
    """Say in one line what jsonargparse says of an option, and suggest a known one for an unknown."""
    words = " ".join(message.split())
    unknown = re.search(r"(?:[Uu]nrecognized arguments: |Option ')([^ =']+)", words)
    if unknown:
        on_line = unknown[1].startswith("--")
        bare = unknown[1].removeprefix("--").replace("-", "_")
        same = [name for name in ((OURS | INSTEAD).get(bare),) if name in names]
        parts = [name for name in names if bare in name.split("_")]  # `size` of `image_size`, if of nothing else
        starts = [name for name in names if name.startswith(bare)]  # `clip` of `clip_grad` and `clip_mode`
        near = same or difflib.get_close_matches(bare, names, n=1, cutoff=0.7) or (parts if len(parts) == 1 else [])
        near = near or (starts if len(starts) <= 3 else [])
        close = [repr(f"--{name.replace('_', '-')}" if on_line else name) for name in near if name]
        return f"unknown option {unknown[1]!r}" + (f", did you mean {' or '.join(close)}?" if close else "")
    # Of a type with alternatives, what each of them expects.
    words = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", "", words)
    given = re.search(r" Given value: (.*)", words)
    words = re.sub(r" - Expected a <class 'NoneType'>| Given value type: .*", "", words)
    words = re.sub(r"Not of type \w+: (?=expected)|typing\.", "", words)
    words = re.sub(r'Parser key "(\w+)"( element \d+)?: ', r"\1\2: ", words)
    number = re.fullmatch(
        r"(\w+(?: element \d+)?): Not of type (\w+): (?:(.*?) ?(?:does not conform .*|not an integer)|.*: (.*))", words
    )
    if number and number[2] in _KINDS:
        value = given[1] if given else (number[3] or number[4] or "").strip("'")
        return f"{number[1]} must be {_KINDS[number[2]]}, got {value}"
    other = re.fullmatch(r"(\w+(?: element \d+)?): Expected a (.*?)\. Got value: (.*)", words)
    if other:
        choices = re.fullmatch(r"Literal\[(.*)\]", other[2])
        kind = f"one of {choices[1].replace(chr(39), '')}" if choices else _KINDS.get(other[2], other[2])
        return f"{other[1]} must be {kind}, got {other[3]}"
    return words


class _Parser(ArgumentParser):
    """Errors are raised, and types shown by their names."""

    def format_help(self, *arguments: Any) -> str:
        text: str = super().format_help(*arguments)
        return re.sub(r"<class\s+'(\w+)'>", r"\1", text)

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise argparse.ArgumentError(None, message)


def parser_of(
    kind: type[Any], *, prog: str | None = None, description: str | None = None, shipped: Path | None = None
) -> ArgumentParser:
    """Make a parser of the options of a dataclass.

    Args:
        kind: the dataclass.
        prog, description: for the help.
        shipped: folder of configurations that `--config` knows by name.
    """
    parser = _Parser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False, print_config="--print-config"
    )
    names = f", or one of {', '.join(shipped_names(shipped))}" if shipped else ""
    parser.add_argument("--config", action="config", metavar="FILE", help=f"YAML file of options{names}; repeatable")
    hints, helps = typing.get_type_hints(kind), _help_of(kind)
    for field in _fields(kind):
        if field.default_factory is not dataclasses.MISSING:
            default: Any = field.default_factory()
        else:
            default = field.default
        settings: dict[str, Any] = {"help": helps[field.name]}
        if default is dataclasses.MISSING:
            settings["required"] = True
        else:
            settings["default"] = list(default) if type(default) is tuple else default
        option = f"--{field.name.replace('_', '-')}"
        if hints[field.name] is bool:
            settings["action"] = ActionYesNo(yes_prefix="", no_prefix="no-")
        else:
            settings["type"], count = _words_of(hints[field.name])
            if count is not None:
                words = settings.get("default") or ("A", "B", "C")[: count if isinstance(count, int) else 2]
                settings["nargs"] = count
                if f"{option} " not in helps[field.name]:
                    settings["help"] += f" (such as {option} {' '.join(map(str, words))})"
            elif ImageSize in (hints[field.name], *typing.get_args(hints[field.name])):
                settings["help"] += f" (such as {option} 224, or height x width: {option} 512x768)"
        parser.add_argument(option, **settings)
    return parser


def _build(kind: type[Config], values: Namespace) -> Config:
    """Make the dataclass of what a parser returned."""
    hints = typing.get_type_hints(kind)
    fields = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value, (_, count) = values[field.name], _words_of(hints[field.name])
        if value is None and typing.get_origin(hints[field.name]) is dict:  # jsonargparse takes it for any mapping
            raise ValueError(f"{field.name} must be {_KINDS[str(dict)]}, got null")
        if isinstance(count, int) and value is not None and len(value) != count:
            raise ValueError(f"{field.name} must be {count} values, got {value}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field.name} must be a finite number, got {number}")
        is_tuple = "tuple[" in str(hints[field.name]) and isinstance(value, list)
        fields[field.name] = tuple(value) if is_tuple else value
    return kind(**fields)


def parse(
    kind: type[Config],
    words: Sequence[str],
    *,
    prog: str | None = None,
    description: str | None = None,
    shipped: Path | None = None,
) -> Config:
    """Read the options of a dataclass from a command line.

    Raises:
        ValueError: an option is unknown, given twice or does not fit; the message names it.
        FileNotFoundError: there is no such configuration.
    """
    parser = parser_of(kind, prog=prog, description=description, shipped=shipped)
    # For the main of all commands, which looks for it itself.
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
    words = _translated_once(kind, words)
    files, words = _take_configs(words)
    paths = [find(name, shipped) for name in files]
    for path in paths:
        _check_lists(kind, read_config(path, None), path)
    words, nulls = _take_nulls(kind, words)
    # Files first, so that the command line overrides them wherever it names them.
    words = [word for path in paths for word in ("--config", path)] + words

    def read() -> Namespace:
        values = parser.parse_args(words)
        for name in nulls:
            values[name] = None
        return values

    return _checked(kind, read)


def _translated_once(kind: type[Any], words: Sequence[str]) -> list[str]:
    """Put our names for those of other libraries; each option may be given once, but for --config."""
    names = [field.name for field in dataclasses.fields(kind)]
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    given = translate(options, names)
    for name in sorted(set(given) - {"--config"}):
        typed = [option for option, ours in zip(options, given, strict=True) if ours == name]
        if len(typed) < 2:
            continue
        said = typed[0] if len(set(typed)) == 1 else " and ".join(sorted(set(typed)))
        field = name.removeprefix("--").replace("-", "_")
        is_list = field in names and _words_of(typing.get_type_hints(kind)[field])[1] is not None
        hint = f"; a list is written as words: {name} FIRST SECOND" if is_list else ""
        raise ValueError(
            f"{said} is given twice{hint}" if len(set(typed)) == 1 else f"{said} are one option, given twice{hint}"
        )
    return translate(words, names)


def _take_configs(words: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the values of `--config` and the other words."""
    files, others, rest = [], [], iter(words)
    for word in rest:
        if word == "--config":
            files += [next(rest, "")]
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            others.append(word)
    return files, others


def _take_nulls(kind: type[Any], words: list[str]) -> tuple[list[str], list[str]]:
    """Take `--mean null` and the like out of a command line: a parser of lists would read it as a word of the list."""
    hints, nulls = typing.get_type_hints(kind), []
    for name, hint in hints.items():
        option = f"--{name.replace('_', '-')}"
        if _words_of(hint)[1] is not None and type(None) in typing.get_args(hint):
            for null in ([option, "null"], [f"{option}=null"]):
                for place in range(len(words)):
                    if words[place : place + len(null)] == null:
                        words = words[:place] + words[place + len(null) :]
                        nulls.append(name)
                        break
    return words, nulls


def _check_lists(kind: type[Any], values: Mapping[str, Any], origin: str) -> None:
    """Refuse a single value, or none, where a list is needed."""
    for name, hint in typing.get_type_hints(kind).items():
        value, may_be_null = values.get(name, []), type(None) in typing.get_args(hint)
        if _words_of(hint)[1] is not None and not isinstance(value, list) and not (value is None and may_be_null):
            example = f", such as [{value}]" if isinstance(value, (int, float, str)) else ""
            raise ValueError(f"{name} must be a list{example}, got {value!r} in {origin}")


def _checked(kind: type[Config], read: Callable[[], Namespace]) -> Config:
    try:
        return _build(kind, read())
    except argparse.ArgumentError as error:
        names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        raise ValueError(_mended(str(error), names)) from None


def make(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Check a mapping of options, as of a YAML file, and build the dataclass.

    Raises:
        ValueError: an option is unknown or does not fit; the message names it, what it must be and what it was.
    """
    plain = to_plain(dict(values))
    _check_lists(kind, plain, "the options")
    return _checked(kind, lambda: parser_of(kind).parse_object(plain))


def to_plain(value: Any) -> Any:
    """Turn options into what YAML and JSON hold: lists, strings and numbers."""
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, ImageSize):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    for kind in (int, float):  # jsonargparse's restricted numbers are subclasses
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Return the options of a dataclass as plain values."""
    return {field.name: to_plain(getattr(config, field.name)) for field in _fields(type(config))}


def to_yaml(config: Any) -> str:
    """Return the options of a dataclass as a YAML document, in their order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def configs_folder(module_file: str) -> Path:
    """Return the folder of an application's shipped YAML files, in a wheel or in a source tree, by a module's file."""
    packaged = Path(module_file).parent / "configs"
    return packaged if packaged.is_dir() else Path(module_file).parents[2] / "configs"


def shipped_names(folder: Path | None) -> list[str]:
    """Return the names of the YAML files in a folder of shipped configurations."""
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder else []


def find(name: str, shipped: Path | None) -> str:
    """Return the path of a configuration: a file, or a shipped one by its name.

    Raises:
        FileNotFoundError: there is neither.
    """
    if Path(name).is_file():
        return name
    if shipped and name in shipped_names(shipped):
        return str(shipped / f"{name}.yaml")
    known = f"; shipped are {', '.join(shipped_names(shipped))}" if shipped else ""
    raise FileNotFoundError(f"no configuration file {name!r}{known}")


def read_config(name: str, shipped: Path | None) -> dict[str, Any]:
    """Read a configuration, a file or a shipped one by its name, as a mapping.

    Raises:
        FileNotFoundError: there is neither; ValueError: it is not a YAML mapping.
    """
    path = find(name, shipped)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not valid YAML: it must be text in UTF-8") from None
    if values is None:
        raise ValueError(f"{path} must be a mapping of options, it is empty")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of options, got {type(values).__name__}")
    return values
